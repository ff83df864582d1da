"""Jobs one after the other, or several at a time, each process with one thread."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager

import torch

Arguments = tuple[object, ...]


def run_jobs(
    function: Callable[..., object], jobs: Sequence[Arguments], workers: int
) -> Iterator[tuple[Arguments, object]]:
    """Call a function for each job, and go on where one fails.

    Args:
        function: Importable by name, where `workers` is 2 or more.
        jobs: Its arguments.
        workers: Processes; 1 runs the jobs in this one.

    Yields:
        Each job with what the function returned, or with the exception that it raised, as they end.
    """
    if workers == 1:
        with one_thread():
            for job in jobs:
                yield job, _outcome(function, job)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker) as pool:
        futures = {pool.submit(function, *job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.exception() or future.result()


def _outcome(function: Callable[..., object], job: Arguments) -> object:
    try:
        return function(*job)
    except Exception as error:  # one row's failure is reported and must not end the others
        return error


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _start_worker() -> None:
    torch.set_num_threads(1)
    quiet_loading()


def quiet_loading() -> None:
    """Show no bar each time a pipeline is loaded."""
    from diffusers.utils import logging

    logging.disable_progress_bar()
