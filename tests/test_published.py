"""What the cells of 19_published cannot show: other people's CLIP, tokenizer and pixels, files of every kind, bad input."""
import gzip, importlib.util, json
from pathlib import Path
import pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from dalle_edu import published
from dalle_edu.clip import CLIP, CLIPConfig
from dalle_edu.published import CLIP_CONFIGS, CLIPTokenizer, clip_from_openai, clip_from_transformers, clip_pixels, clip_tokenizer, published_keys
from dalle_edu.text import Tokenizer

root = Path(__file__).resolve().parent.parent
tiny = CLIPConfig(px=16, patch=8, D=64, depth=2, heads=1, V=60, L=9, text_D=128, text_depth=3, text_heads=2, E=128, act='quick_gelu') # the text projection is square
read = dict(openai=clip_from_openai, transformers=clip_from_transformers)

def make(cfg=tiny, std=.2):
    "A CLIP whose every weight matters"
    torch.manual_seed(0); m = CLIP(cfg)
    for n,p in m.named_parameters():
        if n!='logit_scale': nn.init.normal_(p, mean=float(('ln' in n or 'norm' in n) and 'weight' in n), std=std)
    return m.eval()

def respell(m, layout):
    "Its weights under other people's names"
    res = {}
    for n,p in m.state_dict().items():
        keys = published_keys(n, layout)
        if layout=='openai' and n.endswith('proj.weight'): p = p.T
        res.update(zip(keys, p.chunk(len(keys)) if len(keys)>1 else [p]))
    return {k:v.contiguous().clone() for k,v in res.items()}

def theirs(cfg=tiny, **change):
    "A `transformers.CLIPModel` of the same sizes"
    from transformers import CLIPConfig as Config, CLIPModel
    tower = lambda D, depth, heads: dict(hidden_size=D, intermediate_size=4*D, num_hidden_layers=depth, num_attention_heads=heads, projection_dim=cfg.E, hidden_act=cfg.act) | change
    torch.manual_seed(0)
    return CLIPModel(Config(projection_dim=cfg.E, vision_config=dict(**tower(cfg.D, cfg.depth, cfg.heads), image_size=cfg.px, patch_size=cfg.patch),
        text_config=dict(**tower(cfg.text_D, cfg.text_depth, cfg.text_heads), vocab_size=cfg.V, max_position_embeddings=cfg.L, eos_token_id=cfg.V-1, bos_token_id=cfg.V-2, pad_token_id=0))).eval()

def stir(m, std):
    "Offsets and norms start at 0 and 1 there too: give every weight a say"
    g = torch.Generator().manual_seed(1)
    for p in m.parameters():
        if p.ndim: p.data += std*torch.randn(p.shape, generator=g)
    return m

def captions(cfg, lengths, pad):
    g = torch.Generator().manual_seed(2)
    ids = torch.full((len(lengths),cfg.L), pad)
    for row,n in zip(ids, lengths): row[0],row[1:n+1],row[n+1] = cfg.V-2,torch.randint(1, cfg.V-2, (n,), generator=g),cfg.V-1
    return ids

def differences(m, t, n):
    "Largest difference of image features, text features and logits; captions padded with zeros, with end tokens, and not at all"
    cfg = m.cfg
    x,res = torch.randn(n, 3, cfg.px, cfg.px, generator=torch.Generator().manual_seed(3)),[]
    for pad in (0, cfg.V-1):
        ids = captions(cfg, [2, cfg.L-2, 4][:n], pad)
        with torch.no_grad(): out,u,v = t(input_ids=ids, pixel_values=x),m.encode_image(x),m.encode_text(ids)
        logits = m.logit_scale.exp()*nn.functional.normalize(u, dim=1)@nn.functional.normalize(v, dim=1).T
        res += [(u-out.vision_model_output.pooler_output).abs().max().item(),(v-out.text_model_output.pooler_output).abs().max().item(),(logits-out.logits_per_image).abs().max().item()]
    assert u.std()>.01 and v.std()>.01 and logits.std()>.01                # features that differ, so that agreeing means something
    return res

