"The decoder: what its notebook's cells cannot show. Tiny untrained models with random weights."
import json, math
import pytest, torch
import torch.nn.functional as F
from dataclasses import replace
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close
import dalle_edu.decoder as module
from dalle_edu.clip import CLIP, CLIPConfig
from dalle_edu.decoder import Decoder, DecoderConfig, batches, condition, decoder_loss, hide, recipe, sample_grid, scaled
from dalle_edu.dvae import DVAE, DVAEConfig
from dalle_edu.prior import Prior, PriorConfig
from dalle_edu.text import Tokenizer
from dalle_edu.train import fit
from dalle_edu.unclip_prior import UnCLIPPriorConfig

cfg = DecoderConfig(side=2, K=11, E=8, tokens=2, V=30, L=6, D=8, depth=1, heads=2)
quick = settings(max_examples=20, deadline=None)

def normal(*shape, seed=1): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def uniform(n, seed=1, N=4, R=1): return torch.rand(n, R, N, 2, generator=torch.Generator().manual_seed(seed))

def make(kind=Decoder, **over):
    torch.manual_seed(0)
    model = kind(DecoderConfig(**{**vars(cfg), **over}))
    for p in model.parameters(): nn.init.normal_(p, std=.4)              # the last layer starts at zero
    return model.eval()

@pytest.fixture(scope='module')
def model(): return make()

def unit(n, seed=0, E=8): return F.normalize(normal(n, E, seed=seed), dim=1)
def grids(n, seed=0, side=2): return torch.randint(0, 11, (n, side, side), generator=torch.Generator().manual_seed(seed))
def pictures(n, px=8, seed=0): return torch.rand(n, 3, px, px, generator=torch.Generator().manual_seed(seed))*2-1
def says(n, seed=0, L=6):
    "Captions: one to five words, then pads"
    g = torch.Generator().manual_seed(seed)
    return torch.randint(1, 30, (n, L), generator=g)*(torch.arange(L)<torch.randint(1, L, (n, 1), generator=g))
def told(n, seed=0): return dict(codes=grids(n, seed), z_i=unit(n, seed), ids=says(n, seed))
def cond(n, seed=0): return condition(unit(n, seed), says(n, seed), 6)
def some(c, i): return {k: v[i] for k,v in c.items()}
def partly(n, seed=0): torch.manual_seed(seed); return hide(grids(n, seed).flatten(1), torch.full((n,1), 2), 11) # two of four words hidden
def differ(a, b, xt): return ((a-b).abs().amax(2)*(xt == 11)).amax(1)       # how far the answers at hidden places move, at most

# sizes

@pytest.mark.parametrize('over', [dict(), dict(tokens=1), dict(side=4), dict(dropout=.5), dict(depth=3), dict(K=5), dict(heads=1)], ids=str)
def test_shape(over):
    m = make(**over); N,K = m.cfg.N,m.cfg.K
    assert m(torch.full((3,N), K), cond(3)).shape == (3,N,K)

def test_laptop_size_is_small_enough_to_ship():
    with torch.device('meta'): m = Decoder(DecoderConfig.size('laptop'))
    assert sum(p.numel() for p in m.parameters()) < 4_000_000             # 8 MB in half precision

@pytest.mark.parametrize('name', ['laptop', 'gpu'])
def test_recipes_are_plain_and_sizes_belong_together(name):
    assert {'steps','batch','lr'} <= recipe(name).keys()
    json.dumps(recipe(name)); json.dumps(vars(DecoderConfig.size(name)))
    a,b,c,d = DecoderConfig.size(name),CLIPConfig.size(name),UnCLIPPriorConfig.size(name),DVAEConfig.size(name)
    assert a.E == b.E == c.E and a.K == d.K and b.px == a.side*d.factor
    with torch.device('meta'): Decoder(a).begin_with(Prior(PriorConfig.size(name)))

def test_unknown_sizes_are_named():
    for f in (DecoderConfig.size, recipe):
        with pytest.raises(ValueError, match="(?s)'huge'.*'gpu', 'laptop'"): f('huge')

@quick
@given(seed=st.integers(0, 10**6), n=st.integers(1, 5), E=st.integers(1, 300))
def test_scaled_has_numbers_of_mean_square_one(seed, n, E): assert_close(scaled(unit(n, seed, E)).pow(2).mean(1), torch.ones(n))

# beginning with DALL-E's prior

pcfg = PriorConfig(V=30, L=6, K=11, h=2, w=2, D=8, depth=1, heads=2)

