"""What the cells of 12_unet cannot show: other people's layers, every shape of network, bad input, other devices, one batch against two."""
import json
from dataclasses import asdict, replace
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close

from dalle_edu.diffusion import cosine_abar, diffusion_loss
from dalle_edu.unet import PixelAttention, ResBlock, UNet, UNetConfig, time_embedding

tiny = UNetConfig(px=8, D=8, head=4, mults=(1,2), blocks=1, attn=(2,), cond=5, context=6)
quick = settings(max_examples=15, deadline=None)

def randn(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def awake(net, seed=0):
    "Random numbers where a new network has zeros"
    torch.manual_seed(seed)
    for p in net.parameters():
        if not p.any(): nn.init.normal_(p, std=.2)
    return net
def make(cfg=tiny, seed=0): torch.manual_seed(seed); return awake(UNet(cfg))
def given_to(cfg, B=3): return randn(B, cfg.C, cfg.px, cfg.px),torch.arange(B)*300,randn(B, cfg.cond, seed=1) if cfg.cond else None,randn(B, 4, cfg.context, seed=2) if cfg.context else None

# Parity

def test_time_embedding_is_that_of_diffusers():
    theirs = pytest.importorskip('diffusers.models.embeddings').get_timestep_embedding
    t = torch.tensor([0,1,17,500,999])
    assert_close(time_embedding(t, 64), theirs(t, 64, flip_sin_to_cos=True, downscale_freq_shift=0), atol=1e-4, rtol=0)

def test_residual_block_is_that_of_diffusers():
    theirs = pytest.importorskip('diffusers.models.resnet').ResnetBlock2D(in_channels=8, out_channels=12, temb_channels=16, groups=4, eps=1e-5, time_embedding_norm='scale_shift')
    ours,x,emb = awake(ResBlock(8, 12, 16)),randn(2, 8, 6, 6),randn(2, 16, seed=1)
    pairs = dict(norm1='norm1', conv1='conv1', film='time_emb_proj', norm2='norm2', conv2='conv2', skip='conv_shortcut')
    for a,b in pairs.items(): getattr(theirs, b).load_state_dict(getattr(ours, a).state_dict())
    assert_close(ours(x, emb), theirs(x, emb), atol=1e-5, rtol=1e-4)

def test_residual_block_written_plainly():
    block,x,emb = awake(ResBlock(8, 8, 16)),randn(2, 8, 6, 6),randn(2, 16, seed=1)
    def norm(y, layer):
        g = y.view(2, 4, -1)
        g = (g-g.mean(2, keepdim=True))/(g.var(2, correction=0, keepdim=True)+1e-5).sqrt()
        return g.view_as(y)*layer.weight[:,None,None]+layer.bias[:,None,None]
    silu = lambda y: y*y.sigmoid()
    h = F.conv2d(silu(norm(x, block.norm1)), block.conv1.weight, block.conv1.bias, padding=1)
    film = silu(emb)@block.film.weight.T+block.film.bias
    h = norm(h, block.norm2)*(1+film[:,:8,None,None])+film[:,8:,None,None]
    assert_close(block(x, emb), x+F.conv2d(silu(h), block.conv2.weight, block.conv2.bias, padding=1), atol=1e-5, rtol=1e-4)

def test_attention_is_torchs_with_the_context_as_further_keys():
    "nn.MultiheadAttention with our projections taken out of it, and identities in their place"
    attn,x,context = awake(PixelAttention(8, 4, 6)),randn(2, 8, 3, 5),randn(2, 4, 6, seed=1)
    y = attn.norm(x).flatten(2).transpose(1, 2)
    q,k,v = (y@w.T+b for w,b in zip(attn.qkv.weight.chunk(3), attn.qkv.bias.chunk(3)))
    ck,cv = (context@w.T+b for w,b in zip(attn.kv.weight.chunk(2), attn.kv.bias.chunk(2)))
    theirs = nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.eye(8).repeat(3, 1)); theirs.in_proj_bias.zero_()
        theirs.out_proj.weight.copy_(attn.out.weight); theirs.out_proj.bias.copy_(attn.out.bias)
    for tokens,keys,values in ((context,torch.cat([k,ck], 1),torch.cat([v,cv], 1)), (None,k,v)):
        want = x+theirs(q, keys, values)[0].transpose(1, 2).view(2, 8, 3, 5)
        assert_close(attn(x, tokens), want, atol=1e-5, rtol=1e-4)

