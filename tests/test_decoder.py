"The decoder: what its notebook's cells cannot show. Tiny untrained models with random weights."
import json, math
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close
import dalle_edu.decoder as module
from dalle_edu.clip import CLIP, CLIPConfig
from dalle_edu.decoder import Decoder, DecoderConfig, batches, condition, decoder_loss, recipe, sample_grid, scaled
from dalle_edu.diffusion import ddim, timesteps
from dalle_edu.dvae import DVAE, DVAEConfig
from dalle_edu.train import fit
from dalle_edu.text import Tokenizer
from dalle_edu.unclip_prior import UnCLIPPriorConfig

cfg = DecoderConfig(px=8, side=2, K=11, c=3, E=8, tokens=2, V=30, L=6, D=8, depth=1, head=4, sketch=3, S=50)
quick = settings(max_examples=20, deadline=None)

def noise(*shape, seed=1): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

def make(kind=Decoder, **over):
    torch.manual_seed(0)
    model = kind(DecoderConfig(**{**vars(cfg), **over}))
    for p in model.parameters(): nn.init.normal_(p, std=.2)              # the last layers start at zero
    model.codebook.copy_(noise(*model.codebook.shape)); model.log_share.copy_(noise(model.cfg.K).log_softmax(0))
    return model.eval()

@pytest.fixture(scope='module')
def model(): return make()

def unit(n, seed=0, E=8): return F.normalize(noise(n, E, seed=seed), dim=1)
def grids(n, seed=0, side=2): return torch.randint(0, 11, (n, side, side), generator=torch.Generator().manual_seed(seed))
def pictures(n, px=8, seed=0): return torch.rand(n, 3, px, px, generator=torch.Generator().manual_seed(seed))*2-1
def says(n, seed=0, L=6):
    "Captions: one to five words, then pads"
    g = torch.Generator().manual_seed(seed)
    return torch.randint(1, 30, (n, L), generator=g)*(torch.arange(L)<torch.randint(1, L, (n, 1), generator=g))
def told(n, seed=0): return dict(codes=grids(n, seed), z_i=unit(n, seed), ids=says(n, seed))
def cond(n, seed=0): return condition(unit(n, seed), says(n, seed), 6)
def some(c, i): return {k: v[i] for k,v in c.items()}
def where(m): return noise(3, m.cfg.N, m.cfg.c),torch.tensor([0,20,49])

def sample(model, z_i, xT, ids=None, steps=20, guidance=2., **how): return sample_grid(model, z_i, xT, ids, steps, guidance, **{'eta':0., **how}) # without fresh noise

def oracle(model, z_i, xT, ids, steps, guidance):
    "One picture after the other; DDIM written out for x0, and the nearest code word by itself"
    out,ts = [],timesteps(model.cfg.S, steps)
    for z,words,x in zip(z_i*model.cfg.E**.5, ids, xT):
        x = x[None]
        for now,then in zip(ts, ts[1:]):
            t = torch.tensor([now])
            with torch.no_grad(): c,u = model(x, t, dict(z=z[None], ids=words[None])),model(x, t, dict(z=model.null[None], ids=0*words[None]))
            a,b = model.abar[now],model.abar[then] if then>=0 else torch.tensor(1.)
            x0 = u+guidance*(c-u)
            x = b.sqrt()*x0+(1-b).sqrt()*(x-a.sqrt()*x0)/(1-a).sqrt()
        out.append(torch.stack([((v-model.codebook)**2).sum(1).argmin() for v in x[0]]).view(2, 2))
    return torch.stack(out)

# sizes

@pytest.mark.parametrize('over', [dict(), dict(tokens=1), dict(px=16, side=4), dict(dropout=.5), dict(depth=3), dict(K=5), dict(c=7), dict(sketch=1)], ids=str)
def test_shape(over):
    m = make(**over); xt,t = where(m)
    assert m(xt, t, cond(3)).shape == xt.shape and m.logits(xt, t, cond(3)).shape == (3,m.cfg.N,m.cfg.K)

