"""`morse eval fid`: distances between images and real ones, generated on the way if asked for."""

from typing import TYPE_CHECKING

from morse.evaluation.fid.config import FidConfig

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

__all__ = ["FidConfig", "run_fid"]


def run_fid(config: FidConfig) -> dict[str, object] | None:
    """Generate what is missing, measure, print a table, and write JSON if asked for.

    Under `accelerate launch` all processes generate and the main one measures.

    Returns:
        The JSON's content; None in other processes than the main one.

    Raises:
        FileNotFoundError: If a source, or weights, do not exist.
        ValueError: If images, weights, packages or settings are not what is needed.
    """
    from morse.evaluation.fid.budgets import generate_all
    from morse.evaluation.fid.lpips import check_lpips_weights
    from morse.evaluation.fid.measuring import NOTHING, check_real, measure, measures_nothing
    from morse.evaluation.fid.report import print_result
    from morse.files import write_json

    state, device = _process(config.device)
    extractor = None
    if state.is_main_process:  # first, so that what is missing is told before hours of sampling
        extractor = config.load_extractor(device)
        check_real(config, extractor)
        if config.lpips:
            check_lpips_weights(config.lpips_weights)
        if measures_nothing(config, extractor):
            if config.pipeline is None:  # so there is nothing to do
                raise ValueError(
                    f"of {config.fake} alone extractor {config.extractor} measures nothing; give "
                    "--real, or for images alone --extractor inception or fashion-mnist, which "
                    "have classes, or clip with --prompts"
                )
            print(NOTHING)
    rows = None
    if config.pipeline is not None:
        rows = generate_all(config, state, device, extractor)
    is_main = state.is_main_process
    if state.num_processes > 1:
        state.destroy_process_group()  # nobody waits for the main process from here on
    if not is_main:
        return None
    result = measure(config, extractor, rows, device)
    print_result(result)
    if config.json is not None:
        write_json(config.json, result)
        print(f"wrote {config.json}")
    return result


def _process(device: str) -> "tuple[PartialState, torch.device]":
    """Return this process's place among all, and the device it works on."""
    from accelerate import PartialState

    from morse.evaluation.environment import resolve_device

    found = resolve_device(device)
    state = PartialState(cpu=found.type == "cpu")  # else processes on CPUs form no group
    return state, state.device if state.num_processes > 1 else found
