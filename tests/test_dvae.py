"""What the cells of 08_dvae cannot show: bad input, published sizes, saving, one batch against two."""
import json, math
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close

from dalle_edu.dvae import DVAE, DVAEConfig, Block, batches, cosine, dvae_loss, kl_weight, psnr, recipe, temperature

tiny = DVAEConfig(K=16, D=8, D_code=8)
quick = settings(max_examples=20, deadline=None)

def pictures(n, px=32, seed=0): return torch.rand(n, 3, px, px, generator=torch.Generator().manual_seed(seed))*2 - 1
def make(cfg=tiny): torch.manual_seed(0); return DVAE(cfg)
def count(m): return sum(p.numel() for p in m.parameters())

def test_published_sizes():
    with torch.device('meta'): m = DVAE(DVAEConfig.size('paper'))
    assert count(m.encoder) == 53_786_240 and count(m.decoder) == 43_829_766
    assert m.cfg.factor == 8 and m.cfg.gain == 1/64

def test_published_names_and_widths():
    with torch.device('meta'): m = DVAE(DVAEConfig.size('paper'))
    enc,dec = m.encoder.state_dict(),m.decoder.state_dict()
    shape = lambda d, k: tuple(d[f'blocks.{k}.weight'].shape)
    assert shape(enc, 'input') == (256, 3, 7, 7) and shape(dec, 'input') == (128, 8192, 1, 1)
    assert shape(enc, 'output.conv') == (8192, 2048, 1, 1) and shape(dec, 'output.conv') == (6, 256, 1, 1)
    assert [shape(enc, f'group_2.block_1.res_path.conv_{i}')[2] for i in (1,2,3,4)] == [3, 3, 3, 1]
    assert [shape(dec, f'group_2.block_1.res_path.conv_{i}')[2] for i in (1,2,3,4)] == [1, 3, 3, 3]
    assert shape(enc, 'group_2.block_1.id_path') == (512, 256, 1, 1) and 'blocks.group_2.block_2.id_path.weight' not in enc
    assert shape(enc, 'group_4.block_2.res_path.conv_1') == (512, 2048, 3, 3)

def test_laptop_size_is_small_enough_to_ship():
    m = DVAE(DVAEConfig.size('laptop'))
    assert count(m) < 1_000_000 and m.encode(pictures(1)).shape == (1, 8, 8)

def test_gpu_size_gives_the_same_grid_from_64_pixels():
    m = make(DVAEConfig.size('gpu'))
    codes = m.encode(pictures(2, px=64))
    assert codes.shape == (2, 8, 8) and m.decode(codes).shape == (2, 3, 64, 64)

@pytest.mark.parametrize('name', ['laptop', 'gpu', 'paper'])
def test_recipes_are_plain_and_configurations_are_json(name):
    assert {'steps', 'batch', 'lr'} <= recipe(name).keys()
    json.dumps(recipe(name)); json.dumps(vars(DVAEConfig.size(name)))
    cfg = DVAEConfig.size(name)
    assert cfg.tau_steps <= recipe(name)['steps'] and cfg.beta_steps <= recipe(name)['steps']

@pytest.mark.parametrize('f', [DVAEConfig.size, recipe])
def test_unknown_size_names_the_known_ones(f):
    with pytest.raises(ValueError, match='(?s)huge.*gpu.*laptop'): f('huge')

def test_unknown_likelihood():
    with pytest.raises(ValueError, match='logit_laplace'): DVAEConfig(likelihood='l1')

@quick
@given(st.integers(0, 5000), st.integers(1, 4000))
def test_schedules_start_end_and_stay(step, steps):
    cfg = DVAEConfig(tau_steps=steps, beta_steps=steps)
    assert temperature(0, cfg) == 1 and temperature(steps+step, cfg) == cfg.tau
    assert kl_weight(steps+step, cfg) == pytest.approx(cfg.beta)
    assert kl_weight(0, cfg) == cfg.beta0
    assert cfg.tau <= temperature(step+1, cfg) <= temperature(step, cfg) <= 1
    assert cosine(0, 0, 1., 2.) == 1. and cosine(1, 0, 1., 2.) == 2.                        # no division by no steps

@pytest.mark.parametrize('x, words', [
    (torch.zeros(2, 1, 32, 32), r'\(2, 1, 32, 32\)'), (torch.zeros(2, 3, 30, 32), 'multiples of 4'),
    (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), '127.5'), (torch.full((2, 3, 32, 32), 255.), '255')])
