"""ScaleKD against recordings of the reference implementation."""

import pytest
import torch
from golden_files import assert_golden, assert_gradient, part, read_golden
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

from morse.distillation import (
    CrossAttentionProjector,
    DualViewMimicking,
    ScaleKDLoss,
    TapConfig,
    TeacherParameterPerception,
)
from morse.distillation.functional import (
    dct2,
    dct_matrix,
    idct2,
    logit_distillation_loss,
    remove_low_frequencies,
)


@pytest.mark.parametrize("as_tokens", [False, True])
@pytest.mark.parametrize("name", ["cap_train", "cap_query_eval", "cap_tokens_mismatch"])
def test_projector(name, as_tokens):
    meta, data = read_golden(f"scalekd_{name}")
    config = meta["config"]
    projector = CrossAttentionProjector(
        config["student_dims"],
        config["teacher_dims"],
        tuple(config["query_hw"]),
        tuple(config["input_hw"]),
        num_heads=config["num_heads"],
        softmax_scale=config["softmax_scale"],
        learned_query=not config["external_query"],
    )
    projector.load_official(part(data, "state."))
    projector.train(config["training"])
    student = data["in.feat_student"].requires_grad_()
    query = data["in.query"].requires_grad_() if config["external_query"] else None
    x = student.flatten(2).transpose(1, 2) if as_tokens else student
    tokens = projector(x, query)
    assert_golden(tokens, data["out.tokens"], meta)
    (tokens * data["in.cotangent"]).sum().backward()
    assert_gradient(student.grad, data["grad.feat_student"], meta)
    if query is None:
        assert_gradient(projector.query.grad, data["grad.query.weight"], meta)
    else:
        assert_gradient(query.grad, data["grad.query"], meta)


@pytest.mark.parametrize("name", ["dfm_4", "dfm_7"])
def test_dual_view(name):
    meta, data = read_golden(f"scalekd_{name}")
    teacher, size = data["in.teacher_map"], meta["config"]["resolution"]
    assert_golden(dct_matrix(size), data["state.dct_forward.weight"], meta)
    assert_golden(torch.linalg.inv(dct_matrix(size)), data["state.dct_inverse.weight"], meta)
    assert_golden(dct2(teacher), data["out.teacher_dct"], meta)
    coefficients = data["out.teacher_dct"].clone()
    coefficients[..., 0, 0] = 0
    assert_golden(idct2(coefficients), data["out.teacher_without_dc"], meta)
    assert_golden(remove_low_frequencies(teacher, (1, 1)), data["out.teacher_without_dc"], meta)
    spatial = data["in.student_tokens"].clone().requires_grad_()
    frequency = data["in.student_tokens"].clone().requires_grad_()
    losses = DualViewMimicking(*meta["config"]["alpha"])(spatial, frequency, teacher)
    assert list(losses) == ["spatial", "frequency"]
    assert_golden(losses["spatial"], data["out.loss_spatial"], meta)
    assert_golden(losses["frequency"], data["out.loss_frequency"], meta)
    sum(losses.values()).backward()
    assert_gradient(spatial.grad, data["grad.spatial.student_tokens"], meta)
    assert_gradient(frequency.grad, data["grad.frequency.student_tokens"], meta)


class LastStage(nn.Module):
    """The recording's stand-in for a teacher's last stage."""

    def __init__(self, size, channels, width):
        super().__init__()
        self.size = size
        self.merge = nn.Linear(4 * channels, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens):
        patches = functional.unfold(tokens.transpose(1, 2).unflatten(2, self.size), 2, stride=2)
        return self.norm(functional.gelu(self.merge(patches.transpose(1, 2))))


def tap(config, **more):
    return TapConfig(
        config["student_dims"],
        config["teacher_dims"],
        tuple(config["hw"]),
        num_heads=config["num_heads"],
        spatial_weight=config["alpha"][0],
        frequency_weight=config["alpha"][1],
        **more,
    )


