"""Outline: what a forward calls, in order, at any number of segments, computed once for calls that are alike.

    forward(x of 40 segments)        operation                integers, sizes     reads          comes after
      h = F.linear(x_s, w_0)    ->   linear(*, w_0) f32       1, 8, 16            (split, s)     (cat, s - 1)
      m = torch.cat([m, h], 1)       cat(list, int) f32       1, 1, 16, 16        (linear, s)    (linear, s)

The forward runs on fake tensors under a mode that sees what its code calls. What a call gives is looked up by
the shapes and numbers among its arguments, and computed only where these are new: a long forward costs little
more than its own Python. An operation has a *label* (what is called, dtypes, whatever is no integer, the
parameter that was read last) and a number among those of its label. Its row says the rest: integers, sizes,
and label and number of what it reads and of the operation before it. Forwards with equal outlines do the
same, views and writes in place included.

Where transforms of `torch.func` or gradients are at work, calls are seen below autograd instead, and each is
computed.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from rmtcompile.binding.arguments import left_alone
from rmtcompile.binding.objects import ATOMS, held
from rmtcompile.binding.state import Contents, Snapshot, roots_of
from rmtcompile.binding.surroundings import Surroundings
from rmtcompile.binding.trees import leaves_with_paths
from rmtcompile.frontend.blame import raised_at, user_source
from rmtcompile.frontend.masks import Masks
from rmtcompile.frontend.outline_arguments import (
    Arguments,
    Known,
    New,
    OutlineError,
    Place,
    Same,
    integers_of,
    known_of,
    literal,
    runs,
)
from rmtcompile.frontend.tracing import SharedData, as_written, refused_functions
from rmtcompile.ir.modes import uncached_autocast

Row = tuple[tuple[int, ...], tuple[int, ...]]
"""Labels of the operation before and of what is read; integers, sizes, and the numbers to these labels."""
Rows = dict[int, list[Row]]

_CONTENTS = frozenset(
    (
        "item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "__bool__", "__float__", "__int__",
        "__index__", "__complex__", "__array__",
    )
)  # fmt: skip
"""What asks for the contents of a tensor."""


@dataclass
class Outline:
    """The calls of one forward.

    Attributes:
        count: segments of its input.
        rows: by label, in the order of the calls.
        lists: by the label of a call, what its lists hold, told in both of two ways, see `runs`.
        size: how many there are.
    """

    count: int
    rows: Rows = field(default_factory=lambda: defaultdict(list))
    lists: dict[int, tuple[Rows, Rows]] = field(
        default_factory=lambda: defaultdict(lambda: (defaultdict(list), defaultdict(list)))
    )
    size: int = 0

    def order(self) -> dict[int, list[tuple[int, ...]]]:
        """Which operations are called, after which ones and on the results of which ones, whatever the
        integers and sizes."""
        return {label: [symbols for symbols, _ in rows] for label, rows in self.rows.items()}


class Outliner:
    """Makes outlines of one forward at several lengths, with the same labels.

    Args:
        fn: the forward; left as it was.
        below: see calls below autograd.
    """

    def __init__(self, fn: Callable[..., Any], below: bool = False) -> None:
        self.fn = fn
        self.below = below
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.known: dict[Any, Known] = {}
        self.plain: set[Any] = set()  # what gives no tensors, and changes none
        self._labels: dict[Any, int] = {}
        self._kinds: dict[Any, int] = {}
        self._held: dict[int, tuple[torch.Tensor, Any, int]] = {}  # kept, so that no other gets its id

    def outline(
        self, args: Any, kwargs: Any, count: int, where: tuple[int, int] | None = None
    ) -> tuple[Outline, str]:
        """The calls of `fn(*args, **kwargs)` on an input of `count` segments, of which only shapes are read.

        Args:
            where: label and number of a row; the second result is the user's line that makes it.

        Raises:
            OutlineError: the forward cannot be followed.
        """
        snapshot = Snapshot(roots_of(self.fn))
        for tensor, *_ in snapshot.tensors():
            self._held.setdefault(id(tensor), (tensor, ("held", id(tensor)), self.kind(tensor)))
        contents, around = Contents(snapshot), Surroundings(self.fn)
        recorder = (_Below if self.below else _Above)(self, count, where)
        grad = torch.is_grad_enabled()
        try:
            args, kwargs = self._inputs(recorder, args, kwargs)
            with (
                torch.inference_mode(False),
                torch.set_grad_enabled(grad),
                uncached_autocast(),
                as_written(),
                refused_functions([]),
                _quiet(),
                self.mode,
                SharedData(),
                recorder,
                Masks(),
                left_alone(self.fn, args, kwargs),
            ):
                result = self.fn(*args, **kwargs)
            recorder.leave("result", result)
            recorder.leave_state(snapshot)
        except OutlineError:
            raise
        except Exception as error:
            said = str(error).partition("\n")[0]
            raise OutlineError(f"{type(error).__name__} at {raised_at(error)}: {said}") from error
        finally:
            snapshot.restore()
            contents.restore()
            around.restore()
        return recorder.outline, recorder.found

    def name(self, label: int) -> str:
        """What a label stands for, in a word."""
        what = next(key for key, number in self._labels.items() if number == label)[0]
        return what if isinstance(what, str) else _name(what)

    def calls(self, outline: Outline) -> Counter[Any]:
        """How often each operation is called, whatever it gives."""
        called = {number: key[:-1] for key, number in self._labels.items() if callable(key[0])}
        found: Counter[Any] = Counter()
        for label, rows in outline.rows.items():
            if label in called:
                found[called[label]] += len(rows)
        return found

    def label(self, key: Any) -> int:
        """The label of what is described by a key."""
        return self._labels.setdefault(key, len(self._labels))

    def kind(self, value: torch.Tensor) -> int:
        """Equal for tensors that differ in nothing but their contents."""
        strides = value.stride() if value.layout is torch.strided else value.layout
        key = (tuple(value.shape), strides, value.dtype, value.device, value.requires_grad)
        return self._kinds.setdefault(key, len(self._kinds))

    def held(self, value: torch.Tensor) -> tuple[Any, int]:
        """Name and kind of a tensor that is not made by the forward's operations."""
        known = self._held.get(id(value))
        if known is None:
            known = self._held[id(value)] = (value, literal(value), self.kind(value))
        return known[1], known[2]

    def _inputs(self, recorder: _Recorder, args: Any, kwargs: Any) -> tuple[Any, Any]:
        flat, spec = pytree.tree_flatten((args, kwargs))
        for i, value in enumerate(flat):
            if isinstance(value, torch.Tensor):
                with self.mode:
                    like = value.shape, value.stride()
                    flat[i] = torch.empty_strided(*like, dtype=value.dtype, device=value.device)
                flat[i].requires_grad_(value.requires_grad)
                recorder.stamp(flat[i], recorder.row(("input", i)), 0)
        inputs: tuple[Any, Any] = pytree.tree_unflatten(flat, spec)
        return inputs