@pytest.mark.parametrize('act', ['quick_gelu', 'gelu'])
def test_same_features_as_transformers(act):
    cfg = CLIPConfig(**{**vars(tiny), 'act':act})
    t = stir(theirs(cfg), .1)
    m = clip_from_transformers(t)                                          # the model knows its activation, its weights do not
    assert m.cfg==cfg==clip_from_transformers(t.state_dict(), act=act).cfg and not m.training
    assert max(differences(m, t, 3))<1e-4
    assert max(differences(clip_from_transformers(t, act=dict(gelu='quick_gelu', quick_gelu='gelu')[act]), t, 3))>1e-4   # the other activation is seen
    again = clip_from_openai(respell(m, 'openai'), act=act)                # and by way of OpenAI's names
    assert max(differences(again, t, 3))<1e-4

def test_same_features_as_transformers_at_the_size_of_vit_b_32():
    t = stir(theirs(CLIP_CONFIGS['ViT-B/32']), .01)
    m = clip_from_transformers(t)
    assert m.cfg==CLIP_CONFIGS['ViT-B/32'] and sum(p.numel() for p in m.parameters())==151_277_313
    assert max(differences(m, t, 2))<1e-4

@settings(max_examples=15, deadline=None)
@given(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.sampled_from([2, 4, 7])))
def test_sizes_are_read_off_the_weights(s):
    side,depth,w,text_w,text_depth,L,E,patch = s
    cfg = CLIPConfig(px=side*patch, patch=patch, D=64*w, depth=depth, heads=w, V=7, L=L+2, text_D=64*text_w, text_depth=text_depth, text_heads=text_w, E=E, act='quick_gelu')
    m = make(cfg)
    for layout in published.LAYOUTS:
        back = read[layout](respell(m, layout))
        assert back.cfg==cfg
        for k,v in m.state_dict().items(): assert_close(back.state_dict()[k], v, rtol=0, atol=0)

@pytest.mark.parametrize('layout', published.LAYOUTS)
def test_weights_are_copied_and_can_be_trained(layout):
    give = respell(make(), layout); keep = {k:v.clone() for k,v in give.items()}
    m = read[layout](give)
    assert give.keys()==keep.keys() and all(p.requires_grad and p.is_contiguous() for p in m.parameters())
    with torch.no_grad():
        for p in m.parameters(): p.zero_()
    for k in keep: assert_close(give[k], keep[k], rtol=0, atol=0)

def test_buffers_and_half_precision():
    m = make()
    for layout,extra in (('openai',dict(input_resolution=torch.tensor(16), context_length=torch.tensor(9), vocab_size=torch.tensor(60))),
                         ('transformers',{'text_model.embeddings.position_ids':torch.arange(9)[None], 'vision_model.embeddings.position_ids':torch.arange(5)[None]})):
        for dtype in (torch.float16, torch.bfloat16):
            half = read[layout]({k:v.to(dtype) for k,v in respell(m, layout).items()} | extra)
            for k,v in m.state_dict().items(): assert_close(half.state_dict()[k], v.to(dtype).float(), rtol=0, atol=0)

def test_files_and_folders(tmp_path):
    t = stir(theirs(layer_norm_eps=1e-5), .1)
    t.save_pretrained(tmp_path/'hf')
    for where in (tmp_path/'hf', str(tmp_path/'hf'), tmp_path/'hf'/'model.safetensors'): assert max(differences(clip_from_transformers(where), t, 3))<1e-4
    m = make(); (tmp_path/'oa').mkdir(); file = tmp_path/'oa'/'open_clip_model.safetensors'
    save_file(respell(m, 'openai'), file)
    for where in (tmp_path/'oa', file): assert_close(clip_from_openai(where).state_dict(), m.state_dict(), rtol=0, atol=0)
    clip_from_openai(file).save_pretrained(tmp_path/'ours')
    assert CLIP.from_pretrained(tmp_path/'ours').cfg==tiny

