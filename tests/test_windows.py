import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from train_runs import seeded

from morse.sampling import make_pair
from morse.training import windows
from morse.training.frozen import FrozenDash
from morse.training.pairs import Pairs, weighted_loss
from morse.training.schedule import NoiseSchedule
from morse.training.windows import (
    draw_timesteps,
    fresh_window,
    make_window,
    most_points,
    pick_pairs,
)

ALPHAS = DDPMScheduler().alphas_cumprod


def dash(sample, timestep):
    return torch.tanh(sample.roll(1, -1) + timestep.reshape(-1, 1, 1, 1) / 1000)


def model(sample, timestep, return_dict):
    return (dash(sample, timestep),)


FROZEN = FrozenDash(model, NoiseSchedule.variance_preserving(ALPHAS), "epsilon")


def data(batch_size=4, seed=0):
    return torch.randn(batch_size, 1, 4, 4, generator=seeded(seed)) / 2


@pytest.mark.parametrize("sampling", ["uniform", "plans"])
@pytest.mark.parametrize("num_points", [2, 5])
def test_timesteps_decrease_within_the_schedule(sampling, num_points):
    timesteps = draw_timesteps(500, num_points, sampling, 1000, seeded())
    assert timesteps.shape == (500, num_points)
    assert (timesteps.diff(dim=1) < 0).all()
    assert timesteps.min() >= 0 and timesteps.max() <= 999
    # Both ends are reached, and a seed gives the same draws.
    assert timesteps[:, 0].max() > 980 and timesteps[:, -1].min() < 60
    assert torch.equal(timesteps, draw_timesteps(500, num_points, sampling, 1000, seeded()))


@pytest.mark.parametrize("sampling", ["uniform", "plans"])
@pytest.mark.parametrize("num_train_timesteps", [50, 1000])
def test_the_longest_windows_fit(sampling, num_train_timesteps):
    most = most_points(sampling, num_train_timesteps)
    timesteps = draw_timesteps(3, most, sampling, num_train_timesteps, seeded())
    assert (timesteps.diff(dim=1) < 0).all() and timesteps.min() >= 0


@pytest.mark.parametrize("num_train_timesteps", [4, 50])
def test_a_coarse_schedule_has_no_timestep_twice(num_train_timesteps):
    timesteps = draw_timesteps(500, 3, "plans", num_train_timesteps, seeded())
    assert (timesteps.diff(dim=1) < 0).all()
    assert timesteps[:, 0].max() == num_train_timesteps - 1 and timesteps.min() == 0


class NoDoubles(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **kwargs or {})
        assert found.dtype != torch.float64, function
        return found


def test_plan_timesteps_need_no_float64(monkeypatch):
    """MPS has none; the CPU stands in for it."""
    assert windows._widest_float(torch.device("mps")) == torch.float32
    assert windows._widest_float(torch.device("cuda")) == torch.float64
    monkeypatch.setattr(windows, "_widest_float", lambda device: torch.float32)
    with NoDoubles():
        timesteps = draw_timesteps(500, 3, "plans", 1000, seeded())
    assert (timesteps.diff(dim=1) < 0).all()
    assert timesteps.min() >= 0 and timesteps.max() <= 999


def test_uniform_pairs_are_those_of_algorithm_1():
    timesteps = draw_timesteps(20000, 2, "uniform", 1000, seeded()).float()
    # The larger and the smaller of two uniform draws have means 2/3 and 1/3.
    assert_close(timesteps.mean(0) / 1000, torch.tensor([2 / 3, 1 / 3]), rtol=0, atol=0.01)


def test_plan_timesteps_are_neighbours_on_trailing_grids():
    timesteps = draw_timesteps(300, 3, "plans", 1000, seeded())
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    grids = []
    for steps in range(6, 61):
        scheduler.set_timesteps(steps)
        grids.append(scheduler.timesteps.unfold(0, 3, 1))
    distance = (torch.cat(grids)[None] - timesteps[:, None]).abs().amax(2).amin(1)
    # Halves, as in 437.5 of 48 steps, may be rounded the other way.
    assert distance.max() <= 1 and (distance == 0).float().mean() > 0.97
    # From 6 to 60 evaluations evenly in their logarithm, so that half make fewer than 19.
    steps = (timesteps[:, 0] - timesteps[:, 1]).float()
    assert 45 < steps.median() < 60


def test_a_window_of_one_step_is_algorithm_1():
    clean, noise = data(), data(seed=1)
    timesteps = torch.tensor([[900, 700], [500, 499], [300, 20], [40, 0]])
    window = make_window(FROZEN, clean, noise, timesteps, torch.zeros(4).bool())
    jump, sample, target = make_pair(dash, clean, noise, timesteps.unbind(1), ALPHAS)
    for kept in (window.samples, window.outputs):  # as a cache will give them back
        assert torch.equal(kept.half().float(), kept)
    # Windows round to half precision.
    assert_close(window.samples[:, 0], jump.sample, rtol=1e-3, atol=1e-3)
    assert_close(window.outputs[:, 0, 0], jump.model_output, rtol=1e-3, atol=2e-3)
    scale = sample.abs().amax()  # x_to magnifies rounding where alpha(t_s) is small
    assert_close(window.samples[:, 1] / scale, sample / scale, rtol=1e-2, atol=1e-2)
    assert (window.outputs[:, 1, 0] - target).abs().mean() < 0.02


