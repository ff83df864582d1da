"""Ske2Grid: recordings of the authors' code, and what its rules imply."""

import copy
import doctest
import itertools
import math

import pytest
import torch
from golden_files import assert_golden, assert_gradient, read_golden
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

from morse.modules import (
    GraphNodeIndexTransform,
    GridStage,
    ProgressiveSchedule,
    SkeletonToGrid,
    StageSpec,
    UpsamplingTransform,
    coco_adjacency,
    ske2grid,
    ske2grid_index,
    ske2grid_layout,
    ske2grid_upsampling,
)

MODULES = [ske2grid, ske2grid_index, ske2grid_layout, ske2grid_upsampling]


@pytest.mark.parametrize("module", MODULES)
def test_examples(module):
    done = doctest.testmod(module, globs={})
    assert done.attempted >= 4 and not done.failed


# Recordings


@pytest.mark.parametrize("name", ["sq9", "sq25", "more_cells"])
def test_recorded_placement(name):
    meta, tensors = read_golden("ske2grid_git_a")
    git = GraphNodeIndexTransform(meta["config"][name]["cells"], meta["config"][name]["nodes"])
    git.load_state_dict({"scores": tensors[f"state.{name}.sgt_trans_mat"]})
    assert git.permutation().tolist() == tensors[f"out.{name}.index_sel"].tolist()
    chosen = git.assignment()
    assert_golden(chosen, tensors[f"out.{name}.assignment_train"], meta)
    chosen.backward(tensors[f"in.{name}.cotangent"])
    assert_gradient(git.scores.grad, tensors[f"grad.{name}.sgt_trans_mat"], meta)
    assert torch.equal(git.eval().assignment(), tensors[f"out.{name}.assignment"])


class AuthorsBlock(nn.Module):
    """What the authors put behind the grid: (N, C, T, H, W) to (N, O, T / stride, H, W)."""

    def __init__(self, channels, out, stride):
        super().__init__()
        self.gcn2cn = nn.ModuleDict(
            {"conv": nn.Conv2d(channels, out, 3, padding=1), "bn": nn.BatchNorm2d(out)}
        )
        self.tcn2cn = nn.Sequential(
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, (9, 1), (stride, 1), (4, 0)),
            nn.BatchNorm2d(out),
        )
        self.residual = nn.Sequential(nn.Conv2d(channels, out, 1, (stride, 1)), nn.BatchNorm2d(out))

    def forward(self, x):
        height, width = x.shape[3:]
        y = self.gcn2cn["bn"](self.gcn2cn["conv"](x.transpose(1, 2).flatten(0, 1)))
        y = y.unflatten(0, (len(x), -1)).transpose(1, 2)
        y = self.tcn2cn(y.flatten(3)) + self.residual(x.flatten(3))
        return y.relu().unflatten(3, (height, width))


def test_recorded_block():
    meta, tensors = read_golden("ske2grid_block_a")
    config = meta["config"]
    block = AuthorsBlock(config["in_channels"], config["out_channels"], config["stride"]).eval()
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    block.load_state_dict(state)
    x = tensors["in.x"].requires_grad_()
    y = block(x)
    assert_golden(y, tensors["out.y"], meta)
    y.backward(tensors["in.cotangent"])
    assert_gradient(x.grad, tensors["grad.x"], meta)


