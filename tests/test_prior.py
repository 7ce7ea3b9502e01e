"The prior: what its notebook's cells cannot show."
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close
from dalle_edu.prior import Prior, PriorConfig, batches, blank, pick, prior_loss, recipe, sample_codes

cfg = PriorConfig(V=30, L=6, K=20, h=3, w=4, D=32, depth=2, heads=2)

@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    model = Prior(cfg)
    for p in model.parameters(): nn.init.normal_(p, std=0.3)     # both heads start at zero: every picture would be as likely
    return model.eval()

def rows(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 28, (n,6), generator=g)
    ids[:,0] = 28
    for i in range(n): ids[i,1+i%5],ids[i,2+i%5:] = 29,0          # captions of zero to four tokens
    return ids,torch.rand(n, cfg.N, generator=g)

def oracle(model, ids, uniforms, guidance=1., **kw):
    "Without a cache, the whole stream at every step"
    codes = torch.zeros(len(ids), cfg.h, cfg.w, dtype=torch.long)
    for i in range(cfg.N):
        with torch.no_grad(): c,u = (model(t, codes)[1][:,i] for t in (ids, blank(cfg.V, cfg.L).expand_as(ids)))
        codes.view(len(ids), -1)[:,i] = pick(u+guidance*(c-u), uniforms[:,i], **kw)
    return codes

@pytest.mark.parametrize('kw', [{}, dict(guidance=2.5), dict(guidance=0.), dict(temperature=.4), dict(top_k=3), dict(guidance=3., top_k=2, temperature=.7)], ids=lambda v: None if 'tensor' in str(v) else str(v))
def test_cached_is_uncached(model, kw):
    ids,u = rows(5)
    assert_close(sample_codes(model, ids, u, **kw), oracle(model, ids, u, **kw))

def test_a_row_does_not_depend_on_its_neighbours(model):
    ids,u = rows(7)
    whole = sample_codes(model, ids, u, guidance=2.)
    order = torch.tensor([3,0,6])
    assert_close(sample_codes(model, ids[order], u[order], guidance=2.), whole[order])

@pytest.mark.parametrize('m', [1, 4, 5, 11])
def test_goes_on_from_given_codes(model, m):
    ids,u = rows(4)
    whole = sample_codes(model, ids, u)
    assert_close(sample_codes(model, ids, u, given=whole.flatten(1)[:,:m]), whole)

def test_captions_are_left_as_they_were(model):
    ids,u = rows(4)
    was = ids.clone(); sample_codes(model, ids, u, guidance=2.)
    assert_close(ids, was)

def test_progress_sees_each_step(model):
    seen = []
    def hook(steps):
        for s in steps: seen.append(s); yield s
    ids,u = rows(2)
    assert_close(sample_codes(model, ids, u, progress=hook), sample_codes(model, ids, u))
    assert seen == list(range(cfg.N))

@pytest.mark.parametrize('at', range(cfg.N))
def test_no_code_is_seen_before_its_turn(model, at):
    ids,_ = rows(2)
    codes = torch.randint(0, cfg.K, (2,cfg.h,cfg.w), generator=torch.Generator().manual_seed(1))
    other = codes.clone(); other.view(2, -1)[:,at] = (codes.flatten(1)[:,at]+1)%cfg.K
    (t,a),(s,b) = model(ids, codes),model(ids, other)
    assert_close(t, s); assert_close(a[:,:at+1], b[:,:at+1])
    assert at == cfg.N-1 or (a[:,at+1] != b[:,at+1]).any()

def test_text_sees_no_later_text_and_pictures_see_all_of_it(model):
    ids,_ = rows(5)
    codes = torch.zeros(5, cfg.h, cfg.w, dtype=torch.long)
    other = ids.clone(); other[4,4] = ids[4,4]%20+1
    (t,a),(s,b) = model(ids, codes),model(other, codes)
    assert_close(t[:,:4], s[:,:4]); assert_close(a[:4], b[:4])
    assert (a[4] != b[4]).any(-1).all()