@pytest.mark.parametrize(
    ("scheduler_class", "second_order"),
    [(DDIMScheduler, False), (DPMSolverMultistepScheduler, True)],
)
def test_a_window_follows_diffusers_solver(scheduler_class, second_order):
    scheduler = scheduler_class.from_config(
        DDPMScheduler(clip_sample=False, timestep_spacing="trailing").config
    )
    scheduler.set_timesteps(8)
    grid = scheduler.timesteps[2:6]
    clean, noise = data(), data(seed=1)
    order = torch.full((4,), second_order)
    window = make_window(FROZEN, clean, noise, grid.expand(4, -1), order)
    sample = window.samples[:, 0].clone()
    for index, timestep in enumerate(grid):
        assert_close(window.samples[:, index], sample, rtol=5e-3, atol=5e-3)
        output = dash(sample.half().float(), timestep.expand(4))
        sample = scheduler.step(output, timestep, sample).prev_sample


def test_the_second_order_follows_the_line_no_further_than_plans_do(monkeypatch):
    """A long step after a short one, as uniform draws have them, would multiply what is noise."""
    arguments = (data(), data(seed=1))
    order = torch.ones(4).bool()

    def windows_of(timesteps):
        bounded = make_window(FROZEN, *arguments, timesteps, order)
        with monkeypatch.context() as patch:
            patch.setattr(windows, "_LARGEST_COEFFICIENT", float("inf"))
            return bounded, make_window(FROZEN, *arguments, timesteps, order)

    uneven = torch.tensor([[600, 599, 50]]).expand(4, -1)
    bounded, free = windows_of(uneven)
    plain = make_window(FROZEN, *arguments, uneven, ~order)
    far, near = ((each.samples - plain.samples)[:, 2].abs().max() for each in (free, bounded))
    assert near < 0.1 < 100 * near < far  # its coefficient would be several hundred
    for evaluations in (6, 49, 60):  # 49 has the largest of all, 0.89
        grid = (1000 - torch.arange(evaluations) * (1000 / evaluations)).round().long() - 1
        bounded, free = windows_of(grid.expand(4, -1))
        assert torch.equal(bounded.samples, free.samples)


def test_a_dot_makes_the_steps_and_dash_the_targets():
    def constant_dot(sample, timestep, jump):
        return torch.full_like(sample, 0.25)

    timesteps = torch.tensor([[600, 500, 400]]).expand(4, -1)
    order = torch.zeros(4).bool()
    arguments = (data(), data(seed=1), timesteps, order)
    plain = make_window(FROZEN, *arguments)
    own = make_window(FROZEN, *arguments, dot=constant_dot)
    assert torch.equal(own.samples[:, :2], plain.samples[:, :2])
    assert (own.samples[:, 2] - plain.samples[:, 2]).abs().max() > 0.01
    assert_close(own.outputs[:, 2, 0], dash(own.samples[:, 2], timesteps[:, 2]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("first", [True, False])
def test_pairs_belong_together(first):
    window = fresh_window(FROZEN, data(50), seeded(), 6, "plans")
    pairs = pick_pairs(FROZEN, window, 7, seeded(1), first)
    assert pairs.sample.shape == (350, 1, 4, 4)
    assert (pairs.timestep < pairs.jump.timestep).all()
    assert_close(dash(pairs.sample, pairs.timestep), pairs.target, rtol=0, atol=1e-3)
    assert_close(
        dash(pairs.jump.sample, pairs.jump.timestep), pairs.jump.model_output, rtol=0, atol=1e-3
    )
    starts = {t for row in window.timesteps[:, :1].tolist() for t in row}
    assert (set(pairs.jump.timestep.tolist()) <= starts) == first


def test_weights():
    window = fresh_window(FROZEN, data(), seeded(), 4, "plans")
    pairs: Pairs = pick_pairs(FROZEN, window, 8, seeded(1), first=False)
    for weighting in ("none", "gap"):
        assert weighted_loss(pairs.target, pairs, weighting) == 0
    assert_close(
        weighted_loss(pairs.target + 0.5, pairs, "gap"), torch.tensor(0.25), rtol=1e-4, atol=0
    )
    narrow = pairs.jump.timestep - pairs.timestep == (pairs.jump.timestep - pairs.timestep).min()
    wrong_where_narrow = pairs.target + narrow.reshape(-1, 1, 1, 1)
    assert weighted_loss(wrong_where_narrow, pairs, "gap") > weighted_loss(
        wrong_where_narrow, pairs, "none"
    )
