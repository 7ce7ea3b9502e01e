"""What the cells of 03_train cannot show: SIGKILL, torn and foreign checkpoints, two processes, bad input, parity with PyTorch's own tools."""
import json, os, random, re, subprocess, sys, textwrap
from collections import namedtuple
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import pytest, torch
from accelerate.tracking import GeneralTracker
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

from dalle_edu import train
from dalle_edu.train import Ema, fit, lr_at, native_bf16, param_groups, record, seed_step

cpu = torch.device('cpu')
env = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'PYTHONPATH': os.pathsep.join([str(Path(train.__file__).parent.parent), os.environ.get('PYTHONPATH', '')])}
same = partial(assert_close, rtol=0, atol=0)

# A model with everything that could be forgotten: convolutions, dropout, buffers; a loss with three kinds of noise that changes with the step
toy = '''
import json, os, random, signal, sys
import numpy as np, torch
from pathlib import Path
from torch import nn
from dalle_edu.train import fit

class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU(), nn.Dropout(.2), nn.Flatten(), nn.Linear(64, 1))
        self.register_buffer('mask', torch.tensor([0., float('-inf')])); self.register_buffer('calls', torch.tensor(0))
    def forward(self, x): self.calls += 1; return self.net(x)

def make(): torch.manual_seed(0); return Toy()
def draw(key, n): return torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(key))
def pictures(seed, step, rank, n): return draw(seed*10_000+step*10+rank, n)

def loss(model, x, step):
    x = x+.1*torch.randn_like(x)+.1*float(np.random.randn())+.1*random.random()
    mse = ((model(x)-x.mean((1,2,3)).unsqueeze(1))**2).mean()
    return mse*(1+step/10),dict(mse=mse.detach())

class Stream:
    "Nine batches, over and over; says where it is"
    def __init__(self): self.at = 0
    def __iter__(self):
        while self.at<9: self.at += 1; yield draw(self.at, 8)
        self.at = 0
    def state_dict(self): return dict(at=self.at)
    def load_state_dict(self, state): self.at = state['at']

kw = dict(steps=20, batch=8, lr=1e-2, warmup=3, weight_decay=.1, ema=.9, save_every=4, log_every=3, progress=False, device='cpu', precision='fp32')
'''
exec(toy)

def run(path, code, *words, launch=()):
    "Run `toy` and `code` in a new interpreter, or through a launcher"
    path.write_text(toy+textwrap.dedent(code))
    res = subprocess.run([sys.executable, *launch, str(path), *map(str, words)], env=env, capture_output=True, text=True, timeout=300)
    assert res.returncode == 0, res.stdout[-2000:]+res.stderr[-6000:]
    return res.stdout

def timeless(history): return [{k:v for k,v in row.items() if k != 'seconds'} for row in history]

class Stop(Exception): pass
def stopping(at, batches=pictures):
    "The batches, until step `at`"
    def f(seed, step, rank, n):
        if step == at: raise Stop
        return batches(seed, step, rank, n)
    return f

def stopped(folder, at=10, **more):
    "A folder with the checkpoint of a run that stopped at step `at`"
    with pytest.raises(Stop): fit(make(), loss, stopping(at), folder=folder, **{**kw, **more})
    return folder/'checkpoint.pt'