def make_flow(config, data, **options):
    stage = LastStage(
        config["s3"]["hw"], config["s3"]["teacher_dims"], config["s4"]["teacher_dims"]
    )
    stage.load_state_dict(part(data, "state.tpp_stage."))
    perception = TeacherParameterPerception(stage)
    loss = ScaleKDLoss(tap(config["s3"]), tap(config["s4"]), perception, **options)
    loss.load_official(part(data, "state.") | {"fc.weight": torch.ones(1)})
    return loss.train(config["training"])


def test_whole_flow():
    meta, data = read_golden("scalekd_flow_a")
    loss = make_flow(meta["config"], data)
    mid, last = data["in.student.s3"].requires_grad_(), data["in.student.s4"].requires_grad_()
    teacher = data["in.teacher.s4"].requires_grad_()
    out = loss(mid, last, teacher)
    names = ["mid_spatial", "mid_frequency", "last_spatial", "last_frequency"]
    assert list(out.terms) == names
    for name, theirs in zip(names, ("s3", "s3_alt", "s4", "s4_alt"), strict=True):
        assert_golden(out.terms[name], data[f"out.loss_{theirs}"], meta)
    assert_close(out.loss, sum(out.terms.values()))
    out.loss.backward()
    assert_gradient(mid.grad, data["grad.student.s3"], meta)
    assert_gradient(last.grad, data["grad.student.s4"], meta)
    query = loss.mid.cap_spatial.query.grad
    assert_gradient(query, data["grad.s3.projector_0.query.weight"], meta)
    assert teacher.grad is None and all(p.grad is None for p in loss.tpp.parameters())


@pytest.mark.parametrize("detach", [False, True])
def test_the_last_loss_trains_the_middle_projectors_unless_detached(detach):
    meta, data = read_golden("scalekd_flow_a")
    loss = make_flow(meta["config"], data, detach_query=detach)
    mid = data["in.student.s3"].requires_grad_()
    terms = loss(mid, data["in.student.s4"], data["in.teacher.s4"]).terms
    (terms["last_spatial"] + terms["last_frequency"]).backward()
    for projector in (loss.mid.cap_spatial, loss.mid.cap_frequency):
        assert all((p.grad is None) == detach for p in projector.parameters())
    assert (mid.grad is None) == detach
    assert all(p.grad is not None for p in loss.last.parameters())


def test_logit_term():
    meta, data = read_golden("scalekd_flow_a")
    config = meta["config"]
    student = data["in.kd.logits_student"].requires_grad_()
    teacher = data["in.kd.logits_teacher"].requires_grad_()
    loss = logit_distillation_loss(
        student, teacher, weight=config["kd_alpha"], temperature=config["kd_temp"]
    )
    assert_golden(loss, data["out.kd.loss"], meta)
    assert 1 - config["kd_alpha"] == data["out.kd.task_scale"]
    loss.backward()
    assert_gradient(student.grad, data["grad.kd.logits_student"], meta)
    assert teacher.grad is None


def test_official_loading_is_strict():
    meta, data = read_golden("scalekd_flow_a")
    loss = make_flow(meta["config"], data)
    before = {name: tensor.clone() for name, tensor in loss.state_dict().items()}
    assert "last.cap_frequency.attention.out.weight" in before
    state = {name: tensor + 1 for name, tensor in part(data, "state.").items()}
    root = "distill_losses.loss_fmd_s4.projector_1."
    for change, match in (
        ({f"{root}query.weight": torch.ones(9, 12)}, r"unexpected \[\('query', \(9, 12\)\)\]"),
        ({f"{root}norm.bias": torch.ones(11)}, r"missing \[\('norm\.bias', \(12,\)\)\]"),
    ):
        with pytest.raises(ValueError, match=match):
            loss.load_official(state | change)
    with pytest.raises(ValueError, match="missing"):
        loss.load_official({k: v for k, v in state.items() if k != f"{root}pos_embed"})
    with pytest.raises(ValueError, match="under prefix='other"):
        loss.load_official(state, prefix="other.")
    assert all(torch.equal(tensor, before[name]) for name, tensor in loss.state_dict().items())
    loss.load_official(state)
    assert torch.equal(loss.last.cap_frequency.pos_embed, state[f"{root}pos_embed"])
