"""Arguments of a call of torch, taken apart for an outline: what is no integer, integers, where tensors come
from; and what is known of the results of calls with such arguments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

if TYPE_CHECKING:
    from rmtcompile.frontend.outline import Outliner

_STATIC = (
    bool, str, bytes, complex, type(None), type(...), type, torch.dtype, torch.device, torch.layout,
    torch.memory_format,
)  # fmt: skip
_LITERAL = 64
"""Elements of the largest tensor that is told by its contents, if the model does not keep it."""


class OutlineError(Exception):
    """A forward cannot be followed; the message says why."""


class Place(NamedTuple):
    """Where a tensor was made: in which outline, label and number of the row, which of several results; and
    what kind of tensor it is."""

    outline: object
    label: int
    number: int
    which: int
    kind: int


class Arguments:
    """The arguments of one call.

    Attributes:
        key: decides what the results look like, together with `symbols`.
        symbols: what is no integer, and which tensors of the model are read.
        ints: the integers.
        reads: where the other tensors come from.
        items: lists of tensors and of integers, element by element.
        tensors: all tensors.
        parameter: the last tensor of the model among them.
    """

    def __init__(self, outliner: Outliner, outline: object) -> None:
        self.outliner, self.outline = outliner, outline
        self.key: list[Any] = []
        self.symbols: list[Any] = []
        self.ints: list[int] = []
        self.reads: list[Place] = []
        self.items: list[Arguments] = []
        self.tensors: list[torch.Tensor] = []
        self.parameter: Any = None

    def add_all(self, args: Any, kwargs: Any) -> Arguments:
        """Take these apart."""
        for value in args:
            self.add(value)
        for name, value in kwargs.items():
            self.symbols.append(name)
            self.add(value)
        return self

    def add(self, value: Any) -> None:
        """Take one argument apart."""
        kind = type(value)
        if isinstance(value, torch.Tensor):
            self.add_tensor(value)
        elif kind is int:
            self.key.append(value)
            self.symbols.append(int)
            self.ints.append(value)
        elif kind is float:
            self.symbols += (float, value if value == value else "nan")
        elif isinstance(value, _STATIC):
            self.symbols += (kind, value)
        elif isinstance(value, (list, tuple)):
            self._add_list(value)
        elif kind is slice:
            self.symbols.append(slice)
            self._add_each((value.start, value.stop, value.step))
        elif isinstance(value, dict):
            self.symbols += (dict, *value)
            self._add_each(value.values())
        else:
            raise OutlineError(f"an argument of an operation is a {kind.__name__}")

    def _add_each(self, values: Any) -> None:
        for value in values:
            self.add(value)

    def _add_list(self, values: Any) -> None:
        """Lists that may grow with the number of segments do not say how long they are in symbols."""
        self.key.append(len(values))
        is_of_tensors = values and all(isinstance(value, torch.Tensor) for value in values)
        if not is_of_tensors and not (type(values) is list and all(type(value) is int for value in values)):
            self.symbols += (type(values), len(values))
            self._add_each(values)
            return
        self.symbols.append(list)
        for value in values:
            item = Arguments(self.outliner, self.outline)
            item.add(value)
            self.items.append(item)
            self.key += item.key
            self.tensors += item.tensors
            self.parameter = item.parameter if item.parameter is not None else self.parameter

    def add_tensor(self, value: torch.Tensor) -> None:
        """Take a tensor: made in this outline, kept by the model, or written out in its code."""
        self.tensors.append(value)
        place = getattr(value, "_outline", None)
        if place is not None and place.outline is self.outline:
            self.key.append(place.kind)
            self.symbols.append(torch.Tensor)
            self.reads.append(place)
            return
        if isinstance(value, FakeTensor):
            raise OutlineError("a tensor appears that no operation gives")
        name, kind = self.outliner.held(value)
        self.key.append(kind)
        self.symbols.append(name)
        self.parameter = name


def literal(value: torch.Tensor) -> Any:
    """A name by contents for a small tensor that the model does not keep, else by identity."""
    if value.numel() > _LITERAL or isinstance(value, nn.Parameter):
        return ("held", id(value))
    with torch._C._DisableTorchDispatch():
        return ("literal", value.dtype, tuple(value.shape), tuple(value.detach().flatten().tolist()))


@dataclass
class New:
    """A result that each call makes: a tensor without memory, and what makes a fake tensor of it."""

    elem: torch.Tensor
    device: torch.device
    requires_grad: bool
    kind: int
    fields: dict[str, Any]

    def twin(self) -> Any:
        """A fake tensor, in a fifth of the time that its class takes to make one."""
        with torch._C._DisableTorchDispatch():
            value = torch.Tensor._make_subclass(
                FakeTensor,
                self.elem,
                self.requires_grad,
                dispatch_device=True,
                device_for_backend_keys=self.device,
            )
        value.__dict__.update(self.fields)
        return value


class Same(NamedTuple):
    """A result that is an argument: which of the tensors."""

    argument: int


@dataclass
class Known:
    """What a call gives for arguments of some kinds.

    Attributes:
        form: the type that holds the results; None for a single one.
        results: `New`, `Same`, or values that are no tensors.
        symbol: dtypes, devices and dims of the first and the last.
        sizes: their sizes, and how many there are.
        repeats: whether later calls give the like.
    """

    form: Any
    results: list[Any]
    symbol: Any
    sizes: tuple[int, ...]
    repeats: bool


def known_of(result: Any, arguments: Arguments) -> Known | None:
    """What is to be known of a call that gave this; None where there is no tensor in it."""
    is_many = isinstance(result, (tuple, list)) and type(result) is not torch.Size
    values = list(result) if is_many else [result]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    if not tensors and result is not None:
        return None
    places = {id(tensor): i for i, tensor in enumerate(arguments.tensors)}
    results = [_known(value, places, arguments.outliner) for value in values]
    ends = tensors[:1] + tensors[1:][-1:]
    sizes = [n for tensor in ends for n in tensor.shape] + [len(tensors)] * is_many
    symbol = tuple((tensor.dtype, tensor.device, tensor.dim()) for tensor in ends)
    repeats = not any(isinstance(value, torch.Tensor) for value in results)
    return Known(type(result) if is_many else None, results, symbol, tuple(sizes), repeats)


def _known(value: Any, places: dict[int, int], outliner: Outliner) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if id(value) in places:
        return Same(places[id(value)])
    if type(value) is not FakeTensor or value.constant is not None:
        return value  # its contents are known, and may be asked for
    with torch._C._DisableTorchDispatch():
        elem = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    fields = {name: field for name, field in value.__dict__.items() if name != "_outline"}
    return New(elem, value.device, value.requires_grad, outliner.kind(value), fields)


def runs(items: Sequence[Arguments], start: int) -> Iterator[Sequence[Arguments]]:
    """Items of a list in runs, each of items that differ by the same integers, one from the next: the first,
    the last and their number say all of them. A list of all earlier segments is one run, which grows.

    Args:
        start: where runs may begin. Two items, of which the first comes from a special first segment, do not
            show that they are no run: from the second item on, what grows does so evenly.
    """
    yield from (items[i : i + 1] for i in range(min(start, len(items))))
    while start < len(items):
        steps, end = _steps(items, start), start + 1
        while steps is not None and _steps(items, end - 1) == steps:
            end += 1
        yield items[start:end]
        start = end


def _steps(items: Sequence[Arguments], i: int) -> list[int] | None:
    """By how much the integers of the next item of a list differ; None where more does, or there is none."""
    if i + 1 >= len(items):
        return None
    a, b = items[i], items[i + 1]
    if a.symbols != b.symbols or [x.label for x in a.reads] != [x.label for x in b.reads]:
        return None
    return [y - x for x, y in zip(integers_of(a), integers_of(b), strict=True)]


def integers_of(item: Arguments) -> list[int]:
    """Everything of an item that is another one in another segment."""
    return [*item.ints, *(n for place in item.reads for n in (place.number, place.which))]
