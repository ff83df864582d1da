"""Af-DCD against recordings of the reference implementation, loops and its closed forms."""

import math

import pytest
import torch
from golden_files import assert_gradient, read_golden
from torch.testing import assert_close

from morse.distillation.af_dcd import AfDCDLoss
from morse.distillation.functional import omni_contrastive_loss, omni_tokens

SMALL = {"channel_groups": 2, "pool_size": 0, "patch_size": (2, 2)}
CONTRAST = {"temperature": 1.0, **SMALL}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small_loss(student=4, teacher=4, **settings):
    torch.manual_seed(0)
    return AfDCDLoss(student, teacher, **{**SMALL, **settings})


def contrast_by_loops(pred, target, groups, patch, tau):
    """The mean over positions, summed over groups and batch, one scalar at a time."""
    batch, channels, height, width = pred.shape
    size, total = channels // groups, 0.0
    for b in range(batch):
        for y, x in [(y, x) for y in range(height) for x in range(width)]:
            top, left = y - y % patch[0], x - x % patch[1]
            cells = [(top + i, left + j) for i in range(patch[0]) for j in range(patch[1])]
            for g in range(groups):
                own = pred[b, g * size : (g + 1) * size, y, x]
                scores = {}
                for v, u in cells:
                    for k in range(groups):
                        if k != g or (v, u) == (y, x):
                            other = target[b, k * size : (k + 1) * size, v, u]
                            scores[v, u, k] = math.exp(-float((own - other).abs().sum()) / tau)
                total -= math.log(scores[y, x, g] / sum(scores.values()))
    return total / (height * width)


@pytest.mark.parametrize("name", ["ctr_tiny", "ctr_default"])
def test_contrast_golden(name):
    meta, data = read_golden(f"af_dcd_{name}")
    config = meta["config"]
    pred = data["in.pred"].requires_grad_()
    target = data["in.target"].requires_grad_()
    groups, patch, pool = config["channel_groups"], config["patch_size"], config["pool_size"]
    pooled = torch.nn.functional.max_pool2d(pred, pool) if pool else pred
    assert_close(omni_tokens(pooled, groups, patch), data["out.pred_vectors"], rtol=0, atol=0)
    loss = omni_contrastive_loss(
        pred, target, temperature=config["tau"], channel_groups=groups,
        patch_size=patch, pool_size=pool,
    )  # fmt: skip
    assert_close(loss, data["out.loss_ctr_sum"], rtol=meta["rtol"], atol=meta["atol"])
    loss.backward()
    assert_gradient(pred.grad, data["grad.pred"], meta)
    assert_gradient(target.grad, data["grad.target"], meta)


@pytest.mark.parametrize("name", ["full_a", "full_enhanced"])
@pytest.mark.parametrize("stored_mask", [True, False])
def test_full_golden(name, stored_mask):
    meta, data = read_golden(f"af_dcd_{name}")
    config = meta["config"]
    loss = AfDCDLoss(
        config["student_channels"],
        config["teacher_channels"],
        temperature=config["tau"],
        generator="enhanced" if config["enhanced_generator"] else "plain",
        fd_weight=1.0,
        ctr_weight=1.0,
        **{
            key: config[key]
            for key in ("channel_groups", "pool_size", "patch_size", "mask_ratio", "random_mask")
        },
    )
    state = {k.removeprefix("state."): v for k, v in data.items() if k.startswith("state.")}
    loss.load_official(state)
    student = data["in.feat_student"].requires_grad_()
    teacher = data["in.feat_teacher"].requires_grad_()
    rng = torch.Generator().manual_seed(config["mask_seed"] or 0)
    mask = data["in.mask"]
    if not stored_mask:
        assert torch.equal(loss.make_mask(student, rng.clone_state()), mask)
        mask = None
    out = loss(student, teacher, mask=mask, rng=rng)
    tolerance = {"rtol": meta["rtol"], "atol": meta["atol"]}
    assert_close(out.feature, data["out.loss_fd"], **tolerance)
    assert_close(out.contrast, data["out.loss_ctr"], **tolerance)
    assert_close(out.reconstruction, data["out.reconstructed"], **tolerance)
    out.loss.backward()
    assert_gradient(student.grad, data["grad.feat_student"], meta)
    assert_gradient(loss.align.weight.grad, data["grad.align.weight"], meta)
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("groups", "patch", "expected"), [(16, (4, 4), 87.7568), (2, (2, 2), 3.2189)]
)
def test_contrast_of_equal_constants(groups, patch, expected):
    maps = torch.full((1, 2 * groups, 8, 8), 3.0)
    loss = omni_contrastive_loss(
        maps, maps, temperature=0.07, channel_groups=groups, patch_size=patch, pool_size=0
    )
    uniform = groups * math.log(1 + patch[0] * patch[1] * (groups - 1))
    assert_close(loss.item(), uniform, rtol=1e-5, atol=0)
    assert_close(uniform, expected, rtol=0, atol=1e-4)