# Killed and resumed

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks, so that PyTorch is imported once for all the runs that are killed')
def test_sigkill_anywhere_ends_with_the_same_bits(tmp_path):
    code = '''
    folder = Path(sys.argv[1])
    def die(): os.kill(os.getpid(), signal.SIGKILL)

    def train(kind, accumulate, name, after=None, torn=None):
        "Train in `folder/kind/name`; die at the `after`-th batch of this sitting, or halfway through the `torn`-th checkpoint"
        calls,saves,save = [0],[0],torch.save
        def noisy(model, x, step):
            if calls[0]==after: die()
            calls[0] += 1
            return loss(model, x, step)
        def halfway(state, file):
            save(state, file)
            if isinstance(file, Path):
                saves[0] += 1
                if saves[0]==torn: os.truncate(file, file.stat().st_size//2); die()
        torch.save = halfway
        model = make()
        history = fit(model, noisy, Stream() if kind=='stream' else pictures, folder=folder/kind/name, accumulate=accumulate, **kw)
        save(dict(weights=model.state_dict(), history=history), folder/kind/f'{name}.out')

    def forked(*args, **kwargs):
        pid = os.fork()
        if not pid:
            try: train(*args, **kwargs)
            except: os._exit(3)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

    fit(make(), loss, pictures, **{**kw, 'steps':1})        # what PyTorch and Accelerate import late, once for all
    for kind,n in (('function', 2), ('stream', 1)):
        said = dict(whole=[forked(kind, n, 'whole')], often=[forked(kind, n, 'often', after=a) for a in (3*n, 9*n, 4*n, 5*n, 1000)],
                    torn=[forked(kind, n, 'torn', torn=t) for t in (1, 2, 2, 9)], last=[forked(kind, n, 'last', torn=5), forked(kind, n, 'last')])
        print(json.dumps(said))
    print(json.dumps([p.name for p in folder.rglob('.checkpoint*')]))
    '''
    *said,left = map(json.loads, run(tmp_path/'kill.py', code, tmp_path).splitlines())
    assert said == [dict(whole=[0], often=[-9]*4+[0], torn=[-9]*3+[0], last=[-9, 0])]*2
    assert left == []                                                        # nor do killed writers leave anything behind
    for kind in ('function', 'stream'):
        whole,*others = [torch.load(tmp_path/kind/f'{n}.out') for n in ('whole', 'often', 'torn', 'last')]
        for other in others:
            same(other['weights'], whole['weights'])
            assert timeless(other['history']) == timeless(whole['history'])

@pytest.mark.parametrize('at', range(1, 20, 3))
def test_resumed_from_every_place_in_this_process(tmp_path, at):
    whole,again = make(),make()
    want = fit(whole, loss, pictures, **kw, folder=tmp_path/'whole')
    stopped(tmp_path/'again', at, save_every=1)
    torch.rand(7), np.random.rand(7), random.random()                         # whatever else happens meanwhile
    got = fit(again, loss, pictures, **{**kw, 'save_every':1}, folder=tmp_path/'again')
    same(again.state_dict(), whole.state_dict())
    assert timeless(got) == timeless(want) and [r['step'] for r in got] == [3, 6, 9, 12, 15, 18, 20]

def test_a_finished_run_returns_its_history_and_its_weights(tmp_path):
    model = make(); want = fit(model, loss, pictures, folder=tmp_path, **kw)
    other = nn.Module.train(make()); before = (tmp_path/'checkpoint.pt').read_bytes()
    got = fit(other, loss, stopping(0), folder=tmp_path, **kw)
    assert got == want and not other.training and (tmp_path/'checkpoint.pt').read_bytes() == before
    same(other.state_dict(), model.state_dict())

def test_seconds_go_on_across_sittings(tmp_path, monkeypatch):
    now = [100.]
    def clock(): now[0] += 1; return now[0]
    monkeypatch.setattr(train.time, 'perf_counter', clock)
    stopped(tmp_path, 10)                                                     # saved at step 8
    at = torch.load(tmp_path/'checkpoint.pt')['seconds']
    now[0] += 1_000_000                                                       # nobody trained meanwhile
    history = fit(make(), loss, pictures, folder=tmp_path, **kw)
    seconds = [r['seconds'] for r in history]
    assert seconds == sorted(seconds) and seconds[1] < at < seconds[2] and seconds[-1] < 100
    assert fit(make(), loss, pictures, folder=tmp_path, **kw) == history

