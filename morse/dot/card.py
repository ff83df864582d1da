"""Model cards: what is known about a Dot or a pipeline with one, and what is not."""

import re
from collections.abc import Mapping
from pathlib import Path

from diffusers import DiffusionPipeline, ModelMixin

_UNKNOWN = "not recorded"

_TEMPLATE = """---
license: unknown
library_name: diffusers
tags:
- morse
{base_model}---

# {title}

{what} of [Morse](https://arxiv.org/abs/2506.18251) (Dual-Sampling for Lossless Acceleration of
Diffusion Models, ICML 2025). At some steps the pretrained denoiser (Dash) runs, in between a fast
network that shares its weights (Dot).

```python
from morse import MorsePipeline

{code}
```

| | |
|---|---|
{table}

Not recorded here: training data, training time, quality, and the licence, which also depends on
the base model's. Please add them.
"""


def hub_id(name_or_path: object) -> str | None:
    """Give the hub's id of a model by the place that it was loaded from; None for a local one."""
    name = str(name_or_path or "")
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+?)[/\\]", name)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    is_id = re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and not Path(name).exists()
    return name if is_id else None


def _fill(title: str, what: str, code: str, base: str | None, rows: Mapping[str, object]) -> str:
    table = "\n".join(
        f"| {name} | {_UNKNOWN if value in (None, '') else value} |" for name, value in rows.items()
    )
    base_model = f"base_model: {base}\n" if base else ""
    return _TEMPLATE.format(title=title, what=what, code=code, base_model=base_model, table=table)


def dot_rows(dot: ModelMixin) -> dict[str, object]:
    """List what a Dot's config says, for the table of a card."""
    config = dot.config
    ratios, fingerprint = config.plan_ratio or {}, config.dash_fingerprint
    zeros = {"of these zero, by pruning": f"{_count_zeros(dot):,}"} if config.sparse else {}
    plans = {
        name: ", ".join(dict.fromkeys(f"{entry['lsd']:g}" for entry in saved))
        for name, saved in (config.plans or {}).items()
    }
    searched = {"LSD of saved plans": _pairs(plans)} if plans else {}
    gate = {} if config.gate is None else {"gate on the residual": "fitted, in `config.json`"}
    return {
        "Dash": f"{fingerprint['class']}, {fingerprint['parameters']:,} parameters",
        "Dash's fingerprint": f"`{fingerprint['structure']}` {fingerprint['weights']}",
        "Dot's own parameters": f"{dot.num_parameters():,}",
        **zeros,
        "m (extra down-sampling blocks)": config.num_down_blocks,
        "their channels": ", ".join(map(str, config.block_out_channels)),
        "LoRA rank": config.lora_rank,
        "base that Dot corrects (`base_space`)": config.base_space or "by the scheduler",
        "earlier estimates of Dash that it sees (`history`)": config.history,
        "what it corrects under guidance (`guidance`)": config.guidance,
        **gate,
        "N (Dash's time over Dot's)": config.speed_ratio,
        "evaluations per LSD": _pairs({name: _by_budget(each) for name, each in ratios.items()}),
        **searched,
    }


def _pairs(values: dict[str, object]) -> str:
    return "; ".join(f"{key}: {value}" for key, value in values.items())


def _by_budget(ratio: object) -> object:
    """Put into words a plan ratio that depends on the budget."""
    if not isinstance(ratio, (list, tuple)):
        return ratio
    later = (f"{value:g} from {least:g} LSD on" for least, value in ratio[1:])
    return ", ".join((f"{ratio[0][1]:g}", *later))


def _count_zeros(dot: ModelMixin) -> int:
    return sum(int((parameter == 0).sum()) for parameter in dot.parameters())


def dot_card(dot: ModelMixin, dash_place: object) -> str:
    """Write the card of a Dot; `dash_place` is where its Dash was loaded from, or None."""
    base = hub_id(dash_place)
    rows = {"base model": base, **dot_rows(dot)}
    code = (
        f'pipe = MorsePipeline.from_pretrained("{base or "BASE MODEL"}", dot="THIS MODEL")\n'
        "pipe(..., lsd=10)"
    )
    title = f"Dot for {base or dot.config.dash_fingerprint['class']}"
    return _fill(title, "The Dot", code, base, rows)


def pipeline_card(pipe: DiffusionPipeline, dot: ModelMixin | None) -> str:
    """Write the card of a pipeline that is saved with its Dot."""
    base = hub_id(pipe.config.get("_name_or_path"))
    name = type(pipe).__name__
    rows = {"pipeline": name, "base model": base, **({} if dot is None else dot_rows(dot))}
    code = 'pipe = MorsePipeline.from_pretrained("THIS MODEL")\npipe(..., lsd=10)'
    return _fill(
        f"{base or name} with Morse", "A diffusers pipeline with the Dot", code, base, rows
    )