def test_contrast_by_loops():
    meta, data = read_golden("af_dcd_ctr_tiny")
    looped = contrast_by_loops(data["in.pred"], data["in.target"], 2, (2, 2), 1.0)
    assert_close(looped, data["out.loss_ctr_sum"].item(), rtol=meta["rtol"], atol=meta["atol"])
    pred, target = draw(2, 6, 2, 6), draw(2, 6, 2, 6, seed=1)
    loss = omni_contrastive_loss(
        pred, target, temperature=0.7, channel_groups=3, patch_size=(1, 3), pool_size=0
    )
    assert_close(loss.item(), contrast_by_loops(pred, target, 3, (1, 3), 0.7), rtol=1e-5, atol=1e-5)


def test_contrast_invariances():
    pred, target = draw(2, 6, 4, 4), draw(2, 6, 4, 4, seed=1)
    loss = omni_contrastive_loss(pred, target, **CONTRAST)
    channels = [2, 0, 1, 5, 3, 4]  # the same order inside both groups
    for change in (
        lambda x: x.roll(2, dims=3),
        lambda x: x[:, channels],
        lambda x: x + 5.0,
    ):
        changed = omni_contrastive_loss(change(pred), change(target), **CONTRAST)
        assert_close(changed, loss, rtol=1e-5, atol=1e-5)
    shifted = omni_contrastive_loss(pred.roll(1, dims=3), target, **CONTRAST)
    assert (shifted - loss).abs() > 0.01  # far above rounding: positions do matter


def test_same_group_elsewhere_is_no_negative():
    """An anchor is in its own term alone, so its gradient sees what that term compares it with."""
    target = draw(1, 4, 2, 2, seed=1)
    changed = target.clone()
    changed[0, :2, 1, 1] += 0.3  # group 0 at the last position

    def gradient(target):
        pred = draw(1, 4, 2, 2).requires_grad_()
        omni_contrastive_loss(pred, target, **CONTRAST).backward()
        return pred.grad[0]

    before, after = gradient(target), gradient(changed)
    for y, x in ((0, 0), (0, 1), (1, 0)):
        assert torch.equal(before[:2, y, x], after[:2, y, x])
        assert not torch.equal(before[2:, y, x], after[2:, y, x])


def test_perfect_reconstruction_has_no_feature_loss():
    loss = small_loss()
    loss.generator = torch.nn.Identity()
    maps = draw(2, 4, 4, 4)
    out = loss(maps, maps, mask=torch.ones(2, 1, 4, 4))
    assert out.feature == 0
    assert torch.equal(out.reconstruction, maps)
    assert not any(name.startswith("align") for name in loss.state_dict())


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.75])
def test_kept_fraction(ratio):
    rng = torch.Generator().manual_seed(0)
    mask = small_loss(mask_ratio=ratio).make_mask(torch.zeros(4, 3, 100, 100), rng)
    assert mask.shape == (4, 1, 100, 100)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    deviation = math.sqrt(ratio * (1 - ratio) / mask.numel())
    assert abs(mask.mean().item() - (1 - ratio)) <= 3 * deviation + 1e-7


def test_central_mask():
    mask = small_loss(random_mask=False).make_mask(torch.zeros(2, 3, 8, 7))
    expected = torch.ones(8, 7)
    expected[2:5, 2:4] = 0
    assert torch.equal(mask, expected.expand(2, 1, 8, 7))


def test_mean_reduction_and_weights():
    student, teacher, mask = draw(2, 3, 4, 4), draw(2, 4, 4, 4, seed=1), torch.ones(2, 1, 4, 4)
    total = small_loss(3)(student, teacher, mask=mask)
    mean = small_loss(3, reduction="mean")(student, teacher, mask=mask)
    assert_close(total.feature, mean.feature * 4 * 4 * 4)
    assert_close(total.contrast, mean.contrast * 2)
    assert_close(mean.feature, (mean.reconstruction - teacher).square().mean())
    assert_close(total.loss, 4e-5 * total.feature + 1e-3 * total.contrast)


def test_gradients_by_position():
    student = draw(2, 3, 4, 4).requires_grad_()
    teacher = draw(2, 4, 4, 4, seed=1).requires_grad_()
    loss = small_loss(3, fd_weight=1.0, ctr_weight=1.0)
    mask = loss.make_mask(student, torch.Generator().manual_seed(2))
    loss(student, teacher, mask=mask).loss.backward()
    dropped = (mask == 0).expand_as(student)
    assert 0 < dropped.sum() < dropped.numel()
    assert (student.grad[dropped] == 0).all()
    assert (student.grad[~dropped] != 0).all()
    assert teacher.grad is None
    assert all(parameter.grad.abs().sum() > 0 for parameter in loss.parameters())


