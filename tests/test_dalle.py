"DALL-E, and the pipeline that it shares with DALL-E 2: what their notebooks' cells cannot show. The models are small and untrained."
import pytest, torch
from torch import nn
from torch.testing import assert_close
from dalle_edu.clip import CLIP, CLIPConfig, embed_images, embed_texts
from dalle_edu.dalle import DALLE, complete, cosines, noise
from dalle_edu.dvae import DVAE, DVAEConfig
from dalle_edu.prior import Prior, PriorConfig
from dalle_edu.text import Tokenizer

red,stars = 'a small red circle','three green stars'

def tokenizer(): return Tokenizer.train([red, stars, 'a moon above a heart'], V=70, L=12)

@pytest.fixture(scope='module')
def parts():
    torch.manual_seed(0)
    tok = tokenizer()
    parts = dict(dvae=DVAE(DVAEConfig(K=40, D=8, blocks=1, D_code=8)), prior=Prior(PriorConfig(V=tok.V, L=tok.L, K=40, D=32, depth=2, heads=2)),
                 clip=CLIP(CLIPConfig(D=16, depth=1, heads=1, V=tok.V, L=tok.L, text_D=16, text_depth=1, text_heads=1, E=8)))
    for model in parts.values():
        for p in model.parameters(): nn.init.normal_(p, std=.3)
    return dict(tokenizer=tok, **parts)

@pytest.fixture(scope='module')
def dalle(parts): return DALLE(parts['tokenizer'], 'cpu', **{k: v for k,v in parts.items() if k != 'tokenizer'})

def test_shape_range_and_repeatability(dalle):
    x = dalle.generate([red, stars], n=3)
    assert x.shape == (2,3,3,32,32) and x.min() >= -1 and x.max() <= 1
    assert_close(x, dalle.generate([red, stars], n=3))
    assert (x != dalle.generate([red, stars], n=3, seed=1)).any()
    assert all((a != b).any() for a,b in zip(x[0,:-1], x[0,1:]))

def test_a_picture_depends_on_seed_place_and_sample_alone(dalle):
    x = dalle.generate([red, stars], n=3)
    assert_close(dalle.generate([red], n=1)[0,0], x[0,0])
    assert_close(dalle.generate([stars, stars], n=5)[1,:3], x[1])
    assert (dalle.generate([stars], n=1)[0,0] != x[1,0]).any()

def test_the_size_of_a_piece_changes_nothing(dalle):
    captions,n = [red, stars, red],2
    ids = dalle.tokenizer.encode(captions)
    def draw(ids, keys, which): return (noise(keys, 3, 32, 32) + ids.sum(1)[:,None,None,None]/1000).clamp(-1, 1)
    whole = dalle._draw(captions, n, 0, 2, 32, 256, draw)
    for chunk in (1, 4, 5): assert_close(dalle._draw(captions, n, 0, 2, 32, chunk, draw), whole)

def test_rerank_keeps_the_nearest_of_what_would_be_drawn(dalle):
    captions = [red, stars]
    many = dalle.generate(captions, n=6)
    best = dalle.generate(captions, n=2, rerank=3)
    with torch.no_grad():
        for i in range(2):
            cos = embed_images(dalle.clip, many[i])@embed_texts(dalle.clip, dalle.tokenizer.encode(captions[i:i+1]))[0]
            assert_close(best[i], many[i,cos.argsort(descending=True)[:2]])

def test_cosines_are_cosines(dalle):
    x,ids = dalle.generate([red, stars], n=3),dalle.tokenizer.encode([red, stars])
    with torch.no_grad():
        cos,images,texts = cosines(dalle.clip, ids, x),dalle.clip.encode_image(x.flatten(0, 1)).view(2, 3, -1),dalle.clip.encode_text(ids)
    assert_close(cos, torch.cosine_similarity(images, texts[:,None], dim=2))

