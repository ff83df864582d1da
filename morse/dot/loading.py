"""What every loading of a Dot or of a pipeline insists on."""

from torch import nn


def safetensors_only(kwargs: dict[str, object]) -> dict[str, object]:
    """Complete the keywords of a diffusers `from_pretrained` such that no pickle is ever read.

    Raises:
        ValueError: If `use_safetensors` says otherwise.
    """
    # diffusers hands on None to the components of a pipeline where its caller said nothing.
    if kwargs.get("use_safetensors") not in (None, True):
        raise ValueError("use_safetensors must be True: Morse never reads pickled weights.")
    return {**kwargs, "use_safetensors": True}


def align_weights(model: nn.Module) -> None:
    """Copy weights that begin anywhere in a file's memory to where allocations begin.

    Kernels round differently where a tensor is not aligned, so that a loaded model would not give
    the bits of the saved one.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()
