"""ScaleKD's frozen teacher stage and whole loss: gradients, modes, copies, errors."""

import copy

import pytest
import torch
from doctests import run_examples
from draws import draw
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from morse.distillation import (
    ScaleKDLoss,
    TapConfig,
    TeacherParameterPerception,
    cross_attention,
    dual_view,
    scale_kd,
    teacher_perception,
)
from morse.distillation.functional import logit_distillation_loss


class Stage(nn.Module):
    """Doubles nothing, drops half of it in training, and takes an embedding."""

    def __init__(self, inputs=8, outputs=12):
        super().__init__()
        self.linear, self.drop = nn.Linear(inputs, outputs), nn.Dropout(0.5)

    def forward(self, tokens, embedding=None):
        return self.drop(self.linear(tokens)) + (0 if embedding is None else embedding)


def make_loss(dtype=torch.float64, **options):
    torch.manual_seed(0)
    mid = TapConfig(6, 8, (4, 4), (2, 2), num_heads=2, norm="group")
    last = TapConfig(5, 12, (4, 4), num_heads=3, norm="none")
    tpp = TeacherParameterPerception(Stage())
    inputs = [draw(2, 6, 2, 2), draw(2, 5, 4, 4, seed=1), draw(2, 12, 4, 4, seed=2)]
    loss = ScaleKDLoss(mid, last, tpp, **options).to(dtype)
    return loss, [x.to(dtype).requires_grad_() for x in inputs]


@pytest.mark.parametrize("module", [cross_attention, dual_view, scale_kd, teacher_perception])
def test_examples(module):
    assert run_examples(module)


# The teacher's stage


def test_a_stage_is_frozen_in_eval_mode():
    stage = Stage().train()
    tpp = TeacherParameterPerception(stage)
    assert tpp.stage is stage
    assert not any(p.requires_grad for p in stage.parameters())
    assert tpp.train() is tpp and tpp.training
    assert not any(part.training for part in stage.modules())
    tokens = draw(2, 3, 8, dtype=torch.float32).requires_grad_()
    out = tpp(tokens)
    assert torch.equal(out, stage.linear(tokens))
    out.sum().backward()
    assert_close(tokens.grad, stage.linear.weight.sum(0).expand(2, 3, 8))
    assert all(p.grad is None for p in stage.parameters())
    assert torch.equal(tpp(tokens, embedding=2.0), out + 2)


def test_a_trainer_does_not_wake_the_stage():
    teacher = nn.Sequential(nn.Linear(3, 8), Stage())
    tpp = TeacherParameterPerception(teacher[1])
    teacher.train()
    tokens = draw(2, 3, 8, dtype=torch.float32)
    assert torch.equal(tpp(tokens), tpp(tokens))
    assert not teacher[1].drop.training
    nn.ModuleList([tpp]).train()
    assert not teacher[1].training
    # A new container of the teacher's layers, which its train() does not reach.
    tpp = TeacherParameterPerception(nn.Sequential(teacher[1]))
    teacher.train()
    assert torch.equal(tpp(tokens), tpp(tokens))


def test_other_callables():
    tpp = TeacherParameterPerception(lambda tokens, factor=1: factor * tokens)
    assert tpp.train()(torch.ones(1), factor=3) == 3
    assert TeacherParameterPerception(torch.relu)(-torch.ones(1)) == 0
    for stage in (None, 3, "blocks"):
        with pytest.raises(TypeError, match="stage must be callable"):
            TeacherParameterPerception(stage)


def test_stages_with_skip_inputs_are_refused():
    class UpBlock(nn.Module):
        def forward(self, hidden_states, res_hidden_states_tuple):
            return hidden_states

    class HunyuanBlock(nn.Module):
        def forward(self, hidden_states, temb=None, skip=None):
            return hidden_states

    for stage in (UpBlock(), UpBlock().forward, HunyuanBlock()):
        with pytest.raises(ValueError, match="without skip inputs"):
            TeacherParameterPerception(stage)


# The whole loss


def test_flow_is_that_of_its_parts():
    loss, (mid, last, teacher) = make_loss()
    embedding = draw(12, seed=3)
    out = loss(mid, last, teacher, embedding=embedding)
    tokens = [loss.tpp(cap(mid), embedding=embedding) for cap in loss.mid.projectors()]
    expected = loss.mid.mimicking(*tokens, teacher)
    caps = zip(loss.last.projectors(), tokens, strict=True)
    final = loss.last.mimicking(*(cap(last, query) for cap, query in caps), teacher)
    values = [*expected.values(), *final.values()]
    assert [term.item() for term in out.terms.values()] == [value.item() for value in values]
    assert_close(out.loss, sum(values))
    out.loss.backward()
    assert mid.grad.abs().max() > 0 and last.grad.abs().max() > 0 and teacher.grad is None
    assert all(p.grad is not None for p in loss.mid.parameters())
    assert all(p.grad is None for p in loss.tpp.parameters())


def test_last_stage_takes_the_last_tokens():
    torch.manual_seed(0)
    block = TeacherParameterPerception(Stage(12, 12))
    loss, (mid, last, teacher) = make_loss(last_tpp=block)
    out = loss(mid, last, teacher)
    tokens = [loss.tpp(cap(mid)) for cap in loss.mid.projectors()]
    caps = zip(loss.last.projectors(), tokens, strict=True)
    final = loss.last.mimicking(*(block(cap(last, query)) for cap, query in caps), teacher)
    assert_close(out.terms["last_spatial"], final["spatial"])
    assert_close(out.terms["last_frequency"], final["frequency"])


