"""What the cells of 11_diffusion cannot show: other people's samplers step by step, bad input, both ends of a process, other devices."""
import math
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from dalle_edu.diffusion import (KINDS, convert, cosine_abar, ddim, ddpm, diffusion_loss, dpm_solver, guided, q_sample, sample_t, snr_steps,
                                 target, timesteps)

quick = settings(max_examples=30, deadline=None)
names = dict(x0='sample', eps='epsilon', v='v_prediction')                  # what diffusers calls them

def randn(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def steps_of(abar): return 1-abar/torch.cat([torch.ones(1, dtype=abar.dtype), abar[:-1]])      # the betas
def model(x, t, cond=None): return .7*x.roll(1, 1).tanh()+.2*(t.view(-1, *[1]*(x.ndim-1))/10).sin()

def theirs(cls, abar, kind, **how):
    scheduler = getattr(pytest.importorskip('diffusers'), cls)
    return scheduler(num_train_timesteps=len(abar), trained_betas=steps_of(abar).numpy(), prediction_type=names[kind], **how)

def walk(scheduler, x, ts, **how):
    for i,t in enumerate(ts): x = scheduler.step(model(x, torch.full((len(x),), t)), t, x, **{k: v(i) for k,v in how.items()}).prev_sample
    return x

def gentle(S): return torch.linspace(.99, .02, S, dtype=torch.float64)      # a process whose ends do not magnify rounding

# Parity with diffusers

def test_cosine_schedule_is_the_squared_cosine_of_diffusers():
    scheduler = pytest.importorskip('diffusers').DDPMScheduler(beta_schedule='squaredcos_cap_v2')
    assert_close(cosine_abar(1000).float()[:-2], scheduler.alphas_cumprod[:-2], rtol=2e-3, atol=1e-7)   # they multiply in float32

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('eta', [0., .6, 1.])
def test_ddim_step_by_step(kind, eta):
    abar,x = gentle(37),randn(3, 4)
    scheduler = theirs('DDIMScheduler', abar, kind, clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(9)                                              # 37//9 = 4 is our spacing too
    ts,noise = timesteps(37, 10),lambda i: randn(3, 4, seed=i+1)
    assert ts[:-1]==[*range(36, -1, -4)]
    want = walk(scheduler, x, ts[:-1], eta=lambda i: eta, variance_noise=(lambda i: noise(i) if eta else None))
    assert_close(ddim(model, x, None, abar, 10, kind, eta=eta, noise=noise), want, atol=2e-5, rtol=1e-4)

@pytest.mark.parametrize('kind', KINDS)
def test_ddim_clips_as_glide_does(kind):
    abar,x = gentle(20),3*randn(3, 4)
    scheduler = theirs('DDIMScheduler', abar, kind, clip_sample=True, clip_sample_range=.5, set_alpha_to_one=True)
    scheduler.set_timesteps(20)
    want = walk(scheduler, x, range(19, -1, -1), use_clipped_model_output=lambda i: True)
    assert_close(ddim(model, x, None, abar, 20, kind, clip=.5), want, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(ddim(model, x, None, abar, 20, kind), want, atol=.01)

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('steps', [30, 7])
def test_ddpm_step_by_step(kind, steps):
    abar,x = gentle(30),randn(3, 4)
    scheduler = theirs('DDPMScheduler', abar, kind, clip_sample=False, variance_type='fixed_small')
    scheduler.set_timesteps(timesteps=timesteps(30, steps)[:-1])
    g,dice = torch.Generator().manual_seed(5),torch.Generator().manual_seed(5)
    want = walk(scheduler, x, timesteps(30, steps)[:-1], generator=lambda i: g)
    assert_close(ddpm(model, x, None, abar, steps, kind=kind, noise=lambda i: torch.randn(3, 4, generator=dice)), want, atol=2e-5, rtol=1e-4)

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('steps', [2, 9, 20])
def test_dpm_solver_step_by_step(kind, steps):
    abar,x = gentle(200),randn(3, 4)
    scheduler = theirs('DPMSolverMultistepScheduler', abar, kind, algorithm_type='dpmsolver++', solver_order=2, final_sigmas_type='zero')
    scheduler.set_timesteps(timesteps=snr_steps(abar, steps)[:-1])
    assert_close(dpm_solver(model, x, None, abar, steps, kind), walk(scheduler, x, scheduler.timesteps.tolist()), atol=5e-5, rtol=1e-3)

# Answers on paper

@pytest.mark.parametrize('kind', KINDS)
def test_one_gaussian_is_carried_along_its_known_path(kind):
    "For N(m,s²) the exact denoiser is linear, and noise ends at m + s·(xT-a·m)/sqrt(a²s²+b²)"
    abar,m,s = cosine_abar(1000)[:990],.4,.3
    def exact(xt, t, cond):
        a2 = abar.float()[t][:,None]; a,b = a2.sqrt(),(1-a2).sqrt()
        x0 = m+a*s*s/(a2*s*s+b*b)*(xt-a*m)
        return target(x0, (xt-a*x0)/b, t, abar, kind)
    xT,a2 = randn(50, 2),abar[-1].item()
    want = m+s*(xT-a2**.5*m)/(a2*s*s+1-a2)**.5
    assert_close(ddim(exact, xT, None, abar, 990, kind), want, atol=.01, rtol=0)
    assert_close(dpm_solver(exact, xT, None, abar, 40, kind), want, atol=.01, rtol=0)
    torch.manual_seed(0)
    drawn = ddpm(exact, randn(4000, 2), None, abar, 200, kind=kind)
    assert abs(drawn.mean()-m)<.02 and abs(drawn.std()-s)<.02

@quick
@given(st.floats(.01, .99), st.sampled_from(KINDS), st.sampled_from(KINDS), st.integers(0, 1000))
def test_any_answer_gives_any_other(left, one, other, seed):
    abar,t = torch.tensor([left], dtype=torch.float64),torch.zeros(5, dtype=torch.int64)
    x0,eps = randn(5, 3, seed=seed),randn(5, 3, seed=seed+1)
    xt = q_sample(x0, t, eps, abar)
    back = convert(target(x0, eps, t, abar, one), xt, t, abar, one)
    assert_close(back, (x0,eps), atol=2e-4, rtol=1e-3)
    assert_close(target(*back, t, abar, other), target(x0, eps, t, abar, other), atol=2e-4, rtol=1e-3)
    assert_close(xt.square()+target(x0, eps, t, abar, 'v').square(), x0.square()+eps.square(), atol=1e-4, rtol=1e-4)

@quick
@given(st.integers(1, 1200), st.data())
def test_levels_fall_and_are_as_many_as_asked(S, data):
    steps = data.draw(st.integers(1, S))
    for ts in (timesteps(S, steps), snr_steps(cosine_abar(S), steps)):
        assert len(ts)==steps+1 and ts[0]==S-1 and ts[-1]==-1 and all(a>b for a,b in zip(ts, ts[1:]))
    assert steps==1 or timesteps(S, steps)[-2]==0

@quick
@given(st.integers(1, 3000))
def test_cosine_schedules_fall_within_0_and_1(S):
    abar = cosine_abar(S)
    assert len(abar)==S and abar.dtype==torch.float64 and (abar>0).all() and (abar<1).all() and (abar.diff()<0).all()
    assert (steps_of(abar)<=.999+1e-9).all()

@quick
@given(st.integers(1, 50), st.integers(1, 2000), st.sampled_from([None,0.,.5,3.]), st.floats(-5, 5))
def test_sampled_levels_are_levels(n, S, spread, shift):
    t = sample_t(n, S, spread=spread, shift=shift)
    assert t.shape==(n,) and t.dtype==torch.int64 and t.min()>=0 and t.max()<S
    if spread==0: assert (t-min(S-1, math.atan(math.exp(shift))*2/math.pi*S)).abs().max()<=1   # all at the level of that ratio

def test_levels_beyond_either_end_are_the_last_ones():
    assert sample_t(4, 5, spread=0., shift=40.).tolist()==[4]*4 and sample_t(4, 5, spread=0., shift=-40.).tolist()==[0]*4

# The loss

def test_loss_is_one_number_for_each_example():
    abar,x,t,eps = gentle(10),randn(6, 3, 4, 4),torch.arange(6),randn(6, 3, 4, 4, seed=1)
    for kind in KINDS:
        loss = diffusion_loss(model, x, None, abar, kind, t, eps)
        want = (model(q_sample(x, t, eps, abar), t)-target(x, eps, t, abar, kind)).square().mean((1,2,3))
        assert_close(loss, want)
        assert_close(diffusion_loss(model, x[2:4], None, abar, kind, t[2:4], eps[2:4]), want[2:4])

def test_loss_is_float32_whatever_the_model_computes_in():
    half = lambda x, t, c: model(x, t).to(torch.bfloat16)
    assert diffusion_loss(half, randn(4, 3), None, gentle(10)).dtype==torch.float32
    assert ddim(half, randn(4, 3), None, gentle(10), 3).dtype==torch.float32

def test_loss_draws_from_all_levels_and_from_the_global_generator():
    seen = []
    def spy(x, t, c): seen.append(t); return x
    torch.manual_seed(3); one = diffusion_loss(spy, randn(500, 2), None, gentle(8))
    torch.manual_seed(3); two = diffusion_loss(spy, randn(500, 2), None, gentle(8))
    assert set(seen[0].tolist())==set(range(8))
    assert_close(one, two, atol=0, rtol=0)

def test_nothing_looks_at_values_on_another_device():
    "Tensors on `meta` have no values: whoever asks for one stops. A training on a GPU would have to wait"
    x,t = torch.empty(4, 3, 8, 8, device='meta'),torch.empty(4, dtype=torch.int64, device='meta')
    for kind in KINDS: assert diffusion_loss(lambda x, t, c: x, x, None, gentle(10), kind, t, x).shape==(4,)
    assert diffusion_loss(guided(lambda x, t, c: x, 2., x), x, x, gentle(10)).device.type=='meta'

# The samplers

@pytest.mark.parametrize('sampler', [lambda m, x, n: ddim(m, x, None, gentle(30), 8), lambda m, x, n: ddim(m, x, None, gentle(30), 8, eta=.5, noise=n),
                                     lambda m, x, n: ddpm(m, x, None, gentle(30), noise=n), lambda m, x, n: dpm_solver(m, x, None, gentle(30), 8, clip=2.)])
def test_a_row_depends_on_its_own_noise_alone(sampler):
    x,fresh,given = randn(5, 4),randn(40, 5, 4, seed=1),randn(5, 4)
    whole = sampler(model, x, lambda i: fresh[i])
    assert_close(whole, sampler(model, x, lambda i: fresh[i]), atol=0, rtol=0)
    for i in range(5): assert_close(sampler(model, x[i:i+1], lambda k: fresh[k][i:i+1]), whole[i:i+1])
    assert torch.equal(x, given)                                            # and the caller's noise is left as it was

def test_dpm_solver_clips_the_predicted_picture():
    abar,x = gentle(30),2*randn(3, 4)
    clipped = lambda x, t, c: model(x, t).clamp(-.3, .3)
    got = dpm_solver(model, x, None, abar, 6, 'x0', clip=.3)
    assert_close(got, dpm_solver(clipped, x, None, abar, 6, 'x0'))
    assert not torch.allclose(got, dpm_solver(model, x, None, abar, 6, 'x0'), atol=.01)

def test_dice_come_from_the_global_generator():
    draw = lambda seed: (torch.manual_seed(seed),ddpm(model, randn(3, 4), None, gentle(10)))[1]
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))

@pytest.mark.parametrize('steps', [1, 4, 10])
def test_each_step_is_one_call_and_no_gradient(steps):
    x,count,wrapped = randn(2, 3).requires_grad_(),[],[]
    def counted(x, t, c): count.append(int(t[0])); return model(x, t)
    def progress(pairs): wrapped.append(len(pairs)); return pairs
    for sampler in (ddim, dpm_solver): assert not sampler(counted, x, None, gentle(10), steps, progress=progress).requires_grad
    assert count==timesteps(10, steps)[:-1]+snr_steps(gentle(10), steps)[:-1] and wrapped==[steps]*2
    fresh = []
    ddim(model, x, None, gentle(10), steps, eta=1., noise=lambda i: fresh.append(i) or randn(2, 3))
    assert fresh==[*range(steps-1)]                                         # the last step adds no noise

def test_ddpm_walks_all_steps_by_default():
    count = []
    ddpm(lambda x, t, c: count.append(1) or x, randn(1, 2), None, gentle(13))
    assert len(count)==13

@pytest.mark.parametrize('sampler', [ddim, dpm_solver])
def test_processes_that_end_in_pure_noise(sampler):
    abar = torch.cat([cosine_abar(50)[:-1],torch.zeros(1)])
    for kind in ('x0','v'): assert sampler(model, randn(3, 4), None, abar, 10, kind).isfinite().all()
    with pytest.raises(ValueError, match="no signal"): sampler(model, randn(3, 4), None, abar, 10, 'eps')

def test_no_noise_is_step_minus_one():
    x,t = randn(3, 2),torch.tensor([-1,0,-1])
    y = q_sample(x, t, randn(3, 2, seed=1), gentle(5))
    assert torch.equal(y[::2], x[::2]) and not torch.equal(y[1], x[1])

# Guidance

def test_guidance_of_conditions_in_dicts():
    def told(x, t, c): return x*c['a'][:,None]+c['b']['deep']
    cond,null = ({'a': randn(3, seed=s), 'b': {'deep': randn(3, 2, seed=s+1)}} for s in (1, 5))
    x,t,was = randn(3, 2),torch.zeros(3, dtype=torch.int64),{'a': cond['a'].clone(), 'b': {'deep': cond['b']['deep'].clone()}}
    for scale in (0., .5, 4., -1.): assert_close(guided(told, scale, null)(x, t, cond), (1-scale)*told(x, t, null)+scale*told(x, t, cond), atol=1e-5, rtol=1e-4)
    assert guided(told, 1, null) is told and guided(told, 1., None) is told
    assert torch.equal(cond['a'], was['a']) and torch.equal(cond['b']['deep'], was['b']['deep'])

@pytest.mark.parametrize('null, cond', [(torch.zeros(1), torch.zeros(3)), (None, torch.zeros(3)), (None, None), ({'a': torch.zeros(3)}, {'b': torch.zeros(3)}),
                                        ({'a': torch.zeros(3)}, torch.zeros(3)), ({'a': torch.zeros(3, 1)}, {'a': torch.zeros(3)})])
def test_guidance_needs_two_conditions_of_one_shape(null, cond):
    with pytest.raises(ValueError, match='one shape'): guided(model, 2., null)(randn(3, 2), torch.zeros(3, dtype=torch.int64), cond)

# Bad input

x,t,abar = randn(3, 2),torch.tensor([0,1,2]),gentle(10)
@pytest.mark.parametrize('call, words', [
    (lambda: target(x, x, t, abar, 'score'), 'score.*eps'), (lambda: convert(x, x, t, abar, 'score'), 'score.*eps'), (lambda: ddim(model, x, None, abar, 5, 'score'), 'score.*eps'),
    (lambda: diffusion_loss(model, x, None, abar, 'score'), 'score.*eps'), (lambda: dpm_solver(model, x, None, abar, 5, 'score'), 'score.*eps'),
    (lambda: timesteps(10, 0), '0 sampling.*1 to 10'), (lambda: timesteps(10, 11), '11 sampling.*1 to 10'), (lambda: timesteps(10, 2.5), '2.5 sampling'),
    (lambda: ddim(model, x, None, abar, 11), '11 sampling'), (lambda: dpm_solver(model, x, None, abar, 11), '11 sampling'), (lambda: ddpm(model, x, None, abar, 0), '0 sampling'),
    (lambda: q_sample(x, t+8, x, abar), '8 to 10.*0 to 9'), (lambda: q_sample(x, t-2, x, abar), '-2 to 0'), (lambda: q_sample(x, t.float(), x, abar), 'float32'),
    (lambda: q_sample(x, t[:1], x, abar), r'\(1,\).*3 rows'), (lambda: q_sample(x, t[0], x, abar), '3 rows'), (lambda: q_sample(x, t, x[:1], abar), r'\(1, 2\)'),
    (lambda: convert(x, x, t+8, abar, 'v'), '8 to 10'), (lambda: target(x, x, t[:2], abar, 'v'), '3 rows'), (lambda: convert(x[:,:1], x, t, abar, 'v'), r'\(3, 1\)'),
    (lambda: diffusion_loss(lambda x, t, c: x[:,:1], x, None, abar), r'\(3, 1\)'), (lambda: diffusion_loss(model, x, None, abar, t=t+8), '8 to 10'),
    (lambda: ddim(lambda x, t, c: x[:,:1], x, None, abar, 5), r'\(3, 1\)'),
    (lambda: ddim(model, x, None, abar, 5, eta=-.1), '-0.1'), (lambda: ddim(model, x, None, abar, 5, eta=1.5), '1.5'), (lambda: ddim(model, x, None, abar, 5, clip=-1.), 'clip=-1'),
    (lambda: ddim(model, x, None, abar.flip(0), 5), 'cosine_abar'), (lambda: ddim(model, x, None, torch.ones(5), 5), 'cosine_abar'), (lambda: dpm_solver(model, x, None, abar[None], 1), 'cosine_abar'),
    (lambda: sample_t(3, 0), '0 steps'), (lambda: sample_t(3, 10, spread=-1.), '-1.0'), (lambda: cosine_abar(0), '0 steps')])
def test_bad_input_is_named_with_the_limit(call, words):
    with pytest.raises(ValueError, match=words): call()