def test_begin_with_takes_the_priors_knowledge():
    "On the prior's own stream, with its causal mask, what the decoder took over answers as the prior does"
    torch.manual_seed(0); prior,m = Prior(pcfg).eval(),make()
    for p in prior.parameters(): nn.init.normal_(p, std=.3)
    m.begin_with(prior)
    ids,codes = torch.tensor([[28,3,4,5,6,29]]*3),grids(3)                # no pads
    places = (m.row[:,None]+m.col).flatten(0, 1)
    stream = torch.cat([F.embedding(ids, m.text)+m.text_pos, (F.embedding(codes.flatten(1), m.image)+places)[:,:-1]], 1)
    past = torch.ones(9, 9, dtype=torch.bool).tril()
    assert_close(m.head(m.norm(m.body(stream, past)))[:,5:], prior(ids, codes)[1])
    assert_close(m.ask, torch.cat([prior.pad[-1:], places[:-1]]))         # a word is asked for from the place before, the first from the last pad's
    with torch.no_grad(): prior.image.add_(1)
    assert not torch.allclose(m.image, prior.image)                       # a copy: the prior stays as it is

@pytest.mark.parametrize('over', [dict(D=16), dict(depth=2), dict(heads=1), dict(K=12), dict(V=31), dict(L=7), dict(h=4)], ids=str)
def test_a_prior_of_other_sizes_is_refused(over):
    with pytest.raises(ValueError, match=rf"'{next(iter(over))}': \(\d+, {next(iter(over.values()))}\).*same sizes"): make().begin_with(Prior(replace(pcfg, **over)))

# hiding

@quick
@given(seed=st.integers(0, 10**6), N=st.integers(1, 70))
def test_so_many_words_are_hidden_and_the_others_show(seed, N):
    codes = torch.randint(0, 11, (N+1,N), generator=torch.Generator().manual_seed(seed)); torch.manual_seed(seed)
    was,n = codes.clone(),torch.arange(N+1)[:,None]
    xt = hide(codes, n, 11)
    assert torch.equal((xt == 11).sum(1), n[:,0]) and torch.equal(xt[xt != 11], codes[xt != 11]) and torch.equal(codes, was)

def test_every_place_is_hidden_as_often():
    torch.manual_seed(0)
    often = (hide(torch.zeros(20_000, 8, dtype=torch.long), torch.tensor([[3]]), 1) == 1).float()
    assert_close(often.mean(0), torch.full((8,), 3/8), atol=.015, rtol=0.)
    assert abs((often[:,0]*often[:,1]).mean()-3/8*2/7) < .015              # and pairs, too

# what the answer depends on

@pytest.mark.parametrize('what', ['z','ids'])
def test_everything_that_is_told_matters(model, what):
    xt,c = partly(3),cond(3)
    assert (differ(model(xt, c), model(xt, {**c, what: cond(3, seed=5)[what]}), xt) > 1e-5).all()

def test_each_word_that_shows_matters_in_its_own_picture(model):
    xt,c = partly(3),cond(3); was = model(xt, c)
    for i in (xt[0] != 11).nonzero()[:,0]:
        other = xt.clone(); other[0,i] = (xt[0,i]+1)%11
        moved = differ(model(other, c), was, xt)
        assert moved[0] > 1e-5 and (moved[1:] == 0).all()

def test_places_are_told_apart(model):
    "Two hidden places are not answered alike, and a word means something else elsewhere"
    c,xt = cond(1),torch.full((1,4), 11)
    y = model(xt, c)[0]
    assert all((y[i]-y[j]).abs().max() > 1e-4 for i in range(4) for j in range(i))
    a,b = torch.tensor([[3,11,11,11]]),torch.tensor([[11,3,11,11]])
    assert (model(a, c)[0,2]-model(b, c)[0,2]).abs().max() > 1e-4

@quick
@given(seed=st.integers(0, 10**6))
def test_the_order_of_words_matters(seed):
    m,ids,xt = make(),says(3, seed).clamp(min=1),partly(3)                # no pads
    moved = differ(m(xt, dict(z=scaled(unit(3)), ids=ids)), m(xt, dict(z=scaled(unit(3)), ids=ids.flip(1))), xt)
    assert ((moved > 0) | (ids == ids.flip(1)).all(1)).all()