def test_attention_of_one_place_by_a_loop():
    attn,x,context = awake(PixelAttention(8, 4, 6)),randn(1, 8, 2, 2),randn(1, 3, 6, seed=1)
    tokens = attn.norm(x).flatten(2)[0].T                                   # (4,8)
    qkv,kv,out = attn.qkv(tokens),attn.kv(context[0]),torch.zeros(8)
    for h in range(2):
        part = slice(4*h,4*h+4)
        keys = [qkv[i,8:16][part] for i in range(4)]+[kv[i,:8][part] for i in range(3)]
        values = [qkv[i,16:][part] for i in range(4)]+[kv[i,8:][part] for i in range(3)]
        w = torch.stack([qkv[2,:8][part]@k/2 for k in keys]).softmax(0)
        out[part] = sum(a*v for a,v in zip(w, values))
    assert_close(attn(x, context)[0,:,1,0], x[0,:,1,0]+attn.out(out), atol=1e-5, rtol=1e-4)

def test_context_that_is_not_seen_might_as_well_not_be_there():
    net,(x,t,cond,context) = make(tiny).eval(),given_to(tiny)
    seen = torch.tensor([[True,True,False,False],[True]*4,[False]*4])
    y = net(x, t, cond, context, seen)
    for i,n in enumerate((2,4,0)): assert_close(y[i:i+1], net(x[i:i+1], t[i:i+1], cond[i:i+1], context[i:i+1,:n]), atol=1e-4, rtol=1e-4)
    assert_close(net(x, t, cond, torch.where(seen[...,None], context, 99.), seen), y)

@pytest.mark.parametrize('seen', [torch.ones(3, 5, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool), torch.ones(3, 4)], ids=['tokens','rows','dtype'])
def test_what_is_seen_must_fit_the_context(seen):
    x,t,cond,context = given_to(tiny)
    with pytest.raises(ValueError, match='seen torch.*one boolean for each token'): make()(x, t, cond, context, seen)
    with pytest.raises(ValueError, match='seen torch'): make()(x, t, cond, None, torch.ones(3, 4, dtype=torch.bool))

# The whole

@pytest.mark.parametrize('change', [dict(), dict(patch=1, attn=(8,)), dict(patch=4, mults=(1,), attn=(2,)), dict(mults=(1,2,3), px=16, attn=(8,2)), dict(blocks=3), dict(C=6, out=3),
                                    dict(cond=0), dict(context=0), dict(context=0, attn=()), dict(mults=(2,1,2), px=16, attn=(4,)), dict(dropout=.5)])
def test_every_shape_of_network(change):
    cfg = replace(tiny, **change)
    torch.manual_seed(0); net = UNet(cfg)
    x,t,cond,context = given_to(cfg)
    y = net(x, t, cond, context)
    assert y.shape==(3,cfg.out,cfg.px,cfg.px) and not y.any()               # says zero
    awake(net).eval()
    net(x, t, cond, context).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in net.parameters())
    assert UNetConfig(**json.loads(json.dumps(asdict(cfg)))).sides==cfg.sides   # lists where there were tuples
    UNet(replace(cfg, mults=list(cfg.mults), attn=list(cfg.attn))).load_state_dict(net.state_dict())

def test_keys_and_shapes_that_saved_weights_rely_on():
    with torch.device('meta'): net = UNet(UNetConfig(blocks=1, cond=128, context=128))
    state = {k: tuple(v.shape) for k,v in net.state_dict().items()}
    assert state['place']==(64,16,16) and state['first.weight']==(64,12,3,3) and state['last.weight']==(12,64,3,3)
    assert state['time.0.weight']==(256,64) and state['cond.weight']==(256,128)
    assert state['down.1.weight']==(64,64,3,3) and state['down.2.attn.kv.weight']==(256,128) and state['up.0.res.skip.weight']==(128,256,1,1)
    assert len(state)==147 and sum(torch.Size(s).numel() for s in state.values())==3_185_740

@pytest.mark.parametrize('which', range(4))
def test_each_input_has_its_say(which):
    net,args = make(),list(given_to(tiny))
    before = net(*args)
    args[which] = args[which]+1
    assert not torch.allclose(before, net(*args), atol=1e-4)

def test_a_picture_does_not_depend_on_its_batch():
    net,args = make().eval(),given_to(tiny, 5)
    whole = net(*args)
    for i in range(5): assert_close(net(*(a[i:i+1] for a in args)), whole[i:i+1], atol=1e-5, rtol=1e-4)

def test_two_half_batches_give_the_gradient_of_one():
    net,(x,t,cond,context) = make(),given_to(tiny, 4)
    abar,eps = cosine_abar(1000),randn(4, 3, 8, 8, seed=3)
    def grads(*parts):
        net.zero_grad()
        for p in parts:
            call = lambda xt, t, c: net(xt, t, cond[p], context[p])
            (diffusion_loss(call, x[p], None, abar, 'v', t[p], eps[p]).mean()/len(parts)).backward()
        return [p.grad.clone() for p in net.parameters()]
    assert_close(grads(slice(0,4)), grads(slice(0,2), slice(2,4)), atol=1e-5, rtol=1e-3)