def test_a_doubled_batch_changes_nothing():
    student, teacher = draw(2, 3, 4, 4), draw(2, 4, 4, 4, seed=1)
    loss = small_loss(3)
    mask = loss.make_mask(student, torch.Generator().manual_seed(2))
    once = loss(student, teacher, mask=mask)
    twice = loss(*(torch.cat([x, x]) for x in (student, teacher)), mask=torch.cat([mask, mask]))
    assert_close(twice.feature, once.feature)
    assert_close(twice.contrast, once.contrast)


def test_teacher_rms_removes_the_scale_of_each_sample():
    student, teacher, mask = draw(2, 3, 4, 4), draw(2, 4, 4, 4, seed=1), torch.ones(2, 1, 4, 4)
    loss = small_loss(3, normalize="teacher_rms")
    out = loss(student, teacher, mask=mask)
    scale = torch.tensor([0.01, 50.0]).reshape(2, 1, 1, 1)
    assert_close(loss(student * scale, teacher * scale, mask=mask).loss, out.loss)
    unit = teacher.square().mean((1, 2, 3), keepdim=True).sqrt()
    plain = small_loss(3)(student / unit, teacher / unit, mask=mask)
    assert_close(out.loss, plain.loss)
    assert loss(student, teacher * 0, mask=mask).loss.isfinite()


def test_half_precision_is_summed_in_float32():
    maps = draw(1, 4, 4, 4).to(torch.bfloat16)
    loss = small_loss().to(torch.bfloat16)
    out = loss(maps * 1e3, maps * 1e3)
    assert out.feature.dtype == out.contrast.dtype == torch.float32
    wide = (out.reconstruction.double() - (maps * 1e3).double()).square().sum()
    assert_close(out.feature.double(), wide, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"student": 0}, "student_channels"),
        ({"teacher": 0}, "teacher_channels"),
        ({"teacher": 5}, "channel_groups must divide"),
        ({"channel_groups": 1}, "channel_groups must be 2"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"pool_size": -1}, "pool_size"),
        ({"patch_size": (0, 2)}, "patch_size"),
        ({"patch_size": (2, 2, 2)}, "patch_size"),
        ({"mask_ratio": 1.0}, "mask_ratio"),
        ({"mask_ratio": -0.1}, "mask_ratio"),
        ({"fd_weight": -1.0}, "fd_weight"),
        ({"ctr_weight": math.inf}, "ctr_weight"),
        ({"generator": "large"}, "generator"),
        ({"reduction": "sum"}, "reduction"),
        ({"normalize": "rms"}, "normalize"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        small_loss(**settings)


@pytest.mark.parametrize(
    ("student", "teacher", "mask", "settings", "message"),
    [
        ((2, 4, 4), (2, 4, 4, 4), None, {}, "student must be"),
        ((2, 3, 4, 4), (2, 4, 4, 4), None, {}, "student must be"),
        ((2, 4, 4, 4), (2, 6, 4, 4), None, {}, "teacher must be"),
        ((2, 4, 2, 2), (2, 4, 4, 4), None, {}, "agree in B, H and W"),
        ((1, 4, 4, 4), (2, 4, 4, 4), None, {}, "agree in B, H and W"),
        ((2, 4, 4, 4), (2, 4, 4, 4), (2, 4, 4, 4), {}, "mask must be"),
        ((2, 4, 4, 4), (2, 4, 4, 4), (1, 1, 4, 4), {}, "mask must be"),
        ((2, 4, 3, 4), (2, 4, 3, 4), None, {}, "must divide 3 x 4"),
        ((2, 4, 4, 4), (2, 4, 4, 4), None, {"pool_size": 4}, "must divide 1 x 1"),
        ((2, 4, 4, 4), (2, 4, 4, 4), None, {"pool_size": 5}, "must divide 0 x 0"),
    ],
)
def test_bad_maps(student, teacher, mask, settings, message):
    mask = None if mask is None else torch.ones(mask)
    with pytest.raises(ValueError, match=message):
        small_loss(**settings)(torch.zeros(student), torch.zeros(teacher), mask=mask)


def test_bad_maps_of_the_functions():
    with pytest.raises(ValueError, match=r"got shape \(4, 4, 4\)"):
        omni_tokens(torch.zeros(4, 4, 4), 2, (2, 2))
    with pytest.raises(ValueError, match="must divide the 5 channels"):
        omni_tokens(torch.zeros(1, 5, 4, 4), 2, (2, 2))
    with pytest.raises(ValueError, match="pred has shape"):
        omni_contrastive_loss(torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 4, 2), **CONTRAST)


def test_weights_that_do_not_fit_are_refused_untouched():
    _, data = read_golden("af_dcd_full_a")
    state = {k.removeprefix("state."): v for k, v in data.items() if k.startswith("state.")}
    for loss in (
        small_loss(6, 16, generator="enhanced"),
        small_loss(8, 16),
        small_loss(16, 16),
    ):
        before = {name: value.clone() for name, value in loss.state_dict().items()}
        with pytest.raises(ValueError, match="state_dict does not fit"):
            loss.load_official(state)
        assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())
