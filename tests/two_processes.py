"""Runs scripts one after another in one process group; `test_two_processes` launches it.

accelerate launch --multi_gpu --num_processes 2 tests/two_processes.py COMMANDS.json
"""

import json
import runpy
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import save_file

from morse.training import cache_sizes
from morse.training.run import TrainingRun
from morse.tuning import targets

SHARD_WINDOWS, SHARD_SAMPLES = 32, 5  # so that a shard for each process is soon made


def keep_weights(train):
    """Make `TrainingRun.train` save each process's own weights beside the result, too."""

    def train_and_save(run, *hooks):
        step = train(run, *hooks)
        weights = {name: value.detach().clone() for name, value in run.model.named_parameters()}
        rank = run.accelerator.process_index
        save_file(weights, run.config.output_dir / f"rank-{rank}.safetensors")
        return step

    return train_and_save


def main(file):
    """Run each `[script, *arguments]` of a JSON file."""
    cache_sizes.MOST_ROWS, targets.SHARD_SAMPLES = SHARD_WINDOWS, SHARD_SAMPLES
    TrainingRun.train = keep_weights(TrainingRun.train)
    # A command ends with its process group, which the next one still needs.
    destroy_process_group = torch.distributed.destroy_process_group
    torch.distributed.destroy_process_group = lambda group=None: None
    for script, *arguments in json.loads(Path(file).read_text()):
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")
        print(f"{script}: {PartialState().num_processes} processes", flush=True)
        AcceleratorState._reset_state(reset_partial_state=True)
    destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
