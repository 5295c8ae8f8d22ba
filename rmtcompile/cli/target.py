"""What the command line works on: a model named as `module:function`, or a small ARMT built from sizes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rmtcompile.cli.builder import made_by
from rmtcompile.commandline import UsageError


@dataclasses.dataclass(frozen=True)
class Target:
    """A model with the arguments of one call."""

    name: str
    model: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A small ARMT on a Llama decoder with random weights.

    Attributes:
        layers, hidden, heads: of the decoder; the feed-forward is twice `hidden` wide.
        segment: tokens in a segment, memory tokens not counted.
        segments: segments of the example input.
        memory: memory tokens of a segment.
        d_mem: size of memory keys.
        vocabulary: 256 reads bytes.
    """

    layers: int = 4
    hidden: int = 128
    heads: int = 4
    segment: int = 64
    segments: int = 8
    memory: int = 8
    d_mem: int = 16
    vocabulary: int = 256
    seed: int = 0

    @staticmethod
    def of(options: object) -> Sizes:
        """The sizes among the options of a command line."""
        names = {field.name for field in dataclasses.fields(Sizes)}
        return Sizes(**{name: value for name, value in vars(options).items() if name in names})


def small_armt(sizes: Sizes, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """The reference ARMT at these sizes, in eval mode.

    `W_mv` starts at zero, which makes the memory empty: here it is random, so that a wrong memory shows.

    Raises:
        UsageError: transformers is missing, or the sizes do not fit each other.
    """
    transformers = _transformers()
    if sizes.hidden % (2 * sizes.heads):
        raise UsageError(
            f"no model of these sizes: --hidden {sizes.hidden} is not a multiple of twice --heads"
        )
    config = transformers.LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=2 * sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads if sizes.heads % 2 else sizes.heads // 2,
        max_position_embeddings=max(512, sizes.segment + sizes.memory),
    )
    return _armt(config, sizes, dtype).to(device)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UsageError(f"{error}: the reference model needs pip install 'rmtcompile[models]'") from error
    return transformers


def _armt(config: Any, sizes: Sizes, dtype: torch.dtype | None) -> nn.Module:
    from rmtcompile.models import build

    torch.manual_seed(sizes.seed)
    model = build(
        config, segment_size=sizes.segment, num_mem_tokens=sizes.memory, d_mem=sizes.d_mem, dtype=dtype
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("W_mv.weight"):
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval()


def check_device(device: str) -> None:
    """See that tensors can be made on a device.

    Raises:
        UsageError: there is no such device.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"there is no device {device!r} here ({str(error).splitlines()[0]})") from error


def target_of(
    name: str | None, sizes: Sizes, device: str | None = None, dtype: torch.dtype | None = None
) -> Target:
    """The model that the command line names: a function, a config, or nothing for the small ARMT.

    Raises:
        UsageError: there is no such model or device.
    """
    check_device(device or "cpu")
    if name is None:
        return armt_target(sizes, device or "cpu", dtype or torch.float32)
    if name.endswith(".json"):
        return config_target(name, sizes, device or "cpu", dtype)
    return load_target(name, sizes.segment * sizes.segments, device, dtype)


def armt_target(sizes: Sizes, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Target:
    """A small ARMT with random tokens."""
    model = small_armt(sizes, device, dtype)
    tokens = torch.randint(0, sizes.vocabulary, (1, sizes.segment * sizes.segments), device=device)
    name = f"ARMT, {sizes.layers} layers of width {sizes.hidden}"
    return Target(name, model, (tokens,), {})


def config_target(path: str, sizes: Sizes, device: str = "cpu", dtype: torch.dtype | None = None) -> Target:
    """An ARMT around the decoder that a Hugging Face `config.json` describes, with random tokens.

    Args:
        sizes: segments and memory; the decoder's own sizes are those of the file.

    Raises:
        UsageError: the file is no such config, or transformers is missing.
    """
    transformers = _transformers()
    try:
        described = json.loads(Path(path).read_text(encoding="utf-8"))
        config = transformers.AutoConfig.for_model(described.pop("model_type"), **described)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UsageError(
            f"{path} is no config of a decoder of Hugging Face ({type(error).__name__}: {error})"
        ) from error
    _check_decoder(path, config)
    try:
        model = _armt(config, sizes, dtype).to(device)
    except ValueError as error:
        raise UsageError(f"no ARMT around {path}: {error}") from error
    tokens = torch.randint(0, config.vocab_size, (1, sizes.segment * sizes.segments), device=device)
    return Target(path, model, (tokens,), {})


def _check_decoder(path: str, config: Any) -> None:
    """See that a config is of a causal language model, as transformers itself has them.

    Raises:
        UsageError: it is of something else.
    """
    from transformers.models.auto import modeling_auto as auto

    name, help_ = config.model_type, "an ARMT needs a decoder, a causal language model"
    if config.is_encoder_decoder:
        raise UsageError(f"{path} is the config of an encoder with a decoder ({name}): {help_}")
    is_masked = name in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if is_masked:
        raise UsageError(f"{path} is the config of an encoder ({name}): {help_}")
    if type(config) not in auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UsageError(f"{path} is the config of no causal language model ({name}): {help_}")


def load_target(
    spec: str, tokens: int, device: str | None = None, dtype: torch.dtype | None = None
) -> Target:
    """Call the function that `spec` names, `package.module:function` or `file.py:function`.

    It gives (model, args), (model, args, kwargs), or a model alone, which gets `tokens` random token ids.

    Raises:
        UsageError: there is no such function, it needs arguments, or it gives something else.
        BuilderError: it raises.
    """
    model, args, kwargs = _parts(spec, made_by(spec), tokens)
    if isinstance(model, nn.Module) and (device is not None or dtype is not None):
        model.to(device=device, dtype=dtype)
        args, kwargs = torch.utils._pytree.tree_map(
            lambda value: _moved(value, device, dtype), (args, kwargs)
        )
    return Target(spec, model, args, kwargs)


def _parts(spec: str, made: Any, tokens: int) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    if isinstance(made, tuple) and len(made) in (2, 3) and callable(made[0]):
        args = tuple(made[1]) if isinstance(made[1], (tuple, list)) else (made[1],)
        return made[0], args, dict(made[2]) if len(made) == 3 else {}
    if isinstance(made, nn.Module):
        table = next((m for m in made.modules() if isinstance(m, nn.Embedding)), None)
        if table is None:
            raise UsageError(f"{spec} gives a model without an embedding: return (model, args) instead")
        ids = torch.randint(0, table.num_embeddings, (1, tokens), device=table.weight.device)
        return made, (ids,), {}
    raise UsageError(
        f"{spec} gives a {type(made).__name__}: return a model, (model, args) or (model, args, kwargs)"
    )


def _moved(value: Any, device: str | None, dtype: torch.dtype | None) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device=device, dtype=dtype if value.is_floating_point() else None)