def test_pads_are_not_seen():
    "The embedding of the pad may be anything, and rows of any length stand side by side"
    m,c,xt = make(),cond(3),partly(3)
    c['ids'][0] = 0                                                       # no caption
    c['ids'][1] = torch.arange(1, 7)                                      # as long as can be
    was = m(xt, c)
    for i in range(3): assert_close(m(xt[i:i+1], some(c, slice(i, i+1))), was[i:i+1], atol=1e-4, rtol=1e-4)
    with torch.no_grad(): m.text[0] += 5
    assert_close(m(xt, c), was, rtol=0, atol=0)

def test_a_pad_in_front_hides_nothing(model):
    xt = partly(3)
    a,b = (dict(z=scaled(unit(3)), ids=torch.tensor([[0,5,w,0,0,0]]).expand(3, -1)) for w in (7,9))
    assert (differ(model(xt, a), model(xt, b), xt) > 1e-5).all()

# the loss

def test_the_loss_is_cross_entropy_in_nats_a_picture():
    m,b = make(drop=0., drop_text=0.),told(5)
    torch.manual_seed(3); paid,terms = decoder_loss(m, b, 0)
    torch.manual_seed(3); torch.rand(5, 1); torch.rand(5, 1); n = torch.randint(1, 5, (5,1)) # two coins, then how many
    xt,want = hide(b['codes'].flatten(1), n, 11),0.
    for i in range(5):
        p = m(xt[i:i+1], some(condition(b['z_i'], b['ids'], 6), slice(i, i+1)))[0].softmax(1)
        want -= sum(4/n[i,0]*p[j,k].log() for j,k in enumerate(b['codes'][i].flatten()) if xt[i,j] == 11)/5
    assert_close(paid, want, rtol=1e-4, atol=1e-4); assert terms == {}

def test_two_half_batches_give_the_gradient_of_one(monkeypatch):
    "What two processes average is what one computes, the noise held still for each picture"
    monkeypatch.setattr(module, 'hide', lambda codes, n, K: torch.where(codes%2 == 0, K, codes))
    m,b = make(drop=0., drop_text=0.),dict(told(8), codes=torch.arange(32).view(8, 2, 2)%11)
    monkeypatch.setattr(torch, 'randint', lambda *a, device=None: torch.full(a[2], 2))
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
    m,z_i,ids = make(drop=.3, drop_text=.4),unit(4000),says(4000)
    monkeypatch.setattr(m, 'forward', lambda xt, c: seen.append((xt, c)) or torch.zeros(4000, 4, 11))
    paid = decoder_loss(m, dict(codes=grids(4000), z_i=z_i, ids=ids), 0)[0]
    xt,c = seen[0]; assert_close(paid, torch.tensor(4*math.log(11)))      # who knows nothing pays ln K for each place, however many are hidden
    deaf,silent = (c['z'] == m.null).all(1),(c['ids'] == 0).all(1)
    assert abs(deaf.float().mean()-.3) < .03 and abs(silent.float().mean()-.4) < .03
    assert abs((deaf&silent).float().mean()-.12) < .02                    # one does not ask the other
    assert_close(c['z'][~deaf], scaled(z_i)[~deaf]); assert_close(c['ids'][~silent], ids[~silent])
    assert_close(torch.bincount((xt == 11).sum(1), minlength=5)/4000, torch.tensor([0,.25,.25,.25,.25]), atol=.03, rtol=0.)

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
    assert all(p.grad is not None and p.grad.isfinite().all() and (p.grad != 0).any() for p in m.parameters())
    assert (m.text.grad[1:] != 0).any(1).all() and not m.text.grad[0].any() # each word, and not the pad

# sampling