def test_checkpoints_of_the_first_format_go_on(tmp_path):
    "No seconds, no eps, no count of trained weights, `source` None, averages of float buffers too"
    whole = make(); want = fit(whole, loss, pictures, **kw)
    file = stopped(tmp_path)
    state = torch.load(file)
    del state['seconds'], state['plan']['eps'], state['plan']['trained']
    state['source'],state['history'] = None,timeless(state['history'])
    state['ema'] = {k: state['ema'].get(k, v) for k,v in state['model'].items() if v.is_floating_point()}
    assert {k: type(v).__name__ for k,v in state.items()} == dict(step='int', plan='dict', model='OrderedDict', opt='dict', ema='dict', source='NoneType', history='list', sums='dict', count='int')
    torch.save(state, file)
    model = make(); got = fit(model, loss, pictures, folder=tmp_path, **kw)
    same(model.state_dict(), whole.state_dict())
    assert timeless(got) == timeless(want) and 'seconds' in got[-1] and 'seconds' not in got[0]

# Refused checkpoints

@pytest.mark.parametrize('change, words', [
    (dict(steps=21), 'steps 20 there, 21 here'), (dict(lr=2e-2), r'lr 0\.01 there, 0\.02 here'), (dict(betas=(.9,.95)), r'betas .*0\.99\] there'), (dict(eps=1e-6), 'eps'), (dict(batch=9), 'batch'),
    (dict(clip=None), 'clip'), (dict(ema=None), 'ema'), (dict(accumulate=2), 'accumulate'), (dict(seed=1), 'seed'), (dict(warmup=4), 'warmup'), (dict(weight_decay=0.), 'weight_decay'),
    (dict(precision='bf16'), "precision 'fp32' there, 'bf16' here")])
def test_a_checkpoint_of_other_arguments_is_refused(tmp_path, change, words):
    file = stopped(tmp_path); before = file.read_bytes()
    with pytest.raises(ValueError, match=words): fit(make(), loss, pictures, folder=tmp_path, **{**kw, **change})
    assert file.read_bytes() == before

def test_a_checkpoint_of_another_model_is_refused_and_says_where(tmp_path):
    Cfg = namedtuple('Cfg', 'width depth act')
    def model(cfg): m = make(); m.cfg = cfg; return m
    with pytest.raises(Stop): fit(model(Cfg(1, 2, 'gelu')), loss, stopping(10), folder=tmp_path, **kw)
    with pytest.raises(ValueError, match=r"cfg 'act='gelu'' there, 'act='silu'' here|cfg .*gelu.* there, .*silu.* here") as e: fit(model(Cfg(1, 2, 'silu')), loss, pictures, folder=tmp_path, **kw)
    assert 'width' not in str(e.value)
    wide = model(Cfg(1, 2, 'gelu')); wide.net[5] = nn.Linear(64, 2)
    with pytest.raises(ValueError, match=r'tensor net\.5\.weight \(1, 64\) there, \(2, 64\) here'): fit(wide, loss, pictures, folder=tmp_path, **kw)
    frozen = model(Cfg(1, 2, 'gelu')); frozen.net[0].requires_grad_(False)
    with pytest.raises(ValueError, match='trained'): fit(frozen, loss, pictures, folder=tmp_path, **kw)