def test_laptop_size_is_small_enough_to_ship():
    with torch.device('meta'): m = Decoder(DecoderConfig.size('laptop'))
    assert sum(p.numel() for p in m.parameters()) < 4_000_000             # 8 MB in half precision

@pytest.mark.parametrize('name', ['laptop', 'gpu'])
def test_recipes_are_plain_and_sizes_belong_together(name):
    assert {'steps','batch','lr'} <= recipe(name).keys()
    json.dumps(recipe(name)); json.dumps(vars(DecoderConfig.size(name)))
    a,b,c,d = DecoderConfig.size(name),CLIPConfig.size(name),UnCLIPPriorConfig.size(name),DVAEConfig.size(name)
    assert a.E == b.E == c.E and a.px == b.px == a.side*d.factor and a.K == d.K

def test_unknown_sizes_are_named():
    for f in (DecoderConfig.size, recipe):
        with pytest.raises(ValueError, match="(?s)'huge'.*'gpu', 'laptop'"): f('huge')

@quick
@given(seed=st.integers(0, 10**6), n=st.integers(1, 5), E=st.integers(1, 300))
def test_scaled_has_numbers_of_mean_square_one(seed, n, E): assert_close(scaled(unit(n, seed, E)).pow(2).mean(1), torch.ones(n))

# code words

def painter(**over): torch.manual_seed(0); return DVAE(DVAEConfig(**{**dict(K=11, D=8, D_code=6, groups=2, patch=2), **over}))

def test_what_stands_for_the_words(monkeypatch):
    "Mean square 1 in each direction; while all directions are kept and no word stands far out, nothing is lost"
    m,dvae,x = make(K=4, c=3),painter(K=4),pictures(400)
    monkeypatch.setattr(dvae, 'encode', lambda x: ((x.mean((2,3))*1e6).long()[:,:1,None].expand(-1, 2, 2)+torch.arange(2))%4) # every word somewhere
    m.set_codebook(dvae, x)
    share = dvae.encode(x).flatten().bincount(minlength=4)/(4*len(x))
    assert (share > .02).all() and not (m.codebook.abs() >= 3.99).any()
    assert_close(m.log_share.exp(), share, atol=2e-6, rtol=0.)
    assert_close((m.codebook.T*share)@m.codebook, torch.eye(3), atol=1e-3, rtol=0.)
    assert_close(share@m.codebook, torch.zeros(3), atol=1e-3, rtol=0.)
    look,one = dvae.decoder.blocks[0].weight[:,:,0,0].T,torch.cat([m.codebook,torch.ones(4, 1)], 1)
    assert_close(one@torch.linalg.lstsq(one, look).solution, look, atol=1e-3, rtol=0.)

def test_a_decoder_without_words_says_so():
    m = Decoder(cfg)
    for call in (lambda: decoder_loss(m, told(2), 0), lambda: sample(m, unit(2), noise(2, 4, 3), says(2)), lambda: m(*where(m), cond(3))):
        with pytest.raises(ValueError, match='call set_codebook'): call()

@pytest.mark.parametrize('pixels,over,complaint', [(pictures(4, 16), {}, r'\(4, 3, 16, 16\).*\(M,3,8,8\)'), (pictures(4), dict(c=7), 'c=7.*this dVAE has 6'), (torch.zeros(4, 3, 8, 8), {}, 'one code word over and over')], ids=['px','c','one word'])
def test_bad_examples_of_words_are_named(pixels, over, complaint):
    dvae = painter()
    if complaint.startswith('one'):
        with torch.no_grad(): dvae.encoder.blocks.output.conv.weight.zero_(); dvae.encoder.blocks.output.conv.bias[3] = 1.
    with pytest.raises(ValueError, match=complaint): make(**over).set_codebook(dvae, pixels)