def oracle(model, z_i, u, ids, steps, guidance, temperature, given=None):
    "One picture after the other, one word after the other"
    out = []
    for b,(z,words) in enumerate(zip(z_i*model.cfg.E**.5, ids)):
        x = torch.full((1,4), 11) if given is None else given[b].flatten()[None].clone()
        free = [p for p in range(4) if x[0,p] == 11]
        for r,v in enumerate(u[b]):
            T,m = (max(1, steps//5),len(free)//2) if r else (steps,len(free))
            turns,shown = sorted(free, key=lambda p: v[p,0])[:m],0         # the places to be drawn, in their order
            for p in turns: x[0,p] = 11
            for i in range(1, T+1):
                with torch.no_grad(): c,n = model(x, dict(z=z[None], ids=words[None]))[0],model(x, dict(z=model.null[None], ids=0*words[None]))[0]
                p,x = ((n+guidance*(c-n))/temperature).softmax(1),x.clone()
                upto = max(i, round(len(turns)*(1-math.cos(math.pi*i/2/T))))
                for place in turns[shown:upto]: x[0,place] = int((p[place].cumsum(0) <= v[place,1]).sum())
                shown = upto
        out.append(x.view(2, 2))
    return torch.stack(out)

@pytest.mark.parametrize('guidance,temperature', [(0.,1.), (1.,.5), (2.5,1.)])
@pytest.mark.parametrize('steps,rounds', [(1,1), (3,1), (4,1), (2,2), (4,4)])
def test_sampling_word_by_word(model, guidance, temperature, steps, rounds):
    z_i,u,ids = unit(8),uniform(8, R=rounds),says(8)
    how = steps,guidance,temperature
    assert torch.equal(sample_grid(model, z_i, u, ids, *how), oracle(model, z_i, u, ids, *how))
    assert torch.equal(sample_grid(model, z_i, u, None, *how), oracle(model, z_i, u, 0*ids, *how))
    some_words = hide(grids(8).flatten(1), torch.arange(8)[:,None]%5, 11).view(8, 2, 2) # none to four to come
    assert torch.equal(sample_grid(model, z_i, u, ids, *how, some_words), oracle(model, z_i, u, ids, *how, some_words))

def test_as_many_steps_as_places_show_one_word_each():
    seen = []
    class Look(Decoder):
        def forward(self, xt, cond): seen.append((xt == 11).sum(1).tolist()); return super().forward(xt, cond)
    m = make(Look, side=4)
    sample_grid(m, unit(2), uniform(2, N=16), says(2), 16, 1.); assert seen == [[n]*2 for n in range(16, 0, -1)]
    seen.clear(); sample_grid(m, unit(2), uniform(2, N=16), says(2), 5, 1.)
    assert seen[0] == [16,16] and all(b[0] < a[0] for a,b in zip(seen, seen[1:]))
    seen.clear(); sample_grid(m, unit(2), uniform(2, N=16, R=3), says(2), 10, 1.); assert len(seen) == 14 and [seen[i] for i in (10,12)] == [[8,8]]*2 # half is hidden again

@quick
@given(seed=st.integers(0, 10**6), steps=st.integers(1, 4), guidance=st.sampled_from([0.,.5,1.,3.,20.]), temperature=st.sampled_from([.01,.5,1.,5.]), hidden=st.integers(0, 4))
def test_the_grid_holds_code_words_and_what_was_given(seed, steps, guidance, temperature, hidden):
    torch.manual_seed(seed); given_words = hide(grids(2, seed).flatten(1), torch.tensor([[hidden],[4]]), 11).view(2, 2, 2)
    was = given_words.clone()
    x = sample_grid(make(), unit(2, seed), uniform(2, seed, R=1+seed%3), says(2, seed), steps, guidance, temperature, given_words)
    assert x.shape == (2,2,2) and x.dtype == torch.int64 and x.min() >= 0 and x.max() < 11
    assert torch.equal(x[was != 11], was[was != 11]) and torch.equal(given_words, was)

def test_what_is_given_speaks(model):
    "Words that are given change those that are drawn"
    z_i,u,ids = unit(60),uniform(60),says(60)
    g = torch.full((60,2,2), 11); g[:,0,0] = 3; h = g.clone(); h[:,0,0] = 5
    a,b = (sample_grid(model, z_i, u, ids, 4, 1., 1., x).flatten(1)[:,1:] for x in (g, h))
    assert not torch.equal(a, b)

def test_guidance_one_is_none_and_zero_ignores_what_is_told():
    calls = []
    class Count(Decoder):
        def forward(self, xt, cond): calls.append(len(xt)); return super().forward(xt, cond)
    m,u = make(Count),uniform(40)
    sample_grid(m, unit(40), u, says(40), 4, 1.); assert calls == [40]*4   # what is told alone, once a step
    sample_grid(m, unit(40), u, says(40), 4, 2.); assert calls[4:] == [40]*8
    assert torch.equal(*(sample_grid(m, unit(40, s), u, says(40, s), 4, 0.) for s in (0, 5)))
    assert not torch.equal(*(sample_grid(m, unit(40, s), u, says(40, s), 4, 1.) for s in (0, 5)))

def test_a_drawing_does_not_depend_on_the_batch(model):
    z_i,u,ids = unit(6),uniform(6, R=2),says(6)
    whole = sample_grid(model, z_i, u, ids, 4, 2.)
    for order in ([4], [5,0], [2,2,1]): assert torch.equal(sample_grid(model, z_i[order], u[order], ids[order], 4, 2.), whole[order])

def test_inputs_are_left_as_they_were_and_progress_sees_each_step(model):
    z_i,u,ids,seen = unit(3),uniform(3),says(3),[]
    was = z_i.clone(),u.clone(),ids.clone()
    def hook(steps):
        for s in steps: seen.append(s); yield s
    sample_grid(model, z_i, u, ids, 4, 3., progress=hook)
    assert_close((z_i,u,ids), was, rtol=0, atol=0); assert len(seen) == 4

@pytest.mark.parametrize('kw,complaint', [
    (dict(ids=says(2, L=5)), r'ids .*of shape \(2, 5\).*\(2,6\).*tokenizer'), (dict(ids=says(3)), r'ids .*of shape \(3, 6\)'), (dict(ids=says(2).float()), 'float32.*whole numbers'),
    (dict(ids=says(2)+25), '0 to 29.*tokenizer'), (dict(ids=says(2)-1), r'ids in \[-1'), (dict(z_i=unit(2, E=4)), r'embeddings of shape \(2, 4\).*\(2,8\).*CLIP'), (dict(z_i=unit(3)), r'ids .*of shape \(2, 6\).*\(3,6\)'), (dict(z_i=unit(3), ids=None), r'u of shape \(2, 1, 4, 2\) for 3 embeddings'),
    (dict(u=uniform(2, N=5)), r'u of shape \(2, 1, 5, 2\).*\(2,R,4,2\)'), (dict(u=uniform(2)[...,0]), 'u of shape'), (dict(u=uniform(2)[:,0]), 'u of shape'), (dict(u=uniform(2)[:,:0]), 'u of shape'), (dict(guidance=-.5), 'guidance -0.5: must be 0 or more'),
    (dict(guidance=math.nan), 'guidance nan'), (dict(guidance=math.inf), 'guidance inf'), (dict(steps=0), '0 sampling steps: from 1 to 4'), (dict(steps=5), '5 sampling steps'), (dict(temperature=0.), 'temperature 0.0'), (dict(temperature=math.nan), 'temperature nan'),
    (dict(given=grids(2, side=4)), r'given: torch.int64 of shape \(2, 4, 4\).*\(2,2,2\)'), (dict(given=grids(3)), r'given: .*\(3, 2, 2\)'), (dict(given=grids(2).flatten(1)), r'given: .*\(2, 4\)'), (dict(given=grids(2).float()), 'given: torch.float32'), (dict(given=grids(2)+2), r'given: .*in \[\d+, 12\].*0 to 10.*11'), (dict(given=grids(2)-1), r'given: .*in \[-1')], ids=lambda v: None if 'tensor' in str(v) else str(v)[:24])
def test_bad_arguments_are_named(model, kw, complaint):
    with pytest.raises(ValueError, match=complaint): sample_grid(model, **{**dict(z_i=unit(2), u=uniform(2), ids=says(2), steps=4), **kw})

@pytest.mark.parametrize('kw,complaint', [(dict(z_i=unit(2, E=9)), r'embeddings of shape \(2, 9\).*\(2,8\)'), (dict(ids=says(2, L=7)), r'ids .*of shape \(2, 7\)'), (dict(codes=grids(2, side=4)), r'codes .*\(2, 4, 4\).*\(2,2,2\)'), (dict(codes=grids(2).float()), 'codes torch.float32')], ids=['E','L','side','dtype'])
def test_bad_batches_are_named_in_training(kw, complaint):
    with pytest.raises(ValueError, match=complaint): decoder_loss(make(drop=0., drop_text=0.), {**told(2), **kw}, 0)

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
    z_i,u,ids = unit(40),uniform(40),says(40)
    model.save_pretrained(tmp_path/'full'); model.save_pretrained(tmp_path/'half', dtype=torch.float16)
    full,half = (Decoder.from_pretrained(tmp_path/n) for n in ('full','half'))
    assert full.cfg == half.cfg == cfg
    want = sample_grid(model, z_i, u, ids, 4)
    assert torch.equal(sample_grid(full, z_i, u, ids, 4), want)
    assert (sample_grid(half, z_i, u, ids, 4) == want).float().mean() > .95

def test_autocast(model):
    xt,c = partly(3),cond(3)
    with torch.autocast('cpu', torch.bfloat16): low = model(xt, c).float()
    want = model(xt, c)
    assert (low-want).norm() < .1*want.norm()