@pytest.mark.parametrize("name", ["front_d5", "front_d5_d6"])
@pytest.mark.parametrize("grown", [False, True])
def test_recorded_front(name, grown):
    meta, tensors = read_golden(f"ske2grid_{name}")
    sequence = [*meta["config"]["joint_seq"][1:], math.prod(meta["config"]["grid_shape"])]
    shapes = [2 * (math.isqrt(cells),) for cells in sequence]
    adjacency = tensors["in.graph_adjacency_mat"]
    layout = SkeletonToGrid(17, shapes[:1] if grown else shapes, adjacency=adjacency)
    schedule = ProgressiveSchedule([StageSpec(shape, 1, 0.05) for shape in shapes])
    while grown and len(layout.stages) < len(shapes):
        layout = schedule.expand(layout)
    for index, stage in enumerate(layout.stages):
        assert stage.upt.weight.requires_grad == (index not in meta["config"]["frozen_stages"])
    state = {}
    for index in range(len(shapes)):
        state[f"stages.{index}.upt.weight"] = tensors[f"state.sampling_stages.{index}"]
        scores = tensors[f"state.SGT_stages.{index}.sgt_trans_mat"]
        state[f"stages.{index}.git.scores"] = scores
    layout.load_state_dict(state)
    for index, stage in enumerate(layout.stages):
        assert_golden(stage.git.assignment(), tensors[f"out.assignment.{index}"], meta)

    norm = nn.BatchNorm1d(51, eps=meta["config"]["eps"]).eval()
    names = norm.state_dict()
    norm.load_state_dict({key: tensors[f"state.data_bn.{key}"] for key in names})
    pose = tensors["in.pose"].requires_grad_()  # (N, M, T, J, C)
    samples, people, frames, joints, channels = pose.shape
    x = norm(pose.flatten(0, 1).permute(0, 2, 3, 1).flatten(1, 2))
    nodes = x.unflatten(1, (joints, channels)).flatten(2)
    grid = layout(nodes).unflatten(1, (channels, frames))
    assert grid.shape[0] == samples * people
    assert_golden(grid, tensors["out.grid"], meta)
    grid.backward(tensors["in.cotangent"])
    assert_gradient(pose.grad, tensors["grad.pose"], meta)
    for index, stage in enumerate(layout.stages):
        if index in meta["config"]["frozen_stages"]:
            assert stage.upt.weight.grad is None and stage.git.scores.grad is None
        else:
            expected = tensors[f"grad.sampling_stages.{index}"]
            assert_gradient(stage.upt.weight.grad, expected, meta)
            expected = tensors[f"grad.SGT_stages.{index}.sgt_trans_mat"]
            assert_gradient(stage.git.scores.grad, expected, meta)


def test_coco_adjacency_is_the_authors():
    _, tensors = read_golden("ske2grid_front_d5")
    assert torch.equal(coco_adjacency(), tensors["in.graph_adjacency_mat"])


# Placement


def plain_greedy(scores):
    cells, nodes = scores.shape
    free, chosen = set(range(nodes)), []
    for cell in range(cells):
        allowed = free if cell < nodes else range(nodes)
        best = max(allowed, key=lambda node: (scores[cell, node].item(), -node))
        free.discard(best)
        chosen.append(best)
    return chosen


def sample_scores():
    torch.manual_seed(0)
    yield from (torch.rand(9, 9), torch.rand(16, 16), torch.randn(1, 1))
    yield from (torch.zeros(7, 7), torch.randint(0, 3, (64, 64)).float(), torch.full((5, 5), -2.0))


@pytest.mark.parametrize("solver", ["greedy", "hungarian"])
@pytest.mark.parametrize("index", range(6))
def test_square_placement_is_a_permutation(solver, index):
    scores = [*sample_scores()][index]
    git = GraphNodeIndexTransform(len(scores), solver=solver)
    git.load_state_dict({"scores": scores})
    order = git.permutation()
    assert order.dtype == torch.long and sorted(order.tolist()) == list(range(len(scores)))
    if solver == "greedy":
        assert order.tolist() == plain_greedy(scores)
    x = torch.randn(2, len(scores), 3)
    for mode in (True, False):
        git.train(mode)
        chosen = git.assignment()
        assert set(chosen.unique().tolist()) <= {0.0, 1.0}
        assert torch.equal(chosen.sum(0), chosen.sum(1)) and chosen.sum() == len(scores)
        assert torch.equal(git(x), x[:, order])
        assert_close(git(x), chosen @ x)
        assert torch.equal(git.inverse(git(x)), x)


