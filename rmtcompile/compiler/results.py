"""Results whose structure grows with the number of segments: `logits_0`, `logits_1`, ...; a list with one
entry a segment, each a tensor or a structure of tensors.

Two results of the same forward, over k and k + 1 segments, are compared container by container. Where one has
more entries, the entries that differ only in a number form a family with one member a segment.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch.utils import _pytree as pytree

from rmtcompile.binding.captured import Out
from rmtcompile.binding.objects import ATOMS
from rmtcompile.binding.trees import Again, Kept, Keys, Spec, empty, fill
from rmtcompile.errors import RerollError
from rmtcompile.ir.program import Affine


@dataclass(frozen=True)
class Family:
    """One member a segment, where the last one may have none.

    Attributes:
        member: rule of one member: an `Out` in it is an output of the program that is a list, of which member
            j holds number j; integers are affine in j.
        keys: `("logits_", "")` for the keys `logits_0`, `logits_1`, ..., or None in a sequence.
        first: number in the first key.
        step: by how much it is larger in the next one.
        is_woven: whether its members stand in turn with those of the family before it.
        ends_early: whether the last segment has no member.
    """

    member: Any
    keys: tuple[str, str] | None = None
    first: int = 0
    step: int = 1
    is_woven: bool = False
    ends_early: bool = False

    def has(self, j: int, count: int) -> bool:
        """Whether segment j of so many has a member."""
        return j < count - self.ends_early

    def entry(self, outputs: tuple[Any, ...], count: int, j: int, made: Made) -> tuple[Any, Any]:
        """Key (None in a sequence) and value of one member."""
        key = None if self.keys is None else f"{self.keys[0]}{self.first + self.step * j}{self.keys[1]}"
        return key, value_of(self.member, outputs, count, j, made)


@dataclass(frozen=True)
class Node:
    """A container: its type and context as pytree knows them, or as `trees.py` does, and its children.

    Attributes:
        label: where the very object is put in other places, too.
    """

    kind: Any
    context: Any
    children: tuple[Any, ...]  # Node | Family | Out | Affine | static values
    label: int | None = None

    def build(self, outputs: tuple[Any, ...], count: int, member: int | None, made: Made) -> Any:
        """The result for `count` segments, or its part in one member of a family."""
        object_ = empty(self.kind, self.context) if isinstance(self.context, Keys) else None
        if self.label is not None:
            made[self.label] = object_  # it may hold itself
        built = self._filled(object_, self._entries(outputs, count, member, made))
        if self.label is not None:
            made[self.label] = built
        return built

    def _entries(
        self, outputs: tuple[Any, ...], count: int, member: int | None, made: Made
    ) -> list[tuple[Any, Any]]:
        named = _names(self.context)
        entries: list[tuple[Any, Any]] = []
        for i, child in enumerate(self.children):
            if not isinstance(child, Family):
                key = named[i] if named is not None else None
                entries.append((key, value_of(child, outputs, count, member, made)))
            elif not child.is_woven:
                woven = itertools.takewhile(_is_woven, self.children[i + 1 :])
                families = [child, *woven]
                entries += [
                    family.entry(outputs, count, j, made)
                    for j in range(count)
                    for family in families
                    if family.has(j, count)
                ]
        return entries

    def _filled(self, object_: Any, entries: list[tuple[Any, Any]]) -> Any:
        values, named = [value for _, value in entries], _names(self.context)
        if isinstance(self.context, Keys):
            steps = self.context.steps
            if len(entries) != len(steps) or named is not None:
                steps = tuple(("item", i if named is None else key) for i, (key, _) in enumerate(entries))
            return fill(object_, self.kind, dataclasses.replace(self.context, steps=steps), values)
        context = [key for key, _ in entries] if named is not None else self.context
        if named is not None and issubclass(self.kind, dict) and dataclasses.is_dataclass(self.kind):
            return _with_extra_keys(self.kind, dict(entries))
        return pytree.SUPPORTED_NODES[self.kind].unflatten_fn(values, context)


Made = dict[int, Any]
"""Objects that were made, by their labels."""


def _names(context: Any) -> list[Any] | None:
    """The keys of a container that has some."""
    if isinstance(context, Keys):
        return context.names
    return context if isinstance(context, list) else None


def _is_woven(child: Any) -> bool:
    return isinstance(child, Family) and child.is_woven


def _with_extra_keys(kind: Any, items: dict[str, Any]) -> Any:
    """A dict-like dataclass (a `ModelOutput`) that may hold more keys than it has fields."""
    fields = {field.name for field in dataclasses.fields(kind)}
    made = kind(**{key: value for key, value in items.items() if key in fields})
    for key, value in items.items():
        if key not in fields:
            made[key] = value
    return made


def value_of(
    rule: Any, outputs: tuple[Any, ...], count: int, member: int | None = None, made: Made | None = None
) -> Any:
    """One value of a result: an output, an integer that grows with the segments, a container, or itself.

    Args:
        member: number of the member, in a family.
        made: objects that lie in several values; those made now are added.
    """
    if isinstance(rule, Node):
        return rule.build(outputs, count, member, {} if made is None else made)
    if isinstance(rule, Kept):
        return rule.value
    if isinstance(rule, Again):
        assert made is not None
        return made[rule.label]
    if isinstance(rule, Out):
        return outputs[rule.index] if member is None else outputs[rule.index][member]
    if isinstance(rule, Affine):
        return rule.at(member or 0, count)
    return rule


def outs_of(rule: Any) -> list[Out]:
    """Every output that a rule holds by itself or in families."""
    if isinstance(rule, Family):
        return outs_of(rule.member)
    if isinstance(rule, Node):
        return [out for child in rule.children for out in outs_of(child)]
    return [rule] if isinstance(rule, Out) else []


def has_family(rule: Any) -> bool:
    """Whether a rule holds something that there is one of for each segment."""
    return isinstance(rule, Family) or (isinstance(rule, Node) and any(map(has_family, rule.children)))


@dataclass(frozen=True)
class _Members:
    """What stands at one place in the members of a family."""

    values: tuple[Any, ...]


# Outputs of both captures that correspond; whether a family.
Pairs = list[tuple[tuple[int, ...], tuple[int, ...], bool]]


class Aligner:
    """Aligns two results, or two values left behind, and collects which outputs of the two captures
    correspond."""

    def __init__(self, counts: tuple[int, int]) -> None:
        self.counts = counts
        self.pairs: Pairs = []

    def align(self, small: tuple[Any, Any], large: tuple[Any, Any], where: str) -> Any:
        """Rule for one value, given as (leaves, spec) in both captures."""
        self._where = where
        rule, rest_a, rest_b = self._walk(small[1], large[1], list(small[0]), list(large[0]))
        assert not rest_a and not rest_b
        return rule

    def _walk(
        self, a: Any, b: Any, leaves_a: list[Any], leaves_b: list[Any]
    ) -> tuple[Any, list[Any], list[Any]]:
        if a.is_leaf() and b.is_leaf():
            return self._leaf(leaves_a[0], leaves_b[0]), leaves_a[1:], leaves_b[1:]
        label = getattr(a, "label", None)
        if a.is_leaf() or b.is_leaf() or a.type is not b.type or label != getattr(b, "label", None):
            raise self._error(f"{a}", f"{b}")
        children_a, children_b = _children(a), _children(b)
        if len(children_a) == len(children_b) and a.context == b.context:
            children = []
            for x, y in zip(children_a, children_b, strict=True):
                child, leaves_a, leaves_b = self._walk(x, y, leaves_a, leaves_b)
                children.append(child)
            return Node(a.type, a.context, tuple(children), label), leaves_a, leaves_b
        node = self._grown(a, b, _split(children_a, leaves_a), _split(children_b, leaves_b))
        return node, leaves_a[a.num_leaves :], leaves_b[b.num_leaves :]

    def _leaf(self, a: Any, b: Any) -> Any:
        if isinstance(a, _Members):
            return self._in_members(a.values, b.values)
        if isinstance(a, Out) and isinstance(b, Out):
            self.pairs.append(((a.index,), (b.index,), False))
            return Out(len(self.pairs) - 1)
        if type(a) is int and type(b) is int and a != b:
            slope = (b - a) // (self.counts[1] - self.counts[0])
            return Affine(a - slope * self.counts[0], 0, slope)
        plain = isinstance(a, (*ATOMS, Kept, Again))
        if type(a) is not type(b) or (plain and a != b):
            raise self._error(repr(a), repr(b))
        return a

    def _in_members(self, a: tuple[Any, ...], b: tuple[Any, ...]) -> Any:
        """Rule for one place in the members of a family: a list of outputs, an integer, or the same for
        all."""
        if all(isinstance(value, Out) for value in (*a, *b)):
            self.pairs.append((tuple(x.index for x in a), tuple(x.index for x in b), True))
            return Out(len(self.pairs) - 1)
        if all(type(value) is int for value in (*a, *b)):
            small, large = self.counts
            step, more = b[-1] - b[-2], (b[0] - a[0]) // (large - small)
            fit = Affine(a[0] - more * small, step, more)
            told = ((small, a), (large, b))
            if all(fit.at(j, count) == v for count, values in told for j, v in enumerate(values)):
                return fit if step or more else a[0]
            raise self._error(f"{a}", f"{b}")
        for value in (*a, *b):
            self._leaf(a[0], value)
        return a[0]

    def _grown(self, a: Any, b: Any, parts_a: list[Any], parts_b: list[Any]) -> Node:
        """A container with more entries over more segments; parts are (spec, leaves) of each entry."""
        names_a, names_b = _names(a.context), _names(b.context)
        if names_a is None or names_b is None:
            if isinstance(a.context, Keys) and (a.context.has_fields or b.context.has_fields):
                raise self._error(str(a), str(b))
            families = self._in_turn(parts_a, parts_b)
            if not families:
                raise self._error(f"{len(parts_a)} entries", f"{len(parts_b)} entries")
            return Node(a.type, a.context, tuple(families), getattr(a, "label", None))
        numbered_a, numbered_b = _numbered(names_a), _numbered(names_b)
        growing = {k for k, v in numbered_b.items() if self._each(len(numbered_a.get(k, ())), len(v))}
        children: list[Any] = []
        context: list[Any] = []
        done: set[Any] = set()
        for i, key in enumerate(names_a):
            pattern = _pattern(key)
            if pattern is None or pattern[:2] not in growing:
                if key not in names_b:
                    raise self._error(str(names_a), str(names_b))
                other = parts_b[names_b.index(key)]
                child, _, _ = self._walk(parts_a[i][0], other[0], parts_a[i][1], other[1])
                children.append(child)
                context.append(key)
            elif pattern[:2] not in done:
                done.add(pattern[:2])
                members_a = [parts_a[j] for j in numbered_a[pattern[:2]]]
                members_b = [parts_b[j] for j in numbered_b[pattern[:2]]]
                families = self._in_turn(members_a, members_b, pattern[:2], pattern[2])
                before = children[-1].keys if children and isinstance(children[-1], Family) else None
                woven = before is not None and numbered_b[before][1] > numbered_b[pattern[:2]][0]
                children += [dataclasses.replace(families[0], is_woven=woven), *families[1:]]
                context += [key] * len(families)
        for key in names_b:
            pattern = _pattern(key)
            if key not in names_a and (pattern is None or pattern[:2] not in growing):
                raise self._error(str(names_a), str(names_b))
        if isinstance(a.context, Keys):
            steps = tuple(("item", key) for key in context)
            return Node(a.type, dataclasses.replace(a.context, steps=steps), tuple(children), a.label)
        return Node(a.type, context, tuple(children))

    def _each(self, few: int, many: int) -> int:
        """How many entries each segment has, where the last one may have fewer; 0 where there is no such
        number."""
        each, (small, large) = (many - few) // (self.counts[1] - self.counts[0]), self.counts
        is_even = each > 0 and 0 <= each * small - few < each and each * large - many == each * small - few
        return each if is_even else 0

    def _in_turn(
        self, parts_a: list[Any], parts_b: list[Any], keys: tuple[str, str] | None = None, first: int = 0
    ) -> list[Family]:
        """The families whose members these are, in turn; none where these are no families."""
        each = self._each(len(parts_a), len(parts_b))
        missing = each * self.counts[0] - len(parts_a)
        found = []
        for i in range(each):
            family = self._family(parts_a[i::each], parts_b[i::each], keys, first + i)
            ends_early = i >= each - missing
            found.append(dataclasses.replace(family, step=each, is_woven=i > 0, ends_early=ends_early))
        return found

    def _family(
        self, parts_a: list[Any], parts_b: list[Any], keys: tuple[str, str] | None = None, first: int = 0
    ) -> Family:
        spec = parts_a[0][0]
        if _is_labelled(spec) or any(isinstance(leaf, Again) for _, leaves in parts_a for leaf in leaves):
            raise self._error("an object lies in several places", "one a segment")
        if any(other != spec for other, _ in (*parts_a, *parts_b)):
            raise self._error(*(str([spec for spec, _ in parts]) for parts in (parts_a, parts_b)))
        a, b = (
            [_Members(values) for values in zip(*(leaves for _, leaves in parts), strict=True)]
            for parts in (parts_a, parts_b)
        )
        member, _, _ = self._walk(spec, spec, a, b)
        return Family(member, keys, first)

    def _error(self, a: str, b: str) -> RerollError:
        return RerollError(
            f"{self._where} changes its structure with the number of segments",
            [f"{self.counts[0]} segments: {a}", f"{self.counts[1]} segments: {b}"],
            "return one tensor for all segments, or one a segment under numbered keys",
        )


def _children(spec: Any) -> list[Any]:
    return list(spec.children()) if callable(getattr(spec, "children", None)) else list(spec.children_specs)


def _is_labelled(spec: Any) -> bool:
    return isinstance(spec, Spec) and (spec.label is not None or any(map(_is_labelled, spec.inner)))


def _split(children: list[Any], leaves: list[Any]) -> list[tuple[Any, list[Any]]]:
    """(spec, its leaves) of each child."""
    parts = []
    for child in children:
        parts.append((child, leaves[: child.num_leaves]))
        leaves = leaves[child.num_leaves :]
    return parts


def _pattern(key: Any) -> tuple[str, str, int] | None:
    match = re.fullmatch(r"(\D*)(\d+)(\D*)", key) if isinstance(key, str) else None
    return (match[1], match[3], int(match[2])) if match else None


def _numbered(keys: list[Any]) -> dict[tuple[str, str], list[int]]:
    found: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, key in enumerate(keys):
        if (pattern := _pattern(key)) is not None:
            found[pattern[:2]].append(i)
    return dict(found)
