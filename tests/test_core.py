"""What the cells of 00_core cannot show: folders and files that are wrong, keys and pictures that are wrong, two processes, the hub's own calls."""
import json, os, pickle, subprocess, sys
from dataclasses import dataclass
from pathlib import Path
import pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import nn

from dalle_edu import core
from dalle_edu.core import Pretrained, curve, pick_device, rng, save_png, shipped, shipped_sizes, show, strip, to_uint8, writing

@dataclass(frozen=True)
class NetConfig: D:int=4; gain:float=1.; mults:tuple=(1,2); kind:str='plain'

class Net(Pretrained, nn.Module):
    name,config_class = 'net',NetConfig
    def __init__(self, cfg):
        super().__init__()
        self.cfg,self.lin,self.norm = cfg,nn.Linear(cfg.D, 3),nn.BatchNorm1d(3)

    def forward(self, x): return self.norm(self.lin(x))

quick = settings(max_examples=40, deadline=None)
python = lambda code, **env: subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env={**os.environ, **env}).stdout.strip()
def pictures(*shape): return torch.rand(*shape, generator=rng('pictures'))*2-1
def no_leftovers(folder): return not [p for p in Path(folder).iterdir() if p.name.startswith('.')]

@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    net = Net(NetConfig(D=6, gain=2, mults=(1,2,3)))
    net.norm.running_mean += .3; net.norm.num_batches_tracked += 7
    net.save_pretrained(tmp_path/'net')
    return net,tmp_path/'net'

# Pretrained

def test_saved_and_loaded_are_equal_to_the_bit(saved):
    net,folder = saved
    for place in (folder, str(folder)):
        again = Net.from_pretrained(place)
        assert again.cfg==net.cfg and not again.training and no_leftovers(folder)
        assert again.state_dict().keys()==net.state_dict().keys()
        for k,v in net.state_dict().items():
            assert torch.equal(v, again.state_dict()[k]) and v.dtype==again.state_dict()[k].dtype, k

@pytest.mark.parametrize('dtype,digits', [(torch.float16, 11), (torch.bfloat16, 8)])
def test_half_precision_rounds_floats_alone_and_loads_in_full(saved, tmp_path, dtype, digits):
    net,_ = saved
    net.save_pretrained(tmp_path/'half', dtype=dtype)
    on_disk = core.load_file(tmp_path/'half'/'model.safetensors')
    assert on_disk['lin.weight'].dtype==dtype and on_disk['norm.num_batches_tracked'].dtype==torch.int64
    again = Net.from_pretrained(tmp_path/'half')
    for k,v in net.state_dict().items():
        w = again.state_dict()[k]
        assert w.dtype==v.dtype and ((w-v).abs() <= v.abs()*2.**-digits).all(), k
    assert not torch.equal(again.lin.weight, net.lin.weight)
    net.save_pretrained(tmp_path/'half')                                          # the next saving is whole again
    assert torch.equal(Net.from_pretrained(tmp_path/'half').lin.weight, net.lin.weight)

def test_numbers_that_half_precision_cannot_hold_are_refused(saved, tmp_path):
    net,_ = saved
    with torch.no_grad(): net.lin.weight[0,0] = 1e5
    with pytest.raises(ValueError, match=r'lin.weight holds 1e\+05.*bfloat16'): net.save_pretrained(tmp_path/'half', dtype=torch.float16)
    net.save_pretrained(tmp_path/'half', dtype=torch.bfloat16)
    assert abs(Net.from_pretrained(tmp_path/'half').lin.weight[0,0]-1e5)<500
    with pytest.raises(ValueError, match='torch.int8'): net.save_pretrained(tmp_path/'half', dtype=torch.int8)

def cut(n): return lambda f: (f/'model.safetensors').write_bytes((f/'model.safetensors').read_bytes()[:n])
def config(text): return lambda f: (f/'config.json').write_text(text)
def weights(**state): return lambda f: core.save_file(state, f/'model.safetensors')
def as_pickle(name): return lambda f: ((f/'model.safetensors').unlink(), (f/name).write_bytes(pickle.dumps(dict(w=1))))