def test_authors_figures_of_greedy_and_optimal():
    torch.manual_seed(0)
    totals = []
    for _ in range(20):
        scores = torch.rand(25, 25)
        row = []
        for solver in ("greedy", "hungarian"):
            git = GraphNodeIndexTransform(25, solver=solver)
            git.load_state_dict({"scores": scores})
            row.append((git.assignment() * scores).sum().item())
        rows, columns = linear_sum_assignment(scores, maximize=True)
        assert row[1] == pytest.approx(scores[rows, columns].sum().item(), rel=1e-6)
        assert row[1] >= row[0]
        totals.append(row)
    assert torch.tensor(totals).mean(0).tolist() == pytest.approx([22.4, 23.4], abs=0.5)


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (6, 3)])
def test_hungarian_finds_the_best_of_all(shape):
    torch.manual_seed(1)
    cells, nodes = shape
    for _ in range(10):
        scores = torch.randn(shape, dtype=torch.float64)
        git = GraphNodeIndexTransform(cells, nodes, solver="hungarian").double()
        git.load_state_dict({"scores": scores})
        total = (git.assignment() * scores)[:nodes].sum().item()
        rows = range(min(cells, nodes))
        orders = itertools.permutations(range(nodes), len(rows))
        best = max(scores[rows, list(order)].sum().item() for order in orders)
        assert total == pytest.approx(best)
        assert git.permutation()[nodes:].tolist() == scores[nodes:].argmax(1).tolist()


def test_distinct_favourites_are_granted():
    favourites = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    scores = torch.rand(12, 12) + 2 * functional.one_hot(favourites, 12)
    for solver in ("greedy", "hungarian"):
        git = GraphNodeIndexTransform(12, solver=solver)
        git.load_state_dict({"scores": scores})
        assert torch.equal(git.permutation(), favourites)


@pytest.mark.parametrize("solver", ["greedy", "hungarian"])
def test_cells_and_nodes_of_other_numbers(solver):
    torch.manual_seed(2)
    more = GraphNodeIndexTransform(9, 5, solver=solver)
    order = more.permutation()
    assert sorted(order[:5].tolist()) == list(range(5))
    assert torch.equal(order[5:], more.scores[5:].argmax(1))
    assert solver == "hungarian" or order.tolist() == plain_greedy(more.scores.detach())
    fewer = GraphNodeIndexTransform(4, 9, solver=solver)
    assert len(set(fewer.permutation().tolist())) == 4
    x = torch.randn(1, 9, 2)
    assert torch.equal(fewer(x), x[:, fewer.permutation()])
    with pytest.raises(ValueError, match="as many cells as nodes"):
        fewer.inverse(fewer(x))


def test_placement_passes_the_gradient_straight_through():
    git = GraphNodeIndexTransform(6)
    cotangent = torch.randn(6, 6)
    git.assignment().backward(cotangent)
    assert torch.equal(git.scores.grad, cotangent)
    x, g = torch.randn(2, 6, 3), torch.randn(2, 6, 3)
    for method, matrix in ((git, git.assignment), (git.inverse, lambda: git.assignment().T)):
        inputs = x.clone().requires_grad_()
        ours = torch.autograd.grad(method(inputs), (git.scores, inputs), g)
        theirs = torch.autograd.grad(matrix() @ inputs, (git.scores, inputs), g)
        assert_close(ours, theirs)
    assert not git.eval()(x).requires_grad
    assert not GraphNodeIndexTransform(6, trainable=False)(x).requires_grad


def test_placement_passes_the_whole_gradient_under_autocast():
    git = GraphNodeIndexTransform(6)
    x, g = torch.randn(2, 6, 3), torch.randn(2, 6, 3)
    for method in (git, git.inverse):
        expected = torch.autograd.grad(method(x), git.scores, g)
        with torch.autocast("cpu", torch.bfloat16):
            y = method(x)
        assert_close(torch.autograd.grad(y, git.scores, g), expected, rtol=0, atol=0)