@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10**6), K=st.integers(2, 40), u=st.floats(0, 1), scale=st.sampled_from([.1,1.,30.]), temperature=st.floats(.05, 20), k=st.integers(1, 40))
def test_pick_stays_among_the_likeliest(seed, K, u, scale, temperature, k):
    logits = torch.randn(3, K, generator=torch.Generator().manual_seed(seed))*scale
    k = min(k, K)
    i = pick(logits, torch.full((3,), u), temperature, k)
    assert (i >= 0).all() and (i < K).all()
    assert all(i[b] in logits[b].topk(k).indices for b in range(3))
    j = pick(logits, torch.full((3,), min(u+.1, 1.)), temperature, k)
    assert (j >= i).all()                                        # the inverse of a rising function rises

def test_loss_is_per_row(model):
    ids,_ = rows(6)
    codes = torch.randint(0, cfg.K, (6,cfg.h,cfg.w), generator=torch.Generator().manual_seed(2))
    whole,terms = prior_loss(model, dict(ids=ids, codes=codes), 0)
    halves = [prior_loss(model, dict(ids=ids[i], codes=codes[i]), 0) for i in (slice(0, 3), slice(3, 6))]
    assert_close(whole, (halves[0][0]+halves[1][0])/2)           # one process and two agree
    assert_close(terms['text'], (halves[0][1]['text']+halves[1][1]['text'])/2)
    assert_close(whole, terms['text']/8 + terms['image']/cfg.N*7/8)

def test_saved_and_loaded(model, tmp_path):
    ids,u = rows(3)
    model.save_pretrained(tmp_path/'prior')
    assert_close(sample_codes(Prior.from_pretrained(tmp_path/'prior'), ids, u), sample_codes(model, ids, u))

class Tok:
    V,L = 30,6
    def encode(self, captions): return torch.tensor([[28,5,6,29,0,0]]).expand(len(captions), -1)

class Codes(nn.Module):
    def __init__(self): super().__init__(); self.p = nn.Parameter(torch.zeros(1))
    def encode(self, x): return torch.zeros(len(x), 3, 4, dtype=torch.long)

def test_a_share_of_the_captions_is_blanked_by_seed_and_step():
    make = batches(lambda seed, step, rank, n: (torch.zeros(n, 3, 4, 4), ['a']*n), Tok(), Codes(), blanks=.3)
    a,b,c = make(0, 5, 0, 2000)['ids'],make(0, 5, 0, 2000)['ids'],make(0, 6, 0, 2000)['ids']
    assert_close(a, b); assert (a != c).any()
    none = (a == blank(30, 6)).all(1)
    assert abs(none.float().mean()-.3) < .05 and (a[~none] == Tok().encode(['a'])).all()

@pytest.mark.parametrize('kw,says', [(dict(ids=torch.zeros(2, 5, dtype=torch.long)), 'need .B,6.'), (dict(ids=torch.full((2, 6), 30)), '0 to 29'), (dict(uniforms=torch.rand(2, 11)), 'need .2,12.'),
    (dict(uniforms=torch.rand(3, 12)), 'need .2,12.'), (dict(temperature=0.), 'above 0'), (dict(temperature=float('nan')), 'above 0'), (dict(top_k=0), '1 to 20'), (dict(top_k=21), '1 to 20'),
    (dict(guidance=float('nan')), 'guidance nan'), (dict(guidance=-1.), 'guidance -1'), (dict(given=torch.zeros(2, 12, dtype=torch.long)), 'm below 12'), (dict(given=torch.zeros(3, 2, dtype=torch.long)), 'm below 12')], ids=lambda v: None if 'tensor' in str(v) else str(v)[:24])
def test_bad_arguments_are_named(model, kw, says):
    ids,u = rows(2)
    with pytest.raises(ValueError, match=says): sample_codes(model, **{**dict(ids=ids, uniforms=u), **kw})

def test_bad_codes_and_sizes_are_named(model):
    with pytest.raises(ValueError, match='need .B,3,4.'): model(rows(2)[0], torch.zeros(2, 4, 4, dtype=torch.long))
    for f in (PriorConfig.size, recipe):
        with pytest.raises(ValueError, match="'gpu', 'laptop', 'paper'"): f('huge')