class _Recorder:
    """Notes the rows of one outline."""

    def __init__(self, owner: Outliner, count: int, where: tuple[int, int] | None) -> None:
        super().__init__()
        self.owner = owner
        self.outline = Outline(count)
        self.where, self.found = where, "?"
        self.before = (-1, 0)  # label and number of the last row
        self.parameter: Any = None  # the tensor of the model that was read last

    def row(
        self, key: Any, reads: Sequence[Place] = (), ints: Sequence[int] = (), sizes: tuple[int, ...] = ()
    ) -> tuple[int, int]:
        """Note one operation; gives its label and number."""
        self.before = self._add(self.outline.rows, key, reads, ints, sizes)
        self.outline.size += 1
        return self.before

    def _add(
        self, rows: Rows, key: Any, reads: Sequence[Place], ints: Sequence[int], sizes: tuple[int, ...] = ()
    ) -> tuple[int, int]:
        label = self.owner.label(key)
        before, number = self.before
        numbers = [n for place in reads for n in (place.number, place.which)]
        rows[label].append(((before, *(place.label for place in reads)), (*ints, *sizes, number, *numbers)))
        at = label, len(rows[label]) - 1
        if at == self.where:
            self.found = user_source(sys._getframe(1))
        return at

    def stamp(self, value: Any, made: tuple[int, int], which: int) -> None:
        """Remember where a tensor comes from."""
        value._outline = Place(self, *made, which, self.owner.kind(value))

    def leave(self, name: str, value: Any) -> None:
        """Note what is returned or left behind."""
        for path, leaf in leaves_with_paths(value):
            place = name + pytree.keystr(path)
            ints = [int(digits) for digits in re.findall(r"\d+", place)]
            place = re.sub(r"\d+", "#", place)
            if isinstance(leaf, torch.Tensor):
                said = Arguments(self.owner, self)
                said.add_tensor(leaf)
                self.row((place, *said.symbols), said.reads, ints)
            elif type(leaf) is int:
                self.row((place, int), (), [*ints, leaf])
            else:
                is_atom = isinstance(leaf, ATOMS) and leaf == leaf
                self.row((place, type(leaf), leaf if is_atom else None), (), ints)

    def leave_state(self, snapshot: Snapshot) -> None:
        """Note what the modules hold now: numbers and names whether they have changed or not, since a counter
        may happen to be left as it was."""
        for change in snapshot.changes():
            if not change.is_hook and not isinstance(change.value, ATOMS):
                self.leave(change.name, change.value)
        for target, _ in snapshot.holders():
            for (_, key), value in held(target).items():
                if isinstance(value, ATOMS):
                    place = key if isinstance(key, str) else "an entry"
                    ints = [value] if isinstance(value, int) and not isinstance(value, bool) else []
                    said = None if ints or value != value else value
                    self.row((place, id(target), type(value), said), (), ints)

    def noted(self, func: Any, said: Arguments, known: Known, modes: Any) -> tuple[int, int]:
        """Note a call."""
        key = (func, *said.symbols, self.parameter, modes, known.symbol)
        if said.items:
            for start, rows in enumerate(self.outline.lists[self.owner.label(key)]):
                for run in runs(said.items, start):
                    item = run[0]
                    made = [place.label for place in item.reads]  # lists of lists: by what is in them
                    ints = [*item.ints, len(run), *integers_of(run[-1])]
                    self._add(rows, (func, start, self.parameter, *item.symbols, *made), item.reads, ints)
                    self.outline.size += 1
        if said.parameter is not None:
            self.parameter = said.parameter
        return self.row(key, said.reads, said.ints, known.sizes)

    def stamp_all(self, known: Known, result: Any, made: tuple[int, int]) -> None:
        """Remember where the tensors of a result come from."""
        values = [result] if known.form is None else result
        for which, (value, kept) in enumerate(zip(values, known.results, strict=True)):
            if isinstance(value, FakeTensor) and not isinstance(kept, Same):
                self.stamp(value, made, which)