def test_placement_begins_with_a_permutation():
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    for solver in ("greedy", "hungarian"):
        git = GraphNodeIndexTransform(16, init=order, solver=solver)
        assert torch.equal(git.permutation(), order)
        others = git.scores[functional.one_hot(order, 16) == 0]
        assert others.max() < 0.4 and git.scores.max() < 0.9 and others.std() > 0.05
    assert GraphNodeIndexTransform(3, init=[2, 0, 1]).permutation().tolist() == [2, 0, 1]
    uniform = GraphNodeIndexTransform(30).scores
    assert (
        uniform.min() >= 0
        and uniform.max() < 1
        and uniform.mean().item() == pytest.approx(0.5, abs=0.05)
    )


# Interpolation


def test_upsampling_begins_as_convex_combinations():
    upt = UpsamplingTransform(17, 25)
    matrix = upt.matrix()
    assert upt.weight.shape == (25, 17) and torch.equal(matrix, upt.weight)
    assert torch.equal(matrix[:17], torch.eye(17))
    assert matrix.min() >= 0
    assert_close(matrix.sum(1), torch.ones(25))
    assert (matrix[17:] > 0).all() and matrix[17:].std(1).min() > 0.005
    assert_close(upt(torch.full((2, 17, 3), 1.5)), torch.full((2, 25, 3), 1.5))
    assert_close(upt.left_inverse() @ matrix, torch.eye(17), rtol=0, atol=1e-5)
    x = torch.randn(2, 17, 3)
    assert_close(upt(x)[:, :17], x)


def test_adjacency_applies_first():
    adjacency = coco_adjacency()
    upt = UpsamplingTransform(17, 25, adjacency=adjacency)
    x = torch.randn(2, 17, 3)
    assert_close(upt(x), upt.weight @ (adjacency @ x))
    assert_close(upt(x)[:, 1], x[:, 0] + x[:, 1] + x[:, 2])
    assert list(upt.state_dict()) == ["weight"]
    assert_close(upt.left_inverse() @ upt.matrix(), torch.eye(17), rtol=0, atol=1e-4)


def test_an_adjacency_may_be_of_integers():
    layouts = []
    for adjacency in (coco_adjacency(), coco_adjacency().long()):
        torch.manual_seed(0)
        layouts.append(SkeletonToGrid(17, [(5, 5)], adjacency))
    x = torch.randn(2, 17, 3)
    assert_close(layouts[1](x), layouts[0](x))
    layouts[1](x).sum().backward()
    assert layouts[1].stages[0].upt.weight.grad is not None


@pytest.mark.parametrize("trainable", [True, "extra", False])
def test_an_init_may_be_of_integers(trainable):
    rows = torch.cat([torch.eye(4), torch.ones(5, 4)])
    upt = UpsamplingTransform(4, 9, init=rows.long(), trainable=trainable)
    assert upt.weight.dtype == torch.float32 and torch.equal(upt.matrix(), rows)
    half = UpsamplingTransform(4, 9, init=rows.bfloat16()).weight
    assert half.dtype == torch.bfloat16


def test_what_is_given_follows_the_weights_to_the_default_device():
    adjacency = coco_adjacency()
    with torch.device("meta"):
        upt = UpsamplingTransform(17, 25, adjacency=adjacency)
        git = GraphNodeIndexTransform(3, init=[2, 0, 1])
    assert upt.weight.is_meta and upt.adjacency.is_meta and git.scores.is_meta


def train(parameters, loss, steps=10):
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


@pytest.mark.parametrize("trainable", [True, "extra", False])
def test_what_is_trained(trainable):
    upt = UpsamplingTransform(5, 9, trainable=trainable)
    before = upt.matrix().detach().clone()
    x, y = torch.randn(4, 5, 2), torch.randn(4, 9, 2)
    if trainable:
        train(upt.parameters(), lambda: functional.mse_loss(upt(x), y))
    else:
        assert not upt(x).requires_grad
    after = upt.matrix()
    assert torch.equal(after[:5], before[:5]) == (trainable is not True)
    assert torch.equal(after[5:], before[5:]) == (trainable is False)
    assert_close(upt.left_inverse() @ after, torch.eye(5), rtol=0, atol=1e-4)