@pytest.mark.parametrize('damage', [lambda b: b[:0], lambda b: b[:len(b)//3], lambda b: b[:-1], lambda b: b[:len(b)//2]+bytes(64)+b[len(b)//2+64:], lambda b: b'not a checkpoint'])
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    file = stopped(tmp_path); file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match='truncated or no checkpoint.*delete it'): fit(make(), loss, pictures, folder=tmp_path, **kw)

def test_a_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self): return (Path.touch, (tmp_path/'was here',))
    torch.save(dict(plan={}, step=1, model={}, opt=Evil()), tmp_path/'checkpoint.pt')
    with pytest.raises(ValueError, match='UnpicklingError'): fit(make(), loss, pictures, folder=tmp_path, **kw)
    assert not (tmp_path/'was here').exists()

def test_another_file_of_that_name_is_refused(tmp_path):
    torch.save(dict(weights=torch.zeros(2)), tmp_path/'checkpoint.pt')
    with pytest.raises(ValueError, match='not written by fit'): fit(make(), loss, pictures, folder=tmp_path, **kw)

# What goes wrong while training

def test_a_loss_that_is_not_finite_stops_the_run():
    def burst(model, x, step): mse = ((model(x))**2).mean(); return mse*(float('nan') if step == 4 else 1),dict(mse=mse.detach())
    with pytest.raises(ValueError, match='loss is nan by step 6.*learning rate'): fit(make(), burst, pictures, **kw)

def test_weights_that_are_not_finite_never_overwrite_a_checkpoint(tmp_path):
    def burst(model, x, step): mse = ((model(x))**2).mean(); return mse*(float('nan') if step == 6 else 1),{}
    with pytest.raises(ValueError, match='not finite after step 8'): fit(make(), burst, pictures, folder=tmp_path, **{**kw, 'log_every':20})
    assert torch.load(tmp_path/'checkpoint.pt')['step'] == 4

@pytest.mark.parametrize('terms, words', [(dict(a=torch.zeros(3)), r"'a' of shape \(3,\)"), (dict(lr=1.), "'lr'"), (dict(loss=1.), "'loss'"), (dict(seconds=1.), 'taken')])
def test_terms_are_single_numbers_with_names_of_their_own(terms, words):
    with pytest.raises(ValueError, match=words): fit(make(), lambda m, x, step: (m(x).square().mean(), terms), pictures, **kw)

@pytest.mark.parametrize('change, words', [
    (dict(steps=0), 'steps=0: give 1'), (dict(batch=0), 'batch=0'), (dict(accumulate=0), 'accumulate=0'), (dict(save_every=0), 'save_every=0'), (dict(log_every=0), 'log_every=0'), (dict(warmup=-1), 'warmup=-1: give 0'),
    (dict(clip=-1.), 'clip=-1'), (dict(lr=0.), 'lr=0'), (dict(lr=float('nan')), 'lr=nan'), (dict(ema=1.), 'ema=1'), (dict(precision='fp16'), "'fp16'.*bf16"), (dict(device='abacus'), 'abacus'),
    (dict(trackers='tensorboard'), 'give a folder')])
def test_impossible_arguments(change, words):
    with pytest.raises(ValueError, match=words): fit(make(), loss, pictures, **{**kw, **change})

def test_models_that_cannot_learn():
    with pytest.raises(ValueError, match='requires_grad'): fit(make().requires_grad_(False), loss, pictures, **kw)
    with pytest.raises(ValueError, match=r'net\.0\.weight.*float\(\)'): fit(make().bfloat16(), loss, pictures, **kw)

def test_a_loss_over_pairs_refuses_accumulation_also_through_partial():
    def pairs(model, x, step, weight=1.): return model(x).var(),{}
    pairs.pools_batch = True
    for f in (pairs, partial(pairs, weight=2.), partial(partial(pairs, weight=2.))):
        with pytest.raises(ValueError, match='raise `batch`'): fit(make(), f, pictures, accumulate=2, **kw)
    fit(make(), pairs, pictures, **kw)

class NoState:
    def __iter__(self): yield draw(1, 8)
class Empty(Stream):
    def __iter__(self): return iter(())
class Numpy(Stream):
    def state_dict(self): return dict(at=np.arange(3))
@pytest.mark.parametrize('batches, words', [(NoState(), 'state_dict and load_state_dict'), ([1, 2], 'function'), (Empty(), 'no batch'), (Numpy(), 'without running its code')])
def test_batches_that_cannot_be_resumed_or_are_none(batches, words):
    with pytest.raises(ValueError, match=words): fit(make(), loss, batches, **kw)

# The loop against PyTorch's own tools

def test_fit_is_the_textbook_loop():
    "AdamW, SequentialLR, clip_grad_norm_ and AveragedModel, put together by hand"
    def quiet(model, x, step): mse = ((model(x)-x.mean((1,2,3)).unsqueeze(1))**2).mean(); return mse*100,dict(mse=mse.detach())
    def small(): torch.manual_seed(1); return nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(16, 1))
    got,want = small(),small()
    history = fit(got, quiet, pictures, **{**kw, 'clip':.5, 'log_every':1})
    opt = torch.optim.AdamW(param_groups(want, .1), lr=1e-2, betas=(.9,.99))
    sched = SequentialLR(opt, [LinearLR(opt, 1/3, 1, 2), CosineAnnealingLR(opt, 17, eta_min=1e-4)], [3])
    mean = AveragedModel(want, multi_avg_fn=lambda avg, now, n: torch._foreach_lerp_(avg, now, 1-min(.9, n.item()/(9+n.item()))))
    mean.n_averaged += 1                                                      # at 0 it would copy the weights
    for step in range(20):
        value = quiet(want, pictures(0, step, 0, 8), step)[0]
        assert history[step]['loss'] == pytest.approx(value.item(), rel=1e-3) and history[step]['lr'] == pytest.approx(opt.param_groups[0]['lr'])
        value.backward(); assert nn.utils.clip_grad_norm_(want.parameters(), .5) > .5 or step > 3
        opt.step(); sched.step(); opt.zero_grad(); mean.update_parameters(want)
    assert_close(dict(got.state_dict()), dict(mean.module.state_dict()), rtol=1e-4, atol=1e-5)

