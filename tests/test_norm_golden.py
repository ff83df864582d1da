import copy

import pytest
import torch
from golden_files import assert_golden, assert_gradient, read_golden
from torch import nn
from torch.nn import functional

from morse.distillation.norm import CIFAR_STAGES, IMAGENET_STAGES, NORMLoss, norm_weight
from morse.distillation.norm_transform import NORMTransform


def classification_losses(logits, teacher_logits, target, config):
    """Cross-entropy, and KL divergence at temperature T, of logits standardised over classes."""
    classes, temperature = logits.shape[1:], config["kd_T"]
    student, teacher = (
        functional.layer_norm(each, classes, eps=1e-7) * config["ceta"]
        for each in (logits, teacher_logits)
    )
    divergence = functional.kl_div(
        functional.log_softmax(student / temperature, 1),
        functional.softmax(teacher / temperature, 1),
        reduction="batchmean",
    )
    return functional.cross_entropy(student, target), divergence * temperature**2


def total_loss(losses, norm, config):
    weight = config["beta_norm"] * config["beta1_epoch_factor"]
    return config["gamma"] * losses[0] + config["alpha_kd"] * losses[1] + weight * norm


@pytest.fixture
def official():
    meta, tensors = read_golden("norm_ft_a")
    config = meta["config"]
    ft = NORMTransform(config["channels_student"], config["channels_teacher"], config["N"])
    state = {key.removeprefix("state."): t for key, t in tensors.items() if key[:6] == "state."}
    fc = nn.Linear(config["channels_student"], config["num_classes"])
    fc.load_state_dict({"weight": state["fc.weight"], "bias": state["fc.bias"]})
    return ft.load_official(state), fc, meta, tensors


def test_golden_eval_and_fold(official):
    ft, fc, meta, tensors = official
    feature = tensors["in.feat_student"]
    with torch.no_grad():
        out, expanded = ft.eval()(feature)
        assert_golden(expanded, tensors["out.eval.expanded"], meta)
        assert_golden(out.mean((2, 3)), tensors["out.eval.pooled"], meta)
        assert_golden(fc(out.mean((2, 3))), tensors["out.eval.logits"], meta)
        assert_golden(ft.fold(fc)(feature.mean((2, 3))), tensors["out.eval.logits"], meta)


def test_golden_training_step(official):
    ft, fc, meta, tensors = official
    config = meta["config"]
    feature = tensors["in.train.feat_student"].requires_grad_()
    out, expanded = ft.train()(feature)
    losses = classification_losses(
        fc(out.mean((2, 3))), tensors["in.train.logits_teacher"], tensors["in.train.target"], config
    )
    norm = NORMLoss(config["N"])(expanded, tensors["in.train.feat_teacher"])
    total = total_loss(losses, norm, config)
    total.backward()
    assert_golden(losses[0], tensors["out.train.loss_ce"], meta)
    assert_golden(norm, tensors["out.train.loss_norm"], meta)
    assert_golden(total, tensors["out.train.loss_total"], meta)
    assert_gradient(feature.grad, tensors["grad.train.feat_student"], meta)
    layers = {
        "layer31.0": ft.expand, "layer31.1": ft.expand_norm,
        "layer32.0": ft.contract, "layer32.1": ft.contract_norm,
    }  # fmt: skip
    for name, layer in layers.items():
        for key, parameter in layer.named_parameters():
            assert_gradient(parameter.grad, tensors[f"grad.train.{name}.{key}"], meta)
        if name.endswith("1"):
            for key in ("running_mean", "running_var"):
                assert_golden(getattr(layer, key), tensors[f"out.train.after.{name}.{key}"], meta)


@pytest.mark.parametrize("pool", ["teacher", "student"])
def test_golden_losses(pool):
    meta, tensors = read_golden(f"norm_loss_{pool}_pool")
    config = meta["config"]
    count = sum(key.startswith("in.feat_student") for key in tensors)
    students = [tensors[f"in.feat_student.{index}"].requires_grad_() for index in range(count)]
    teachers = [tensors[f"in.feat_teacher.{index}"] for index in range(count)]
    logits = tensors["in.logits_student"].requires_grad_()
    losses = classification_losses(
        logits, tensors["in.logits_teacher"], tensors["in.target"], config
    )
    loss = NORMLoss(config["N"], pool=pool)
    norm = sum(loss(*pair) for pair in zip(students, teachers, strict=True))
    total = total_loss(losses, norm, config)
    total.backward()
    assert_golden(losses[0], tensors["out.loss_ce"], meta)
    assert_golden(norm, tensors["out.loss_norm"], meta)
    assert_golden(total, tensors["out.loss_total"], meta)
    assert_gradient(logits.grad, tensors["grad.logits_student"], meta)
    for index, student in enumerate(students):
        assert_gradient(student.grad, tensors[f"grad.feat_student.{index}"], meta)


def test_golden_stages():
    for name, stages, epochs in (
        ("norm_ft_a", CIFAR_STAGES, 240),
        ("norm_loss_teacher_pool", CIFAR_STAGES, 240),
        ("norm_loss_student_pool", IMAGENET_STAGES, 100),
    ):
        config = read_golden(name)[0]["config"]
        assert norm_weight(config["epoch"] / epochs, stages) == config["beta1_epoch_factor"]


def test_official_prefix_and_other_entries(official):
    ft, _, _, tensors = official
    state = {
        key.removeprefix("state.").replace("layer3", "module.layer4"): tensor
        for key, tensor in tensors.items()
        if key.startswith("state.")
    } | {"alpha": torch.ones(4), "layer21.0.weight": torch.ones(1)}
    other = NORMTransform(16, 12, 4).load_official(state, prefix="module.layer4")
    for key, tensor in ft.state_dict().items():
        assert torch.equal(other.state_dict()[key], tensor)


def test_official_loading_is_strict(official):
    ft, _, _, tensors = official
    before = copy.deepcopy(ft.state_dict())
    state = {key.removeprefix("state."): tensor + 1 for key, tensor in tensors.items()}
    missing = {key: t for key, t in state.items() if key != "layer32.1.num_batches_tracked"}
    with pytest.raises(
        ValueError, match=r"missing \[\('contract_norm\.num_batches_tracked', \(\)\)\]"
    ):
        ft.load_official(missing)
    with pytest.raises(ValueError, match=r"unexpected \[\('expand\.bias', \(1,\)\)\]"):
        ft.load_official(state | {"layer31.0.bias": torch.ones(1)})
    with pytest.raises(ValueError, match="layer4"):
        ft.load_official(state, prefix="layer4")
    assert all(torch.equal(ft.state_dict()[key], tensor) for key, tensor in before.items())
    with pytest.raises(ValueError, match=r"unexpected .*'expand\.weight', \(48, 16, 1, 1\)"):
        NORMTransform(16, 12, 5).load_official(state)
    with pytest.raises(ValueError, match="norm='none'"):
        NORMTransform(16, 12, 4, norm="none").load_official(state)