def test_a_pad_in_front_hides_nothing():
    m,(xt,t) = make(),where(make()); z = scaled(unit(3))
    a,b = torch.tensor([[0,5,7,0,0,0]]).expand(3, -1),torch.tensor([[0,5,9,0,0,0]]).expand(3, -1)
    assert ((m.logits(xt, t, dict(z=z, ids=a))-m.logits(xt, t, dict(z=z, ids=b))).abs().flatten(1).amax(1) > 1e-5).all()

@pytest.mark.parametrize('over', [dict(K=12), dict(groups=1)], ids=str)
def test_a_foreign_dvae_is_refused(over):
    with pytest.raises(ValueError, match='this decoder has 11 in a grid of 2 for 8 pixels'): make().set_codebook(painter(**over), pictures(4))

@quick
@given(seed=st.integers(0, 10**6), t=st.integers(0, 49))
def test_a_place_by_itself_is_bayes_rule(seed, t):
    m = make(); xt = noise(2, 4, 3, seed=seed); a = m.abar[t].double()
    likely = torch.distributions.Normal(0., 1.).log_prob((xt[:,:,None].double()-a.sqrt()*m.codebook.double())/(1-a).sqrt()).sum(3)
    assert_close(m.alone(xt, torch.full((2,), t)).double().softmax(2), (m.log_share+likely).softmax(2), atol=2e-3, rtol=0.)

def test_an_untrained_decoder_says_what_each_place_knows():
    torch.manual_seed(0); fresh = Decoder(cfg); fresh.codebook.copy_(noise(11, 3)); xt,t = where(fresh)
    assert_close(fresh.logits(xt, t, cond(3)), fresh.alone(xt, t))
    assert_close(fresh(xt, t, cond(3)), fresh.alone(xt, t).softmax(2)@fresh.codebook)

# what the answer depends on

@pytest.mark.parametrize('what', ['xt','t','z','ids'])
def test_everything_that_is_told_matters(model, what):
    (xt,t),c = where(model),cond(3)
    was = model.logits(xt, t, c)-model.alone(xt, t)
    xt,t = -xt if what == 'xt' else xt,(t+7)%50 if what == 't' else t
    now = model.logits(xt, t, {**c, what: cond(3, seed=5)[what]} if what in c else c)-model.alone(xt, t)
    assert ((was-now).abs().flatten(1).amax(1) > 1e-5).all()

@pytest.mark.parametrize('what', ['z','ids'])
@pytest.mark.parametrize('way', ['time','tokens','sketch'])
def test_embedding_and_caption_come_in_three_ways(way, what):
    m = make(); xt,t = where(m)
    one,two = cond(3),{**cond(3), what: cond(3, seed=5)[what]}
    ways = dict(time=m.cond, tokens=m.trunk.context, sketch=m.told)
    with torch.no_grad():
        for other in ways.keys()-{way}: ways[other].weight.zero_()        # close the others
        assert ((m.logits(xt, t, one)-m.logits(xt, t, two)).abs().flatten(1).amax(1) > 1e-6).all()
        ways[way].weight.zero_()
        if what == 'ids': two['ids'] = torch.where(one['ids'] != 0, one['ids']%29+1, 0) # other words, as many: how many there are is seen by attention itself
        assert_close(m.logits(xt, t, one), m.logits(xt, t, two), rtol=0, atol=0)

@quick
@given(seed=st.integers(0, 10**6))
def test_order_reaches_the_tokens_and_not_the_bag(seed):
    m,ids = make(),says(3, seed).clamp(min=1)                             # no pads
    turned,(xt,t),z = ids.flip(1),where(m),scaled(unit(3))
    differ = (m.logits(xt, t, dict(z=z, ids=ids))-m.logits(xt, t, dict(z=z, ids=turned))).abs().flatten(1).amax(1)
    assert ((differ > 0) | (ids == turned).all(1)).all()
    with torch.no_grad(): m.trunk.context.weight.zero_()
    assert_close(m.logits(xt, t, dict(z=z, ids=ids)), m.logits(xt, t, dict(z=z, ids=turned)), rtol=1e-4, atol=1e-4)