@pytest.mark.parametrize("coarse, fine", [((4, 4), (8, 8)), ((2, 3), (6, 6)), ((3, 2), (5, 3))])
def test_nearest_equals_interpolate(coarse, fine):
    upt = UpsamplingTransform.from_grids(coarse, fine, "nearest")
    git = GraphNodeIndexTransform(math.prod(fine), init=upt.placement)
    stage = GridStage(upt, git, fine)
    x = torch.randn(2, 3, *coarse)
    expected = functional.interpolate(x, size=fine, mode="nearest")
    cells = stage(x.flatten(2).mT)
    assert torch.equal(cells.mT.unflatten(2, fine), expected)
    assert torch.equal(upt.matrix()[: math.prod(coarse)], torch.eye(math.prod(coarse)))
    assert_close(stage.inverse(cells), x.flatten(2).mT)


def test_linear_averages_neighbours():
    upt = UpsamplingTransform.from_grids((3, 4), (6, 8), "linear")
    assert torch.equal(upt.matrix()[:12], torch.eye(12))
    assert_close(upt.matrix().sum(1), torch.ones(48))
    x = torch.randn(1, 12, 2)
    coarse = functional.pad(x.mT.unflatten(2, (3, 4)), (0, 1, 0, 1), "replicate")
    fine = upt(x)[:, upt.placement].mT.unflatten(2, (6, 8))
    assert_close(fine[..., ::2, ::2], coarse[..., :-1, :-1])
    assert_close(fine[..., ::2, 1::2], (coarse[..., :-1, :-1] + coarse[..., :-1, 1:]) / 2)
    square = coarse[..., :-1, :-1] + coarse[..., :-1, 1:] + coarse[..., 1:, :-1]
    assert_close(fine[..., 1::2, 1::2], (square + coarse[..., 1:, 1:]) / 4)
    thirds = UpsamplingTransform.from_grids((1, 2), (1, 6), "linear")
    line = thirds(torch.tensor([[[0.0], [3.0]]]))[0, thirds.placement, 0]
    assert_close(line, torch.tensor([0.0, 1, 2, 3, 3, 3]))


# Stages


@pytest.mark.parametrize("solver", ["greedy", "hungarian"])
@pytest.mark.parametrize("trainable", [True, "extra"])
def test_skeletons_are_read_back(solver, trainable):
    layout = SkeletonToGrid(17, [(5, 5), (6, 6)], trainable=trainable, solver=solver)
    assert layout.stages[1].git.solver == solver
    x = torch.randn(3, 17, 2)
    grid = layout(x)
    assert grid.shape == (3, 2, 6, 6)
    back = layout.inverse(grid)
    atol = 1e-6 if trainable == "extra" else 1e-4
    assert_close(back, x, rtol=0, atol=atol)
    cells = grid.flatten(2).mT
    matrix = torch.eye(17)
    for stage in layout.stages:
        matrix = stage.git.assignment() @ stage.upt.matrix() @ matrix
    assert_close(cells, matrix @ x)


def test_adjacency_is_for_the_first_stage():
    layout = SkeletonToGrid(17, [(5, 5), (6, 6)], coco_adjacency())
    assert layout.stages[0].upt.adjacency is not None and layout.stages[1].upt.adjacency is None
    assert set(layout.state_dict()) == {
        f"stages.{s}.{name}" for s in (0, 1) for name in ("upt.weight", "git.scores")
    }
    x = torch.randn(1, 17, 2)
    assert_close(layout.inverse(layout(x)), x, rtol=0, atol=1e-3)


class PoseNet(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.layout = SkeletonToGrid(17, [(5, 5)], **options)
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.norm(self.conv(self.layout(x))).relu().mean((2, 3)))