def test_configuration_beside_the_file_decides(tmp_path):
    "Two heads of 32, and the usual GELU: nothing of this is in the weights"
    cfg = CLIPConfig(**{**vars(tiny), 'heads':2, 'text_heads':4, 'act':'gelu'})
    t = stir(theirs(cfg), .1); t.save_pretrained(tmp_path/'hf')
    m = clip_from_transformers(tmp_path/'hf')
    assert m.cfg==cfg and max(differences(m, t, 3))<1e-4
    assert clip_from_transformers(tmp_path/'hf', heads=(1,2), act='quick_gelu').cfg==tiny           # what is said wins
    (tmp_path/'oa').mkdir(); save_file(respell(m, 'openai'), tmp_path/'oa'/'model.safetensors')
    assert clip_from_openai(tmp_path/'oa').cfg==tiny
    c = dict(vision_cfg=dict(width=64, head_width=32), text_cfg=dict(heads=4))
    for quick,act in (({},'gelu'), (dict(quick_gelu=True),'quick_gelu')):
        (tmp_path/'oa'/'open_clip_config.json').write_text(json.dumps(dict(model_cfg=c|quick)))
        assert clip_from_openai(tmp_path/'oa').cfg==CLIPConfig(**{**vars(cfg), 'act':act})
    for what,said in ((dict(vision_config=dict(hidden_act='gelu'), text_config=dict(hidden_act='quick_gelu')),'one activation'), (dict(vision_config=dict(layer_norm_eps=1e-6), text_config={}),'eps')):
        (tmp_path/'hf'/'config.json').write_text(json.dumps(what))
        with pytest.raises(ValueError, match=said): clip_from_transformers(tmp_path/'hf')
    (tmp_path/'hf'/'config.json').write_text('{"vision_config"')
    with pytest.raises(ValueError, match='no JSON'): clip_from_transformers(tmp_path/'hf')

def test_the_defaults_that_a_configuration_leaves_out_are_those_of_transformers(tmp_path):
    cfg = CLIPConfig(**{**vars(tiny), 'D':96, 'heads':12, 'text_heads':8})
    t = stir(theirs(cfg), .1); t.save_pretrained(tmp_path)
    said = json.loads((tmp_path/'config.json').read_text())
    for k in ('vision_config','text_config'): said[k] = {a:b for a,b in said[k].items() if a not in ('num_attention_heads','hidden_act','layer_norm_eps')}
    (tmp_path/'config.json').write_text(json.dumps(said))
    assert max(differences(clip_from_transformers(tmp_path), t, 3))<1e-4

def test_what_does_not_fit_is_named():
    for layout in published.LAYOUTS:
        good = respell(make(), layout)
        key = lambda n: published_keys(n, layout)[0]
        gone = {k:v for k,v in good.items() if k!=key('text.ln_final.weight')}
        with pytest.raises(ValueError, match=f"1 missing: {key('text.ln_final.weight')}$"): read[layout](gone)
        with pytest.raises(ValueError, match='2 left over: one, two$'): read[layout](good|dict(one=torch.ones(1), two=torch.ones(1)))
        with pytest.raises(ValueError, match=r'1 of the wrong shape: .*ln_post.* \(63,\), wanted \(64,\)$' if layout=='openai' else r'1 of the wrong shape: .*post_layernorm.* \(63,\), wanted \(64,\)$'):
            read[layout](good|{key('image.ln_post.bias'):torch.ones(63)})
        with pytest.raises(ValueError, match=r'12 missing: [^,]+, [^,]+, [^,]+ …$'): read[layout]({k:v for k,v in good.items() if k not in sorted(k for k in good if 'norm' in k or 'ln_' in k)[:12]})
        with pytest.raises(ValueError, match='use clip_from_'): read[layout](respell(make(), next(l for l in published.LAYOUTS if l!=layout)))
        with pytest.raises(ValueError, match='floating-point'): read[layout](good|{key('text.proj.weight'):torch.ones(128, 128, dtype=torch.int8)})
        with pytest.raises(ValueError, match='floating-point'): read[layout]({k:v.int() for k,v in good.items()})
        with pytest.raises(ValueError, match='wrong shape'): read[layout](good|{key('image.patches.weight'):torch.ones(64)})
        with pytest.raises(ValueError, match='missing'): read[layout]({})
        with pytest.raises(ValueError, match='wrong shape'): read[layout](good|{key('image.pos'):torch.ones(7, 64)})    # 6 patches make no square
    with pytest.raises(ValueError, match='ResNet'): clip_from_openai({'visual.layer1.0.conv1.weight':torch.ones(1), 'positional_embedding':torch.ones(9, 128)})
    with pytest.raises(ValueError, match='state_dict'): clip_from_openai(dict(epoch=3, state_dict=respell(make(), 'openai')))
    with pytest.raises(ValueError, match='no multiple of 64'): clip_from_openai(respell(make(CLIPConfig(**{**vars(tiny), 'D':96})), 'openai'))
    assert clip_from_openai(respell(make(CLIPConfig(**{**vars(tiny), 'D':96})), 'openai'), heads=(3,2)).cfg.heads==3
    for heads in ((5,2), 2, (1,)):
        with pytest.raises(ValueError, match='heads'): clip_from_openai(respell(make(), 'openai'), heads=heads)
    with pytest.raises(ValueError, match='layout'): published_keys('text.pos', 'flax')
    with pytest.raises(ValueError, match='no weight'): published_keys('image.nose', 'openai')