def test_accumulation_is_the_large_batch():
    def halves(seed, step, rank, n): return pictures(seed, step//2, rank, 16)[step%2*8:][:8]
    def quiet(model, x, step): return ((model(x)-x.mean((1,2,3)).unsqueeze(1))**2).mean()*(1+step),{}
    def small(): torch.manual_seed(1); return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.SiLU(), nn.Linear(8, 1))
    a,b = small(),small()
    one = fit(a, quiet, lambda seed, step, rank, n: pictures(seed, step, rank, 16), **kw)
    two = fit(b, quiet, halves, accumulate=2, **kw)
    assert_close(dict(a.state_dict()), dict(b.state_dict()), rtol=1e-4, atol=1e-5)
    assert_close([r['loss'] for r in one], [r['loss'] for r in two], rtol=1e-4, atol=1e-5)

@settings(max_examples=50, deadline=None)
@given(st.integers(1, 500), st.integers(0, 600), st.integers(0, 499))
def test_the_schedule_rises_and_falls_and_stays_above_a_hundredth(steps, warmup, step):
    rates = [lr_at(s, steps, warmup) for s in range(steps)]
    top = min(warmup, steps)
    assert all(a < b for a,b in zip(rates[:top-1], rates[1:top])) and all(a > b for a,b in zip(rates[top:-1], rates[top+1:]))
    assert 0 < min(rates) and max(rates) <= 1 and (rates[-1] >= .01 or warmup >= steps)
    if warmup < steps: assert max(rates) == 1

@settings(max_examples=20, deadline=None)
@given(st.floats(.5, .9999), st.integers(1, 60), st.integers(0, 99))
def test_the_average_is_what_its_formula_says(decay, steps, seed):
    torch.manual_seed(seed); model = nn.Linear(2, 2); ema = Ema(model, decay)
    want = model.weight.detach().double().clone()
    for s in range(steps):
        with torch.no_grad(): model.weight.copy_(torch.randn(2, 2))
        d = min(decay, (1+s)/(10+s)); want = d*want+(1-d)*model.weight.detach().double(); ema.update(s)
    assert_close(ema.mean['weight'].double(), want, rtol=1e-4, atol=1e-5)
    same(ema.mean['bias'], model.bias.detach())                               # what never moved is not moved

def test_buffers_are_left_as_they_are_and_tied_weights_stay_tied():
    model = make(); model.tied = model.net[5].weight
    fit(model, loss, pictures, **kw)
    assert model.calls == 20 and model.mask.tolist() == [0., float('-inf')] and model.net[1].num_batches_tracked == 20
    assert model.tied is model.net[5].weight and not model.training

