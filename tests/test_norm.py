import pytest
import torch
from doctests import run_examples
from draws import draw
from torch.nn import functional

from morse.distillation import IMAGENET_STAGES, NORMLoss, af_dcd, norm, norm_transform, norm_weight


@pytest.mark.parametrize("module", [norm, norm_transform, af_dcd])
def test_examples(module):
    assert run_examples(module)


def test_loss_formula_gradient_and_zero():
    expanded, teacher = draw(2, 15, 4, 4).requires_grad_(), draw(2, 5, 4, 4, seed=2)
    teacher.requires_grad_()
    tiled = teacher.detach().repeat(1, 3, 1, 1)
    loss = NORMLoss(3)(expanded, teacher)
    loss.backward()
    torch.testing.assert_close(loss, 3 * functional.mse_loss(expanded, tiled))
    gradient = 2 * (expanded.detach() - tiled) / teacher.numel()
    torch.testing.assert_close(expanded.grad, gradient)
    assert teacher.grad is None
    assert NORMLoss(3)(tiled, teacher).item() == 0
    torch.testing.assert_close(NORMLoss(3, weight=0.5)(expanded, teacher), loss / 2)
    assert not list(NORMLoss(3).state_dict())


def test_loss_takes_lower_precision():
    expanded, teacher = draw(2, 6, 4, 4), draw(2, 3, 4, 4, seed=2)
    half = expanded.bfloat16().requires_grad_()
    loss = NORMLoss(2)(half, teacher.float())
    loss.backward()
    # bfloat16 keeps 8 bits.
    torch.testing.assert_close(loss.double(), NORMLoss(2)(expanded, teacher), rtol=0.02, atol=0)
    assert half.grad.dtype == torch.bfloat16
    wide = expanded.clone().requires_grad_()
    NORMLoss(2)(wide, teacher.float()).backward()
    assert wide.grad.dtype == torch.float64


def test_loss_of_features_beyond_half_precision():
    large = torch.full((1, 2, 2, 2), 400.0, dtype=torch.float16)
    assert NORMLoss(2)(large, torch.zeros(1, 1, 2, 2)).item() == 2 * 400**2
    teacher = torch.full((1, 1, 2, 2), 1e5)
    assert NORMLoss(2)(torch.zeros_like(large), teacher).item() == pytest.approx(2e10)
    # Nor is the teacher rounded to what the student has.
    student = torch.full((1, 2, 2, 2), 100.0, dtype=torch.bfloat16)
    assert NORMLoss(2)(student, teacher / 1e3 + 0.1).item() == pytest.approx(0.02, rel=1e-3)


@pytest.mark.parametrize("mode", ["max", "avg"])
def test_pooling(mode):
    pool = functional.max_pool2d if mode == "max" else functional.avg_pool2d
    small, large = draw(2, 6, 2, 3), draw(2, 3, 4, 9, seed=2)
    loss = NORMLoss(2, pool="teacher", pool_mode=mode)
    expected = NORMLoss(2, pool="none")(small, pool(large, (2, 3)))
    torch.testing.assert_close(loss(small, large), expected)
    small, large = draw(2, 3, 2, 2), draw(2, 6, 6, 6, seed=2)
    loss = NORMLoss(2, pool="student", pool_mode=mode)
    torch.testing.assert_close(loss(large, small), NORMLoss(2)(pool(large, 3), small))


