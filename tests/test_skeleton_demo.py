"""The skeleton demonstration, and its committed results."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from morse import MorsePipeline
from morse.training.schedule import read_schedule
from morse.training.windows import pick_pairs
from pipelines.skeleton_data import (
    ELBOWS,
    KNEES,
    LENGTHS,
    NUM_JOINTS,
    bone_errors,
    bone_lengths,
    draw_angles,
    draw_poses,
    energy_distance,
    forward_kinematics,
)
from pipelines.skeleton_diffusion import SkeletonConfig, no_residual, run
from pipelines.skeleton_report import to_markdown
from pipelines.skeleton_training import (
    GRID,
    SkeletonDash,
    SkeletonLayout,
    dot_estimates,
    make_pipeline,
    make_windows,
)

RESULTS = Path(__file__).parents[1] / "eval/results/skeletons"


def tiny_config(grid="ske2grid"):
    return SkeletonConfig(output_dir=Path("nowhere"), quick=True, grid=grid)


class TestData:
    def test_any_rotations_keep_bone_lengths(self):
        angles = 7 * torch.randn(50, NUM_JOINTS, generator=torch.Generator().manual_seed(0))
        expected = LENGTHS[1:].expand(50, -1)
        torch.testing.assert_close(bone_lengths(forward_kinematics(angles)), expected)

    def test_standing_upright(self):
        pose = forward_kinematics(torch.zeros(1, NUM_JOINTS))[0]
        right = [[0, 0], [-0.26, 0], [-0.26, -0.9], [-0.26, -1.76]]
        torch.testing.assert_close(pose[:4], torch.tensor(right), atol=1e-5, rtol=0)
        torch.testing.assert_close(pose[10], torch.tensor([0, 1.48]), atol=1e-5, rtol=0)
        mirrored = pose[[0, 4, 5, 6]] * torch.tensor([-1.0, 1.0])
        torch.testing.assert_close(pose[:4], mirrored, atol=1e-5, rtol=0)

    def test_turning_the_body_turns_every_joint(self):
        angles = draw_angles(8, torch.Generator().manual_seed(0))
        turned = angles.clone()
        turned[:, 0] += math.pi / 2
        poses = forward_kinematics(angles)
        expected = torch.stack([-poses[..., 1], poses[..., 0]], 2)
        torch.testing.assert_close(forward_kinematics(turned), expected, atol=1e-5, rtol=1e-5)

    def test_knees_and_elbows_bend_one_way(self):
        angles = draw_angles(500, torch.Generator().manual_seed(0))
        knees, elbows = angles[:, list(KNEES)], angles[:, list(ELBOWS)]
        assert (knees.abs() < math.radians(150.1)).all() and (elbows.abs() < 2.7).all()
        # Whichever way a body faces, its knees bend against its elbows.
        assert (knees[:, :, None] * elbows[:, None] <= 0).all()
        assert 0.4 < (elbows.sum(1) > 0).double().mean() < 0.6

    def test_draws_depend_on_the_seed_alone(self):
        assert torch.equal(draw_poses(5, 3), draw_poses(5, 3))
        assert not torch.equal(draw_poses(5, 3), draw_poses(5, 4))

    def test_a_longer_bone_is_counted(self):
        poses = draw_poses(4, 0)
        poses[:, 13] += 0.1 * (poses[:, 13] - poses[:, 12])  # the left forearm
        errors = bone_errors(poses)
        torch.testing.assert_close(errors[:, 12], torch.full((4,), 0.1), atol=1e-5, rtol=0)
        assert (errors > 0.05).sum() == 4


class TestEnergyDistance:
    def test_equal_sets(self):
        poses = draw_poses(40, 0)
        assert energy_distance(poses, poses) == pytest.approx(0, abs=1e-12)

    def test_a_shift(self):
        one, shift = torch.zeros(1, NUM_JOINTS, 2), torch.zeros(1, NUM_JOINTS, 2)
        shift[0, 3] = torch.tensor([3.0, 4.0])
        assert energy_distance(one, one + shift) == pytest.approx(10)
        # Against a set of which half is shifted: 2 * 5/2 - 0 - 5/2.
        assert energy_distance(one, torch.cat([one, one + shift])) == pytest.approx(2.5)

    def test_another_mixture_is_farther_than_the_same(self):
        poses, others = draw_poses(200, 0), draw_poses(200, 1)
        assert energy_distance(poses, others) < 0.1 < energy_distance(poses, others + 0.3)


@pytest.mark.parametrize("grid", ["ske2grid", "gridconv"])
class TestOnTheGrid:
    def test_joints_are_read_back(self, grid):
        torch.manual_seed(0)
        layout = SkeletonLayout(grid)
        with torch.no_grad():
            for parameter in layout.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        poses = draw_poses(6, 0)
        cells = layout(poses)
        assert cells.shape == (6, 2, *GRID)
        torch.testing.assert_close(layout.inverse(cells), poses)

    def test_an_exact_dot_is_dash(self, grid):
        pipe = make_pipeline(tiny_config(grid))
        bare = MorsePipeline.from_pipe(pipe, None, scheduler="dpmsolver++")
        unet = bare.unet

        def exact(sample, timestep, jump):
            # Not through the module's own call, which the plan has switched to Dot.
            return type(unet).forward(unet, sample, timestep).sample - jump.model_output

        def draw(**steps):
            with torch.no_grad():
                return bare(3, generator=torch.Generator().manual_seed(0), **steps)

        expected = draw(num_inference_steps=5)
        for dot, same in ((exact, True), (no_residual, False)):
            bare = MorsePipeline.from_pipe(bare, dot)
            found = draw(plan="DoDoo")
            assert bare.last_run.num_dot == 3 and not bare.last_run.fallbacks
            assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4) is same

    def test_training_pairs_are_what_the_pipeline_sees(self, grid):
        pipe = make_pipeline(tiny_config(grid))
        schedule, kind = read_schedule(pipe.scheduler, 1)
        dash = SkeletonDash(
            model=pipe.unet, schedule=schedule, prediction_type=kind, layout=pipe.layout
        )
        windows = make_windows(dash, draw_poses(8, 0), 8, 0)
        assert windows.samples.shape[2:] == (NUM_JOINTS, 2)
        samples, times = windows.samples[:, 1], windows.timesteps[:, 1]
        with torch.no_grad():
            outputs = pipe.unet(pipe.layout(samples), times).sample
        torch.testing.assert_close(windows.outputs[:, 1, 0], outputs, atol=2e-3, rtol=1e-3)

        pairs = pick_pairs(dash, windows, 2, torch.Generator().manual_seed(0), False)
        found = dot_estimates(no_residual, pairs, pipe.layout)
        assert torch.equal(found, pipe.layout.inverse(pairs.base))
        assert found.shape == pairs.target.shape == (16, NUM_JOINTS, 2)


def test_quick_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("pipelines.skeleton_diffusion.REFERENCE_STEPS", 20)
    output = tmp_path / "results"
    run(SkeletonConfig(output_dir=output, quick=True))
    result = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert (output / "results.md").read_text(encoding="utf-8") == to_markdown(result)
    assert "assumed N = 3" in to_markdown(result)
    methods = [(row["method"], row["lsd"]) for row in result["rows"]]
    assert methods == [(name, lsd) for lsd in (4, 6) for name in ("solver", "morse", "reuse")]
    assert all(row["cost"] <= row["lsd"] for row in result["rows"])
    assert {row["plan"] for row in result["rows"][1:3]} == {"DoDoDo"}
    assert result["rows"][1]["rmse"] != result["rows"][2]["rmse"]  # Dot does something
    assert result["floor"]["valid"]["mean"] == 100 and result["dot_error"] < 1
    assert str(tmp_path) not in json.dumps(result["config"])
    with Image.open(output / "poses.png") as picture:
        assert picture.format == "PNG" and picture.width == 1200
    assert "Dot is trained" in capsys.readouterr().out


def test_quick_leaves_what_was_asked_for(tmp_path):
    config = SkeletonConfig(output_dir=tmp_path, quick=True, lsd=(8,))
    assert (config.lsd, config.num_poses) == ((8,), 16)


def test_bad_settings(tmp_path):
    for options in (
        {"channels": 12}, {"dash_steps": 0}, {"num_poses": 1}, {"lsd": (1, 4)},
        {"speed_ratio": 0.9}, {"plan_ratio": 0.5}, {"batch_size": 1}, {"train_poses": 700},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(options))):
            SkeletonConfig(output_dir=tmp_path, **options)


@pytest.mark.parametrize(
    "path", sorted(RESULTS.glob("**/results.json")), ids=lambda p: p.parent.name
)
def test_committed_results_agree(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    assert path.with_suffix(".md").read_text(encoding="utf-8") == to_markdown(result)
    assert "/home/" not in json.dumps(result) and "/tmp/" not in json.dumps(result)
