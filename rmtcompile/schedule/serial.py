"""JSON, with its schema, both ways."""

from __future__ import annotations

import json
from typing import Any

from rmtcompile.errors import InternalError
from rmtcompile.schedule.data import Schedule
from rmtcompile.schedule.parts import Carry

FORMAT = "rmtcompile.schedule"
VERSION = 1

_INT = {"type": "integer", "minimum": 0}
_PAIR = {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}
_NAMES = {"type": "array", "items": {"type": "string"}}

SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "rmtcompile schedule",
    "description": "Cells are [segment, layer]; offsets are [segments, layers], consumer minus producer.",
    "type": "object",
    "required": ["format", "version", "n_layers", "n_segments", "alpha", "offsets", "levels"],
    "additionalProperties": False,
    "properties": {
        "format": {"const": FORMAT},
        "version": {"const": VERSION},
        "n_layers": {"type": "integer", "minimum": 1},
        "n_segments": {"type": "integer", "minimum": 1},
        "alpha": {**_INT, "description": "level of a cell = alpha * segment + layer"},
        "block": {**_INT, "description": "with alpha 0: segments that run together at most; 0: all"},
        "offsets": {"type": "array", "items": _PAIR},
        "carries": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "offset", "shape", "dtype", "nbytes"],
                "additionalProperties": False,
                "properties": {
                    "name": {"type": "string"},
                    "offset": _PAIR,
                    "shape": {"type": "array", "items": _INT, "description": "of one cell's value"},
                    "dtype": {"type": "string"},
                    "nbytes": {**_INT, "description": "of one cell's value"},
                    "producer_layers": {"type": "array", "items": _INT, "description": "empty: every layer"},
                    "source": {"type": "string", "description": "file:line that writes it"},
                    "through": {"type": "string", "description": "regions passed between the two cells"},
                },
            },
        },
        "segment_variants": {**_NAMES, "description": "one name a segment"},
        "layer_kinds": {**_NAMES, "description": "one name a layer"},
        "reads": {
            "type": "array",
            "description": "which layers read by an offset, where it is not every layer",
            "items": {
                "type": "object",
                "required": ["offset", "layers"],
                "additionalProperties": False,
                "properties": {"offset": _PAIR, "layers": {"type": "array", "items": _INT}},
            },
        },
        "bands": {
            "type": "array",
            "description": "[first, one after the last] layer of each band; empty: not cut",
            "items": _PAIR,
        },
        "levels": {
            "type": "array",
            "description": "what is executed, in order: the cells of each level",
            "items": {"type": "array", "items": _PAIR},
        },
    },
}


def to_dict(schedule: Schedule) -> dict[str, Any]:
    """The JSON form as plain dictionaries and lists."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "n_layers": schedule.n_layers,
        "n_segments": schedule.n_segments,
        "alpha": schedule.alpha,
        "block": schedule.block,
        "offsets": [list(o) for o in sorted(schedule.offsets)],
        "carries": [_carry_to_dict(c) for c in schedule.carries],
        "segment_variants": list(schedule.segment_variants),
        "layer_kinds": list(schedule.layer_kinds),
        "reads": [{"offset": list(o), "layers": list(layers)} for o, layers in schedule.reads],
        "bands": [[band.start, band.stop] for band in schedule.bands],
        "levels": [[list(cell) for cell in cells] for cells in schedule.levels],
    }


def _carry_to_dict(carry: Carry) -> dict[str, Any]:
    return {
        "name": carry.name,
        "offset": list(carry.offset),
        "shape": list(carry.shape),
        "dtype": carry.dtype,
        "nbytes": carry.nbytes,
        "producer_layers": list(carry.producer_layers),
        "source": carry.source,
        "through": carry.through,
    }


def to_json(schedule: Schedule, *, indent: int | None = None) -> str:
    """The schedule as JSON text."""
    separators = (",", ":") if indent is None else None
    return json.dumps(to_dict(schedule), indent=indent, separators=separators)


def from_dict(data: dict[str, Any]) -> Schedule:
    """The schedule that `to_dict` described, verified."""
    if data.get("format") != FORMAT or data.get("version") != VERSION:
        found = f"{data.get('format')!r} version {data.get('version')!r}"
        raise ValueError(f"expected {FORMAT!r} version {VERSION}, found {found}")
    schedule = Schedule(
        n_layers=data["n_layers"],
        n_segments=data["n_segments"],
        alpha=data["alpha"],
        offsets=frozenset(map(_pair, data["offsets"])),
        carries=tuple(_carry_from_dict(c) for c in data.get("carries", ())),
        segment_variants=tuple(data.get("segment_variants", ())),
        layer_kinds=tuple(data.get("layer_kinds", ())),
        reads=tuple((_pair(r["offset"]), tuple(r["layers"])) for r in data.get("reads", ())),
        levels=tuple(tuple((s, layer) for s, layer in cells) for cells in data["levels"]),
        block=data.get("block", 0),
        bands=tuple(range(*_pair(band)) for band in data.get("bands", ())),
    )
    try:
        schedule.verify()
    except InternalError as error:
        raise ValueError(f"the file does not hold a legal schedule: {error}") from error
    return schedule


def _pair(pair: list[int]) -> tuple[int, int]:
    a, b = pair
    return a, b


def _carry_from_dict(data: dict[str, Any]) -> Carry:
    return Carry(
        name=data["name"],
        offset=_pair(data["offset"]),
        shape=tuple(data["shape"]),
        dtype=data["dtype"],
        nbytes=data["nbytes"],
        producer_layers=tuple(data.get("producer_layers", ())),
        source=data.get("source", ""),
        through=data.get("through", ""),
    )


def from_json(text: str | bytes) -> Schedule:
    """The schedule that `to_json` wrote; `ValueError` if the text is something else."""
    return from_dict(json.loads(text))