def test_files_that_are_not_there_or_no_weights(tmp_path):
    for give in (clip_from_openai, clip_from_transformers, clip_tokenizer):
        with pytest.raises(FileNotFoundError, match='there is no'): give(tmp_path/'nowhere')
        with pytest.raises(FileNotFoundError, match='there is no'): give('weights/vit.safetensors')
        with pytest.raises(FileNotFoundError, match='holds no'): give(tmp_path)
    with pytest.raises(ValueError, match='what weights come in'): clip_from_openai(3)
    pickle = tmp_path/'ViT-B-32.pt'; torch.save({'a':torch.ones(1)}, pickle)
    for give in (clip_from_openai, clip_from_transformers):
        with pytest.raises(ValueError, match='pickle'): give(pickle)
        with pytest.raises(FileNotFoundError, match='ViT-B-32.pt is a pickle'): give(tmp_path)
    whole = tmp_path/'whole.safetensors'; save_file(respell(make(), 'openai'), whole)
    (tmp_path/'cut.safetensors').write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(ValueError, match='truncated'): clip_from_openai(tmp_path/'cut.safetensors')

def test_hub_names(monkeypatch, tmp_path):
    "Without network, a clear error; with it, the first file that is there, and the configuration beside it"
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    asked = []
    def nothing(name, file, revision=None): asked.append(file); raise LocalEntryNotFoundError('no network')
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', nothing)
    for give in (clip_from_openai, clip_from_transformers, clip_tokenizer):
        with pytest.raises(FileNotFoundError, match="'some-body/clip_b.32' is no file or folder here.*LocalEntryNotFoundError.*network"): give('some-body/clip_b.32')
    assert len(asked)==3                                                    # no second file is tried where there is no network
    cfg = CLIPConfig(**{**vars(tiny), 'act':'gelu', 'heads':2})
    save_file(respell(make(cfg), 'openai'), tmp_path/'model.safetensors')
    (tmp_path/'open_clip_config.json').write_text(json.dumps(dict(model_cfg=dict(vision_cfg=dict(width=64, head_width=32), text_cfg=dict(heads=2)))))
    class Absent(EntryNotFoundError):
        def __init__(self): Exception.__init__(self, 'not there')
    def hub(name, file, revision=None):
        assert (name,revision)==('some-body/clip','v1')
        if not (tmp_path/file).is_file(): raise Absent
        return str(tmp_path/file)
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', hub)
    assert clip_from_openai('some-body/clip', revision='v1').cfg==cfg
    (tmp_path/'open_clip_config.json').unlink()
    assert clip_from_openai('some-body/clip', revision='v1').cfg==tiny
    def flaky(name, file, revision=None):
        if file.endswith('json'): raise LocalEntryNotFoundError('gone')
        return hub(name, file, revision)
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', flaky)
    with pytest.raises(FileNotFoundError, match='open_clip_config.json'): clip_from_openai('some-body/clip', revision='v1')   # not knowing is not the same as there being none

