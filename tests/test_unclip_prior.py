"The unCLIP prior: what its notebook's cells cannot show. Tiny untrained models with random weights."
import json, math
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close
import dalle_edu.unclip_prior as module
from dalle_edu.clip import CLIP, CLIPConfig
from dalle_edu.diffusion import diffusion_loss, timesteps
from dalle_edu.train import fit
from dalle_edu.unclip_prior import UnCLIPPrior, UnCLIPPriorConfig, batches, condition, recipe, sample_embedding, unclip_prior_loss

cfg = UnCLIPPriorConfig(V=30, L=6, E=8, D=32, depth=2, heads=2, S=50)
quick = settings(max_examples=25, deadline=None)

def make(kind=UnCLIPPrior, **over):
    torch.manual_seed(0)
    model = kind(UnCLIPPriorConfig(**{**vars(cfg), **over}))
    for p in model.parameters(): nn.init.normal_(p, std=.3)
    return model.eval()

@pytest.fixture(scope='module')
def model(): return make()

def rows(n, seed=0, E=8):
    "Captions of zero to three words with start, end and pads, and embeddings of length 1"
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 28, (n,6), generator=g)
    ids[:,0] = 28
    for i in range(n): ids[i,1+i%4],ids[i,2+i%4:] = 29,0
    z_t,z_i = (F.normalize(torch.randn(n, E, generator=g), dim=1) for _ in range(2))
    return dict(ids=ids, z_t=z_t, z_i=z_i)

def noise(*shape, seed=1): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

def oracle(model, ids, z_t, xT, steps, guidance):
    "One caption and one candidate after the other; DDIM written out for a model that predicts x0"
    out,ts = [],timesteps(model.cfg.S, steps)
    yes,no = torch.ones(1, dtype=torch.bool),torch.zeros(1, dtype=torch.bool)
    for r in range(len(ids)):
        found = []
        for x in xT[r]:
            x = x[None]
            for now,then in zip(ts, ts[1:]):
                t = torch.tensor([now])
                with torch.no_grad(): c,u = (model(x, t, condition(ids[r:r+1], z_t[r:r+1], g)) for g in (yes, no))
                x0 = u+guidance*(c-u)
                a,b = model.abar[now],model.abar[then] if then>=0 else torch.tensor(1.)
                x = b.sqrt()*x0+(1-b).sqrt()*(x-a.sqrt()*x0)/(1-a).sqrt()
            found.append(x[0]/x[0].norm())
        out.append(max(found, key=lambda z: (z@z_t[r]).item()))
    return torch.stack(out)

# sizes

@pytest.mark.parametrize('B', [1, 5])
def test_shape(model, B):
    r = rows(B)
    assert model(noise(B, 8), torch.arange(B), condition(r['ids'], r['z_t'])).shape == (B,8)

def test_paper_size_has_the_papers_blocks():
    with torch.device('meta'): big = UnCLIPPrior(UnCLIPPriorConfig.size('paper'))
    D = 2048
    assert sum(p.numel() for p in big.body.parameters()) == 24*(12*D*D+13*D)              # 1.21 thousand million
    assert big.pos.shape == (256+4,D) and big.out.weight.shape == (1024,D)

@pytest.mark.parametrize('name', ['laptop', 'gpu'])
def test_recipes_are_plain_and_fit_takes_them(name):
    assert {'steps','batch','lr'} <= recipe(name).keys()
    json.dumps(recipe(name)); json.dumps(vars(UnCLIPPriorConfig.size(name)))

def test_unknown_sizes_are_named():
    for f in (UnCLIPPriorConfig.size, recipe):
        with pytest.raises(ValueError, match="(?s)'huge'.*'gpu', 'laptop'"): f('huge')

def test_laptop_and_gpu_fit_their_clip():
    for name in ('laptop', 'gpu'):
        a,b = UnCLIPPriorConfig.size(name),CLIPConfig.size(name)
        assert (a.V,a.L,a.E) == (b.V,b.L,b.E)

