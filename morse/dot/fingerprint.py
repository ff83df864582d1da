"""Which Dash a Dot belongs to: told by its structure and by projections of a few of its weights."""

import hashlib
import math

import torch
from torch import Tensor, nn

from morse.dot.wrapped import is_ip_adapter, named_weights, read_weight


def fingerprint(dash: nn.Module) -> dict[str, object]:
    """Identify a Dash by its structure and by projections of a few of its weights.

    The projections are onto fixed cosines and change little with the dtype, so that the same
    weights in float16 still match.

    Raises:
        ValueError: If its weights are quantized.
    """
    method = quantization_of(dash)
    if method is not None:
        raise ValueError(
            f"{type(dash).__name__} is quantized ({method}), but Dot shares and adapts its weights "
            "as they were trained: load it without quantization_config, in torch.bfloat16, say; "
            "where memory is short, offload it (pipe.enable_model_cpu_offload())."
        )
    parameters = [place for place in named_weights(dash) if not is_ip_adapter(place[0])]
    shapes = [(name, tuple(value.shape)) for name, value, *_ in parameters]
    digest = hashlib.sha256(f"{type(dash).__name__} {shapes}".encode()).hexdigest()[:12]
    weights = [place for _, *place in parameters if place[0].ndim > 1]
    sampled = [read_weight(*place) for place in weights[:: max(1, len(weights) // 8)][:8]]
    return {
        "class": type(dash).__name__,
        "parameters": sum(math.prod(shape) for _, shape in shapes),
        "structure": digest,
        # On "meta", where only shapes count, there are no values to look at.
        "weights": [round(_project(weight), 3) for weight in sampled if weight is not None],
    }


def quantization_of(model: nn.Module) -> str | None:
    """Name the method that a model's weights are quantized by; None for none."""
    quantizer = getattr(model, "hf_quantizer", None)
    config = getattr(quantizer or getattr(model, "config", None), "quantization_config", None)
    # The config still tells of a quantization that `dequantize` undid.
    if config is None or not getattr(model, "is_quantized", True):
        return None
    is_dict = isinstance(config, dict)
    method = config.get("quant_method") if is_dict else getattr(config, "quant_method", None)
    return str(getattr(method, "value", method))


def identify(network: nn.Module) -> dict[str, object] | str:
    """Tell any network from others: by `fingerprint`, or by the method of its quantization alone.

    Quantized weights have no values to compare.
    """
    return quantization_of(network) or fingerprint(network)


def _project(weight: Tensor) -> float:
    flat = weight.detach().cpu().double().flatten()  # MPS has no float64
    direction = torch.cos(torch.arange(flat.numel(), dtype=flat.dtype, device="cpu"))
    return float(flat @ direction / flat.norm().clamp(min=1e-12))


def check_fingerprint(
    dash: nn.Module, expected: dict[str, object], other: dict[str, object] | None = None
) -> None:
    """Raise `ValueError`, showing two fingerprints, unless `dash` is `expected` or `other`."""
    found = fingerprint(dash)
    if not any(_agree(found, each) for each in (expected, other) if each is not None):
        raise ValueError(
            f"dot was trained for another Dash.\n  expected: {expected}\n  found:    {found}\n"
            "Load the model it was trained for (without a LoRA fused into its weights), or train a "
            "Dot for this one (train_dot.py)."
        )


def _agree(found: dict[str, object], expected: dict[str, object]) -> bool:
    if found["structure"] != expected["structure"]:
        return False
    pairs = zip(found["weights"], expected["weights"], strict=False)
    # A bfloat16 copy moves a projection by about 0.002, other weights by about 0.7. Where weights
    # have no values ("meta"), the structure alone must do.
    return len(found["weights"]) != len(expected["weights"]) or all(
        abs(one - other) < 0.05 for one, other in pairs
    )
