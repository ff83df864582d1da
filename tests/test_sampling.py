import pytest
import torch
from diffusers import DDIMScheduler
from torch.testing import assert_close

from morse import dot_loss, morse_sample
from morse.plan import MorsePlan
from morse.sampling import JumpPoint, dot_estimate, estimate, make_pair
from morse.spaces import ddim_step, from_clean, signal_and_noise, to_clean


@pytest.fixture
def scheduler():
    return DDIMScheduler(clip_sample=False, timestep_spacing="leading")


@pytest.fixture
def denoiser():
    """A nonlinear denoiser that mixes positions but not images."""
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)) / 4

    def dash(sample, timestep):
        time = torch.as_tensor(timestep, dtype=sample.dtype).reshape(-1, 1, 1, 1) / 1000
        return torch.tanh((sample.flatten(1) @ weight).reshape(sample.shape) + time)

    return dash


def solver_of(scheduler):
    table = scheduler.alphas_cumprod

    def step(model_output, sample, timestep, prev_timestep):
        start, end = (
            signal_and_noise(table, torch.tensor(t), sample) for t in (timestep, prev_timestep)
        )
        return ddim_step(model_output, sample, start, end)

    return step


def noise(batch_size=3):
    return torch.randn(batch_size, 1, 4, 4, generator=torch.Generator().manual_seed(5))


def exact_dot(dash):
    return lambda sample, timestep, jump: dash(sample, timestep) - jump.model_output


def test_all_dash_is_diffusers_ddim(scheduler, denoiser):
    scheduler.set_timesteps(10)
    expected = noise()
    for timestep in scheduler.timesteps:
        expected = scheduler.step(denoiser(expected, timestep), timestep, expected).prev_sample
    found = morse_sample(
        denoiser,
        None,
        solver_of(scheduler),
        noise(),
        scheduler.timesteps.tolist(),
        MorsePlan.uniform(10, 0),
    )
    # DDIMScheduler keeps its alphas in float32, and so do we, in another order of operations.
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_dot_with_the_exact_residual_equals_more_dash(scheduler, denoiser):
    timesteps = [999, 870, 701, 500, 333, 100]
    solver = solver_of(scheduler)
    all_dash = morse_sample(denoiser, None, solver, noise(), timesteps, MorsePlan.uniform(6, 0))
    with_dot = morse_sample(
        denoiser, exact_dot(denoiser), solver, noise(), timesteps, MorsePlan.uniform(2, 4)
    )
    assert_close(with_dot, all_dash)
    reuse = morse_sample(
        denoiser,
        lambda sample, timestep, jump: torch.zeros_like(sample),
        solver,
        noise(),
        timesteps,
        MorsePlan.uniform(2, 4),
    )
    assert (reuse - all_dash).abs().max() > 1e-3


def test_a_batch_equals_its_images_one_by_one(scheduler, denoiser):
    def dot(sample, timestep, jump):
        return 0.1 * torch.sin(sample + jump.sample) * jump.model_output

    plan, timesteps = MorsePlan.from_string("DooDo"), [999, 800, 600, 400, 200]
    arguments = (denoiser, dot, solver_of(scheduler))
    batch = morse_sample(*arguments, noise(4), timesteps, plan)
    singles = [morse_sample(*arguments, one[None], timesteps, plan) for one in noise(4)]
    # Matrix products round differently with the batch size, and 1 / alpha(999) magnifies it.
    assert_close(batch, torch.cat(singles), rtol=1e-4, atol=1e-4)


def test_dot_sees_the_latest_dash_evaluation(denoiser):
    seen = []

    def dot(sample, timestep, jump):
        seen.append((int(timestep), int(jump.timestep)))
        assert_close(jump.model_output, denoiser(jump.sample, jump.timestep))
        return torch.zeros_like(sample)

    def in_place(model_output, sample, timestep, prev_timestep):
        return sample.add_(model_output, alpha=-0.1)

    plan, timesteps = MorsePlan.from_string("DoDoo"), [90, 70, 50, 30, 10]
    morse_sample(denoiser, dot, in_place, noise(), timesteps, plan)
    assert seen == [(70, 90), (30, 50), (10, 50)]


def test_an_independent_dot_replaces_the_base():
    def dot(sample, timestep, jump):
        return torch.ones_like(sample)

    jump = JumpPoint(noise(), torch.tensor(9), 2 * torch.ones_like(noise()))
    assert_close(dot_estimate(dot, noise(), torch.tensor(3), jump), 3 * torch.ones_like(noise()))
    dot.independent = True
    assert_close(dot_estimate(dot, noise(), torch.tensor(3), jump), torch.ones_like(noise()))


def test_lengths_must_agree(denoiser):
    with pytest.raises(ValueError, match="plan has 6 evaluations but timesteps has 2"):
        morse_sample(denoiser, None, None, noise(), [9, 3], MorsePlan.uniform(2, 4))


def test_dash_gradient_does_not_leak_and_jump_is_a_copy(denoiser):
    sample = noise()
    _, jump = estimate("dash", sample, torch.tensor(5), None, denoiser, None)
    sample.zero_()
    assert jump.sample.abs().max() > 0