# what the answer depends on

def test_a_dropped_caption_cannot_matter(model):
    a,b = rows(6),rows(6, seed=5)
    z,t = noise(6, 8),torch.arange(6)
    given = torch.tensor([True,False]*3)
    x = model(z, t, condition(a['ids'], a['z_t'], given))
    y = model(z, t, condition(torch.where(given[:,None], a['ids'], b['ids']), torch.where(given[:,None], a['z_t'], b['z_t']), given))
    assert_close(x, y, rtol=0, atol=0)
    full = model(z, t, condition(a['ids'], a['z_t']))
    assert_close(x[given], full[given]); assert (x[~given] != full[~given]).any(1).all()
    blank = model(z, t, condition(torch.zeros_like(a['ids']), 0*a['z_t'], torch.zeros(6, dtype=torch.bool)))
    assert_close(x[~given], blank[~given])

@pytest.mark.parametrize('what', ['z','t','z_t','ids'])
def test_everything_that_is_told_matters(model, what):
    "A prior that never saw its noised input would fail here"
    r,z,t = rows(4),noise(4, 8),torch.tensor([0,10,30,49])
    said = dict(ids=r['ids'].clone(), z_t=r['z_t'])
    was = model(z, t, condition(**said))
    if what == 'ids': said['ids'][:,1] = said['ids'][:,1]%20+1
    if what == 'z_t': said['z_t'] = -said['z_t']
    now = model(-z if what == 'z' else z, (t+7)%50 if what == 't' else t, condition(**said))
    assert ((was-now).abs().amax(1) > 1e-4).all()

def test_every_word_matters(model):
    r = rows(4); ids,z,t = r['ids'][3:],noise(1, 8),torch.tensor([20])                     # start, three words, end, pad
    was = model(z, t, condition(ids, r['z_t'][3:]))
    for place in range(5):
        other = ids.clone(); other[0,place] = other[0,place]%20+1
        assert (model(z, t, condition(other, r['z_t'][3:]))-was).abs().max() > 1e-4

@pytest.mark.parametrize('words', range(4))
def test_nobody_looks_at_pads(words):
    model = make(); r = rows(4); one = {k: v[words:words+1] for k,v in r.items()}
    z,t,given = noise(1, 8),torch.tensor([20]),torch.ones(1, dtype=torch.bool)
    def both(): return [model(z, t, condition(one['ids'], one['z_t'], g)) for g in (given, ~given)]
    told,blank = both()
    with torch.no_grad(): model.pos[:6][one['ids'][0] == 0] += 3.
    told2,blank2 = both()
    assert_close(told, told2, rtol=0, atol=0)
    assert words == 4 or (blank != blank2).any()                                           # the blanked caption has no pads

def test_a_row_does_not_depend_on_its_neighbours(model):
    r,z,t = rows(7),noise(7, 8),torch.arange(7)
    whole = model(z, t, condition(r['ids'], r['z_t']))
    order = torch.tensor([3,0,6])
    assert_close(model(z[order], t[order], condition(r['ids'][order], r['z_t'][order])), whole[order], atol=1e-5, rtol=1e-5)

def test_text_is_computed_once(model):
    r = rows(3); said = condition(r['ids'], r['z_t'])
    a,b = (model.body(model.stream(noise(3, 8, seed=s), torch.full((3,), s), said), model.mask(said['ids'], said['given'])) for s in (3, 40))
    assert_close(a[:,:7], b[:,:7], rtol=0, atol=0); assert (a[:,7:] != b[:,7:]).any(-1).all()

# the loss

class Zero(UnCLIPPrior):
    def forward(self, z, t, cond): return torch.zeros_like(z)

@quick
@given(seed=st.integers(0, 10**6), n=st.integers(1, 9), E=st.integers(2, 40))
def test_saying_zero_costs_one(seed, n, E):
    m = Zero(UnCLIPPriorConfig(**{**vars(cfg), 'E':E}))
    assert_close(unclip_prior_loss(m, rows(n, seed, E), 0)[0], torch.tensor(1.))