@pytest.fixture
def schedule():
    sizes = ((5, 5), 3, 0.1), ((6, 6), 2, 0.05), ((6, 8), 4, 0.01)
    return ProgressiveSchedule([StageSpec(*size) for size in sizes])


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("trainable", [True, "extra"])
def test_expansion(schedule, nested, trainable):
    model = PoseNet(nested=nested, trainable=trainable)
    x, y = torch.randn(8, 17, 2), torch.randn(8, 2)
    train(model.parameters(), lambda: functional.mse_loss(model(x), y), steps=2)
    state = copy.deepcopy(model.state_dict())
    bigger = schedule.expand(schedule.expand(model))
    kept = torch.equal(bigger.layout(x)[..., :5, :5], model.layout(x))
    assert kept == nested
    assert model.state_dict().keys() == state.keys() and model.layout.grid_shape == (5, 5)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert bigger.layout.grid_shape == (6, 8) and bigger.layout.nested == nested
    for key, value in state.items():
        assert torch.equal(bigger.state_dict()[key], value)

    bigger.eval()
    cells = model.layout(x).flatten(2).mT
    shapes = [(5, 5), (6, 6), (6, 8)]
    for stage, old, new in zip(bigger.layout.stages[1:], shapes, shapes[1:], strict=False):
        nodes = stage.upt(cells)
        assert_close(nodes[:, : math.prod(old)], cells, rtol=0, atol=1e-6)
        grid, before = (c.mT.unflatten(2, s) for c, s in ((stage(cells), new), (cells, old)))
        corner = grid[..., : old[0], : old[1]]
        if nested:
            assert torch.equal(corner, before)
            assert_close(grid[..., : old[0], old[1] :], before[..., -1:].expand_as(
                grid[..., : old[0], old[1] :]), rtol=0, atol=1e-6)  # fmt: skip
        else:
            assert (corner - before).abs().max() > 0.1
        cells = stage(cells)

    names = dict(schedule.trainable(bigger))
    frozen = {n for n, p in bigger.named_parameters() if not p.requires_grad}
    pairs = {f"layout.stages.{s}.{n}" for s in (0, 1) for n in ("upt.weight", "git.scores")}
    assert frozen == pairs and not pairs & names.keys()
    assert {"layout.stages.2.upt.weight", "layout.stages.2.git.scores", "conv.bias"} <= set(names)
    before = copy.deepcopy(bigger.train().state_dict())
    # Weight decay must not reach them either.
    train(bigger.parameters(), lambda: functional.mse_loss(bigger(x), y))
    for key in bigger.state_dict():
        same = torch.equal(bigger.state_dict()[key], before[key])
        assert same == (key in pairs), key
    assert all(p.grad is None for n, p in bigger.named_parameters() if n in pairs)


def test_a_new_stage_stops_the_others_at_once():
    layout = SkeletonToGrid(17, [(5, 5)])
    optimizer = torch.optim.SGD(layout.parameters(), lr=1.0)
    layout(torch.randn(2, 17, 3)).square().sum().backward()
    before = layout.stages[0].upt.weight.clone()
    layout.append_stage((6, 6))
    optimizer.step()
    assert torch.equal(layout.stages[0].upt.weight, before)


def test_expansion_keeps_type_mode_and_refuses_more(schedule):
    model = schedule.expand(SkeletonToGrid(17, [(5, 5)]).double().eval())
    assert model.stages[1].git.scores.dtype == torch.float64
    assert not any(module.training for module in model.modules())
    model = schedule.expand(model)
    with pytest.raises(ValueError, match="all 3 stages"):
        schedule.expand(model)
    with pytest.raises(ValueError, match="first of this schedule"):
        schedule.expand(SkeletonToGrid(17, [(6, 6)]))
    for several in (nn.Linear(2, 2), nn.ModuleList([model, SkeletonToGrid(17, [(5, 5)])])):
        with pytest.raises(ValueError, match="one SkeletonToGrid"):
            schedule.expand(several)