@pytest.mark.parametrize('change,error,said', [
    (cut(-1),                                 ValueError, 'truncated'),
    (cut(20),                                 ValueError, 'truncated'),
    (cut(0),                                  ValueError, 'truncated'),
    (lambda f: (f/'model.safetensors').write_bytes(pickle.dumps(dict(w=1))), ValueError, 'no safetensors file'),
    (as_pickle('pytorch_model.bin'),          ValueError, r'pytorch_model.bin, a pickle'),
    (as_pickle('net.pkl'),                    ValueError, r'net.pkl, a pickle'),
    (lambda f: (f/'model.safetensors').unlink(), FileNotFoundError, 'no model.safetensors'),
    (lambda f: (f/'config.json').unlink(),    FileNotFoundError, 'no config.json'),
    (config('{"cfg": {"D": 6, '),             ValueError, 'damaged'),
    (config('[]'),                            ValueError, 'damaged'),
    (config('{"D": 6}'),                      ValueError, "no 'cfg'"),
    (config('{"cfg": 6}'),                    ValueError, 'is no NetConfig but 6'),
    (config('{"cfg": {"D": 7}}'),             ValueError, r'2? ?of another shape: lin.weight \(3, 6\), wanted \(3, 7\)'),
    (config('{"cfg": {"D": 6, "depth": 2}}'), ValueError, r"\['depth'\].*another version"),
    (config('{"cfg": {"D": "six"}}'),         ValueError, "NetConfig.D of config.json is 'six'"),
    (config('{"cfg": {"D": 6, "mults": 3}}'), ValueError, 'NetConfig.mults'),
    (weights(**{'lin.weight': torch.zeros(3, 6)}), ValueError, r'6 missing: lin.bias, norm.bias, norm.num_batches_tracked …'),
    (weights(extra=torch.zeros(1)),           ValueError, '1 left over: extra'),
])
def test_a_wrong_folder_is_refused_with_the_reason(saved, change, error, said):
    net,folder = saved
    change(folder)
    with pytest.raises(error, match=said) as e: Net.from_pretrained(folder)
    assert str(folder) in str(e.value) or 'config' in str(e.value).lower()