def test_published_sizes_have_the_published_counts():
    counts = {'ViT-B/32':(87_849_216,63_428_096), 'ViT-B/16':(86_192_640,63_428_096), 'ViT-L/14':(303_966_208,123_650_304), 'ViT-L/14@336px':(304_293_888,123_650_304)}
    assert CLIP_CONFIGS.keys()==counts.keys()
    for name,want in counts.items():
        with torch.device('meta'): m = CLIP(CLIP_CONFIGS[name])
        assert tuple(sum(p.numel() for p in t.parameters()) for t in (m.image, m.text))==want and sum(p.numel() for p in m.parameters())==sum(want)+1

# ---- words

merges = ['t h', 'th e</w>', 'a t</w>', 'c at</w>', 'i n</w>', 'i n', 'in g</w>', "' s</w>", 'Ã ©', '2 0', '! !</w>', 'o o', 'oo o</w>', 'ð Ł', 'h o', 'p ho', 'pho t', 'phot o</w>']
said = ['a photo of the cat', "The CAT's hat!!", '', 'in2020 going café cafe\u0301', 'naïve 東京 🎉 :-)', "it's we're I've I'm you'll he'd don't ROCK'N'ROLL", '  two   spaces\tand\nlines ', '!!! !! !', '?!)("\'', 'ÀÉ İstanbul ß ﬁ', 'a\u00a0b\u3000c', '0123 4½ Ⅷ', "''s 's's", 'thethe the-the', 'x'*60, '</w> a</w>', '\x00\x1f\x7f']

def hf_tokenizer(folder):
    "The same merges in `transformers`"
    from transformers import CLIPTokenizer as T
    letters = published._letters(); vocab = [*letters, *(l+'</w>' for l in letters), *(m.replace(' ', '') for m in merges), '<|startoftext|>', '<|endoftext|>']
    (folder/'vocab.json').write_text(json.dumps({v:i for i,v in enumerate(vocab)})); (folder/'merges.txt').write_text('#version: 0.2\n'+'\n'.join(merges)+'\n', encoding='utf-8')
    return T.from_pretrained(folder)

def test_same_numbers_as_the_tokenizer_of_transformers(tmp_path):
    hf,tok = hf_tokenizer(tmp_path),clip_tokenizer(tmp_path/'merges.txt')
    assert tok.V==len(hf)==512+len(merges)+2 and (tok.start,tok.end)==(hf.bos_token_id,hf.eos_token_id) and isinstance(tok, Tokenizer)
    for c,row in zip(said, tok.encode(said)):
        want = hf(c)['input_ids']
        assert row[:len(want)].tolist()==want and not row[len(want):].any(), c
    assert tok.encode(said).shape==(len(said),77)

@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(codec='utf-8'), max_size=18))
def test_any_text_has_numbers_and_comes_back(c):
    tok = clip_tokenizer(merges, L=300)
    ids = tok.encode([c])
    assert ids[0].argmax()==(ids[0]==tok.end).nonzero()[0,0] and (ids[0]==tok.end).sum()==1
    once = tok.decode(ids)
    assert tok.decode(tok.encode(once))==once                               # small letters and single spaces stay as they are
    assert ''.join(once[0].split())==''.join(tok.library.normalizer.normalize_str(c).split())
    if c.isascii(): assert ''.join(once[0].split())==''.join(c.lower().split())

def test_where_merges_may_come_from(tmp_path):
    (tmp_path/'merges.txt').write_text('#version: 0.2\n'+'\n'.join(merges)+'\n', encoding='utf-8')
    (tmp_path/'a.txt.gz').write_bytes(gzip.compress(('"bpe_simple_vocab_16e6.txt#version: 0.2\n'+'\n'.join(merges)).encode()))
    want = clip_tokenizer(merges).encode(said)
    for m in (tmp_path, str(tmp_path), tmp_path/'merges.txt', tmp_path/'a.txt.gz', [tuple(m.split()) for m in merges]): assert_close(clip_tokenizer(m).encode(said), want)
    clip_tokenizer(merges, L=80).save(tmp_path/'saved')
    back = CLIPTokenizer.load(tmp_path/'saved')
    assert back.L==80 and back.decode(want)==clip_tokenizer(merges).decode(want)
    assert_close(Tokenizer.load(tmp_path/'saved').encode(['a photo of the cat'])[0,:7], want[0,:7])  # the class of 02 reads it too