def test_schedule(schedule):
    assert [schedule.stage(step) for step in range(11)] == [0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 2]
    assert schedule.stages[1].lr == 0.05
    with pytest.raises(ValueError, match="step"):
        schedule.stage(-1)


# All


def layers():
    torch.manual_seed(0)
    yield UpsamplingTransform(5, 9), (2, 5, 2)
    yield UpsamplingTransform(5, 9, adjacency=torch.rand(5, 5), trainable="extra"), (2, 5, 2)
    yield GraphNodeIndexTransform(9), (2, 9, 2)
    yield GraphNodeIndexTransform(6, 9, solver="hungarian"), (2, 9, 2)
    yield SkeletonToGrid(5, [(2, 3), (3, 3)]), (2, 5, 2)


@pytest.mark.parametrize("index", range(5))
def test_gradients_copies_states_and_compilation(index):
    layer, shape = [*layers()][index]
    x = torch.randn(shape)
    again = copy.deepcopy(layer)
    assert torch.equal(again(x), layer(x))
    with torch.no_grad():
        [*again.parameters()][-1].add_(torch.randn_like([*again.parameters()][-1]))
    assert not torch.equal(again(x), layer(x))
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results = []
    for function in (compiled, layer):
        layer.zero_grad()
        inputs = x.clone().requires_grad_()
        y = function(inputs)
        y.sin().sum().backward()
        grads = [p.grad.clone() for p in layer.parameters() if p.requires_grad]
        results.append((y, inputs.grad, *grads))
    assert_close(*results, rtol=1e-5, atol=1e-6)
    assert torch.autograd.gradcheck(layer.double(), x.double().requires_grad_())


def test_parameters_and_inverses_pass_gradcheck():
    upt = UpsamplingTransform(3, 5, adjacency=torch.rand(3, 3) + torch.eye(3)).double()
    x = torch.randn(1, 3, 2, dtype=torch.float64)

    def run(weight):
        return torch.func.functional_call(upt, {"weight": weight}, x)

    assert torch.autograd.gradcheck(run, upt.weight)
    layout = SkeletonToGrid(3, [(2, 2), (2, 3)]).double()
    grid = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layout.inverse, grid)