def test_encode_refuses_what_is_no_picture(x, words):
    with pytest.raises(ValueError, match=words): make().encode(x)

@pytest.mark.parametrize('codes', [torch.full((1, 8, 8), 16), torch.full((1, 8, 8), -1), torch.zeros(1, 64, dtype=torch.int64), torch.zeros(1, 8, 8)])
def test_decode_refuses_what_are_no_codes(codes):
    with pytest.raises(ValueError, match=r'0, 15'): make().decode(codes)

@pytest.mark.parametrize('likelihood', ['gaussian', 'logit_laplace'])
@pytest.mark.parametrize('patch, groups', [(1, 2), (2, 1), (2, 2), (4, 2)])
def test_every_shape_of_network(likelihood, patch, groups):
    cfg = DVAEConfig(K=16, D=8, D_code=8, patch=patch, groups=groups, likelihood=likelihood)
    m,x = make(cfg),pictures(2)
    codes = m.encode(x)
    y = m.decode(codes)
    assert codes.shape == (2, 32//cfg.factor, 32//cfg.factor) and codes.dtype == torch.int64
    assert y.shape == x.shape and y.abs().max() <= 1
    loss,terms = dvae_loss(m, dict(pixels=x), 3)
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())
    assert terms.keys() == {'nll', 'kl'} and not any(t.requires_grad for t in terms.values())

def test_decode_is_the_decoder_on_one_hot_grids():
    m = make()
    codes = m.encode(pictures(3))
    onehot = nn.functional.one_hot(codes, 16).movedim(-1, 1).float()
    assert_close(m.decode(codes), m.decoder(onehot).clamp(-1, 1))

def test_a_picture_does_not_depend_on_its_batch():
    m,x = make(),pictures(5)
    codes = m.encode(x)
    for i in range(5):
        assert (m.encode(x[i:i+1]) == codes[i:i+1]).all()
        assert_close(m.decode(codes[i:i+1]), m.decode(codes)[i:i+1])

def test_two_half_batches_give_the_gradient_of_one(monkeypatch):
    "What two processes average is what one computes; the noise is the same for each picture"
    import dalle_edu.dvae as dvae
    monkeypatch.setattr(dvae, 'relax', lambda logits, tau: (logits/tau).softmax(1))
    m,x = make(),pictures(8)
    def grads(*parts):
        m.zero_grad()
        for p in parts: (dvae_loss(m, dict(pixels=p), 500)[0]/len(parts)).backward()
        return [p.grad.clone() for p in m.parameters()]
    assert_close(grads(x), grads(x[:4], x[4:]), rtol=1e-3, atol=1e-3)

def test_save_and_load(tmp_path):
    m,x = make(),pictures(2)
    m.save_pretrained(tmp_path/'full'); m.save_pretrained(tmp_path/'half', dtype=torch.float16)
    full,half = (DVAE.from_pretrained(str(tmp_path/n)) for n in ('full', 'half'))
    assert full.cfg == half.cfg == tiny
    assert_close(dict(full.state_dict()), dict(m.state_dict()), rtol=0, atol=0)
    assert all(p.dtype == torch.float32 for p in half.parameters())
    assert_close(half.logits(x), m.logits(x), atol=0.02, rtol=0.02)

def test_batches_and_autocast():
    draw = lambda seed, step, rank, n: (pictures(n, seed=seed+step+rank), ['a']*n)
    batch = batches(draw)(1, 2, 3, 4)
    assert batch.keys() == {'pixels'}
    assert_close(batch['pixels'], pictures(4, seed=6))
    m = make()
    with torch.autocast('cpu', torch.bfloat16): mu,scale,logits = m(batch['pixels'], 0.1)
    assert mu.dtype == logits.dtype == torch.float32

def test_psnr_on_paper():
    x = torch.zeros(2, 3, 4, 4)
    assert_close(psnr(x, x+0.2), torch.full((2,), 20.))                                     # 20·log10(2/0.2)
    assert psnr(x, x).min() > 100

def test_a_block_starts_near_its_identity_path():
    torch.manual_seed(0); b,x = Block(16, 16, 1/64, (3,3,3,1)),torch.randn(4, 16, 8, 8)
    assert (b(x)-x).std() < 0.03*x.std()