def test_nothing_of_the_caller_counts_or_is_touched():
    "Gradients left over, the random state; and the random state is given back"
    a,b = make(),make(); fit(a, loss, pictures, **kw)
    b(draw(3, 8)).sum().backward(); b.net[1].reset_running_stats(); b.calls.zero_()
    random.seed(5); np.random.seed(5); torch.manual_seed(5); want = random.random(),np.random.rand(),torch.rand(1)
    random.seed(5); np.random.seed(5); torch.manual_seed(5); fit(b, loss, pictures, **kw)
    assert (random.random(),np.random.rand(),torch.rand(1)) == want
    same(a.state_dict(), b.state_dict())

def test_decay_shrinks_matrices_alone_and_nothing_that_is_frozen():
    model = make(); model.net[0].requires_grad_(False); before = deepcopy(dict(model.named_parameters()))
    groups = param_groups(model, .5)
    assert [len(g['params']) for g in groups] == [1, 3] and [g['weight_decay'] for g in groups] == [.5, 0.]
    fit(model, lambda m, x, step: (m(x).sum()*0, {}), pictures, **{**kw, 'ema':None, 'weight_decay':.5})
    for k,p in model.named_parameters(): assert (p.abs().sum() < before[k].abs().sum()) == (k == 'net.5.weight') and (k == 'net.5.weight' or (p == before[k]).all())

def test_seeds_differ_by_each_of_three_numbers_and_reach_three_libraries():
    def drawn(*key): seed_step(*key); return torch.rand(1).item(),np.random.rand(),random.random()
    assert drawn(1, 2, 3) == drawn(1, 2, 3)
    seen = [drawn(*key) for key in ((1, 2, 3), (2, 1, 3), (1, 3, 2), (12, 3, 0), (1, 23, 0))]
    assert all(len(set(column)) == 5 for column in zip(*seen))

# Precision, layouts, compilation

def test_bf16_computes_in_bf16_and_keeps_weights_and_loss_in_fp32():
    seen = set()
    def spy(model, x, step):
        y = model(x); seen.add(y.dtype)
        return ((y.float()-x.mean((1,2,3)).unsqueeze(1))**2).mean(),dict(half=y.mean())
    a,b = make(),make()
    exact,rough = (fit(m, spy, pictures, **{**kw, 'precision':p})[-1]['loss'] for m,p in ((a,'fp32'),(b,'bf16')))
    assert seen == {torch.float32, torch.bfloat16} and all(p.dtype == torch.float32 for p in b.parameters())
    assert 0 < abs(exact-rough) < .1*exact

def test_auto_precision_asks_the_machine(monkeypatch, tmp_path):
    for there in (True, False):
        monkeypatch.setattr(train, 'native_bf16', lambda device: there)
        fit(make(), loss, pictures, **{**kw, 'precision':'auto'}, folder=tmp_path/str(there))
        assert torch.load(tmp_path/str(there)/'checkpoint.pt')['plan']['precision'] == ('bf16' if there else 'no')
    assert isinstance(native_bf16(cpu), bool)

def test_batches_of_any_nesting_and_models_of_any_rank():
    Pair = namedtuple('Pair', 'x words')
    model = nn.ModuleDict(dict(a=nn.Conv3d(1, 2, 1), b=nn.Conv2d(1, 2, 1), c=nn.Conv1d(1, 2, 1)))
    def spy(m, batch, step):
        assert isinstance(batch['pair'], Pair) and batch['pair'].words == ['a', 'b'] and batch['list'][0].dtype == torch.int64
        return sum((m[k](batch['pair'].x.reshape(8, 1, *([-1]+[1]*n))).square().mean() for k,n in (('a', 2), ('b', 1), ('c', 0)))),{}
    fit(model, spy, lambda seed, step, rank, n: dict(pair=Pair(draw(step, n), ['a', 'b']), list=[torch.arange(3)]), **kw)