class Perfect(UnCLIPPrior):
    def forward(self, z, t, cond): return self.answer*self.cfg.E**.5

def test_saying_the_embedding_costs_nothing_and_its_opposite_four():
    m,r = Perfect(cfg),rows(5)
    m.answer = r['z_i']; assert unclip_prior_loss(m, r, 0)[0] < 1e-10
    m.answer = -r['z_i']; assert_close(unclip_prior_loss(m, r, 0)[0], torch.tensor(4.))

def test_two_half_batches_give_the_gradient_of_one(model, monkeypatch):
    "What two processes average is what one computes, the noise held still for each row"
    def still(m, z, cond, abar, kind): return diffusion_loss(m, z, cond, abar, kind, (z[:,0].abs()*10).long()%50, z.flip(1))
    monkeypatch.setattr(module, 'diffusion_loss', still)
    m,r = make(drop=0.),rows(8)
    def grads(*parts):
        m.zero_grad()
        loss = sum(unclip_prior_loss(m, {k: v[p] for k,v in r.items()}, 0)[0] for p in parts)/len(parts)
        loss.backward()
        return loss.detach(),[p.grad.clone() for p in m.parameters() if p.grad is not None]
    assert_close(grads(slice(0, 8)), grads(slice(0, 4), slice(4, 8)), rtol=1e-4, atol=1e-4)
    twice = {k: torch.cat([v, v]) for k,v in r.items()}
    assert_close(unclip_prior_loss(m, twice, 0)[0], unclip_prior_loss(m, r, 0)[0])

def test_a_share_of_the_captions_is_dropped(monkeypatch):
    seen = []
    monkeypatch.setattr(module, 'diffusion_loss', lambda m, z, cond, abar, kind: seen.append((z, cond, kind)) or z.sum(1))
    r = {k: v.repeat(500, *[1]*(v.ndim-1)) for k,v in rows(4).items()}
    unclip_prior_loss(make(drop=.3), r, 0)
    z,cond,kind = seen[0]
    assert kind == 'x0' and abs((~cond['given']).float().mean()-.3) < .04
    assert_close(z, r['z_i']*8**.5); assert_close(cond['z_t'].norm(dim=1), torch.full((2000,), 8**.5))

def test_every_parameter_is_trained():
    m = make(drop=.5); m.train()
    torch.manual_seed(0)
    unclip_prior_loss(m, {k: v.repeat(8, *[1]*(v.ndim-1)) for k,v in rows(4).items()}, 0)[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and (p.grad != 0).any() for p in m.parameters())

# sampling

@pytest.mark.parametrize('guidance', [0., 1., 2.5])
@pytest.mark.parametrize('steps', [1, 4])
def test_sampling_is_ddim_row_by_row(model, guidance, steps):
    r,xT = rows(3),noise(3, 3, 8)
    assert_close(sample_embedding(model, r['ids'], r['z_t'], xT, steps, guidance), oracle(model, r['ids'], r['z_t'], xT, steps, guidance), atol=1e-4, rtol=1e-4)

@quick
@given(seed=st.integers(0, 10**6), steps=st.integers(1, 8), guidance=st.sampled_from([0.,.5,1.,3.,20.]), n=st.integers(1, 3))
def test_length_is_one(seed, steps, guidance, n):
    r = rows(4, seed)
    z = sample_embedding(make(), r['ids'], r['z_t'], noise(4, n, 8, seed=seed), steps, guidance)
    assert z.shape == (4,8) and not z.requires_grad
    assert_close(z.norm(dim=1), torch.ones(4))