def test_autocast_and_half_precision():
    layout = SkeletonToGrid(17, [(5, 5)], trainable="extra")
    x = torch.randn(2, 17, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layout(x)
        back = layout.inverse(y)
        git = layout.stages[0].git
        nodes = torch.randn(2, 25, 3)
        assert torch.equal(git.inverse(git(nodes)), nodes)
    assert torch.equal(back, x)
    inexact = SkeletonToGrid(17, [(5, 5)], adjacency=coco_adjacency())
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(inexact.inverse(inexact(x)), x, rtol=1e-4, atol=1e-4)
    (y.float().square().sum() + back.float().sum()).backward()
    for tensor in (x, *layout.parameters()):
        assert tensor.grad.isfinite().all() and tensor.grad.any()
    half = SkeletonToGrid(17, [(5, 5)]).bfloat16()
    back = half.inverse(half(x.detach().bfloat16()))
    assert back.dtype == torch.bfloat16
    assert_close(back.float(), x.detach(), rtol=0.1, atol=0.1)
    assert SkeletonToGrid(17, [(5, 5)])(x.detach().half()).dtype == torch.half
    mixed = GraphNodeIndexTransform(25)
    assert mixed(nodes.half()).dtype == torch.half


# Errors


@pytest.mark.parametrize(
    "sizes, options, words",
    [
        ((9, 4), {}, "out_nodes"),
        ((0, 4), {}, "in_nodes"),
        ((4, 9), {"adjacency": torch.eye(9)}, "adjacency"),
        ((4, 9), {"init": "bilinear"}, "init"),
        ((4, 9), {"init": torch.zeros(4, 9)}, "init"),
        ((4, 9), {"init": "nearest"}, "layout"),
        ((4, 9), {"layout": ((2, 2), (3, 4))}, "layout"),
        ((4, 9), {"layout": ((4, 1), (3, 3))}, "shrink"),
        ((4, 9), {"init": "linear", "layout": ((2, 2), (3, 3))}, "multiple"),
        ((4, 9), {"trainable": "some"}, "trainable"),
        ((4, 9), {"init": torch.ones(9, 4), "trainable": "extra"}, "identity"),
        ((1024, 4096), {}, "entries"),
    ],
)
def test_upsampling_errors(sizes, options, words):
    with pytest.raises(ValueError, match=words):
        UpsamplingTransform(*sizes, **options)


def test_upsampling_errors_of_inputs():
    with pytest.raises(ValueError, match=r"\(B, 4, C\)"):
        UpsamplingTransform(4, 9)(torch.zeros(2, 9, 3))
    flat = UpsamplingTransform(4, 9, init=torch.ones(9, 4))
    with pytest.raises(ValueError, match="rank 1"):
        flat.left_inverse()


@pytest.mark.parametrize(
    "sizes, options, words",
    [
        ((0,), {}, "num_cells"),
        ((3, 0), {}, "num_nodes"),
        ((4,), {"solver": "auction"}, "solver"),
        ((4,), {"init": "normal"}, "init"),
        ((4,), {"init": [0, 1, 2]}, "each of 4 cells"),
        ((4,), {"init": [0.0, 1.0, 2.0, 3.0]}, "each of 4 cells"),
        ((4,), {"init": [0, 1, 2, 4]}, "0 to 3"),
        ((4,), {"init": [0, 1, 2, -1]}, "0 to 3"),
        ((4,), {"init": torch.tensor([0, 1, 2, 2])}, "twice"),
        ((4096,), {}, "entries"),
    ],
)
def test_placement_errors(sizes, options, words):
    with pytest.raises(ValueError, match=words):
        GraphNodeIndexTransform(*sizes, **options)


def test_placement_errors_of_inputs():
    git = GraphNodeIndexTransform(4, solver="hungarian")
    for method in (git, git.inverse):
        with pytest.raises(ValueError, match=r"\(B, 4, C\)"):
            method(torch.zeros(2, 5, 3))
    with torch.no_grad():
        git.scores[0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        git.permutation()


def test_stage_errors():
    upt, git = UpsamplingTransform(4, 9), GraphNodeIndexTransform(9)
    for pair in ((upt, git, (3, 4)), (upt, GraphNodeIndexTransform(9, 8), (3, 3))):
        with pytest.raises(ValueError, match="cells"):
            GridStage(*pair)
    for shapes, words in (([], "grid_shapes"), ([(5, 5), (5, 5)], "increase")):
        with pytest.raises(ValueError, match=words):
            SkeletonToGrid(17, shapes)
    with pytest.raises(ValueError, match=r"begins with \(4, 4\).*16 cells.*num_nodes=17"):
        SkeletonToGrid(17, [(4, 4)])
    with pytest.raises(ValueError, match="both sides"):
        SkeletonToGrid(17, [(5, 5), (4, 9)], nested=True)
    layout = SkeletonToGrid(17, [(5, 5)])
    with pytest.raises(ValueError, match="17"):
        layout(torch.zeros(1, 16, 2))
    with pytest.raises(ValueError, match="5, 5"):
        layout.inverse(torch.zeros(1, 2, 5, 6))


def test_schedule_errors():
    for spec in (((5,), 1, 0.1), ((5, 5), 0, 0.1), ((5, 5), 1, 0.0), ((5, 5), 1, math.inf)):
        with pytest.raises(ValueError):
            StageSpec(*spec)
    with pytest.raises(ValueError, match="stages"):
        ProgressiveSchedule([])
    with pytest.raises(TypeError, match="StageSpec"):
        ProgressiveSchedule([((5, 5), 1, 0.1)])
    with pytest.raises(ValueError, match="increase"):
        ProgressiveSchedule([StageSpec((6, 6), 1, 0.1), StageSpec((5, 5), 1, 0.1)])