class _Above(_Recorder, TorchFunctionMode):
    """Sees what the forward's code calls, and answers it from what is known."""

    writes = False  # whether an operation may have changed a tensor in place

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.owner.plain or func is torch._C._set_grad_enabled:  # each call says the mode
            return func(*args, **kwargs)
        if func is torch.autograd.grad or torch._C._functorch.peek_interpreter_stack() is not None:
            raise OutlineError("the forward takes gradients, or uses transforms of torch.func")
        said = Arguments(self.owner, self).add_all(args, kwargs)
        modes = (torch.is_grad_enabled(), _autocast())
        key = (func, *said.key, *said.symbols, modes)
        known = self.owner.known.get(key)
        if known is not None:
            return self._again(known, said, self.noted(func, said, known, modes))
        if _name(func) in _CONTENTS:
            return self._contents(func, args, kwargs, said)
        kinds = [self.owner.kind(tensor) for tensor in said.tensors]
        result = func(*args, **kwargs)
        if [self.owner.kind(tensor) for tensor in said.tensors] != kinds:
            raise OutlineError(f"{_name(func)} changes the shape of a tensor in place")
        known = known_of(result, said)
        if known is None:
            self.owner.plain.add(func)
            return result
        if known.repeats:
            self.owner.known[key] = known
        self.writes = self.writes or result is None or Same in map(type, known.results)
        self.stamp_all(known, result, self.noted(func, said, known, modes))
        return result

    def _again(self, known: Known, said: Arguments, made: tuple[int, int]) -> Any:
        """The results of a call like an earlier one."""
        results: list[Any] = []
        for which, kept in enumerate(known.results):
            if isinstance(kept, New):
                value = kept.twin()
                value._outline = Place(self, *made, which, kept.kind)
            elif isinstance(kept, Same):
                value, self.writes = said.tensors[kept.argument], True
            else:
                value = kept
            results.append(value)
        if known.form is None:
            return results[0]
        return known.form(results)

    def _contents(self, func: Any, args: Any, kwargs: Any, said: Arguments) -> Any:
        """What a tensor holds: those of the model are there to be read."""
        if any(isinstance(tensor, FakeTensor) for tensor in said.tensors):
            return func(*args, **kwargs)
        if self.writes and not all(isinstance(tensor, nn.Parameter) for tensor in said.tensors):
            raise OutlineError(f"{_name(func)} reads a tensor that may have been written")
        with torch._C._DisableTorchDispatch():
            return func(*args, **kwargs)


class _Below(_Recorder, TorchDispatchMode):
    """Sees the operations below autograd and transforms."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        said = Arguments(self.owner, self).add_all(args, kwargs)
        result = func(*args, **kwargs)
        known = known_of(result, said)
        if known is not None:
            self.stamp_all(known, result, self.noted(func, said, known, None))
        return result


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Errors of operations on fake tensors are not logged: they are dealt with."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


def _name(func: Any) -> str:
    return getattr(func, "__name__", str(func))


def _autocast() -> Any:
    if not torch._C._is_any_autocast_enabled():
        return None
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return tuple((d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices)
