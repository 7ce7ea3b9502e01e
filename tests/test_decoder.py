"The decoder: what its notebook's cells cannot show. Tiny untrained models with random weights."
import json, math
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close
import dalle_edu.decoder as module
from dalle_edu.clip import CLIP, CLIPConfig
from dalle_edu.decoder import Decoder, DecoderConfig, batches, condition, decoder_loss, recipe, sample_pixels, scaled
from dalle_edu.diffusion import diffusion_loss, timesteps
from dalle_edu.train import fit
from dalle_edu.text import Tokenizer
from dalle_edu.unclip_prior import UnCLIPPriorConfig

cfg = DecoderConfig(px=8, E=8, tokens=2, V=30, L=6, D=8, mults=(1,2), attn=(2,), trunk=1, head=8, S=50)
quick = settings(max_examples=20, deadline=None)

def make(kind=Decoder, **over):
    torch.manual_seed(0)
    model = kind(DecoderConfig(**{**vars(cfg), **over}))
    for p in model.parameters(): nn.init.normal_(p, std=.2)              # the last layers start at zero
    return model.eval()

@pytest.fixture(scope='module')
def model(): return make()

def noise(*shape, seed=1): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def unit(n, seed=0, E=8): return F.normalize(noise(n, E, seed=seed), dim=1)
def pictures(n, px=8, seed=0): return torch.rand(n, 3, px, px, generator=torch.Generator().manual_seed(seed))*2-1
def says(n, seed=0, L=6):
    "Captions: one to five words, then pads"
    g = torch.Generator().manual_seed(seed)
    return torch.randint(1, 30, (n, L), generator=g)*(torch.arange(L)<torch.randint(1, L, (n, 1), generator=g))
def told(n, seed=0): return dict(pixels=pictures(n, seed=seed), z_i=unit(n, seed), ids=says(n, seed))
def cond(n, seed=0): return condition(unit(n, seed), says(n, seed), 6)
def some(c, i): return {k: v[i] for k,v in c.items()}

def oracle(model, z_i, xT, ids, steps, guidance):
    "One picture after the other; DDIM written out for x0, the predicted picture kept in [-1,1]"
    out,ts = [],timesteps(model.cfg.S, steps)
    for z,words,x in zip(z_i*model.cfg.E**.5, ids, xT):
        x = x[None]
        for now,then in zip(ts, ts[1:]):
            t = torch.tensor([now])
            with torch.no_grad(): c,u = model(x, t, dict(z=z[None], ids=words[None])),model(x, t, dict(z=model.null[None], ids=0*words[None]))
            a,b = model.abar[now],model.abar[then] if then>=0 else torch.tensor(1.)
            x0 = (u+guidance*(c-u)).clamp(-1, 1)
            x = b.sqrt()*x0+(1-b).sqrt()*(x-a.sqrt()*x0)/(1-a).sqrt()
        out.append(x[0].clamp(-1, 1))
    return torch.stack(out)

# sizes

@pytest.mark.parametrize('over', [dict(), dict(patch=1, mults=(1,2,2)), dict(attn=(4,2)), dict(tokens=1), dict(px=16, blocks=2, attn=(8,4)), dict(dropout=.5), dict(trunk=0), dict(trunk=3)], ids=lambda v: None if 'tensor' in str(v) else str(v))
def test_shape(over):
    m = make(**over); px = m.cfg.px
    assert m(noise(3, 3, px, px), torch.arange(3), cond(3)).shape == (3,3,px,px)

def test_paper_size_is_of_the_papers_order():
    with torch.device('meta'): big = Decoder(DecoderConfig.size('paper'))
    n = sum(p.numel() for p in big.parameters())
    assert 1.5e9 < n < 3e9                                                # GLIDE's U-Net: 2.3 thousand million (§4.1)
    assert big.cfg.unet.px == 64 and big.tokens.weight.shape == (4*1024,1024) and (big.cfg.drop,big.cfg.drop_text) == (.1,.5) # §2.1

def test_laptop_size_is_small_enough_to_ship():
    with torch.device('meta'): m = Decoder(DecoderConfig.size('laptop'))
    assert sum(p.numel() for p in m.parameters()) < 4_000_000             # 8 MB in half precision