def test_without_the_teachers_layers_taps_are_independent():
    torch.manual_seed(0)
    mid = TapConfig(6, 12, (4, 4), (2, 2), num_heads=2, frequency_weight=0.0)
    last = TapConfig(5, 12, (4, 4), num_heads=3, spatial_weight=1.0)
    loss, (x, y, teacher) = ScaleKDLoss(mid, last, None).double(), make_loss()[1]
    assert loss.last.cap_spatial.query.shape == (16, 12)
    terms = loss(x, y, teacher).terms
    assert terms["mid_frequency"] == 0 and terms["mid_spatial"] > 0
    (terms["last_spatial"] + terms["last_frequency"]).backward()
    assert all(p.grad is None for p in loss.mid.parameters())
    alone = ScaleKDLoss(mid, None, None).double()
    alone.mid.load_state_dict(loss.mid.state_dict())
    out = alone(x, None, teacher)
    assert list(out.terms) == ["mid_spatial", "mid_frequency"]
    assert_close(out.terms["mid_spatial"], terms["mid_spatial"])


def test_learned_queries_where_they_are_needed():
    mid, last = TapConfig(6, 8, (4, 4), num_heads=2), TapConfig(5, 12, (4, 4), num_heads=3)
    tpp = TeacherParameterPerception(Stage())
    loss = ScaleKDLoss(mid, last, tpp)
    assert loss.mid.cap_spatial.query is not None and loss.last.cap_spatial.query is None
    kept = TapConfig(5, 12, (4, 4), num_heads=3, learned_query=True)  # as the authors' Swin-S
    assert ScaleKDLoss(mid, kept, tpp).last.cap_frequency.query is not None


def test_gradcheck():
    torch.manual_seed(0)
    mid = TapConfig(2, 4, (2, 2), (1, 2), num_heads=2, norm="none")
    last = TapConfig(2, 4, (2, 2), num_heads=1, norm="none")
    loss = ScaleKDLoss(mid, last, TeacherParameterPerception(Stage(4, 4))).double()
    inputs = [draw(1, 2, 1, 2).requires_grad_(), draw(1, 2, 2, 2, seed=1).requires_grad_()]
    teacher = draw(1, 4, 2, 2, seed=2)
    assert torch.autograd.gradcheck(lambda a, b: loss(a, b, teacher).loss, inputs)


def test_autocast():
    loss, inputs = make_loss(torch.float32)
    expected = loss(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        out = loss(*inputs)
    assert out.loss.dtype == torch.float32
    # bfloat16 keeps 8 bits.
    assert_close(out.loss, expected.loss, rtol=0.05, atol=0)
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in loss.mid.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend):
    loss, (mid, last, teacher) = make_loss()
    expected = loss(mid, last, teacher)
    expected.loss.backward()
    gradients = [mid.grad.clone(), last.grad.clone()]
    mid.grad = last.grad = None
    out = torch.compile(loss, backend=backend, fullgraph=True)(mid, last, teacher)
    assert_close(out.loss, expected.loss)
    out.loss.backward()
    for x, gradient in zip((mid, last), gradients, strict=True):
        assert_close(x.grad, gradient)
    torch._dynamo.reset()


def test_copies_and_state_dicts(tmp_path):
    loss, inputs = make_loss()
    expected = loss(*inputs).loss
    assert torch.equal(copy.deepcopy(loss)(*inputs).loss, expected)
    save_file(loss.state_dict(), tmp_path / "loss.safetensors")
    other, _ = make_loss()
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    other.load_state_dict(load_file(tmp_path / "loss.safetensors"))
    assert torch.equal(other(*inputs).loss, expected)


def test_bad_arguments():
    loss, (mid, last, teacher) = make_loss()
    alone = ScaleKDLoss(TapConfig(6, 12, (4, 4), (2, 2), num_heads=2), None, None)
    with pytest.raises(ValueError, match="student_last must be given for the last tap"):
        loss(mid, None, teacher)
    with pytest.raises(ValueError, match="student_last must be None: there is no last tap"):
        alone(mid, last, teacher)
    with pytest.raises(TypeError, match=r"\['embedding'\] are for the teacher's layers"):
        alone(mid, None, teacher, embedding=1)
    with pytest.raises(ValueError, match="last_tpp needs a last tap"):
        ScaleKDLoss(TapConfig(6, 8, (4, 4)), None, None, last_tpp=loss.tpp)
    with pytest.raises(ValueError, match=r"tokens_spatial must be \(2, 9, 12\)"):
        loss(mid, last, teacher[..., :3, :3])
    with pytest.raises(ValueError, match="num_heads=8 must divide teacher_channels=12"):
        ScaleKDLoss(TapConfig(6, 12, (4, 4)), None, None)


def test_logit_distillation():
    student, teacher = draw(3, 5), draw(3, 5, seed=1)
    loss = logit_distillation_loss(student, teacher, weight=0.3, temperature=2.0)
    expected = 0.3 * 4 * nn.functional.cross_entropy(student / 2, (teacher / 2).softmax(1))
    assert_close(loss, expected)
    for arguments, match in (
        ((student, teacher[:2], 0.5, 1.0), "Not twice"),
        ((student[0], teacher[0], 0.5, 1.0), "Not twice"),
        ((student, teacher, -1.0, 1.0), "weight"),
        ((student, teacher, 0.5, 0.0), "temperature"),
    ):
        with pytest.raises(ValueError, match=match):
            logit_distillation_loss(*arguments[:2], weight=arguments[2], temperature=arguments[3])
