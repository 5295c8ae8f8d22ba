"""Choices: the options of `generate`, as classes of transformers that take from the logits and that stop.

    generation_config, options   ->   one value for each field, options first
    fields                       ->   processors, the caller's own, what tokens are drawn from; criteria

Fields have the names and the meaning that they have in transformers' `GenerationConfig`. One that is set and
has no part in `generate` is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process as takes
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

_LOGGER = logging.getLogger("rmtcompile")

Maker = Callable[[Any, Tensor, list[int]], Any]
"""Makes a processor of a field's value, the text i64[B, T] and the tokens that end it."""

_PROCESSORS: dict[str, Maker] = {
    "repetition_penalty": lambda value, *_: takes.RepetitionPenaltyLogitsProcessor(value),
    "no_repeat_ngram_size": lambda value, *_: takes.NoRepeatNGramLogitsProcessor(value),
    "bad_words_ids": lambda value, _, ends: takes.NoBadWordsLogitsProcessor(value, ends or None),
    "min_length": lambda value, ids, ends: takes.MinLengthLogitsProcessor(value, ends, device=_on(ids)),
    "min_new_tokens": lambda value, ids, ends: takes.MinNewTokensLengthLogitsProcessor(
        ids.shape[1], value, ends, device=_on(ids)
    ),
    "suppress_tokens": lambda value, ids, _: takes.SuppressTokensLogitsProcessor(value, device=_on(ids)),
}
"""What changes the logits, in the order of transformers."""

_WARPERS: dict[str, Maker] = {
    "temperature": lambda value, *_: takes.TemperatureLogitsWarper(value),
    "top_k": lambda value, *_: takes.TopKLogitsWarper(value),
    "top_p": lambda value, *_: takes.TopPLogitsWarper(value),
    "min_p": lambda value, *_: takes.MinPLogitsWarper(value),
    "typical_p": lambda value, *_: takes.TypicalLogitsWarper(value),
}
"""What says of which tokens one is drawn, in the order of transformers."""

_NEUTRAL = {
    "temperature": 1.0, "top_k": 0, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0, "min_length": 0, "num_beams": 1, "num_beam_groups": 1,
}  # fmt: skip
"""Values of fields that do nothing, besides None."""

_ENDS = frozenset(("min_length", "min_new_tokens"))
"""Fields that mean nothing without a token that ends a text."""

_OTHERS = frozenset(
    (
        "do_sample", "num_return_sequences", "eos_token_id", "pad_token_id", "max_new_tokens", "max_length",
        "use_cache",
    )
)  # fmt: skip
_TOLD = frozenset(("bos_token_id", "transformers_version", "_from_model_config"))
"""Fields of a config that say what it is of."""


@dataclass(frozen=True)
class Choices:
    """What `generate` does with the logits.

    Attributes:
        most: how many tokens at most.
        draws: whether tokens are drawn; else the best is taken.
        rows: continuations of each text.
        pad: what rows that have ended are filled up with.
        takes: changes logits f[B, V].
        stops: which rows end, bool[B].
        use_cache: None where nobody says.
    """

    most: int
    draws: bool
    rows: int
    pad: int
    takes: LogitsProcessorList
    stops: StoppingCriteriaList
    use_cache: bool | None


def choices(
    ids: Tensor,
    attention_mask: Tensor | None,
    generation_config: Any,
    options: Mapping[str, Any],
    logits_processor: Iterable[Any],
    stopping_criteria: Iterable[Any],
) -> Choices:
    """What the options ask for.

    Args:
        ids: i64[B, T], the text.
        options: values of fields, before those of the config.

    Raises:
        ValueError: an option that is not done here, has no effect, or does not fit the text.
        TypeError: there is no such option.
    """
    _check_text(ids, attention_mask)
    fields = _fields(generation_config, options)
    draws, rows = bool(fields.get("do_sample")), fields.get("num_return_sequences") or 1
    if rows > 1 and not draws:
        raise ValueError("several continuations of one text differ by sampling only: do_sample=True")
    ends = _listed(fields.get("eos_token_id"))
    most = fields.get("max_new_tokens")
    if most is None and fields.get("max_length") is not None:
        most = fields["max_length"] - ids.shape[1]
    if most is None:
        raise ValueError("say how many tokens are wanted: max_new_tokens or max_length")
    if most < 1:
        raise ValueError(f"at least one new token, not {most}")
    if not ends and (idle := _ENDS & fields.keys()):
        raise ValueError(f"{min(idle)} has no effect without eos_token_id")
    undrawn = [name for name in _WARPERS if name in fields and not draws]
    if asked := [name for name in undrawn if _is_set(name, options.get(name))]:
        raise ValueError(f"{asked[0]} has no effect without do_sample=True")
    if undrawn and _is_told(generation_config, undrawn):
        _LOGGER.warning("%s of the generation config: no effect without do_sample=True", ", ".join(undrawn))
    made = [make(fields[name], ids, ends) for name, make in _PROCESSORS.items() if name in fields]
    made += logits_processor
    made += [make(fields[name], ids, ends) for name, make in _WARPERS.items() if draws and name in fields]
    stops = [MaxLengthCriteria(ids.shape[1] + most), *([EosTokenCriteria(ends)] if ends else [])]
    pad = fields.get("pad_token_id")
    pad = pad if pad is not None else (ends or [0])[0]
    stops = StoppingCriteriaList([*stops, *stopping_criteria])
    return Choices(most, draws, rows, pad, LogitsProcessorList(made), stops, fields.get("use_cache"))


def _fields(config: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are set, by the options or else by the config."""
    known = _PROCESSORS.keys() | _WARPERS.keys() | _OTHERS
    there = vars(transformers.GenerationConfig())
    unknown = [name for name in options if name not in known and name not in there]
    if unknown:
        raise TypeError(f"generate() got an unexpected keyword argument {unknown[0]!r}")
    given = {name: value for name, value in options.items() if _is_set(name, value)}
    if config is not None:
        told = {name: getattr(config, name, None) for name in {*known, *config.to_diff_dict()} - _TOLD}
        if told.get("use_cache"):  # of a config it allows a cache, and asks for none
            told.pop("use_cache")
        if "max_new_tokens" in given or told.get("max_new_tokens") is not None:
            told.pop("max_length", None)
        given = {name: value for name, value in told.items() if _is_set(name, value)} | given
    if undone := sorted(given.keys() - known):
        raise ValueError(
            f"{undone[0]}={given[undone[0]]!r} is not done here: tokens are taken one at a time, the best or "
            f"drawn ({', '.join(sorted(known))})"
        )
    return given


def _is_set(name: str, value: Any) -> bool:
    is_off = value is False and name != "use_cache"
    return not (value is None or is_off or (name in _NEUTRAL and value == _NEUTRAL[name]))


def _is_told(config: Any, names: Iterable[str]) -> bool:
    """Whether a config has other values than it begins with: some versions begin with a `top_k`."""
    return not config.to_diff_dict().keys().isdisjoint(names)


def _check_text(ids: Tensor, attention_mask: Tensor | None) -> None:
    if ids.dim() != 2 or not ids.numel():
        raise ValueError(f"a text is i64[batch, tokens], of one token at least; not {tuple(ids.shape)}")
    if attention_mask is not None and attention_mask.shape != ids.shape:
        raise ValueError(
            f"the mask has to be {tuple(ids.shape)}, as the text, not {tuple(attention_mask.shape)}"
        )


def _listed(ids: int | Iterable[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _on(ids: Tensor) -> str:
    return str(ids.device)


__all__ = ["Choices", "choices"]