def test_pads_are_not_seen():
    "The embedding of the pad may be anything"
    m,c = make(),cond(3); xt,t = where(m)
    c['ids'][0] = 0                                                       # no caption
    was = m(xt, t, c)
    with torch.no_grad(): m.word.weight[0] += 5
    assert_close(m(xt, t, c), was, rtol=0, atol=0)

def test_a_picture_does_not_depend_on_its_neighbours(model):
    xt,t,c = noise(6, 4, 3),torch.arange(6),cond(6)
    whole = model.logits(xt, t, c)
    for order in ([4], [5,0], [2,2,1]): assert_close(model.logits(xt[order], t[order], some(c, order)), whole[order], atol=1e-4, rtol=1e-4)

# the loss

def test_the_loss_is_cross_entropy_in_nats_a_picture(monkeypatch):
    m,b = make(drop=0., drop_text=0.),told(5)
    monkeypatch.setattr(module, 'sample_t', lambda n, S, device, **kw: torch.arange(n)*9)
    torch.manual_seed(3); paid,terms = decoder_loss(m, b, 0)
    torch.manual_seed(3); torch.rand(5, 1); torch.rand(5, 1); eps = torch.randn(5, 4, 3); want = 0. # two coins, then the noise
    for i in range(5):
        a = m.abar[9*i]; xt = a.sqrt()*m.codebook[b['codes'][i].flatten()]+(1-a).sqrt()*eps[i]
        p = m.logits(xt[None], torch.tensor([9*i]), some(condition(b['z_i'], b['ids'], 6), slice(i, i+1)))[0].softmax(1)
        want -= sum(p[n,k].log() for n,k in enumerate(b['codes'][i].flatten()))/5
    assert_close(paid, want, rtol=1e-4, atol=1e-4); assert terms == {}

def test_two_half_batches_give_the_gradient_of_one(monkeypatch):
    "What two processes average is what one computes, the noise held still for each picture"
    monkeypatch.setattr(module, 'q_sample', lambda x0, t, eps, abar: x0.flip(1)+.3)
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
    m,z_i,ids = make(drop=.3, drop_text=.4, S=1000),unit(4000),says(4000)
    monkeypatch.setattr(m, 'logits', lambda xt, t, c: seen.append((xt, t, c)) or torch.zeros(4000, 4, 11))
    paid = decoder_loss(m, dict(codes=grids(4000), z_i=z_i, ids=ids), 0)[0]
    xt,t,c = seen[0]; assert_close(paid, torch.tensor(4*math.log(11)))    # who knows nothing pays ln K for each place
    deaf,silent = (c['z'] == m.null).all(1),(c['ids'] == 0).all(1)
    assert abs(deaf.float().mean()-.3) < .03 and abs(silent.float().mean()-.4) < .03
    assert abs((deaf&silent).float().mean()-.12) < .02                    # one does not ask the other
    assert_close(c['z'][~deaf], scaled(z_i)[~deaf]); assert_close(c['ids'][~silent], ids[~silent])
    ratio = (t.clamp(min=1)/1000*math.pi/2).tan().log()                   # of noise over signal
    assert abs(ratio.mean()-1.2) < .08 and abs(ratio.std()-.8) < .08 and t.min() >= 0 and t.max() < 1000
    eps = (xt-m.abar[t].sqrt()[:,None,None]*m.codebook[grids(4000).flatten(1)])/(1-m.abar[t]).sqrt()[:,None,None]
    assert abs(eps.mean()) < .03 and abs(eps.std()-1) < .03

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
    z_i,xT,ids = unit(3),noise(3, 4, 3),says(3)
    assert torch.equal(sample(model, z_i, xT, ids, steps, guidance), oracle(model, z_i, xT, ids, steps, guidance))
    assert torch.equal(sample(model, z_i, xT, None, steps, guidance), oracle(model, z_i, xT, 0*ids, steps, guidance))

