"""What the cells of 04_transformer cannot show: random shapes, other people's implementations, bad input."""
import math
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close

from dalle_edu.transformer import ACTS, Attention, Block, Cache, Transformer, TransformerConfig, quick_gelu, sdpa

quick = settings(max_examples=25, deadline=None)
sizes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(1, 7), st.integers(1, 5), st.integers(1, 4)) # B, heads, N, M, d, seed

def make(seed=0, std=.3, **cfg):
    "A stack whose every weight matters: at their initial size its branches are whispers"
    torch.manual_seed(seed)
    t = Transformer(TransformerConfig(**{**dict(D=16, depth=2, heads=2), **cfg}))
    for n,p in t.named_parameters(): nn.init.normal_(p, mean=float('norm' in n and 'weight' in n), std=std)
    return t.eval()

def loop(q, k, v, mask):
    "One pair of tokens at a time, in float64; a token that may look nowhere gets zeros"
    q,k,v = (t.double() for t in (q, k, v))
    B,H,N,d = q.shape
    out = torch.zeros(B, H, N, v.shape[-1], dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for i in range(N):
                w = {j: math.exp((q[b,h,i]@k[b,h,j]).item()/d**.5) for j in range(k.shape[2]) if mask[b,h,i,j]}
                for j in w: out[b,h,i] += w[j]/sum(w.values())*v[b,h,j]
    return out.float()

@quick
@given(sizes, st.sampled_from(['full', 'per head', 'per row', 'keys alone']))
def test_sdpa_is_the_loop(size, kind):
    B,H,N,M,d,seed = size
    g = torch.Generator().manual_seed(seed)
    q,k,v = (torch.randn(B, H, n, d, generator=g) for n in (N, M, M))
    shape = {'full':(B,H,N,M), 'per head':(1,H,N,M), 'per row':(B,1,N,M), 'keys alone':(B,1,1,M)}[kind]
    mask = torch.rand(shape, generator=g)<.6                                # rows without a True are among them
    assert_close(sdpa(q, k, v, mask), loop(q, k, v, mask.expand(B, H, N, M)), atol=1e-5, rtol=1e-5)

@quick
@given(sizes)
def test_causal_flag_is_a_triangular_mask(size):
    B,H,N,_,d,seed = size
    q,k,v = torch.randn(3, B, H, N, d, generator=torch.Generator().manual_seed(seed))
    assert_close(sdpa(q, k, v, causal=True), loop(q, k, v, torch.ones(B, H, N, N).tril()), atol=1e-5, rtol=1e-5)

def test_sdpa_keeps_the_dtype_and_ignores_autocast_on_a_cpu():
    q = torch.randn(1, 2, 4, 8)
    assert sdpa(*[q.bfloat16()]*3).dtype==torch.bfloat16
    want = F.scaled_dot_product_attention(q, q, q)
    with torch.autocast('cpu', torch.bfloat16): assert_close(sdpa(q, q, q), want, rtol=0, atol=0)

def as_theirs(block, theirs):
    "Copy a `Block` into a `torch.nn.TransformerEncoderLayer`, whose attention has our layout"
    pairs = dict(norm1='norm1', norm2='norm2', up='linear1', down='linear2')
    state = {f'{b}.{p}':getattr(getattr(block, a), p) for a,b in pairs.items() for p in ('weight','bias')}
    state |= {f'self_attn.in_proj_{p}':getattr(block.attn.qkv, p) for p in ('weight','bias')}
    state |= {f'self_attn.out_proj.{p}':getattr(block.attn.out, p) for p in ('weight','bias')}
    theirs.load_state_dict(state)
    return theirs.eval()

@pytest.mark.parametrize('heads', [1, 2, 4])
@pytest.mark.parametrize('causal', [False, True])
def test_torchs_multihead_attention(heads, causal):
    a = make(heads=heads, causal=causal).blocks[0].attn
    theirs = nn.MultiheadAttention(16, heads, batch_first=True).eval()
    theirs.load_state_dict({'in_proj_weight':a.qkv.weight, 'in_proj_bias':a.qkv.bias, 'out_proj.weight':a.out.weight, 'out_proj.bias':a.out.bias})
    x = torch.randn(3, 7, 16)
    forbidden = torch.ones(7, 7).bool().triu(1) if causal else None         # True is forbidden there
    assert_close(a(x), theirs(x, x, x, attn_mask=forbidden, need_weights=False)[0], atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize('act', ['gelu', 'quick_gelu'])
def test_torchs_encoder_layer_with_norm_first(act):
    t,x = make(depth=1, act=act),torch.randn(3, 7, 16)
    theirs = as_theirs(t.blocks[0], nn.TransformerEncoderLayer(16, 2, 64, 0., ACTS[act], batch_first=True, norm_first=True))
    real = torch.ones(3, 7).bool(); real[1,4:] = False
    want = theirs(x, src_key_padding_mask=~real)
    assert_close(t(x, real[:,None,None])[real], want[real], atol=1e-4, rtol=1e-4)
    post = as_theirs(t.blocks[0], nn.TransformerEncoderLayer(16, 2, 64, 0., ACTS[act], batch_first=True))
    assert (post(x)-t(x)).abs().max()>.1                                    # a test that the other order of the norm would fail

def test_transformers_gpt2_stack():
    transformers = pytest.importorskip('transformers')
    t,x = make(causal=True, depth=3),torch.randn(2, 9, 16)
    gpt = transformers.GPT2Model(transformers.GPT2Config(vocab_size=4, n_positions=16, n_embd=16, n_layer=3, n_head=2, activation_function='gelu')).eval()
    with torch.no_grad():
        gpt.wpe.weight.zero_()
        for b,g in zip(t.blocks, gpt.h):
            for ours,his in ((b.attn.qkv,g.attn.c_attn),(b.attn.out,g.attn.c_proj),(b.up,g.mlp.c_fc),(b.down,g.mlp.c_proj)):
                his.weight.copy_(ours.weight.T); his.bias.copy_(ours.bias)
            for ours,his in ((b.norm1,g.ln_1),(b.norm2,g.ln_2)): his.load_state_dict(ours.state_dict())
        assert_close(gpt.ln_f(t(x)), gpt(inputs_embeds=x).last_hidden_state, atol=1e-4, rtol=1e-4)

def test_quick_gelu_is_transformers_own():
    acts = pytest.importorskip('transformers.activations')
    x = torch.linspace(-9, 9, 500)
    assert_close(quick_gelu(x), acts.ACT2FN['quick_gelu'](x))

def jacobian(t, x, **kw):
    "(N,N): does output i move with input j?"
    x = x.clone().requires_grad_()
    return torch.stack([torch.autograd.grad(o.sum(), x, retain_graph=True)[0][0].abs().amax(-1) for o in t(x, **kw)[0]])

@pytest.mark.parametrize('depth', [1, 3])
def test_causality_by_gradient(depth):
    x = torch.randn(1, 6, 16)
    assert ((jacobian(make(causal=True, depth=depth), x)>0)==torch.ones(6, 6).bool().tril()).all()
    assert (jacobian(make(depth=depth), x)>0).all()

def test_mask_and_causality_must_both_hold():
    torch.manual_seed(1); mask = (torch.rand(6, 6)<.6)|torch.eye(6).bool()
    x = torch.randn(1, 6, 16)
    assert ((jacobian(make(causal=True, depth=1), x, mask=mask)>0)==mask.tril()).all()
    assert ((jacobian(make(depth=1), x, mask=mask)>0)==mask).all()

@quick
@given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 9))
def test_cached_is_uncached_in_any_chunks(a, b, c):
    t,x = make(causal=True),torch.randn(2, a+b+c, 16)
    cache,chunks = Cache(),[n for n in (a,b,c) if n]
    assert_close(torch.cat([t(part, cache=cache) for part in x.split(chunks, 1)], 1), t(x), atol=1e-5, rtol=1e-4)
    assert len(cache)==a+b+c

