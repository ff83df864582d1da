"""A pipeline and its Dot become one folder in half precision."""

import json

import pytest
import torch

from morse import MorsePipeline
from training.export_pipeline import ExportConfig, export


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    other = tmp_path / "notes.json"
    other.write_text('{"_name_or_path": "mine"}')
    config = ExportConfig(pretrained_model_name_or_path="p", dot="d", output_dir=tmp_path)
    with pytest.raises(FileExistsError, match="which is not empty; give another --output_dir"):
        export(config)
    assert other.read_text() == '{"_name_or_path": "mine"}'


def test_both_are_in_the_folder(build_unet, make_pipe, make_dot, tmp_path):
    pipe, folder = make_pipe(unet=build_unet(channels=(8, 8), sample_size=8)), tmp_path / "both"
    make_dot(pipe.unet).save_pretrained(tmp_path / "dot")
    pipe.save_pretrained(tmp_path / "pipe")
    export(
        ExportConfig(
            pretrained_model_name_or_path=str(tmp_path / "pipe"),
            dot=str(tmp_path / "dot"),
            output_dir=folder,
            speed_ratio=4.0,
        )
    )
    for path in folder.rglob("*.json"):
        assert "_name_or_path" not in json.loads(path.read_text())
    found = MorsePipeline.from_pretrained(folder, dtype=torch.float16)
    assert found.dot.config.speed_ratio == 4.0
    assert found.dot.config.plan_ratio == {"default": 2.0}
    assert found.dot.conv_out.weight.dtype == torch.float16
    assert type(found.scheduler).__name__ == "DPMSolverMultistepScheduler"