def test_no_pickle_is_opened(saved, tmp_path):
    class Bomb:
        def __reduce__(self): return Path.touch,(tmp_path/'went off',)
    for name in ('model.safetensors', 'model.pt'):
        _,folder = saved
        if name!='model.safetensors': (folder/'model.safetensors').unlink()
        (folder/name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(ValueError): Net.from_pretrained(folder)
        assert not (tmp_path/'went off').exists()
    pickle.loads(pickle.dumps(Bomb())); assert (tmp_path/'went off').exists()      # it is a bomb

def test_names_and_places_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1'); monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no net called 'huge': give one of \[\]"): Net.from_pretrained('huge')
    for place in (tmp_path/'none', './none', 'a/b/c'):
        with pytest.raises(FileNotFoundError, match='no folder'): Net.from_pretrained(place)

def test_shipped_weights_are_found_by_name(saved, monkeypatch, tmp_path):
    net,folder = saved
    place = tmp_path/'package'
    monkeypatch.setattr(core, 'files', lambda name: place)
    net.save_pretrained(shipped('net', 'laptop')); (shipped('net', 'gpu')).mkdir(parents=True)
    assert shipped_sizes('net')==['laptop'] and shipped('net', 'laptop').is_relative_to(place)   # an empty folder is no size
    assert torch.equal(Net.from_pretrained('laptop').lin.weight, net.lin.weight)
    with pytest.raises(FileNotFoundError, match=r"\['laptop'\]"): Net.from_pretrained('paper')

def test_fields_that_an_older_config_lacks_take_their_defaults(saved):
    net,folder = saved
    config('{"cfg": {"D": 6, "gain": 2}}')(folder)
    assert Net.from_pretrained(folder).cfg==NetConfig(D=6, gain=2)

def test_arguments_that_would_be_ignored_are_refused(saved):
    with pytest.raises(ValueError, match='map_location'): Net.from_pretrained(saved[1], device='cpu')
    assert Net.from_pretrained(saved[1], map_location='meta').lin.weight.device.type=='meta'

def test_push_to_hub_uploads_what_from_pretrained_reads(saved, monkeypatch):
    import huggingface_hub.hub_mixin as mixin
    net,sent = saved[0],{}
    class Api:
        def __init__(self, token=None): pass
        def create_repo(self, repo_id, **kw): return type('R', (), dict(repo_id=repo_id))
        def upload_folder(self, folder_path, repo_id, **kw):
            sent.update({p.name: p.read_bytes() for p in Path(folder_path).iterdir()})
            assert torch.equal(Net.from_pretrained(folder_path).lin.weight, net.lin.weight)
            return repo_id
    monkeypatch.setattr(mixin, 'HfApi', Api)
    assert net.push_to_hub('someone/net')=='someone/net'
    assert sent.keys()=={'README.md', 'config.json', 'model.safetensors'} and json.loads(sent['config.json'])['cfg']['D']==6
    assert sent['README.md'].startswith(b'---\nlibrary_name: dalle_edu')

def test_from_the_hub(saved, monkeypatch):
    import huggingface_hub, huggingface_hub.hub_mixin as mixin
    net,folder = saved
    fetch = lambda repo_id=None, filename=None, *a, **kw: str(folder/filename)
    monkeypatch.setattr(mixin, 'hf_hub_download', fetch); monkeypatch.setattr(huggingface_hub, 'hf_hub_download', fetch)
    again = Net.from_pretrained('someone/net')
    assert again.cfg==net.cfg and torch.equal(again.lin.weight, net.lin.weight)
    config('{"sizes": 3}')(folder)
    with pytest.raises(ValueError, match="no 'cfg'"): Net.from_pretrained('someone/net')

# files

def test_an_interrupted_saving_leaves_the_old_weights_and_no_litter(saved, monkeypatch):
    net,folder = saved
    old,save = (folder/'model.safetensors').read_bytes(),core.save_file
    def dies(state, path): save(state, path); Path(path).write_bytes(Path(path).read_bytes()[:50]); raise OSError('disk full')
    monkeypatch.setattr(core, 'save_file', dies)
    with pytest.raises(OSError, match='disk full'): net.save_pretrained(folder)
    assert (folder/'model.safetensors').read_bytes()==old and no_leftovers(folder)

def test_writing_makes_folders_and_readable_files(tmp_path):
    file = tmp_path/'a'/'b'/'c.txt'
    with writing(str(file)) as tmp:
        assert tmp.parent==file.parent and not file.exists()                      # one file system: the rename is one step
        tmp.write_text('new')
    assert file.read_text()=='new' and file.stat().st_mode&0o777==0o644 and no_leftovers(file.parent)
    with writing(file) as tmp: tmp.unlink(); os.close(os.open(tmp, os.O_CREAT|os.O_WRONLY, 0o600))  # as safetensors does
    assert file.stat().st_mode&0o777==0o644

def test_two_writers_of_one_file_do_not_mix(tmp_path):
    with writing(tmp_path/'x') as a, writing(tmp_path/'x') as b:
        assert a!=b
        a.write_text('a'); b.write_text('b')
    assert (tmp_path/'x').read_text() in 'ab' and no_leftovers(tmp_path)

# random numbers and devices

keys = st.lists(st.integers(-2**70, 2**70)|st.text(max_size=4)|st.floats(allow_nan=False)|st.booleans(), max_size=4)
@quick
@given(keys, keys)
def test_generators_are_equal_exactly_when_their_keys_are(a, b):
    same = repr(a)==repr(b)
    assert (rng(*a).initial_seed()==rng(*b).initial_seed())==same and rng(*a).initial_seed()==rng(*a).initial_seed()

@pytest.mark.parametrize('a,b', [(('ab','c'),('a','bc')), ((1,'1'),('1',1)), ((1,23),(12,3)), ((1,),(1.,)), ((),('',)), ((1,),(True,))])
def test_keys_that_look_alike_are_not(a, b): assert rng(*a).initial_seed()!=rng(*b).initial_seed()

def test_a_generator_has_no_past_and_leaves_the_global_one_alone():
    torch.manual_seed(0); state = torch.get_rng_state()
    a = rng(0, 1); torch.rand(100, generator=a)
    assert torch.equal(torch.rand(3, generator=rng(0, 2)), torch.rand(3, generator=rng(0, 2)))
    assert torch.equal(torch.get_rng_state(), state)

def test_neighbouring_keys_give_numbers_that_are_spread_evenly():
    u = torch.stack([torch.rand(1, generator=rng(0, i)) for i in range(4000)])[:,0]
    counts = torch.histc(u, 20, 0, 1)
    assert ((counts-200)**2/200).sum()<50                                         # chi-square, 19 degrees of freedom: 50 is one in 10,000
    assert abs(torch.corrcoef(torch.stack([u[1:], u[:-1]]))[0,1])<.06

@pytest.mark.parametrize('key', [None, (1,2), torch.tensor(3), [0]])
def test_keys_whose_name_may_change_are_refused(key):
    with pytest.raises(ValueError, match='plain numbers and strings'): rng(0, key)

def test_numpy_numbers_are_refused_since_numpy_1_and_2_spell_them_differently():
    import numpy as np
    with pytest.raises(ValueError, match='int64.*int()'): rng(np.int64(3))

def test_another_process_draws_the_same_and_import_brings_no_matplotlib():
    code = "import sys, torch\nfrom dalle_edu.core import rng, save_png\nx = torch.rand(2, 3, generator=rng('a', 1, 2.5))\nprint(x.tolist())\nprint('matplotlib' in sys.modules)"
    numbers,there = python(code, PYTHONHASHSEED='7').splitlines()
    assert json.loads(numbers)==torch.rand(2, 3, generator=rng('a', 1, 2.5)).tolist() and there=='False'

@pytest.mark.parametrize('device', ['gpu', 'cuda:x', 1.5, ''])
def test_devices_that_are_none(device):
    with pytest.raises(ValueError, match='unknown device'): pick_device(device)

@pytest.mark.parametrize('count,device,there', [(0,'cuda',False), (0,'cuda:0',False), (1,'cuda',True), (1,'cuda:0',True), (1,'cuda:1',False), (2,'cuda:1',True)])
def test_devices_that_are_not_there(monkeypatch, count, device, there):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: count)
    if there: assert str(pick_device(device))==device
    else:
        with pytest.raises(ValueError, match=f"'{device}' is not there"): pick_device(device)