def test_fresh_noise_comes_in_with_the_call(model):
    z_i,xT,ids,asked = unit(40),noise(40, 4, 3),says(40),[]
    def fresh(i): asked.append(i); return noise(40, 4, 3, seed=100+i)
    a,b = (sample(model, z_i, xT, ids, 4, 1., eta=1., noise=fresh) for _ in range(2))
    assert torch.equal(a, b) and asked == [0,1,2]*2                       # the last step adds none
    assert not torch.equal(a, sample(model, z_i, xT, ids, 4, 1.))
    x = ddim(model, xT, condition(z_i, ids, 6), model.abar, 4, 'x0', eta=1., noise=fresh)
    assert torch.equal(a.flatten(1), torch.cdist(x, model.codebook.expand(40, -1, -1)).argmin(2))

@quick
@given(seed=st.integers(0, 10**6), steps=st.integers(1, 6), guidance=st.sampled_from([0.,.5,1.,3.,20.]), big=st.sampled_from([.1,1.,10.]))
def test_the_grid_holds_code_words(seed, steps, guidance, big):
    x = sample(make(), unit(2, seed)*big, noise(2, 4, 3, seed=seed), says(2, seed), steps, guidance)
    assert x.shape == (2,2,2) and x.dtype == torch.int64 and x.min() >= 0 and x.max() < 11

def test_guidance_one_is_none_and_zero_ignores_what_is_told():
    calls = []
    class Count(Decoder):
        def forward(self, xt, t, cond): calls.append(len(xt)); return super().forward(xt, t, cond)
    m,xT = make(Count),noise(40, 4, 3)
    sample(m, unit(40), xT, says(40), 4, 1.); assert calls == [40]*4  # what is told alone, once a step
    sample(m, unit(40), xT, says(40), 4, 2.); assert calls[4:] == [80]*4
    assert torch.equal(*(sample(m, unit(40, s), xT, says(40, s), 4, 0.) for s in (0, 5)))
    with torch.no_grad(): m.out.weight *= 20
    assert not torch.equal(*(sample(m, unit(40), xT, says(40, s), 4, 1.) for s in (0, 5)))

def test_a_drawing_does_not_depend_on_the_batch(model):
    z_i,xT,ids = unit(6),noise(6, 4, 3),says(6)
    whole = sample(model, z_i, xT, ids, 4, 2.)
    for order in ([4], [5,0], [2,2,1]): assert torch.equal(sample(model, z_i[order], xT[order], ids[order], 4, 2.), whole[order])

def test_inputs_are_left_as_they_were_and_progress_sees_each_step(model):
    z_i,xT,ids,seen = unit(3),noise(3, 4, 3),says(3),[]
    was = z_i.clone(),xT.clone(),ids.clone()
    def hook(steps):
        for s in steps: seen.append(s); yield s
    sample(model, z_i, xT, ids, 4, 3., progress=hook)
    assert_close((z_i,xT,ids), was, rtol=0, atol=0); assert len(seen) == 4