def test_guidance_one_is_none(model, monkeypatch):
    r,xT = rows(3),noise(3, 8)
    calls = []
    class Count(UnCLIPPrior):
        def forward(self, z, t, cond): calls.append(len(z)); return super().forward(z, t, cond)
    m = make(Count)
    plain = sample_embedding(m, r['ids'], r['z_t'], xT, 4, 1.)
    assert calls == [3]*4                                                                  # the caption alone, once a step
    sample_embedding(m, r['ids'], r['z_t'], xT, 4, 2.)
    assert calls[4:] == [6]*4
    assert_close(plain, oracle(model, r['ids'], r['z_t'], xT[:,None], 4, 1.), atol=1e-4, rtol=1e-4)

def test_guidance_zero_ignores_the_caption(model):
    a,b,xT = rows(3),rows(3, seed=7),noise(3, 8)
    assert_close(*(sample_embedding(model, r['ids'], r['z_t'], xT, 4, 0.) for r in (a, b)))

def test_a_draw_does_not_depend_on_the_batch(model):
    r,xT = rows(7),noise(7, 2, 8)
    whole = sample_embedding(model, r['ids'], r['z_t'], xT, 5, 2.)
    for order in ([4], [6,1], [2,2,0]): assert_close(sample_embedding(model, r['ids'][order], r['z_t'][order], xT[order], 5, 2.), whole[order], atol=1e-4, rtol=1e-4)

def test_more_candidates_never_lie_farther_from_the_caption(model):
    r,xT = rows(6),noise(6, 5, 8)
    near = torch.stack([(sample_embedding(model, r['ids'], r['z_t'], xT[:,:n], 3)*r['z_t']).sum(1) for n in range(1, 6)])
    assert (near.diff(dim=0) > -1e-5).all() and (near[-1] > near[0]+1e-4).any()

def test_another_noise_another_embedding(model):
    r = rows(4)
    a,b = (sample_embedding(model, r['ids'], r['z_t'], noise(4, 8, seed=s), 5) for s in (1, 2))
    assert ((a-b).norm(dim=1) > 1e-5).all()

def test_inputs_are_left_as_they_were_and_progress_sees_each_step(model):
    r,xT,seen = rows(3),noise(3, 2, 8),[]
    was = [v.clone() for v in (r['ids'], r['z_t'], xT)]
    def hook(steps):
        for s in steps: seen.append(s); yield s
    sample_embedding(model, r['ids'], r['z_t'], xT, 4, 3., progress=hook)
    assert_close([r['ids'], r['z_t'], xT], was, rtol=0, atol=0); assert len(seen) == 4

@pytest.mark.parametrize('kw,says', [
    (dict(ids=torch.ones(2, 5, dtype=torch.long)), r'ids of shape \(2, 5\).*\(2, 6\).*tokenizer'), (dict(ids=torch.full((2, 6), 30)), '0 to 29.*tokenizer'), (dict(ids=torch.full((2, 6), -1)), '0 to 29'),
    (dict(z_t=F.normalize(torch.ones(2, 4), dim=1)), r'z_t of shape \(2, 4\).*\(2, 8\).*CLIP'), (dict(z_t=torch.ones(2, 8)), 'length 2.83.*embed_texts'), (dict(z_t=torch.full((2, 8), math.nan)), 'length nan'),
    (dict(z_t=F.normalize(torch.ones(3, 8), dim=1)), r'z_t of shape \(3, 8\)'), (dict(xT=torch.randn(2, 4)), r'xT.*need \(2,8\), or \(2,n,8\)'), (dict(xT=torch.randn(3, 8)), 'for 2 captions'), (dict(xT=torch.randn(2, 0, 8)), 'for n candidates'),
    (dict(xT=torch.randn(2, 1, 1, 8)), r'need \(2,8\)'), (dict(guidance=-1.), 'guidance -1.0: must be 0 or more'), (dict(guidance=math.nan), 'guidance nan'), (dict(guidance=math.inf), 'guidance inf'), (dict(steps=0), '0 sampling steps.*1 to 50'), (dict(steps=51), '51 sampling steps.*1 to 50')], ids=lambda v: None if 'tensor' in str(v) else str(v)[:24])
