"""The engine: how cell functions and bodies of regions are executed, and the storage that outlives a run."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rmtcompile.ir.program import Group, Lane, Program
from rmtcompile.passes.cell.lift import SEGMENTS
from rmtcompile.runtime.forms import Form, Marks
from rmtcompile.runtime.gradients import is_transformed
from rmtcompile.runtime.likening import fed_with_gradients, likened
from rmtcompile.runtime.lookups import Divided, divided
from rmtcompile.runtime.storage import Target, dense, lane_buffers
from rmtcompile.runtime.unread import Dependents, dependents

_PLACE = -1  # an output that goes to a tensor of its own


def backend_for(backend: str | Callable[..., Any], device: torch.device) -> str | Callable[..., Any]:
    """What "auto" stands for: inductor on CUDA, eager elsewhere."""
    if backend != "auto":
        return backend
    return "inductor" if device.type == "cuda" else "eager"


class Engine:
    """Runs functions as they are, or in compiled forms.

    A cell function is compiled with all sizes fixed for one cell and for the full width, and with the number
    of cells left open for every other one and for full wavefronts of mixed classes; the widths of the first
    short inputs that are seen (`fix_width`) get a form of their own too: fixed sizes make faster kernels.

    Args:
        program: whose cells are run.
        backend: "eager", or a `torch.compile` backend.
        keeps_buffers: whether all runs use one set of lane buffers, whose addresses stay; open lanes have
            none.
        passes_off: those of `passes/inductor` that Inductor does not run on graphs of cells; None for all.
        has_one: whether a free size is one here. The compiler takes a size of one for a fixed one, wherever
            it turns up, so that functions which depend on free sizes run as they are.

    Attributes:
        forms: all that were compiled.
        mixes_often: whether wavefronts of the full width are often of mixed classes: those of several texts.
    """

    MAX_FIXED_WIDTHS = 2

    def __init__(
        self,
        program: Program,
        backend: str | Callable[..., Any],
        keeps_buffers: bool,
        passes_off: frozenset[str] | None = None,
        has_one: bool = False,
    ) -> None:
        self.program = program
        self.has_one = has_one
        self.backend = backend
        self.passes_off = passes_off if backend == "inductor" else None
        self.device = next((lane.device for lane in program.lanes), torch.device("cpu"))
        self.is_sequential = program.alpha >= program.n_layers
        widths = [len(group.layers) for group in program.groups]
        self.full = 1 if self.is_sequential else min(widths, default=1)
        self.fixed_widths: set[int] = {1, self.full}
        self.mixes_often = False
        self.forms: list[Form] = []
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._regions: dict[str, tuple[Any, Callable[..., Any]]] = {}
        self._masks: dict[tuple[bool, ...], torch.Tensor] = {}
        self._divided: dict[str, Divided | None] = {}
        self._fed: dict[Any, frozenset[str]] = {}  # lanes, by cell function
        self._dependents: dict[Callable[..., Any], Dependents | None] = {}
        open_lanes = program.open_lanes | {lane.name for lane in program.lanes if lane.grows}
        kept = [lane for lane in program.lanes if keeps_buffers and lane.name not in open_lanes]
        self._kept = {lane.name: lane_buffers(lane) for lane in kept}

    @property
    def is_compiled(self) -> bool:
        return self.backend != "eager"

    def share(self, other: Engine) -> None:
        """Use the compiled forms and the masks of an engine of the same code at other sizes."""
        self.fixed_widths, self._compiled, self._regions = other.fixed_widths, other._compiled, other._regions
        self._masks, self.forms = other._masks, other.forms

    def share_buffers(self, other: Engine) -> None:
        """Run on the lane buffers of an engine whose lanes are the same, but for open ones."""
        self._kept = other._kept

    def at_sizes(self, program: Program) -> Engine:
        """An engine for the same program at other sizes of the last segments, of these forms and buffers."""
        other = Engine(program, self.backend, False, self.passes_off, self.has_one)
        other.share(self)
        other.share_buffers(self)
        return other

    def can_fix(self, width: int) -> bool:
        """Whether a width has no compiled form of its own, and there is room for one."""
        has_room = len(self.fixed_widths - {1, self.full}) < self.MAX_FIXED_WIDTHS
        return 1 < width < self.full and has_room and width not in self.fixed_widths

    def fix_width(self, width: int) -> None:
        """Give this width a compiled form of its own."""
        self.fixed_widths.add(width)

    def prefers_mixed(self, width: int) -> bool:
        """With compilation, windows that are not as wide as most share the function for mixed classes."""
        return self.is_compiled and width != self.full

    def buffers(self, lane: Lane) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Storage for a lane that is kept from run to run; None where each run makes its own."""
        return self._kept.get(lane.name)

    def mask(self, bits: tuple[bool, ...]) -> torch.Tensor:
        """A bool tensor of these values."""
        if bits not in self._masks:
            self._masks[bits] = torch.tensor(bits, device=self.device)
        return self._masks[bits]

    def region(
        self, function: Callable[..., Any], args: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        """Run the body of a prologue or an epilogue, compiled for the shapes that it is called with first.

        With other shapes, which come from values that grow with the number of segments, it runs as it is, and
        so does a body that reads free sizes which its arguments do not show.
        """
        opened = self.program.opened.get(function.__name__)
        if not self.is_compiled or (self.program.opened and opened is None):
            return function(*args)
        marks = opened.inputs if opened is not None else ()
        if self.has_one and any(marks):
            return function(*args)
        args = tuple(dense(arg) for arg in args)
        shapes = tuple(_fixed(arg.shape, marks[i] if marks else ()) for i, arg in enumerate(args))
        if function.__name__ not in self._regions:
            shows = opened is not None
            made = Form(function, (), marks, shows, backend=self.backend, dynamic=False, fullgraph=True)
            self.forms.append(made)
            self._regions[function.__name__] = (shapes, made)
        first, form = self._regions[function.__name__]
        return form(*args) if shapes == first and not _has_one(args, marks) else function(*args)

    def divided(self, function: Callable[..., Any]) -> Divided | None:
        """A region's function whose embeddings come before the rest; None where it has none, or where sizes
        are free."""
        name = function.__name__
        if name not in self._divided:
            self._divided[name] = None if self.program.opened else divided(function)
        return self._divided[name]

    def call(
        self,
        function: Callable[..., Any],
        width: int,
        args: tuple[torch.Tensor, ...],
        targets: Sequence[Target | None],
    ) -> tuple[torch.Tensor, ...]:
        """Run a cell function for `width` cells.

        Args:
            function: an emitted one.
            args: its arguments.
            targets: where each of its results is stored, or None where it is returned.

        Returns:
            The results, in order; those that are stored as views of their place.
        """
        modes = tuple(self._mode(function, target) for target in targets)
        places = [t.place for t, mode in zip(targets, modes, strict=True) if t and mode == _PLACE]
        made = iter(self._form(function, width, modes)(*args, *places))
        return tuple(next(made) if target is None else target.place for target in targets)

    def likened(
        self, function: Callable[..., Any], args: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        """Arguments of one cell with gradients, as cells of later segments have them; see `likening`."""
        if not self.is_compiled or is_transformed() or not any(arg.requires_grad for arg in args):
            return args
        key, group = self._key(function), self._group(function)
        if key not in self._fed:
            self._fed[key] = fed_with_gradients(self.program, group, function, args)
        ports = {port.name for port in group.ports if port.role == "lane" and port.source in self._fed[key]}
        named = zip(_parameters(function), args, strict=True)
        return tuple(likened(arg) if name in ports else arg for name, arg in named)

    def dependents(self, function: Callable[..., Any], args: Sequence[Any]) -> Dependents | None:
        """Of each argument of a compiled function; None where autograd sees what is unread. See `unread`."""
        if not self.is_compiled:
            return None
        if function not in self._dependents:
            found = dependents(function, args)
            is_needed = found is not None and len(set(found) - {frozenset()}) > 1  # else all or none are read
            self._dependents[function] = found if is_needed else None
        return self._dependents[function]

    def _mode(self, function: Callable[..., Any], target: Target | None) -> int | None:
        """None: returned; the position of the argument that is overwritten; or `_PLACE`."""
        if target is None:
            return None
        names = _parameters(function)
        return names.index(target.port) if target.port in names else _PLACE

    def _form(
        self, function: Callable[..., Any], width: int, modes: tuple[int | None, ...]
    ) -> Callable[..., Any]:
        opened = self.program.opened.get(function.__name__)
        if self.has_one and opened is not None and any(opened.inputs):
            return storing(function, modes)
        size = width if self.is_compiled and self._is_fixed(function, width) else 0
        key = self._key(function, size, modes)
        if key not in self._compiled:
            stored = storing(function, modes)
            self._compiled[key] = self._compile(function, stored, size, modes) if self.is_compiled else stored
        return self._compiled[key]

    def _is_fixed(self, function: Callable[..., Any], width: int) -> bool:
        """Whether a function has a form for just this width. Of wavefronts of the full width few are of mixed
        classes, which is not worth one."""
        is_rare = width == self.full and not self.is_sequential and self._is_mixed(function)
        is_rare = is_rare and not self.mixes_often
        return width in self.fixed_widths and not is_rare

    def _is_mixed(self, function: Callable[..., Any]) -> bool:
        """Whether a cell function asks each cell for its class."""
        masks = {port.name for port in self._group(function).ports if port.role == "mask"}
        return not masks.isdisjoint(_parameters(function))

    def _key(self, function: Callable[..., Any], *rest: Any) -> tuple[Any, ...]:
        """Of a form; a function that does not show the free sizes has one for each module that it is in."""
        shows = self.is_compiled and function.__name__ in self.program.opened
        return (function.__name__, *rest, None if shows else id(function.__globals__))

    def _compile(
        self,
        function: Callable[..., Any],
        stored: Callable[..., Any],
        size: int,
        modes: tuple[int | None, ...] = (),
    ) -> Callable[..., Any]:
        marks = self._marks(function, size, modes)
        if _grows(function) or not self.program.counts.isdisjoint(function.__code__.co_names):
            return stored
        if _runs_apart(function) and any(marks):  # what comes behind such an operation has no open sizes
            return stored
        own = _renamed(stored, f"{function.__name__}_{size or 'n'}")  # a cache of compiled forms for itself
        form = Form(
            own,
            (size, modes),
            marks,
            function.__name__ in self.program.opened,
            backend=self.backend,
            dynamic=False if size else None,
            fullgraph=not _runs_apart(function),
            options=self._options(size),
        )
        self.forms.append(form)
        free = opened.inputs if (opened := self.program.opened.get(function.__name__)) is not None else ()

        def call(*args: torch.Tensor) -> Any:
            return stored(*args) if _has_one(args, free) else form(*args)

        return call if any(free) else form

    def _marks(self, function: Callable[..., Any], size: int, modes: tuple[int | None, ...]) -> Marks:
        """Dims of a stored function's arguments that a compiled form leaves open: the number of cells where
        `size` is 0, and the free sizes."""
        has_axis = [axis and not size for axis in self._has_axis(function)]
        opened = self.program.opened.get(function.__name__)
        inputs = opened.inputs if opened is not None else ((),) * len(has_axis)
        outputs = opened.outputs if opened is not None else ((),) * len(modes)
        places = [dims for dims, mode in zip(outputs, modes, strict=False) if mode == _PLACE]
        has_axis += [not size] * len(places)
        return tuple(
            (*((0,) if axis else ()), *dims) for axis, dims in zip(has_axis, (*inputs, *places), strict=True)
        )

    def _options(self, size: int) -> dict[str, Any] | None:
        """Settings of Inductor for a form of `size` cells."""
        options = _passes(self.passes_off) if self.passes_off is not None else {}
        if self._exceeds_cache(size):
            options["realize_reads_threshold"] = 3
        return options or None

    def _exceeds_cache(self, size: int) -> bool:
        """Inductor computes a sum of four values again where it is read a second time.  Where the values of a
        window do not fit in half the L2 cache, reading them again costs more than storing the sum once."""
        if self.backend != "inductor" or self.device.type != "cuda" or not size:
            return False
        largest = max(math.prod(lane.shape) * lane.dtype.itemsize for lane in self.program.lanes)
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        return size * largest > cache / 2

    def _has_axis(self, function: Callable[..., Any]) -> list[bool]:
        """For each parameter of a cell function, whether it has the axis of cells in front."""
        has_axis = {port.name: port.has_axis for port in self._group(function).ports}
        return [has_axis.get(name, False) for name in _parameters(function)]

    def _group(self, function: Callable[..., Any]) -> Group:
        """The group that a cell function is of."""
        return max(
            (g for g in self.program.groups if function.__name__.startswith(f"cell_{g.name}")),
            key=lambda g: len(g.name),
        )


def _runs_apart(function: Callable[..., Any]) -> bool:
    """Whether an operation of a cell function runs cell by cell, between two compiled parts."""
    return "cell_by_cell" in function.__code__.co_names


def _grows(function: Callable[..., Any]) -> bool:
    """Whether a cell function works on values that grow with the segments: its sizes are never the same."""
    return SEGMENTS in _parameters(function)


def _passes(switched_off: frozenset[str]) -> dict[str, Any]:
    """The passes of `passes/inductor`, as options; none where this torch lacks the parts of Inductor that
    they need."""
    try:
        from rmtcompile.passes.cell.inductor import options
    except ImportError:
        return {}
    return dict(options(switched_off))


def _has_one(args: Sequence[torch.Tensor], marks: Marks) -> bool:
    """Whether an open size is one, for which a form would be compiled again."""
    return any(arg.shape[dim] < 2 for arg, dims in zip(args, marks, strict=False) for dim in dims)


def _fixed(shape: torch.Size, free: Sequence[int]) -> tuple[int, ...]:
    return tuple(-1 if dim in free else size for dim, size in enumerate(shape))


def storing(function: Callable[..., Any], modes: tuple[int | None, ...]) -> Callable[..., Any]:
    """A function that runs `function`, stores its results as `modes` say, and returns the others; places
    follow the arguments."""
    count = len(_parameters(function))

    def run(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = function(*args[:count])
        places = iter(args[count:])
        returned = []
        for result, mode in zip(results, modes, strict=True):
            if mode is None:
                returned.append(result)
            elif mode == _PLACE:
                next(places).copy_(result)
            else:
                args[mode].copy_(result)
        return tuple(returned)

    return run


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    code: types.CodeType = function.__code__
    return code.co_varnames[: code.co_argcount]


def _renamed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The same function with code of its own."""
    code = function.__code__.replace(co_name=name)
    return types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
