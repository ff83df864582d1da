"""Morse: faster sampling for pretrained diffusion models with a frozen Dash and a fast Dot.

`MorsePipeline` is where to begin; `morse.calls.MorseCalls` says what its calls take. Where to find
what in the code, besides the packages `training`, `evaluation` and `tuning` of the commands:

- the method: `sampling`, on what `plan`, `spaces` and `rates` define; `history` for two estimates
  of Dash
- MorseDot: the package `dot`; layers that it may have: `modules`; ways to train it, which stand by
  themselves: `distillation`, `compression`
- pipelines with Morse: `attach`, `pipeline`; `calls` is what a call does, `prepare` what it needs
  before, `summary` what is told of it
- from a budget to evaluations: `plan_choice`, `saved_plans`, `steps`
- a denoiser's call in a run: `slot`, `switch`, `denoisers`, `clock`, `branches`, then `estimates`,
  `guess`, `one_pass` or `controlnet`
- solvers: `schedulers`; our own are `leapfrog` and `flow_leapfrog`, which share `leapfrog_moves`
- CUDA graphs: `graphs`, `graphed`, `capture`
- commands: `cli` names each one's module; of those in `evaluation` `planning` is `morse plan`, and
  `report` and `stats` serve `bench`; their options: `settings`; writing: `files`; what may be
  resumed: `folder_settings`
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "MorsePlan": "morse.plan",
    "JumpPoint": "morse.sampling",
    "estimate": "morse.sampling",
    "morse_sample": "morse.sampling",
    "dot_loss": "morse.sampling",
    "MorseDot": "morse.dot",
    "enable_morse": "morse.attach",
    "disable_morse": "morse.attach",
    "enable_cuda_graphs": "morse.graphs",
    "disable_cuda_graphs": "morse.graphs",
    "MorsePipeline": "morse.pipeline",
    "LeapfrogScheduler": "morse.leapfrog",
    "FlowMatchLeapfrogScheduler": "morse.flow_leapfrog",
}
__all__ = list(_HOMES)
# diffusers loads a pipeline's component if its library has a base class of it under this name.
_BASES = {"ModelMixin": "diffusers", "SchedulerMixin": "diffusers"}


def __getattr__(name: str) -> object:
    """Import public names on first use, so that `import morse` stays instant."""
    home = (_HOMES | _BASES).get(name)
    if home is None:
        raise AttributeError(f"module 'morse' has no attribute {name!r}; it has {__all__}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