def test_no_context_is_an_empty_one():
    net,(x,t,cond,_) = make(),given_to(tiny)
    assert_close(net(x, t, cond), net(x, t, cond, torch.zeros(3, 0, 6)))

def test_left_behind_is_taken_up_newest_first():
    "Each block on the way up gets a result of its own side; the first one of all is used last"
    net,args,sizes = make(),given_to(tiny),[]
    for layer in net.up: layer.register_forward_pre_hook(lambda m, i: sizes.append(tuple(i[0].shape[1:])))
    net(*args)
    assert sizes==[(32,2,2),(24,2,2),(16,2,2),(16,4,4),(16,4,4)]

def test_channels_last_and_bf16_agree():
    net,args = make().eval(),given_to(tiny)
    want = net(*args)
    net = net.to(memory_format=torch.channels_last)
    assert_close(net(args[0].to(memory_format=torch.channels_last), *args[1:]), want, atol=1e-5, rtol=1e-4)
    with torch.autocast('cpu', torch.bfloat16): half = net(*args)
    assert (half.float()-want).abs().mean()<.05*want.abs().mean()

def test_nothing_looks_at_values():
    "Tensors on `meta` have no values: whoever asks for one stops. A training on a GPU would have to wait"
    with torch.device('meta'): net = UNet(tiny)
    assert net(*(a.to('meta') for a in given_to(tiny))).shape==(3,3,8,8)

@quick
@given(st.integers(0, 999), st.integers(0, 999), st.integers(1, 64))
def test_time_embedding_has_one_length_and_depends_on_differences(a, b, half):
    e = time_embedding(torch.tensor([a,b,a+1,b+1]), 2*half)
    assert e.shape==(4,2*half)
    assert_close(e.square().sum(1), torch.full((4,), float(half)), atol=1e-3, rtol=0)
    assert_close(e[0]@e[1], e[2]@e[3], atol=2e-3*half, rtol=0)

# Bad input

@pytest.mark.parametrize('change, words', [
    (dict(px=10), '10 pixels.*4 divides'), (dict(px=0), '0 pixels'), (dict(px=-8), '-8 pixels'), (dict(D=6), 'D=6.*multiple of 4'), (dict(D=0), 'D=0'),
    (dict(attn=(8,)), r'\(8,\).*\(4, 2\)'), (dict(px=16), r'\(2,\).*\(8, 4\)'), (dict(attn=(), context=6), 'context=6.*attn'), (dict(D=20, head=12), '40 channels.*3 heads')])
def test_configurations_that_cannot_be_built(change, words):
    with pytest.raises(ValueError, match=words): replace(tiny, **change)

@pytest.mark.parametrize('change, words', [
    (lambda x, t, c, k: (x[:,:2],t,c,k), r'\(B,3,8,8\), not \(3, 2, 8, 8\)'), (lambda x, t, c, k: (x[...,:4],t,c,k), r'not \(3, 3, 8, 4\)'), (lambda x, t, c, k: (x[0],t,c,k), r'not \(3, 8, 8\)'),
    (lambda x, t, c, k: (F.pad(x, (4,4,4,4)),t,c,k), r'not \(3, 3, 16, 16\)'),
    (lambda x, t, c, k: (x,t[:1],c,k), r'\(1,\).*3 pictures'), (lambda x, t, c, k: (x,t[0],c,k), r'\(\).*3 pictures'), (lambda x, t, c, k: (x,t[:,None],c,k), r'\(3, 1\)'),
    (lambda x, t, c, k: (x,t,None,k), r'missing.*\(3,5\)'), (lambda x, t, c, k: (x,t,c[:,:4],k), r'\(3, 4\).*\(3,5\)'), (lambda x, t, c, k: (x,t,c[:1],k), r'\(1, 5\)'),
    (lambda x, t, c, k: (x,t,c,k[0]), r'\(4, 6\).*\(3,M,6\)'), (lambda x, t, c, k: (x,t,c,k[:1]), r'\(1, 4, 6\)'), (lambda x, t, c, k: (x,t,c,k[...,:5]), r'\(3, 4, 5\)')])
def test_inputs_that_do_not_fit(change, words):
    with pytest.raises(ValueError, match=words): UNet(tiny)(*change(*given_to(tiny)))

@pytest.mark.parametrize('name', ['cond', 'context'])
def test_what_a_network_was_made_without(name):
    x,t,cond,context = given_to(tiny)
    net = UNet(replace(tiny, cond=0, context=0))
    with pytest.raises(ValueError, match=f'{name}=0'): net(x, t, **{name: dict(cond=cond, context=context)[name]})

@pytest.mark.parametrize('t, D', [(torch.zeros(2, 1), 8), (torch.tensor(3), 8), (torch.zeros(2), 7), (torch.zeros(2), 0)])
def test_time_embedding_refuses(t, D):
    with pytest.raises(ValueError): time_embedding(t, D)
