"""What the cells of 07_elbo cannot show: bad input, half precision, laws over many inputs."""
import math
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import distributions as D
from torch.testing import assert_close

from dalle_edu.elbo import (gaussian_nll, kl_normal, kl_to_uniform, logit_laplace_nll, map_pixels, relax, reparameterize,
                            unmap_pixels)

sizes = st.tuples(st.integers(1, 4), st.integers(2, 9), st.integers(1, 4), st.integers(1, 4))
quick = settings(max_examples=30, deadline=None)

def normal(seed, *shape, scale=1.): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))*scale

@quick
@given(sizes, st.floats(0., 30.), st.integers(0, 999))
def test_kl_to_uniform_lies_between_0_and_ln_K_a_cell(shape, scale, seed):
    B,K,h,w = shape
    kl = kl_to_uniform(normal(seed, *shape, scale=scale))
    assert kl.shape == (B,)
    assert (kl > -1e-4).all() and (kl < h*w*math.log(K)+1e-4).all()

@quick
@given(sizes, st.floats(0.05, 5.), st.integers(0, 999))
def test_relax_gives_distributions_along_dimension_1(shape, tau, seed):
    z = relax(normal(seed, *shape, scale=5.), tau)
    assert z.shape == shape and z.isfinite().all() and (z >= 0).all()
    assert_close(z.sum(1), torch.ones(shape[0], *shape[2:]))

@quick
@given(sizes, st.integers(0, 999))
def test_every_term_is_one_number_per_image_and_does_not_mix_images(shape, seed):
    x,mu,s = (normal(seed+i, *shape) for i in range(3))
    for f in (lambda i: kl_normal(mu[i], s[i]), lambda i: gaussian_nll(x[i], mu[i], s[i].exp()), lambda i: kl_to_uniform(mu[i]),
              lambda i: logit_laplace_nll(map_pixels(x[i].tanh()), mu[i], s[i])):
        whole = f(slice(None))
        assert whole.shape == shape[:1]
        assert_close(whole, torch.cat([f(slice(i, i+1)) for i in range(shape[0])]), rtol=1e-4, atol=1e-4)

@quick
@given(st.floats(-3., 3.), st.floats(-2., 1.), st.integers(0, 999))
def test_kl_normal_is_what_draws_say(mu, logvar, seed):
    torch.manual_seed(seed)
    mu,logvar = torch.tensor([[mu]]).expand(20_000, 1),torch.tensor([[logvar]]).expand(20_000, 1)
    z = reparameterize(mu, logvar)
    q,p = D.Normal(mu, (logvar/2).exp()),D.Normal(0., 1.)
    gap = q.log_prob(z) - p.log_prob(z)
    assert abs(gap.mean() - kl_normal(mu, logvar)[0]) < 6*gap.std()/20_000**0.5 + 1e-4

def test_gaussian_nll_takes_a_number_a_parameter_or_a_picture():
    x,mu,log_sigma = normal(0, 2, 3, 4, 4),normal(1, 2, 3, 4, 4),torch.nn.Parameter(torch.tensor(-1.))
    one = gaussian_nll(x, mu, math.exp(-1))
    assert_close(gaussian_nll(x, mu, torch.full_like(x, -1).exp()), one)
    assert_close(gaussian_nll(x, mu, log_sigma.exp()), one)
    gaussian_nll(x, mu, log_sigma.exp()).mean().backward()
    assert_close(log_sigma.grad, (1 - ((x-mu)/math.exp(-1))**2).flatten(1).sum(1).mean())   # on paper

def test_pixel_map_round_trip_and_margin():
    x = torch.linspace(-1, 1, 101, dtype=torch.float64)
    for eps in (0.01, 0.1, 0.3): assert_close(unmap_pixels(map_pixels(x, eps), eps), x)
    assert unmap_pixels(torch.tensor([0., 1.])).tolist() == [-1., 1.]

@pytest.mark.parametrize('tau', [0., -1., float('nan')])
def test_relax_refuses_temperatures_that_are_none(tau):
    with pytest.raises(ValueError, match='above 0'): relax(torch.zeros(1, 2, 1, 1), tau)

def test_half_precision_logits_are_relaxed_and_priced_in_full():
    logits = normal(0, 4, 512, 2, 2, scale=4.)
    assert relax(logits.bfloat16()).dtype == kl_to_uniform(logits.bfloat16()).dtype == torch.float32
    assert_close(kl_to_uniform(logits.bfloat16()), kl_to_uniform(logits.bfloat16().float()))

def test_relax_survives_a_gumbel_draw_of_zero(monkeypatch):
    monkeypatch.setattr(torch.Tensor, 'exponential_', lambda self: self.zero_())              # seen on GPUs
    z = relax(torch.zeros(1, 4, 1, 1))
    assert z.isfinite().all()
