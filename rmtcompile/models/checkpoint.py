"""Saving and loading reference models as safetensors; checkpoints of the authors' implementation load too."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .armt import ARMT, decoder_options
from .associative import ARMTConfig

WEIGHTS, CONFIG = "model.safetensors", "armt.json"


def save(model: ARMT, folder: str | Path) -> None:
    """Writes the decoder's `config.json`, the memory's `armt.json` and `model.safetensors`.

    Parameters that share storage (tied embeddings) are written once, under the name that comes first.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    decoder = model.memory_cell.model
    decoder.config.save_pretrained(folder)
    about = {"decoder": type(decoder).__name__, **dataclasses.asdict(model.config)}
    (folder / CONFIG).write_text(json.dumps(about, indent=2) + "\n")
    seen: set[int] = set()
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def load(
    folder: str | Path, *, dtype: torch.dtype | None = None, attn_implementation: str | None = None
) -> ARMT:
    """The model that `save` wrote, in eval mode on the CPU.

    Args:
        folder: where it was saved.
        dtype: dtype of the parameters; None for the one that was saved.
        attn_implementation: "sdpa", "eager", ...; None leaves it to transformers.

    Raises:
        ValueError: the weights do not fit the model.
    """
    folder = Path(folder)
    about: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    cls = getattr(transformers, about.pop("decoder"))
    config = transformers.AutoConfig.from_pretrained(folder)
    config._attn_implementation_autoset = (
        False  # transformers 4.51 saves it, and would then fall back to eager
    )
    if dtype is None:
        with safe_open(folder / WEIGHTS, "pt") as file:
            dtype = file.get_tensor("memory_cell.memory").dtype
    model = ARMT(cls._from_config(config, **decoder_options(dtype, attn_implementation)), ARMTConfig(**about))
    load_weights(model, folder / WEIGHTS)
    return model.eval()


def load_weights(model: ARMT, file: str | Path) -> None:
    """Loads a safetensors file, the authors' included.

    Their cell registers its layers twice, so their files may hold a layer under `memory_cell.layers.<i>`
    only: those names are read as the decoder's own.

    Raises:
        ValueError: names in the file that the model lacks, or parameters that neither the file nor a tied
            one fills.
    """
    path = model.memory_cell.layers_path
    tensors = {_rename(name, path): tensor for name, tensor in load_file(file).items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    state = model.state_dict()
    filled = {state[name].data_ptr() for name in tensors if name in state}
    missing = [name for name in missing if state[name].data_ptr() not in filled]
    if missing or unexpected:
        raise ValueError(f"{file} does not fit the model: missing {missing}, unexpected {unexpected}")


def _rename(name: str, layers_path: str) -> str:
    alias = "memory_cell.layers."
    return f"memory_cell.model.{layers_path}.{name[len(alias) :]}" if name.startswith(alias) else name
