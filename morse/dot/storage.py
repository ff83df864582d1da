"""Pruned Dots on the disk: a file that holds only the weights that are not zero.

`morse.compression.sparse` has the layout. The file has the name of any diffusers model's weights,
since diffusers refuses pipelines on the hub whose folders hold others; its own header tells.
"""

import os
from pathlib import Path
from typing import Self

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME, _add_variant, _get_model_file
from safetensors import SafetensorError, safe_open
from torch import nn

from morse.compression import load_sparse, save_sparse
from morse.compression.sparse import FORMAT
from morse.dot.loading import FETCH_OPTIONS
from morse.files import write_bytes

_PLACE = (*FETCH_OPTIONS, "subfolder")
_SPARSE_OPTIONS = ("variant", "dtype", "torch_dtype", "use_safetensors")
# What diffusers hands to all models of a pipeline, and says only how to read other layouts.
_OF_NO_USE = ("low_cpu_mem_usage", "disable_mmap", "offload_state_dict", "use_flashpack")


class SparselyStored:
    """Saves a diffusers model in the sparse layout if its config says `sparse`; loads either."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        save_function: object = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        **kwargs: object,
    ) -> None:
        """Save as diffusers does or, sparse, as one file whatever `max_shard_size` is.

        A sparse file is replaced as a whole: who reads meanwhile sees the old or the new one.

        Raises:
            ValueError: If a sparse model is to be saved as a pickle.
        """
        if not self.config.sparse:
            super().save_pretrained(
                save_directory,
                is_main_process,
                save_function,
                safe_serialization,
                variant,
                **kwargs,
            )
        elif not safe_serialization:
            raise ValueError(
                "safe_serialization is False, but the sparse layout is safetensors; leave it out, "
                "or register_to_config(sparse=False) before."
            )
        elif is_main_process:
            folder = Path(save_directory)
            folder.mkdir(parents=True, exist_ok=True)
            save_sparse(self, folder / _add_variant(SAFETENSORS_WEIGHTS_NAME, variant))
            self.save_config(folder)

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Write the config whole or not at all, for it may replace that of the only copy."""
        write_bytes(Path(json_file_path), self.to_json_string().encode())

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, **kwargs: object) -> Self:
        """Load as diffusers does, in either layout.

        Raises:
            TypeError: For a keyword, not None, that a sparse model's loading does not know.
            ValueError: If a sparse file is damaged.
        """
        place = {name: kwargs[name] for name in _PLACE if name in kwargs}
        name = _add_variant(SAFETENSORS_WEIGHTS_NAME, kwargs.get("variant"))
        file = _find_sparse(path, name, place)
        if file is None:
            return super().from_pretrained(path, **kwargs)
        known = (*_PLACE, *_SPARSE_OPTIONS, *_OF_NO_USE)
        unknown = [name for name in kwargs if name not in known and kwargs[name] is not None]
        if unknown:
            raise TypeError(
                f"{path} is saved in the sparse layout, whose loading does not know {unknown}; it "
                f"takes {[*_PLACE, *_SPARSE_OPTIONS]}."
            )
        state = load_sparse(file)
        with torch.random.fork_rng(devices=[]):  # what is drawn here is all replaced
            model = cls.from_config(cls.load_config(path, **place))
        model.load_state_dict(state)
        model.register_to_config(_name_or_path=str(path))
        # As for any diffusers model, without a wish for a model it is float32.
        wish = kwargs.get("dtype") or kwargs.get("torch_dtype")
        dtype = wish if isinstance(wish, torch.dtype) else torch.float32
        return nn.Module.to(model, dtype).eval()  # without ModelMixin's warning


def _find_sparse(path: str | os.PathLike, name: str, place: dict[str, object]) -> str | None:
    """Give the weights' file if it is sparse; what is wrong with another is diffusers' to say."""
    try:
        file = _get_model_file(path, weights_name=name, **place)
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata() or {}
    except (OSError, SafetensorError):
        return None
    return file if FORMAT in metadata.get("json", "") else None