def test_compiled_is_the_same_function(monkeypatch):
    plain = nn.Module.compile
    monkeypatch.setattr(nn.Module, 'compile', lambda self: plain(self, backend='eager'))   # the C++ backend takes a minute
    def quiet(model, x, step): mse = (model(x)-x.mean((1,2,3)).unsqueeze(1)).square().mean(); return mse*(1+step/10),dict(mse=mse.detach())
    def small(): torch.manual_seed(1); return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.SiLU(), nn.Linear(8, 1))
    a,b = small(),small()
    torch._dynamo.utils.counters.clear()
    fit(a, quiet, pictures, **kw, compile=True)
    assert 1 <= torch._dynamo.utils.counters['stats']['unique_graphs'] <= 2               # not one a step
    fit(b, quiet, pictures, **kw, compile=False)
    assert_close(dict(a.state_dict()), dict(b.state_dict()))

# What is shown

def test_the_bar_shows_terms_and_rate(capsys):
    fit(make(), loss, pictures, **{**kw, 'progress':True})
    err = capsys.readouterr().err
    assert '20/20' in err and 'mse=' in err and re.search(r'per s=[1-9]\d*', err)
    fit(make(), loss, pictures, **kw)
    assert capsys.readouterr().err == ''

class Notes(GeneralTracker):
    name,requires_logging_directory = 'notes',False
    def __init__(self): super().__init__(); self.rows,self.config,self.ended = [],None,False
    @property
    def tracker(self): return self
    def store_init_configuration(self, values): self.config = values
    def log(self, values, step=None, **kwargs): self.rows.append((step, values))
    def finish(self): self.ended = True

def test_trackers_and_callback_get_each_report():
    notes,seen = Notes(),[]
    history = fit(make(), loss, pictures, trackers=notes, callback=seen.append, **kw)
    assert seen == history and notes.ended and notes.config['lr'] == 1e-2
    assert [s for s,_ in notes.rows] == [r['step'] for r in history]
    assert all(v['samples_per_second'] > 0 and v['loss'] == r['loss'] for (_,v),r in zip(notes.rows, history))

@pytest.mark.filterwarnings('ignore:.log_with=tensorboard')
def test_a_tracker_that_is_not_installed_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr('accelerate.tracking.get_available_trackers', lambda: [])
    with pytest.raises(ValueError, match='tensorboard.*pip install'): fit(make(), loss, pictures, trackers='tensorboard', folder=tmp_path, **kw)

# Two processes

def test_two_processes_are_one_with_the_joined_batch(tmp_path):
    code = '''
    from torch import distributed as dist
    folder = Path(sys.argv[1]); kw['log_every'] = 1
    def small(seed): torch.manual_seed(seed); return nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(16, 1))
    def quiet(model, x, step): mse = ((model(x)-x.mean((1,2,3)).unsqueeze(1))**2).mean(); return mse*(1+step),dict(mse=mse.detach())
    def joined(seed, step, rank, n): return pictures(seed, step, 0, 16)
    def shared(seed, step, rank, n): return joined(seed, step, rank, n)[8*rank:8*rank+8]
    def broken(seed, step, rank, n):
        if step==14: raise KeyboardInterrupt
        return shared(seed, step, rank, n)
    rank = int(os.environ.get('RANK', -1))
    if rank<0:
        for accumulate in (1, 2):
            model = small(0); history = fit(model, quiet, joined, folder=folder/f'one{accumulate}', accumulate=accumulate, **kw)
            torch.save((model.state_dict(), history), folder/f'one{accumulate}.out')
    else:
        for accumulate in (1, 2):
            model = small(rank)                              # the first process decides where all start
            writer,real = 0,torch.save
            if accumulate==2:                                # this one is broken off, and read again by both
                try: fit(small(rank), quiet, broken, folder=folder/f'two{accumulate}', accumulate=accumulate, **kw)
                except KeyboardInterrupt: pass
            def spy(state, file): global writer; writer += isinstance(file, Path); real(state, file)
            torch.save = spy
            history = fit(model, quiet, shared, folder=folder/f'two{accumulate}', accumulate=accumulate, **kw)
            torch.save = real
            torch.save((model.state_dict(), history, writer), folder/f'two{accumulate}.{rank}.out')
        try: fit(small(0), quiet, lambda *k: shared(*k)*(float('nan') if k[1]==5 and rank==1 else 1), folder=folder/'nan', **kw)
        except ValueError as e: Path(folder/f'nan.{rank}').write_text(str(e))
        quiet.pools_batch = True
        try: fit(small(0), quiet, shared, **kw)
        except ValueError as e: Path(folder/f'pools.{rank}').write_text(str(e))
        dist.destroy_process_group()
    '''
    run(tmp_path/'one.py', code, tmp_path)
    run(tmp_path/'two.py', code, tmp_path, launch=('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2'))
    for accumulate in (1, 2):
        weights,history = torch.load(tmp_path/f'one{accumulate}.out')
        (a,hist_a,writes_a),(b,hist_b,writes_b) = [torch.load(tmp_path/f'two{accumulate}.{rank}.out') for rank in (0, 1)]
        same(a, b)
        assert timeless(hist_a) == timeless(hist_b) and writes_a > 0 == writes_b
        assert_close(dict(a), dict(weights), rtol=1e-4, atol=1e-5)
        assert_close([r['loss'] for r in hist_a], [r['loss'] for r in history], rtol=1e-4, atol=1e-5)
        assert hist_a[-1]['step'] == 20 and len(hist_a) == 20
    for rank in (0, 1):
        assert 'is nan by step 6' in (tmp_path/f'nan.{rank}').read_text()     # both stop, at once
        assert 'one process' in (tmp_path/f'pools.{rank}').read_text()