def test_long_captions_and_bad_ones(tmp_path):
    tok = clip_tokenizer(merges, L=6)
    with pytest.raises(ValueError, match="'one two' has 8 tokens.*limit is 6.*truncate"): tok.encode(['a', 'one two'])
    cut = tok.encode(['a', 'one two'], truncate=True)
    assert cut[1,0]==tok.start and cut[1,-1]==tok.end and (cut[1,1:-1]<tok.start).all() and (cut[0]==tok.end).sum()==1
    with pytest.raises(ValueError, match='brackets'): tok.encode('a cat')
    with pytest.raises(ValueError, match='not int'): tok.encode([3])
    with pytest.raises(ValueError, match='no token: numbers go from 0 to'): tok.decode([[tok.V]])
    with pytest.raises(ValueError, match='brackets'): tok.decode([3])
    for bad,why in ((['t h', 'th q e'],'two pieces'), (['th e'],"'th' is no byte"), (['t h', 't h'],'there already'), (['t 中'],"'中' is no byte")):
        with pytest.raises(ValueError, match=why): clip_tokenizer(bad)
    (tmp_path/'x.gz').write_bytes(b'no gzip')
    with pytest.raises(ValueError, match='holds no merges'): clip_tokenizer(tmp_path/'x.gz')
    assert tok.encode([]).shape==(0,6)

def test_a_zero_before_the_end_is_a_word():
    tok = clip_tokenizer([])
    assert tok.encode(['!!'])[0,:5].tolist()==[512, 0, 256, 513, 0] and tok.decode(tok.encode(['!!']))==['!!']

def vocabulary():
    "The file in the wheel of open_clip_torch, installed here or by bench/peers.sh"
    spec = importlib.util.find_spec('open_clip')
    places = [Path(p) for p in (spec.submodule_search_locations if spec else [])]+[*(root/'bench'/'.venv').glob('lib/python*/site-packages/open_clip')]
    return next((p/'bpe_simple_vocab_16e6.txt.gz' for p in places if (p/'bpe_simple_vocab_16e6.txt.gz').is_file()), None)

@pytest.mark.skipif(vocabulary() is None, reason='open_clip_torch is not installed (bash bench/peers.sh): its wheel holds the vocabulary')
def test_the_published_vocabulary():
    tok = clip_tokenizer(vocabulary())
    assert (tok.V,tok.start,tok.end,tok.L)==(49_408,49_406,49_407,77)==(CLIP_CONFIGS['ViT-B/32'].V,49_406,49_407,CLIP_CONFIGS['ViT-B/32'].L)
    ids = tok.encode(['a photo of a cat', 'a diagram', 'Hello World!'])
    assert ids[0,:8].tolist()==[49406, 320, 1125, 539, 320, 2368, 49407, 0] and ids[1,:4].tolist()==[49406, 320, 22697, 49407] and ids[2,:5].tolist()==[49406, 3306, 1002, 256, 49407]
    assert tok.decode(ids)==['a photo of a cat', 'a diagram', 'hello world !']

# ---- pixels

def picture(mode, size):
    g = torch.Generator().manual_seed(0)
    bands = [Image.frombytes('L', size, (torch.rand(size[1], size[0], generator=g)*255).byte().numpy().tobytes()) for _ in range(4)]
    rgb = Image.merge('RGB', bands[:3])
    if mode=='palette': return rgb.quantize(16)
    if mode=='palette, one colour clear': p = rgb.quantize(16); p.info['transparency'] = 3; return p
    return dict(RGB=rgb, RGBA=Image.merge('RGBA', bands), L=bands[0], LA=Image.merge('LA', bands[:2])).get(mode) or rgb.convert(mode)