@pytest.mark.parametrize("n", [4, 9])
def test_phase_target(n):
    factor, loss = int(n**0.5), NORMLoss(n, target="phase", pool="none")
    teacher = draw(2, 3, 2 * factor, 2 * factor)
    phases = [teacher[..., p // factor :: factor, p % factor :: factor] for p in range(n)]
    expanded = torch.cat(phases, 1)
    assert loss(expanded, teacher).item() == 0
    reordered = expanded.unflatten(1, (n, 3)).transpose(1, 2).flatten(1, 2)
    assert torch.equal(functional.pixel_shuffle(reordered, factor), teacher)
    # The order of pixel_unshuffle itself, channel-major, is another one.
    assert loss(functional.pixel_unshuffle(teacher, factor), teacher) > 0.1
    other = draw(2, 3 * n, 2, 2, seed=2)
    expected = sum(functional.mse_loss(other[:, 3 * p : 3 * p + 3], phases[p]) for p in range(n))
    torch.testing.assert_close(loss(other, teacher), expected)


def test_phase_with_one_segment_is_replicate():
    for size, pool in ((4, "none"), (8, "teacher"), (2, "student")):
        expanded, teacher = draw(2, 3, 4, 4), draw(2, 3, size, size, seed=2)
        both = [NORMLoss(1, target=t, pool=pool) for t in ("phase", "replicate")]
        assert torch.equal(both[0](expanded, teacher), both[1](expanded, teacher))


def test_phase_pools_to_the_phases_size():
    expanded, teacher = draw(2, 12, 4, 4), draw(2, 3, 16, 16, seed=2)
    pooled = functional.avg_pool2d(teacher, 2)
    loss = NORMLoss(4, target="phase", pool_mode="avg")
    expected = NORMLoss(4, target="phase", pool="none")(expanded, pooled)
    torch.testing.assert_close(loss(expanded, teacher), expected)
    loss = NORMLoss(4, target="phase", pool="student", pool_mode="avg")
    shrunk = functional.avg_pool2d(expanded, 2)
    expected = NORMLoss(4, target="phase", pool="none")(shrunk, teacher[..., :4, :4])
    torch.testing.assert_close(loss(expanded, teacher[..., :4, :4]), expected)


def test_loss_refuses_shapes():
    x = torch.zeros
    for options, expanded, teacher, match in (
        ({}, x(2, 6, 4, 4), x(2, 2, 4, 4), "n=2 times teacher's channels"),
        ({}, x(2, 6, 4, 4), x(1, 3, 4, 4), "same batch"),
        ({}, x(2, 6, 4), x(2, 3, 4), r"must be \(B, C, H, W\)"),
        ({}, x(2, 6, 4, 4), x(2, 3, 7, 7), r"teacher has size \(7, 7\)"),
        ({}, x(2, 6, 4, 4), x(2, 3, 2, 2), r"multiple of \(4, 4\)"),
        ({"pool": "student"}, x(2, 6, 7, 4), x(2, 3, 4, 4), r"expanded has size \(7, 4\)"),
        ({"pool": "none"}, x(2, 6, 4, 4), x(2, 3, 8, 8), "1 times the rows"),
        ({"n": 4, "target": "phase", "pool": "none"}, x(2, 4, 4, 4), x(2, 1, 4, 4), "2 times"),
        ({"n": 4, "target": "phase", "pool": "student"}, x(2, 4, 4, 4), x(2, 1, 5, 5), "2 times"),
        ({"n": 4, "target": "phase", "pool": "student"}, x(2, 4, 4, 4), x(2, 1, 1, 1), "multiple"),
    ):
        with pytest.raises(ValueError, match=match):
            NORMLoss(**{"n": 2, **options})(expanded, teacher)


def test_bad_arguments():
    for options, match in (
        ({"n": 0}, "n must be a whole number of at least 1, got 0"),
        ({"n": 1.5}, r"got 1\.5"),
        ({"pool": "both"}, "pool must be"),
        ({"pool_mode": "min"}, "pool_mode must be"),
        ({"target": "tile"}, "target must be"),
        ({"weight": -1}, "weight must be"),
        ({"weight": float("nan")}, "weight must be"),
        ({"n": 8, "target": "phase"}, "n must be a square"),
    ):
        with pytest.raises(ValueError, match=match):
            NORMLoss(**options)


# The staircase


def test_staircase():
    cifar = [norm_weight(epoch / 240) for epoch in range(241)]  # the authors' epochs 0 to 240
    assert cifar == [0.1] * 10 + [0.5] * 10 + [1.0] * 160 + [0.5] * 30 + [0.1] * 31
    imagenet = [norm_weight(epoch / 100, IMAGENET_STAGES) for epoch in range(101)]
    assert imagenet == [0.1] * 5 + [0.5] * 10 + [0.9] * 45 + [0.5] * 20 + [0.1] * 21


def test_staircase_refuses():
    for progress in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="progress"):
            norm_weight(progress)
    for stages in ((), ((0.5, 1.0),), ((0.5, 1.0), (0.5, 0.1), (1.0, 1.0)), ((0.0, 1.0), (1.0, 1))):
        with pytest.raises(ValueError, match="stages"):
            norm_weight(0.2, stages)