class TestLoss:
    """Algorithm 1."""

    timesteps = (torch.tensor([900, 500, 20]), torch.tensor([700, 499, 0]))

    def test_the_exact_residual_has_no_loss(self, scheduler, denoiser):
        arguments = {"timesteps": self.timesteps, "alphas_cumprod": scheduler.alphas_cumprod}
        clean = noise() / 3
        loss = dot_loss(denoiser, exact_dot(denoiser), clean, noise(), **arguments)
        assert_close(loss, torch.zeros(()))

    def test_zero_residual_costs_the_change_of_dash(self, scheduler, denoiser):
        arguments = {"timesteps": self.timesteps, "alphas_cumprod": scheduler.alphas_cumprod}
        clean = noise() / 3
        loss = dot_loss(
            denoiser, lambda x, t, jump: torch.zeros_like(x), clean, noise(), **arguments
        )
        alphas = scheduler.alphas_cumprod.double()
        total = []
        for index in range(3):
            a_s, a_o = (alphas[t[index]].item() for t in self.timesteps)
            x_s = a_s**0.5 * clean[index] + (1 - a_s) ** 0.5 * noise()[index]
            z_s = denoiser(x_s[None].float(), self.timesteps[0][index])[0]
            x_o = a_o**0.5 * (x_s - (1 - a_s) ** 0.5 * z_s) / a_s**0.5 + (1 - a_o) ** 0.5 * z_s
            z_o = denoiser(x_o[None].float(), self.timesteps[1][index])[0]
            total.append((z_o - z_s).square().mean())
        assert_close(loss, torch.stack(total).mean().float(), rtol=1e-4, atol=1e-7)

    @pytest.mark.parametrize("kind", ["sample", "v_prediction"])
    def test_a_pair_is_the_same_whatever_dash_predicts(self, scheduler, denoiser, kind):
        table = scheduler.alphas_cumprod

        def dash(sample, timestep):
            rates = signal_and_noise(table, timestep, sample)
            clean = to_clean(denoiser(sample, timestep), sample, rates, "epsilon")
            return from_clean(clean, sample, rates, kind)

        arguments = (noise() / 3, noise().flip(0), self.timesteps, table)
        _, expected, _ = make_pair(denoiser, *arguments)
        jump, sample, target = make_pair(dash, *arguments, kind)
        # The small alpha at 900 magnifies rounding.
        assert_close(sample, expected, rtol=1e-4, atol=1e-4)
        assert_close(target, dash(sample, self.timesteps[1]))
        options = {"timesteps": self.timesteps, "alphas_cumprod": table, "prediction_type": kind}
        loss = dot_loss(dash, lambda x, t, jump: torch.zeros_like(x), *arguments[:2], **options)
        assert_close(loss, (target - jump.model_output).square().mean())

    def test_gradient_reaches_dot_alone(self, scheduler):
        dash_weight = torch.tensor(0.3, requires_grad=True)
        dot_weight = torch.tensor(0.2, requires_grad=True)
        loss = dot_loss(
            lambda x, t: dash_weight * x,
            lambda x, t, jump: dot_weight * x,
            noise(),
            noise(),
            timesteps=self.timesteps,
            alphas_cumprod=scheduler.alphas_cumprod,
        )
        loss.backward()
        assert dash_weight.grad is None and dot_weight.grad.abs() > 0

    def test_the_order_of_timesteps_is_checked(self, scheduler, denoiser):
        one_equal = (self.timesteps[0], torch.tensor([700, 499, 20]))
        for timesteps in (self.timesteps[::-1], one_equal):
            with pytest.raises(ValueError, match="t_s > t_o"):
                make_pair(denoiser, noise(), noise(), timesteps, scheduler.alphas_cumprod)


class TestSpaces:
    @pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
    def test_round_trip(self, scheduler, prediction_type):
        clean, eps = noise() / 3, noise(3).flip(0)
        rates = signal_and_noise(scheduler.alphas_cumprod, torch.tensor([900, 500, 20]), clean)
        alpha, sigma = rates
        sample = alpha * clean + sigma * eps
        output = {"epsilon": eps, "sample": clean, "v_prediction": alpha * eps - sigma * clean}
        model_output = output[prediction_type]
        clean = to_clean(model_output, sample, rates, prediction_type)
        found = from_clean(clean, sample, rates, "epsilon")
        assert_close(found, eps, rtol=1e-4, atol=1e-4)
        clean = to_clean(found, sample, rates, "epsilon")
        back = from_clean(clean, sample, rates, prediction_type)
        assert_close(back, model_output, rtol=1e-4, atol=1e-4)

    def test_velocity_is_diffusers_velocity(self, scheduler):
        clean, eps, timestep = noise(), noise().flip(0), torch.tensor([900, 500, 20])
        rates = signal_and_noise(scheduler.alphas_cumprod, timestep, clean)
        sample = scheduler.add_noise(clean, eps, timestep)
        velocity = scheduler.get_velocity(clean, eps, timestep)
        found = from_clean(to_clean(eps, sample, rates, "epsilon"), sample, rates, "v_prediction")
        # The small alpha at 900 magnifies rounding.
        assert_close(found, velocity, rtol=1e-3, atol=1e-4)

    def test_the_clean_end(self, scheduler):
        alpha, sigma = signal_and_noise(scheduler.alphas_cumprod, torch.tensor(-1), noise())
        assert (alpha == 1).all() and (sigma == 0).all()

    def test_half_precision_keeps_what_little_noise_the_first_timestep_has(self, scheduler):
        """1 - alpha^2 is 1e-4 there, less than what float16 tells from 0 beside 1."""
        alpha, sigma = signal_and_noise(scheduler.alphas_cumprod, torch.tensor(0), noise().half())
        assert alpha.dtype == sigma.dtype == torch.half
        assert float(sigma) == pytest.approx(0.01, rel=1e-3)

    def test_unknown_prediction_type(self):
        rates = (torch.ones(()), torch.ones(()))
        for convert in (to_clean, from_clean):
            with pytest.raises(ValueError, match=r"one of .*flow_prediction'\), got 'flow'"):
                convert(noise(), noise(), rates, "flow")
        with pytest.raises(ValueError, match=r"one of .*v_prediction'\), got 'flow_pred"):
            ddim_step(noise(), noise(), rates, rates, "flow_prediction")