def test_rerank_of_one_chooses_nothing(dalle, monkeypatch):
    monkeypatch.setattr('dalle_edu.dalle.cosines', lambda *a: pytest.fail('CLIP was asked'))
    dalle.generate([red], n=2)

def test_guidance_leans_on_the_caption(dalle):
    a,b = (dalle.generate([red], guidance=g) for g in (1., 4.))
    assert (a != b).any()
    assert_close(dalle.generate([red], guidance=0.), dalle.generate([stars], guidance=0.))  # none of the caption is left

def test_completion_keeps_the_rows(dalle):
    x = torch.rand(2, 3, 32, 32)*2-1
    for rows in (1, 4, 7):
        y = complete(dalle, [red, stars], x, rows, n=2)
        assert y.shape == (2,2,3,32,32)
    codes = []
    decode = dalle.dvae.decode
    dalle.dvae.decode = lambda c: codes.append(c) or decode(c)
    try: complete(dalle, [red, stars], x, 3, n=2)
    finally: del dalle.dvae.decode
    assert_close(codes[0].view(2, 2, 8, 8)[:,:,:3], dalle.dvae.encode(x)[:,None,:3].expand(-1, 2, -1, -1))

@pytest.mark.parametrize('kw,says', [(dict(captions=red), 'list of strings'), (dict(captions=[]), 'no captions'), (dict(captions=[3]), 'list of strings'), (dict(captions=None), 'list of strings'),
    (dict(n=0), 'n=0'), (dict(n=1.5), 'n=1.5'), (dict(rerank=0), 'rerank=0'), (dict(rerank='2'), "rerank='2'"), (dict(px=64), 'px=64.*no upsampler.*px=32'),
    (dict(captions=['A moon']), "'A'"), (dict(captions=['moon '*20+'moon']), 'limit is 12'), (dict(temperature=0.), 'temperature'), (dict(top_k=41), 'top_k 41'), (dict(guidance=float('inf')), 'guidance inf')], ids=lambda v: None if 'tensor' in str(v) else str(v)[:24])
def test_bad_arguments_are_named(dalle, kw, says):
    with pytest.raises(ValueError, match=says): dalle.generate(**{**dict(captions=[red]), **kw})

@pytest.mark.parametrize('rows,shape,says', [(0, (1,3,32,32), 'rows=0'), (8, (1,3,32,32), 'keep 1 to 7'), (2, (2,3,32,32), 'one for each'), (2, (1,3,64,64), '64'), (2, (3,32,32), 'one for each')])
def test_bad_completions_are_named(dalle, rows, shape, says):
    with pytest.raises(ValueError, match=says): complete(dalle, [red], torch.zeros(shape), rows)

def test_loads_from_a_folder(dalle, parts, tmp_path):
    for k,v in parts.items(): v.save(tmp_path/k) if k == 'tokenizer' else v.save_pretrained(tmp_path/k)
    again = DALLE.from_pretrained(tmp_path, device='cpu')
    assert_close(again.generate([red, stars], n=2, rerank=2), dalle.generate([red, stars], n=2, rerank=2))
    assert not any(m.training for m in again.models.values())
    with pytest.raises(FileNotFoundError, match='no prior'): (tmp_path/'prior').rename(tmp_path/'other') and DALLE.from_pretrained(tmp_path)

def test_models_that_do_not_belong_together_are_refused(parts):
    tok,models = parts['tokenizer'],{k: v for k,v in parts.items() if k != 'tokenizer'}
    with pytest.raises(ValueError, match='different K'): DALLE(tok, 'cpu', **{**models, 'dvae': DVAE(DVAEConfig(K=41, D=8, blocks=1, D_code=8))})
    with pytest.raises(ValueError, match='different V'): DALLE(Tokenizer.train([red], V=60, L=12), 'cpu', **models)
    with pytest.raises(ValueError, match='made of'): DALLE(tok, 'cpu', clip=parts['clip'])
