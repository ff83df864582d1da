"""What every loading of a Dot or of a pipeline insists on."""


def safetensors_only(kwargs: dict[str, object]) -> dict[str, object]:
    """Complete the keywords of a diffusers `from_pretrained` such that no pickle is ever read.

    Raises:
        ValueError: If `use_safetensors` says otherwise.
    """
    # diffusers hands on None to the components of a pipeline where its caller said nothing.
    if kwargs.get("use_safetensors") not in (None, True):
        raise ValueError("use_safetensors must be True: Morse never reads pickled weights.")
    return {**kwargs, "use_safetensors": True}