# The record

def rows(n): return [dict(step=i+1, loss=1/(i+1), lr=1e-3, seconds=2.*i) for i in range(n)]

@settings(max_examples=30, deadline=None)
@given(st.integers(1, 1000))
def test_the_record_keeps_first_last_and_at_most_a_hundred(tmp_path_factory, n):
    folder = tmp_path_factory.mktemp('record')
    got = record('x', rows(n), 'true', folder=folder)
    steps = [r['step'] for r in got['history']]
    assert steps[0] == 1 and steps[-1] == n and len(steps) == min(n, 100) and steps == sorted(set(steps))
    assert got == json.loads((folder/'x.json').read_text()) and got['seconds'] == 2*(n-1)

def test_a_record_says_where_it_comes_from(tmp_path, monkeypatch):
    got = record('clip', rows(3), 'dalle-edu train clip', folder=tmp_path/'a'/'b', recall=torch.tensor([.5, .25]), table=dict(n=np.float64(2)), device='cpu')
    assert got['commit'] is None and got['command'] == 'dalle-edu train clip' and re.fullmatch(r'\d{4}-\d\d-\d\d', got['date'])
    assert got['recall'] == [.5, .25] and got['table'] == dict(n=2) and re.fullmatch(r'(\d+ threads? on )?\d+ CPU cores?', got['machine'])
    import platform; assert platform.node() not in json.dumps(got)
    for words in (('init', '-q'), ('-c', 'user.name=a', '-c', 'user.email=a@b', 'commit', '-q', '--allow-empty', '-m', 'a')): subprocess.run(['git', *words], cwd=tmp_path, check=True)
    assert re.fullmatch('[0-9a-f]{7,}', record('clip', rows(3), 'x', folder=tmp_path/'a'/'b')['commit'])
    monkeypatch.setenv('PATH', ''); assert record('clip', rows(3), 'x', folder=tmp_path)['commit'] is None   # no git at all
    assert record('clip', timeless(rows(3)), 'x', folder=tmp_path)['seconds'] is None

def test_a_record_that_cannot_be_written_leaves_the_old_one(tmp_path):
    record('x', rows(3), 'x', folder=tmp_path); before = (tmp_path/'x.json').read_bytes()
    for bad,words in ((dict(recall=float('nan')), 'JSON'), (dict(date=1), "'date'"), (dict(machine=1), "'machine'")):
        with pytest.raises(ValueError, match=words): record('x', rows(4), 'x', folder=tmp_path, **bad)
    with pytest.raises(ValueError, match='empty'): record('x', [], 'x', folder=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ['x.json'] and (tmp_path/'x.json').read_bytes() == before