def hf_pixels(im, px):
    "`transformers`' processor, the one on Pillow"
    try: from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Processor
    except ImportError: from transformers import CLIPImageProcessor as Processor
    return Processor(size=dict(shortest_edge=px), crop_size=dict(height=px, width=px))(im, return_tensors='pt')['pixel_values']

def levels(x): return (x*torch.tensor(published.CLIP_STD).view(3, 1, 1)+torch.tensor(published.CLIP_MEAN).view(3, 1, 1))*255

@pytest.mark.parametrize('size', [(224,224), (301,199), (199,301), (500,225), (225,500), (1,1), (1,9), (13,2), (224,900), (640,480), (31,32)], ids=lambda s: f'{s[0]}x{s[1]}')
@pytest.mark.parametrize('px', [224, 30])
def test_same_pixels_as_transformers(size, px):
    im = picture('RGB', size)
    assert_close(levels(clip_pixels(im, px)), levels(hf_pixels(im, px)), atol=1.01, rtol=0)

@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'L', 'LA', 'palette', 'palette, one colour clear', '1', 'CMYK', 'YCbCr'])
def test_same_pixels_for_every_mode(mode):
    import transformers
    if int(transformers.__version__.split('.')[0])<5 and ('A' in mode or 'clear' in mode): pytest.skip('before its version 5 the processor dropped transparency')
    im = picture(mode, (61,47))
    assert_close(levels(clip_pixels(im, 32)), levels(hf_pixels(im, 32)), atol=1.01, rtol=0)

@settings(max_examples=40, deadline=None)
@given(st.tuples(st.integers(1, 90), st.integers(1, 90)), st.integers(1, 40))
def test_same_pixels_for_any_size(size, px):
    im = picture('RGB', size)
    assert_close(levels(clip_pixels(im, px)), levels(hf_pixels(im, px)), atol=1.01, rtol=0)

def test_pictures_from_files_and_tensors(tmp_path):
    im = picture('RGB', (40,30)); im.save(tmp_path/'a.png')
    x = torch.frombuffer(bytearray(im.tobytes()), dtype=torch.uint8).view(30, 40, 3).movedim(2, 0)/127.5-1
    want = clip_pixels(im, 16)
    for p in (tmp_path/'a.png', str(tmp_path/'a.png'), x, x[None], [im]): assert_close(clip_pixels(p, 16), want, rtol=0, atol=0)
    assert clip_pixels([im, picture('L', (9,80))], 16).shape==(2,3,16,16)
    exif = Image.Exif(); exif[274] = 6; im.save(tmp_path/'turned.png', exif=exif)                    # a camera that was held upright
    assert_close(clip_pixels(tmp_path/'turned.png', 16), clip_pixels(im.transpose(Image.Transpose.ROTATE_270), 16), rtol=0, atol=0)
    m = make(); assert m.encode_image(clip_pixels(im, 16)).shape==(1,128)
    with pytest.raises(FileNotFoundError, match='no picture'): clip_pixels(tmp_path/'b.png')
    (tmp_path/'c.png').write_bytes(b'no picture')
    for bad,why in ((tmp_path/'c.png','cannot be read'), ([],'no pictures'), (torch.zeros(3, 4, 4).byte(),'float'), (torch.full((3,4,4), 255.),'float in'), (torch.zeros(1, 4, 4),'tensor'), (3,'Pillow'), ([3],'Pillow'),
                    (Image.new('I;16', (9,9)),'256 levels'), (Image.new('F', (9,9)),'256 levels'), (torch.full((3,4,4), float('nan')),'float in')):
        with pytest.raises(ValueError, match=why): clip_pixels(bad, 16)
    with pytest.raises(ValueError, match='px'): clip_pixels(im, 0)

def test_what_is_hardly_seen_is_refused():
    assert clip_pixels(Image.new('RGB', (2000,10)), 16).shape==(1,3,16,16)
    with pytest.raises(ValueError, match='2001 by 10 pixels.*cut it'): clip_pixels(Image.new('RGB', (2001,10)), 16)
    with pytest.raises(ValueError, match='empty'): clip_pixels(Image.new('RGB', (0,10)), 16)