@pytest.mark.parametrize('name', ['laptop', 'gpu'])
def test_recipes_are_plain_and_sizes_belong_together(name):
    assert {'steps','batch','lr'} <= recipe(name).keys()
    json.dumps(recipe(name)); json.dumps(vars(DecoderConfig.size(name)))
    a,b,c = DecoderConfig.size(name),CLIPConfig.size(name),UnCLIPPriorConfig.size(name)
    assert a.E == b.E == c.E and a.px == b.px

def test_unknown_sizes_are_named():
    for f in (DecoderConfig.size, recipe):
        with pytest.raises(ValueError, match="(?s)'huge'.*'gpu', 'laptop'"): f('huge')

@quick
@given(seed=st.integers(0, 10**6), n=st.integers(1, 5), E=st.integers(1, 300))
def test_scaled_has_numbers_of_mean_square_one(seed, n, E): assert_close(scaled(unit(n, seed, E)).pow(2).mean(1), torch.ones(n))

# what the answer depends on

@pytest.mark.parametrize('what', ['xt','t','z','ids'])
def test_everything_that_is_told_matters(model, what):
    xt,t,c = noise(4, 3, 8, 8),torch.tensor([0,10,30,49]),cond(4)
    was = model(xt, t, c)
    now = model(-xt if what == 'xt' else xt, (t+7)%50 if what == 't' else t, {**c, what: cond(4, seed=5)[what]} if what in c else c)
    assert ((was-now).abs().flatten(1).amax(1) > 1e-4).all()

@pytest.mark.parametrize('what', ['z','ids'])
@pytest.mark.parametrize('way', ['time','tokens'])
def test_embedding_and_caption_come_in_two_ways(way, what):
    m = make(); xt,t = noise(2, 3, 8, 8),torch.tensor([5,40])
    one,two = cond(2),{**cond(2), what: cond(2, seed=5)[what]}
    ways = dict(time=m.unet.cond, tokens=m.unet.mid[0].context)
    with torch.no_grad():
        ways['tokens' if way == 'time' else 'time'].weight.zero_()        # close the other one
        assert ((m(xt, t, one)-m(xt, t, two)).abs().flatten(1).amax(1) > 1e-5).all()
        ways[way].weight.zero_()
        if what == 'ids': two['ids'] = torch.where(one['ids'] != 0, one['ids']%29+1, 0) # other words, as many: how many there are is seen by attention itself
        assert_close(m(xt, t, one), m(xt, t, two), rtol=0, atol=0)