# pictures

bad = dict(no_tensor=[[1.]], flat=torch.zeros(3, 4), gray=torch.zeros(2, 1, 4, 4), last=torch.zeros(2, 4, 4, 3), empty=torch.zeros(0, 3, 4, 4),
           bytes=torch.zeros(2, 3, 4, 4, dtype=torch.uint8), nan=torch.full((2,3,4,4), float('nan')), video=torch.zeros(1, 2, 3, 4, 4))
@pytest.mark.parametrize('name', bad)
def test_bad_pictures_are_refused_by_all_and_nothing_is_written(name, tmp_path):
    for draw in (show, strip, lambda x: save_png(x, tmp_path/'x.png')):
        with pytest.raises(ValueError, match='pictures'): draw(bad[name])
    assert not list(tmp_path.iterdir())

def test_titles_grids_and_scales_that_cannot_be(tmp_path):
    x = pictures(2, 3, 4, 4)
    with pytest.raises(ValueError, match='1 titles for 2 pictures'): show(x, ['one'])
    for n in (0, -1):
        with pytest.raises(ValueError, match='in a row'): show(x, ncols=n)
        with pytest.raises(ValueError, match='in a row'): save_png(x, tmp_path/'x.png', ncols=n)
        with pytest.raises(ValueError, match='scale'): save_png(x, tmp_path/'x.png', scale=n)
    with pytest.raises(ValueError, match='gap -1'): save_png(x, tmp_path/'x.png', gap=-1)

@quick
@given(B=st.integers(1, 7), ncols=st.integers(1, 9), scale=st.integers(1, 3), gap=st.integers(0, 3))
def test_a_png_holds_each_picture_at_its_place(tmp_path_factory, B, ncols, scale, gap):
    x,file = pictures(B, 3, 4, 5),tmp_path_factory.mktemp('png')/'x.png'
    save_png(x, file, ncols, scale, gap)
    got,cols = torch.tensor(list(Image.open(file).tobytes()), dtype=torch.uint8).view(*Image.open(file).size[::-1], 3),min(ncols, B)
    rows = -(-B//cols)
    assert got.shape==(scale*(rows*4+(rows-1)*gap), scale*(cols*5+(cols-1)*gap), 3)
    for i,im in enumerate(to_uint8(x)):
        r,c = i//cols*(4+gap),i%cols*(5+gap)
        assert torch.equal(got[scale*r:scale*(r+4):scale, scale*c:scale*(c+5):scale], im)

@quick
@given(st.integers(0, 255))
def test_bytes_come_back(b):
    assert (to_uint8(torch.full((1,3,2,2), b/127.5-1))==b).all()

def test_half_precision_and_gradients_can_be_drawn(tmp_path):
    x = pictures(3, 4, 4)
    for y in (x.half(), x.bfloat16(), x.double(), x.clone().requires_grad_()): save_png(y, tmp_path/'x.png')
    assert Image.open(tmp_path/'x.png').size==(4, 4)

def test_curves_draw_terms_and_neither_step_nor_rate_nor_seconds():
    import matplotlib; matplotlib.use('Agg')
    history = [dict(step=1, lr=.1, loss=3., seconds=9), dict(step=2, lr=.1, loss=2., val=1., seconds=9)]
    lines = curve(history).lines
    assert [l.get_label() for l in lines]==['loss', 'val'] and lines[0].get_ydata().tolist()==[3., 2.] and lines[1].get_xdata().tolist()==[2]
    assert [l.get_label() for l in curve(history, 'seconds', label='my ').lines]==['my seconds']
    with pytest.raises(ValueError, match=r"no report has \['kl'\]: the terms are \['loss', 'val'\]"): curve(history, 'loss', 'kl')
    for empty in ([], [dict(step=1, lr=.1)]):
        with pytest.raises(ValueError, match='nothing to draw'): curve(empty)
