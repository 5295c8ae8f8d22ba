"""Record: a compiled program as JSON, its source and its constants; and the same program on a model again.

What runs is written: the emitted source, the tables that its runs read (groups, lanes, taps), rules of the
result and of what is left behind, names of tensors. The graphs that it was made from are not: a program that
came from a record runs and reports, and is captured anew where something asks for graphs.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from rmtcompile.binding.captured import Capture, Effect, Extent, Leaf
from rmtcompile.binding.kinds import is_plain, kind_name
from rmtcompile.binding.state import Change
from rmtcompile.binding.trees import Spec
from rmtcompile.binding.values import Values
from rmtcompile.compiler.loading import load, unload
from rmtcompile.compiler.pipeline import Compiled
from rmtcompile.compiler.results import Node
from rmtcompile.errors import UnsupportedError
from rmtcompile.passes.emit import Emitted
from rmtcompile.passes.grid.reroll import Rolled, Unrolled
from rmtcompile.saved.contents import tensor_kind, tensor_text
from rmtcompile.saved.encode import Unsaved, decode, encode
from rmtcompile.saved.moment import Moment, read
from rmtcompile.saved.origin import Origin, guard_from, place_of, told

FORMAT = "rmtcompile.program/3"


@dataclass(frozen=True)
class Record:
    """A program without its model.

    Attributes:
        data: JSON.
        source: of the emitted module.
        state: the watch in words, by entry.
        tensors: constants.
    """

    data: dict[str, Any]
    source: str
    state: dict[str, str]
    tensors: dict[str, torch.Tensor]


class Differs(Exception):
    """The model is not as it was when the program was captured; the message says in what."""


def record_of(compiled: Compiled) -> Record:
    """Write a program down.

    Raises:
        UnsupportedError: a part of it has no name that another process could find it by.
    """
    if compiled.rolled.grows:
        raise UnsupportedError("the program has values that grow with the segments, which are not saved yet")
    origin: Origin = compiled.origin

    def refer(value: Any) -> Any:
        return origin.places.get(id(value))

    rolled, emitted = compiled.rolled, compiled.emitted
    effects = [
        {
            "name": effect.name,
            "at": encode(place_of(origin, effect)),
            "in place": effect.in_place.name if effect.in_place is not None else None,
            "rule": encode(rule, refer),
        }
        for effect, rule in compiled.effects
    ]
    places = origin.leaves
    constants = {name: x.tensor for name, x in compiled.leaves.items() if "written" in places[name]}
    data = {
        "format": FORMAT,
        "program": encode(replace(compiled.program, rolled=None)),
        "rolled": {
            "classes": encode(rolled.classes),
            "outputs": encode(rolled.outputs),
            "count": rolled.base.count,
            "minimum": rolled.minimum,
            "fixed": rolled.fixed,
            "proved_on": encode(rolled.proved_on),
        },
        "emitted": {
            name: encode(getattr(emitted, name))
            for name in ("phases", "opened", "borders", "carried", "padding", "readers")
        },
        "extent": [compiled.longest.nodes, encode(compiled.longest.types), compiled.longest.draws],
        "dependences": encode(compiled.dependences),
        "layer_paths": encode(compiled.layer_paths),
        "effects": effects,
        "result": encode(compiled.result, refer),
        "leaves": [[name, places[name], tensor_kind(x.tensor)] for name, x in compiled.leaves.items()],
        "input_names": encode(compiled.input_names),
        "written": encode(compiled.written),
        "stages": encode(compiled.stages),
        "passes_off": encode(compiled.passes_off),
        "sizes": encode(dict(compiled.sizes)),
        "parts": compiled.parts,
        "division": encode(compiled.division),
        "checkpoint": compiled.capture.checkpoint,
        "ignored": encode(compiled.capture.ignored),
        "reads": origin.reads,
        "changed": origin.changed,
        "kept": origin.kept,
        "dropped": origin.dropped,
        "values": origin.values,
    }
    return Record(data, emitted.source, origin.state, constants)


def program_of(record: Record, moment: Moment) -> Compiled:
    """A program on the model of now.

    Raises:
        Differs: the model, or what its forward has read, is not as it was.
    """
    data = record.data
    try:
        guard = guard_from(data, moment)
        state = told(guard, moment)
        if state != record.state:
            raise Differs("; ".join(_differences(record.state, state)[:3]))
        leaves = {name: _leaf(name, place, kind, record, moment) for name, place, kind in data["leaves"]}
        read_from = data["values"].items()
        values = Values([_read_leaf(name, a, b, record, moment) for name, (a, b) in read_from])
        effects = [_effect(one, leaves, moment) for one in data["effects"]]
        result = decode(data["result"], lambda place: moment.records[read(place)].target)
        _refuse_unknown(result)
    except LookupError as error:
        raise Differs(f"{error.args[0] if error.args else error} is not there any more") from error
    sizes = decode(data["sizes"])
    module = load(record.source, sizes)
    rolled = _rolled(data)
    emitted = {name: decode(value) for name, value in data["emitted"].items()}
    nodes, types, draws = data["extent"]
    no_graph: Any = Unsaved("the captured graph")
    capture = Capture(
        no_graph, leaves, [], ((), pytree.tree_structure(None)), [], moment.roots, guard, [],
        data["checkpoint"], decode(data["ignored"]),
    )  # fmt: skip
    compiled = Compiled(
        program=replace(decode(data["program"]), rolled=rolled),
        emitted=Emitted(source=record.source, cells=(), **emitted),
        capture=capture,
        longest=Extent(nodes, decode(types), (), draws),
        rolled=rolled,
        dependences=decode(data["dependences"]),
        layer_paths=decode(data["layer_paths"]),
        effects=effects,
        result=result,
        leaves=leaves,
        input_names=decode(data["input_names"]),
        written=decode(data["written"]),
        namespace=vars(module),
        stages=decode(data["stages"]),
        passes_off=decode(data["passes_off"]),
        sizes=sizes,
        values=values,
        parts=data["parts"],
        division=decode(data["division"]),
    )
    weakref.finalize(compiled, unload, module.__name__)
    return compiled


def _rolled(data: Mapping[str, Any]) -> Rolled:
    rolled, n_layers = data["rolled"], data["program"]["Program"]["n_layers"]
    base = Unrolled(rolled["count"], n_layers, {}, {}, (), {})
    no_rules: Any = Unsaved("the rule of each region")
    return Rolled(
        n_layers, decode(rolled["classes"]), no_rules, decode(rolled["outputs"]), base, rolled["minimum"],
        rolled["fixed"], decode(rolled["proved_on"]),
    )  # fmt: skip


def _leaf(name: str, place: Any, kind: str, record: Record, moment: Moment) -> Leaf:
    """A tensor that the program reads, of the kind that it had."""
    leaf = _placed(name, place, record, moment)
    if not is_plain(leaf.tensor):
        raise Differs(f"{name} is {kind_name(leaf.tensor)}")
    if tensor_kind(leaf.tensor) != kind:
        raise Differs(f"{name} was {kind} and is {tensor_kind(leaf.tensor)}")
    return leaf


def _placed(name: str, place: Any, record: Record, moment: Moment) -> Leaf:
    """The tensor in a place."""
    if "written" in place:
        return Leaf(name, record.tensors[name].to(place["written"]))
    if "named" in place:
        return Leaf(name, moment.surrounding[place["named"]])
    return moment.leaf(name, [read(way) for way in place["ways"]])


def _read_leaf(name: str, was: str, place: Any, record: Record, moment: Moment) -> Leaf:
    """A tensor that numbers were read from, with the contents that it had."""
    leaf = _placed(name, place, record, moment)
    if tensor_text(leaf.tensor) != was:
        raise Differs(f"the forward reads numbers from {name}, which holds others now")
    return leaf


def _effect(data: Mapping[str, Any], leaves: Mapping[str, Leaf], moment: Moment) -> tuple[Effect, Any]:
    place, step = decode(data["at"])
    change = Change(moment.records[read(place)], read([step])[0], None)
    in_place = leaves[data["in place"]] if data["in place"] is not None else None
    rule = decode(data["rule"], lambda way: moment.records[read(way)].target)
    return Effect(change, data["name"], Spec(), (), in_place), rule


def _refuse_unknown(rule: Any) -> None:
    """Look whether results can be made of all classes."""
    if isinstance(rule, Node):
        if rule.kind not in pytree.SUPPORTED_NODES and not hasattr(rule.context, "steps"):
            raise LookupError(f"{rule.kind.__qualname__} as a container of results")
        for child in rule.children:
            _refuse_unknown(child)


def _differences(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    found = []
    for name in dict.fromkeys((*now, *then)):
        before, after = then.get(name), now.get(name)
        if before is None or after is None:
            found.append(f"the forward reads {name}, which is {'new' if before is None else 'gone'}")
        elif before != after:
            found.append(f"{name} was {before} and is {after}")
    return found


__all__ = ["Differs", "Record", "program_of", "record_of"]