def test_bad_arguments_are_named(model, kw, says):
    r = rows(2)
    with pytest.raises(ValueError, match=says): sample_embedding(model, **{**dict(ids=r['ids'], z_t=r['z_t'], xT=noise(2, 8)), **kw})

@pytest.mark.parametrize('kw,says', [(dict(ids=torch.ones(2, 7, dtype=torch.long)), 'ids of shape .2, 7.'), (dict(z_i=torch.ones(2, 9)/3), 'z of shape .2, 9.'), (dict(z_t=torch.ones(2, 9)/3), 'z_t of shape .2, 9.')], ids=lambda v: None if 'tensor' in str(v) else str(v))
def test_bad_batches_are_named_in_training(model, kw, says):
    with pytest.raises(ValueError, match=says): unclip_prior_loss(model, {**rows(2), **kw}, 0)

# batches, training, saving

class Tok:
    V,L = 200,32
    def encode(self, captions): return torch.tensor([[198,5,6,199]+[0]*28]).expand(len(captions), -1)

def draw(seed, step, rank, n): return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed*100+step*10+rank))*2-1,['a']*n

def test_batches_are_a_function_of_their_arguments():
    torch.manual_seed(0); clip = CLIP(CLIPConfig()).train()
    was = {k: v.clone() for k,v in clip.state_dict().items()}
    make_batch = batches(draw, Tok(), clip)
    a,b,c = make_batch(0, 1, 0, 4),make_batch(0, 1, 0, 4),make_batch(0, 2, 0, 4)
    assert_close(a, b, rtol=0, atol=0); assert (a['z_i'] != c['z_i']).any()
    assert {k: tuple(v.shape) for k,v in a.items()} == dict(ids=(4,32), z_t=(4,128), z_i=(4,128))
    assert not clip.training and not any(v.requires_grad for v in a.values())
    assert_close(a['z_t'].norm(dim=1), torch.ones(4)); assert_close(a['z_i'].norm(dim=1), torch.ones(4))
    assert_close(dict(clip.state_dict()), was, rtol=0, atol=0)

def from_rows(seed, step, rank, n): return rows(n, seed*1000+step)

def test_a_killed_training_goes_on(tmp_path):
    how = dict(steps=6, batch=4, lr=1e-2, warmup=2, progress=False, device='cpu', precision='fp32', log_every=1, save_every=2)
    whole = make(); fit(whole, unclip_prior_loss, from_rows, **how)
    class Killed(Exception): pass
    def kill(row):
        if row['step'] == 5: raise Killed
    cut = make()
    with pytest.raises(Killed): fit(cut, unclip_prior_loss, from_rows, **how, folder=tmp_path, callback=kill)
    cut = make(); fit(cut, unclip_prior_loss, from_rows, **how, folder=tmp_path)
    assert_close(dict(cut.state_dict()), dict(whole.state_dict()), rtol=0, atol=0)
    assert any((a != b).any() for a,b in zip(whole.parameters(), make().parameters()))

def test_saved_and_loaded(model, tmp_path):
    r,xT = rows(3),noise(3, 8)
    model.save_pretrained(tmp_path/'full'); model.save_pretrained(tmp_path/'half', dtype=torch.float16)
    full,half = (UnCLIPPrior.from_pretrained(tmp_path/n) for n in ('full','half'))
    want = sample_embedding(model, r['ids'], r['z_t'], xT, 4)
    assert full.cfg == half.cfg == cfg and 'abar' not in full.state_dict()
    assert_close(sample_embedding(full, r['ids'], r['z_t'], xT, 4), want, rtol=0, atol=0)
    assert_close(sample_embedding(half, r['ids'], r['z_t'], xT, 4), want, atol=.05, rtol=0)

def test_autocast(model):
    r,z,t = rows(4),noise(4, 8),torch.arange(4)
    said = condition(r['ids'], r['z_t'], torch.tensor([True,False]*2))
    with torch.autocast('cpu', torch.bfloat16): low = model(z, t, said).float()
    want = model(z, t, said)
    assert (low-want).norm() < .1*want.norm()