def test_cached_is_uncached_under_a_mask():
    t,x = make(causal=True),torch.randn(2, 8, 16)
    real = torch.ones(2, 1, 1, 8).bool(); real[1,...,2] = False
    cache = Cache()
    got = torch.cat([t(x[:,a:b], real[...,:b], cache) for a,b in ((0,3),(3,4),(4,8))], 1)
    assert_close(got, t(x, real), atol=1e-5, rtol=1e-4)
    assert (got-t(x)).abs().max()>1e-3

def test_a_cache_cuts_no_gradient():
    t,x = make(causal=True),torch.randn(1, 5, 16)
    def grads(f): t.zero_grad(); f().sum().backward(); return {n:p.grad.clone() for n,p in t.named_parameters()}
    def cached(): c = Cache(); return torch.cat([t(p, cache=c) for p in x.split(2, 1)], 1)
    assert_close(grads(cached), grads(lambda: t(x)), atol=1e-3, rtol=1e-3)

@pytest.mark.parametrize('causal', [False, True])
def test_one_wanted_token_changes_neither_value_nor_gradient(causal):
    t,x,at = make(causal=causal),torch.randn(3, 6, 16),torch.tensor([5, 0, 2])
    def grads(f): t.zero_grad(); f().square().sum().backward(); return [p.grad.clone() for p in t.parameters()]
    one,all_ = (lambda: t(x, at=at)[:,0]),(lambda: t(x)[[0,1,2],at])
    assert_close(one(), all_()); assert_close(grads(one), grads(all_), atol=1e-3, rtol=1e-3)