@pytest.mark.parametrize('kw,complaint', [
    (dict(ids=says(2, L=5)), r'ids .*of shape \(2, 5\).*\(2,6\).*tokenizer'), (dict(ids=says(3)), r'ids .*of shape \(3, 6\)'), (dict(ids=says(2).float()), 'float32.*whole numbers'),
    (dict(ids=says(2)+25), '0 to 29.*tokenizer'), (dict(ids=says(2)-1), r'ids in \[-1'), (dict(z_i=unit(2, E=4)), r'embeddings of shape \(2, 4\).*\(2,8\).*CLIP'), (dict(z_i=unit(2)[0]), r'embeddings of shape \(8,\)'), (dict(z_i=unit(3)), r'ids .*of shape \(2, 6\).*\(3,6\)'), (dict(z_i=unit(3), ids=None), r'xT of shape \(2, 4, 3\) for 3 embeddings'),
    (dict(xT=noise(2, 3, 16, 16)), r'xT of shape \(2, 3, 16, 16\).*\(2,4,3\)'), (dict(xT=noise(2, 4, 4)), 'xT of shape'), (dict(xT=noise(4, 3)), 'xT of shape'), (dict(guidance=-.5), 'guidance -0.5: must be 0 or more'),
    (dict(guidance=math.nan), 'guidance nan'), (dict(guidance=math.inf), 'guidance inf'), (dict(steps=0), '0 sampling steps.*1 to 50'), (dict(steps=51), '51 sampling steps.*1 to 50'), (dict(eta=1.5), 'eta=1.5')], ids=lambda v: None if 'tensor' in str(v) else str(v)[:24])
def test_bad_arguments_are_named(model, kw, complaint):
    with pytest.raises(ValueError, match=complaint): sample(model, **{**dict(z_i=unit(2), xT=noise(2, 4, 3), ids=says(2)), **kw})

@pytest.mark.parametrize('kw,complaint', [(dict(z_i=unit(2, E=9)), r'embeddings of shape \(2, 9\).*\(2,8\)'), (dict(ids=says(2, L=7)), r'ids .*of shape \(2, 7\)'), (dict(codes=grids(2, side=4)), r'codes .*\(2, 4, 4\).*\(2,2,2\)'), (dict(codes=grids(2).float()), 'codes torch.float32')], ids=['E','L','side','dtype'])
def test_bad_batches_are_named_in_training(kw, complaint):
    with pytest.raises(ValueError, match=complaint): decoder_loss(make(), {**told(2), **kw}, 0)

# batches, training, saving

def draw(seed, step, rank, n): return pictures(n, 32, seed*100+step*10+rank),['a star']*n

def test_batches_are_a_function_of_their_arguments():
    torch.manual_seed(0); clip,dvae = CLIP(CLIPConfig()).train(),DVAE(DVAEConfig()).train()
    make_batch = batches(draw, Tokenizer.load('laptop'), clip, dvae)
    a,b,c = make_batch(0, 1, 0, 4),make_batch(0, 1, 0, 4),make_batch(0, 2, 0, 4)
    assert_close(a, b, rtol=0, atol=0); assert (a['z_i'] != c['z_i']).any()
    assert {k: tuple(v.shape) for k,v in a.items()} == dict(codes=(4,8,8), z_i=(4,128), ids=(4,32))
    assert not clip.training and not dvae.training and not a['z_i'].requires_grad
    assert_close(a['z_i'].norm(dim=1), torch.ones(4)); assert torch.equal(a['codes'], dvae.encode(pictures(4, 32, 10)))

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
    z_i,xT,ids = unit(40),noise(40, 4, 3),says(40)
    model.save_pretrained(tmp_path/'full'); model.save_pretrained(tmp_path/'half', dtype=torch.float16)
    full,half = (Decoder.from_pretrained(tmp_path/n) for n in ('full','half'))
    assert full.cfg == half.cfg == cfg and 'abar' not in full.state_dict()
    want = sample(model, z_i, xT, ids, 4)
    assert torch.equal(sample(full, z_i, xT, ids, 4), want)
    assert (sample(half, z_i, xT, ids, 4) == want).float().mean() > .95

def test_autocast(model):
    (xt,t),c = where(model),cond(3)
    with torch.autocast('cpu', torch.bfloat16): low,alone = model.logits(xt, t, c).float(),model.alone(xt, t)
    want = model.logits(xt, t, c)
    assert_close(alone, model.alone(xt, t), rtol=0, atol=0)               # Bayes' rule is not rounded
    assert (low-want).norm() < .1*want.norm()