@quick
@given(seed=st.integers(0, 10**6))
def test_order_reaches_the_tokens_and_not_the_bag(seed):
    m,ids = make(),says(3, seed).clamp(min=1)                             # no pads
    turned = ids.flip(1)
    xt,t,z = noise(3, 3, 8, 8),torch.tensor([5,20,40]),scaled(unit(3))
    differ = (m(xt, t, dict(z=z, ids=ids))-m(xt, t, dict(z=z, ids=turned))).abs().flatten(1).amax(1)
    assert ((differ > 0) | (ids == turned).all(1)).all()
    with torch.no_grad(): m.unet.mid[0].context.weight.zero_()
    assert_close(m(xt, t, dict(z=z, ids=ids)), m(xt, t, dict(z=z, ids=turned)), rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize('trunk', [0, 2])
def test_pads_are_not_seen(trunk):
    "The embedding of the pad may be anything"
    m,xt,t,c = make(trunk=trunk),noise(4, 3, 8, 8),torch.arange(4),cond(4)
    c['ids'][0] = 0                                                       # no caption
    was = m(xt, t, c)
    with torch.no_grad(): m.word.weight[0] += 5
    assert_close(m(xt, t, c), was, rtol=0, atol=0)

def test_a_picture_does_not_depend_on_its_neighbours(model):
    xt,t,c = noise(6, 3, 8, 8),torch.arange(6),cond(6)
    whole = model(xt, t, c)
    for order in ([4], [5,0], [2,2,1]): assert_close(model(xt[order], t[order], some(c, order)), whole[order], atol=1e-4, rtol=1e-4)

# the loss

def test_an_untrained_decoder_pays_what_zero_pays(monkeypatch):
    "mean x0² / max(1-abar, .2), at each noise level"
    torch.manual_seed(0)
    fresh,x = Decoder(cfg),pictures(1)
    for t in (3, 20, 45):
        monkeypatch.setattr(module, 'sample_t', lambda n, S, device, **kw: torch.full((n,), t))
        a = fresh.abar[t]
        with torch.no_grad(): paid = decoder_loss(fresh, dict(pixels=x.expand(40, -1, -1, -1), z_i=unit(40), ids=says(40)), 0)[0]
        assert_close(paid, x.pow(2).mean()/max(1-a, torch.tensor(.2)))

def test_two_half_batches_give_the_gradient_of_one(monkeypatch):
    "What two processes average is what one computes, the noise held still for each picture"
    def still(m, x0, z, abar, kind, t): return diffusion_loss(m, x0, z, abar, kind, (x0[:,0,0,0].abs()*49).long(), x0.flip(2))
    monkeypatch.setattr(module, 'diffusion_loss', still)
    monkeypatch.setattr(module, 'sample_t', lambda n, S, device, **kw: torch.full((n,), 20))
    m,b = make(drop=0., drop_text=0.),told(8)
    def grads(*parts):
        m.zero_grad()
        loss = sum(decoder_loss(m, {k: v[p] for k,v in b.items()}, 0)[0] for p in parts)/len(parts)
        loss.backward()
        return loss.detach(),[p.grad.clone() for p in m.parameters() if p.grad is not None]
    assert_close(grads(slice(0, 8)), grads(slice(0, 4), slice(4, 8)), rtol=1e-3, atol=1e-4)
    twice = {k: torch.cat([v, v]) for k,v in b.items()}
    assert_close(decoder_loss(m, twice, 0)[0], decoder_loss(m, b, 0)[0])

def test_what_the_loss_asks_for(monkeypatch):
    seen = []
    monkeypatch.setattr(module, 'diffusion_loss', lambda m, x0, c, abar, kind, t: seen.append((c, kind, t)) or x0.flatten(1).sum(1))
    m,z_i,ids = make(drop=.3, drop_text=.4, S=1000),unit(4000),says(4000)
    decoder_loss(m, dict(pixels=torch.zeros(4000, 3, 8, 8), z_i=z_i, ids=ids), 0)
    c,kind,t = seen[0]
    deaf,silent = (c['z'] == m.null).all(1),(c['ids'] == 0).all(1)
    assert kind == 'x0' and abs(deaf.float().mean()-.3) < .03 and abs(silent.float().mean()-.4) < .03
    assert abs((deaf&silent).float().mean()-.12) < .02                    # one does not ask the other
    assert_close(c['z'][~deaf], scaled(z_i)[~deaf]); assert_close(c['ids'][~silent], ids[~silent])
    ratio = (t.clamp(min=1)/1000*math.pi/2).tan().log()                   # of noise over signal
    assert abs(ratio.mean()-1.2) < .08 and abs(ratio.std()-1.2) < .08 and t.min() >= 0 and t.max() < 1000

@pytest.mark.parametrize('what,key', [('drop','z_i'), ('drop_text','ids')])
def test_what_is_always_dropped_does_not_matter(what, key):
    m,a = make(**{what: 1.}),told(4)
    b = {**a, key: told(4, seed=9)[key]}
    paid = []
    for x in (a, b): torch.manual_seed(3); paid.append(decoder_loss(m, x, 0)[0])
    assert_close(*paid, rtol=0, atol=0)
    paid[0].backward(); assert what == 'drop_text' or (m.null.grad != 0).all()
    m.cfg.__dict__[what] = 0.
    torch.manual_seed(3); assert decoder_loss(m, a, 0)[0] != paid[0]

def test_every_parameter_is_trained():
    m = make(drop=.5).train(); torch.manual_seed(0)
    decoder_loss(m, dict(told(64), ids=torch.arange(1, 385).view(64, 6)%29+1), 0)[0].backward()
    m.word.weight.grad[0] = 1.; assert all(p.grad is not None and p.grad.isfinite().all() and (p.grad != 0).any() for p in m.parameters())

# sampling

@pytest.mark.parametrize('guidance', [0., 1., 2.5])
@pytest.mark.parametrize('steps', [1, 4])
def test_sampling_is_ddim_picture_by_picture(model, guidance, steps):
    z_i,xT,ids = unit(3),noise(3, 3, 8, 8),says(3)
    assert_close(sample_pixels(model, z_i, xT, ids, steps, guidance), oracle(model, z_i, xT, ids, steps, guidance), atol=1e-3, rtol=1e-3)
    assert_close(sample_pixels(model, z_i, xT, None, steps, guidance), oracle(model, z_i, xT, 0*ids, steps, guidance), atol=1e-3, rtol=1e-3)

@quick
@given(seed=st.integers(0, 10**6), steps=st.integers(1, 6), guidance=st.sampled_from([0.,.5,1.,3.,20.]), big=st.sampled_from([.1,1.,10.]))
def test_pixels_lie_in_range(seed, steps, guidance, big):
    x = sample_pixels(make(), unit(2, seed)*big, noise(2, 3, 8, 8, seed=seed), says(2, seed), steps, guidance)
    assert x.shape == (2,3,8,8) and x.abs().max() <= 1 and x.isfinite().all() and not x.requires_grad

def test_guidance_one_is_none_and_zero_ignores_what_is_told():
    calls = []
    class Count(Decoder):
        def forward(self, xt, t, cond): calls.append(len(xt)); return super().forward(xt, t, cond)
    m,xT = make(Count),noise(3, 3, 8, 8)
    sample_pixels(m, unit(3), xT, says(3), 4, 1.); assert calls == [3]*4   # what is told alone, once a step
    sample_pixels(m, unit(3), xT, says(3), 4, 2.); assert calls[4:] == [6]*4
    assert_close(*(sample_pixels(m, unit(3, s), xT, says(3, s), 4, 0.) for s in (0, 5)))
    a,b = (sample_pixels(m, unit(3), xT, says(3, s), 4, 1.) for s in (0, 5)); assert (a != b).flatten(1).any(1).all()

def test_a_drawing_does_not_depend_on_the_batch(model):
    z_i,xT,ids = unit(6),noise(6, 3, 8, 8),says(6)
    whole = sample_pixels(model, z_i, xT, ids, 4, 2.)
    for order in ([4], [5,0], [2,2,1]): assert_close(sample_pixels(model, z_i[order], xT[order], ids[order], 4, 2.), whole[order], atol=1e-3, rtol=1e-3)

def test_inputs_are_left_as_they_were_and_progress_sees_each_step(model):
    z_i,xT,ids,seen = unit(3),noise(3, 3, 8, 8),says(3),[]
    was = z_i.clone(),xT.clone(),ids.clone()
    def hook(steps):
        for s in steps: seen.append(s); yield s
    sample_pixels(model, z_i, xT, ids, 4, 3., progress=hook)
    assert_close((z_i,xT,ids), was, rtol=0, atol=0); assert len(seen) == 4

@pytest.mark.parametrize('kw,complaint', [
    (dict(ids=says(2, L=5)), r'ids .*of shape \(2, 5\).*\(2,6\).*tokenizer'), (dict(ids=says(3)), r'ids .*of shape \(3, 6\)'), (dict(ids=says(2).float()), 'float32.*whole numbers'),
    (dict(ids=says(2)+25), '0 to 29.*tokenizer'), (dict(ids=says(2)-1), r'ids in \[-1'), (dict(z_i=unit(2, E=4)), r'embeddings of shape \(2, 4\).*\(2,8\).*CLIP'), (dict(z_i=unit(2)[0]), r'embeddings of shape \(8,\)'), (dict(z_i=unit(3)), r'ids .*of shape \(2, 6\).*\(3,6\)'), (dict(z_i=unit(3), ids=None), r'xT of shape \(2, 3, 8, 8\) for 3 embeddings'),
    (dict(xT=noise(2, 3, 16, 16)), r'xT of shape \(2, 3, 16, 16\).*\(2,3,8,8\)'), (dict(xT=noise(2, 1, 8, 8)), 'xT of shape'), (dict(xT=noise(3, 8, 8)), 'xT of shape'), (dict(guidance=-.5), 'guidance -0.5: must be 0 or more'),
    (dict(guidance=math.nan), 'guidance nan'), (dict(guidance=math.inf), 'guidance inf'), (dict(steps=0), '0 sampling steps.*1 to 50'), (dict(steps=51), '51 sampling steps.*1 to 50')], ids=lambda v: None if 'tensor' in str(v) else str(v)[:24])
def test_bad_arguments_are_named(model, kw, complaint):
    with pytest.raises(ValueError, match=complaint): sample_pixels(model, **{**dict(z_i=unit(2), xT=noise(2, 3, 8, 8), ids=says(2)), **kw})

@pytest.mark.parametrize('kw,complaint', [(dict(z_i=unit(2, E=9)), r'embeddings of shape \(2, 9\).*\(2,8\)'), (dict(ids=says(2, L=7)), r'ids .*of shape \(2, 7\)'), (dict(pixels=pictures(2, px=16)), r'\(B,3,8,8\).*\(2, 3, 16, 16\)')], ids=['E','L','px'])
def test_bad_batches_are_named_in_training(kw, complaint):
    with pytest.raises(ValueError, match=complaint): decoder_loss(make(), {**told(2), **kw}, 0)

# batches, training, saving

def draw(seed, step, rank, n): return pictures(n, 32, seed*100+step*10+rank),['a star']*n

def test_batches_are_a_function_of_their_arguments():
    torch.manual_seed(0); clip = CLIP(CLIPConfig()).train()
    make_batch = batches(draw, Tokenizer.load('laptop'), clip)
    a,b,c = make_batch(0, 1, 0, 4),make_batch(0, 1, 0, 4),make_batch(0, 2, 0, 4)
    assert_close(a, b, rtol=0, atol=0); assert (a['z_i'] != c['z_i']).any()
    assert {k: tuple(v.shape) for k,v in a.items()} == dict(pixels=(4,3,32,32), z_i=(4,128), ids=(4,32))
    assert not clip.training and not a['z_i'].requires_grad
    assert_close(a['z_i'].norm(dim=1), torch.ones(4)); assert_close(a['pixels'], pictures(4, 32, 10))

def from_told(seed, step, rank, n): return told(n, seed*1000+step)

def test_a_killed_training_goes_on(tmp_path):
    how = dict(steps=6, batch=4, lr=1e-2, warmup=2, progress=False, device='cpu', precision='fp32', log_every=1, save_every=2)
    whole = make(); fit(whole, decoder_loss, from_told, **how)
    class Killed(Exception): pass
    def kill(row):
        if row['step'] == 5: raise Killed
    cut = make()
    with pytest.raises(Killed): fit(cut, decoder_loss, from_told, **how, folder=tmp_path, callback=kill)
    cut = make(); fit(cut, decoder_loss, from_told, **how, folder=tmp_path)
    assert_close(dict(cut.state_dict()), dict(whole.state_dict()), rtol=0, atol=0)
    assert any((a != b).any() for a,b in zip(whole.parameters(), make().parameters()))

def test_saved_and_loaded(model, tmp_path):
    z_i,xT,ids = unit(2),noise(2, 3, 8, 8),says(2)
    model.save_pretrained(tmp_path/'full'); model.save_pretrained(tmp_path/'half', dtype=torch.float16)
    full,half = (Decoder.from_pretrained(tmp_path/n) for n in ('full','half'))
    assert full.cfg == half.cfg == cfg and 'abar' not in full.state_dict()
    want = sample_pixels(model, z_i, xT, ids, 4)
    assert_close(sample_pixels(full, z_i, xT, ids, 4), want, rtol=0, atol=0)
    assert (sample_pixels(half, z_i, xT, ids, 4)-want).abs().mean() < .02

def test_autocast(model):
    xt,t,c = noise(4, 3, 8, 8),torch.arange(4),cond(4)
    with torch.autocast('cpu', torch.bfloat16): low = model(xt, t, c).float()
    want = model(xt, t, c)
    assert (low-want).norm() < .1*want.norm()