def test_a_row_does_not_depend_on_its_neighbours():
    for causal in (False, True):
        t,x = make(causal=causal),torch.randn(5, 6, 16)
        assert_close(t(x)[2:3], t(x[2:3]), atol=1e-5, rtol=1e-4)

def test_order_is_nowhere_but_in_the_tokens():
    t,x,order = make(),torch.randn(2, 6, 16),torch.tensor([3,1,5,0,4,2])
    assert_close(t(x[:,order]), t(x)[:,order], atol=1e-5, rtol=1e-4)

def test_a_token_that_looks_nowhere_hears_nobody_and_makes_no_nan():
    t = make(); x = torch.randn(1, 4, 16, requires_grad=True)
    mask = torch.ones(4, 4).bool(); mask[2] = False
    y = t(x, mask); y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in t.parameters())
    other = x.detach().clone(); other[0,[0,1,3]] += 1
    assert_close(t(other, mask)[0,2], y[0,2]); assert (t(other, mask)[0,0]-y[0,0]).abs().max()>1e-3
    b = t.blocks[0]                                                         # nothing but the bias of `out` comes from attention
    assert_close(b.attn(x, mask)[0,2], b.attn.out.bias)

def test_dropout_is_in_training_alone():
    t,x = make(dropout=.5),torch.randn(1, 4, 16)
    assert_close(t(x), t(x)); t.train()
    assert (t(x)-t(x)).abs().max()>1e-3

def test_names_of_the_weights():
    "Saved weights depend on them"
    names = {n.split('.', 2)[2] for n in make().state_dict()}
    assert names=={f'{m}.{p}' for m in ('norm1','attn.qkv','attn.out','norm2','up','down') for p in ('weight','bias')}
    assert sum(p.numel() for p in make().parameters())==2*(12*16*16+13*16)

@pytest.mark.parametrize('mask, says', [
    (torch.ones(4, 4), 'boolean.*float32'), (torch.ones(4, 4).long(), 'boolean.*int64'), (torch.zeros(4, 4), 'boolean'),
    (torch.ones(4).bool(), r'\(4,\)'), (torch.ones(4, 5).bool(), r'\(4, 5\).*\(3,2,4,4\)'), (torch.ones(3, 4).bool(), r'\(3, 4\)'), (torch.ones(2, 1, 4, 4).bool(), r'\(2, 1, 4, 4\)'),
    (torch.ones(3, 4, 4).bool(), r'\(3, 4, 4\)'), (torch.ones(1, 3, 2, 4, 4).bool(), r'\(1, 3, 2, 4, 4\)')], ids=lambda v: str(tuple(v.shape)) if isinstance(v, torch.Tensor) else '')
def test_masks_that_do_not_fit_are_refused(mask, says):
    for causal in (False, True):
        with pytest.raises(ValueError, match=says): make(causal=causal)(torch.zeros(3, 4, 16), mask)

@pytest.mark.parametrize('shape', [(4,4), (1,4), (1,1,4), (2,4,4), (1,2,1,4), (3,1,1,4), (3,2,4,4)], ids=lambda v: None if 'tensor' in str(v) else str(v))
def test_masks_that_fit_are_taken(shape):
    x = torch.randn(3, 4, 16)
    assert_close(make()(x, torch.ones(shape).bool()), make()(x), atol=1e-5, rtol=1e-4)

def test_a_mask_covers_what_is_in_the_cache_too():
    t,cache = make(causal=True),Cache()
    t(torch.zeros(3, 4, 16), cache=cache)
    with pytest.raises(ValueError, match=r'\(3,2,2,6\)'): t(torch.zeros(3, 2, 16), torch.ones(2, 2).bool(), cache)
    assert len(cache)==4                                                    # refused before anything was appended

def test_caches_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match='causal=True'): make()(torch.zeros(1, 2, 16), cache=Cache())
    t,cache = make(causal=True),Cache(); t(torch.zeros(2, 3, 16), cache=cache)
    with pytest.raises(ValueError, match='5 rows.*holds 2'): t(torch.zeros(5, 1, 16), cache=cache)

def test_tokens_of_another_width_are_refused():
    with pytest.raises(ValueError, match='width 8.*16'): make()(torch.zeros(1, 2, 8))

@pytest.mark.parametrize('cfg, says', [(dict(D=10, heads=3), '10.*3 heads'), (dict(heads=0), 'heads is 0'), (dict(depth=0), 'depth is 0'), (dict(D=-4), 'D is -4'), (dict(mlp=0), 'mlp is 0'),
    (dict(act='relu'), "'relu'.*'gelu', 'quick_gelu'"), (dict(dropout=1.), 'dropout 1.0'), (dict(dropout=-.1), 'dropout -0.1'), (dict(dropout=math.nan), 'dropout nan')], ids=lambda v: None if 'tensor' in str(v) else str(v))
def test_bad_configurations_are_named(cfg, says):
    with pytest.raises(ValueError, match=says): TransformerConfig(**cfg)
