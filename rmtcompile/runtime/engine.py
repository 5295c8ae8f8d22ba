"""Engines: how the cells of a level are executed, directly or as replayed CUDA graphs."""

from __future__ import annotations

import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from rmtcompile.program import Lane, Program
from rmtcompile.runtime.run import Outputs, Run, Window

_ATTENTION = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
]  # fmt: skip


class DirectEngine:
    """Runs cell functions one after the other, compiled or not; storage is made anew for each run.

    A function is compiled with all sizes fixed for the full width, and with the number of cells left open for
    every other one; the widths of the first short inputs that are seen (`fix_width`) get a form of their own
    too, since fixed sizes make faster kernels. One cell alone runs as it is: both ends of a run are one cell
    wide, and a compiled form for that would cost more than it saves.
    """

    MAX_FIXED_WIDTHS = 2

    def __init__(self, program: Program, backend: str | Callable[..., Any]) -> None:
        self.program = program
        self.backend = backend
        self.device = next((lane.device for lane in program.lanes), torch.device("cpu"))
        self.is_sequential = program.alpha >= program.n_layers
        self.full = 1 if self.is_sequential else min(len(group.layers) for group in program.groups)
        self.fixed_widths: set[int] = set()
        self._compiled: dict[tuple[str, int], Callable[..., Any]] = {}
        self._masks: dict[tuple[bool, ...], torch.Tensor] = {}

    @property
    def is_compiled(self) -> bool:
        return self.backend != "eager"

    def fix_width(self, width: int) -> None:
        """Give this width a compiled form of its own, if there is room for one more."""
        if 1 < width < self.full and len(self.fixed_widths) < self.MAX_FIXED_WIDTHS:
            self.fixed_widths.add(width)

    def prefers_mixed(self, width: int) -> bool:
        """With compilation, windows that are neither full nor one cell wide share the function for mixed
        classes."""
        return self.is_compiled and width not in (1, self.full)

    def cell(self, function: Callable[..., Any], width: int) -> Callable[..., Any]:
        if not self.is_compiled or (width == 1 and not self.is_sequential):
            return function
        form = width if width == self.full or width in self.fixed_widths else 0
        key = (function.__name__, form)
        if key not in self._compiled:
            self._compiled[key] = self._compile(function, form)
        return self._compiled[key]

    def region(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if not self.is_compiled:
            return function
        key = (function.__name__, 0)
        if key not in self._compiled:
            self._compiled[key] = torch.compile(function, backend=self.backend, dynamic=False, fullgraph=True)
        return self._compiled[key]

    def _compile(self, function: Callable[..., Any], form: int) -> Callable[..., Any]:
        name = f"{function.__name__}_{form or 'n'}"  # one cache of compiled forms each
        code = function.__code__.replace(co_name=name)
        own = types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__)
        compiled = torch.compile(own, backend=self.backend, dynamic=False if form else None, fullgraph=True)
        if form:
            return compiled
        batched = self._batched(function)

        def call(*args: torch.Tensor) -> Any:
            views = [arg[:] if has_axis else arg for arg, has_axis in zip(args, batched, strict=True)]
            for view, has_axis in zip(views, batched, strict=True):
                if has_axis:  # the mark stays on a tensor object, so it goes on a view made for this call
                    torch._dynamo.mark_dynamic(view, 0)
            return compiled(*views)

        return call

    def _batched(self, function: Callable[..., Any]) -> list[bool]:
        group = max(
            (g for g in self.program.groups if function.__name__.startswith(f"cell_{g.name}")),
            key=lambda g: len(g.name),
        )
        roles = {port.name: port.role for port in group.ports}
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        return [roles[name] != "shared" for name in names]

    def launch(self, run: Run, wave: Callable[..., Any], windows: list[Window]) -> list[Outputs] | None:
        with sdpa_kernel(_ATTENTION, set_priority=True):
            return wave(run, windows)

    def place_init(self, values: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        return values

    def mask(self, bits: tuple[bool, ...]) -> torch.Tensor:
        if bits not in self._masks:
            self._masks[bits] = torch.tensor(bits, device=self.device)
        return self._masks[bits]

    def buffer(self, lane: Lane) -> torch.Tensor | None:
        return None

    def staged(self, tap: str) -> torch.Tensor:
        raise KeyError(tap)


class GraphEngine(DirectEngine):
    """Replays each level as a CUDA graph: static storage, one graph for each window of layers, a shared
    memory pool.

    Args:
        limit: graphs kept; the least recently used one is dropped.
    """

    def __init__(self, program: Program, backend: str | Callable[..., Any], limit: int = 256) -> None:
        super().__init__(program, backend)
        self.limit = limit
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: OrderedDict[Any, torch.cuda.CUDAGraph] = OrderedDict()
        self.buffers = {
            lane.name: torch.zeros((len(lane.layers), *lane.shape), dtype=lane.dtype, device=lane.device)
            for lane in program.lanes
        }
        self.in_lanes = _held_by_lanes(program)
        self.stage: dict[str, torch.Tensor] = {}
        self.static_init: dict[int, torch.Tensor] = {}
        self.read_by_cells = {
            source.node
            for group in program.groups
            for port in group.ports
            for source in (
                port.source if port.role == "stacked" else (port.source,) if port.role == "shared" else ()
            )
            if source.kind == "init"
        }
        self._addresses: tuple[int, ...] = ()

    def buffer(self, lane: Lane) -> torch.Tensor | None:
        return self.buffers[lane.name]

    def staged(self, tap: str) -> torch.Tensor:
        if tap in self.in_lanes:
            lane, rank = self.in_lanes[tap]
            return self.buffers[lane][rank].clone()
        return self.stage[tap].clone()

    def place_init(self, values: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Copy what cells read to addresses that stay."""
        for index in self.read_by_cells & values.keys():
            static = self.static_init.get(index)
            if static is None or static.shape != values[index].shape:
                self.static_init[index] = values[index].clone()
                self.graphs.clear()
            else:
                static.copy_(values[index])
            values[index] = self.static_init[index]
        return values

    def check_addresses(self, tensors: list[torch.Tensor]) -> None:
        """Drop the graphs where weights have moved since."""
        addresses = tuple(tensor.data_ptr() for tensor in tensors)
        if addresses != self._addresses:
            self.graphs.clear()
            self._addresses = addresses

    def launch(self, run: Run, wave: Callable[..., Any], windows: list[Window]) -> list[Outputs] | None:
        key = tuple(window.key for window in windows)
        graph = self.graphs.get(key)
        if graph is None:
            graph = self.graphs[key] = self._capture(run, wave, windows)
            while len(self.graphs) > self.limit:
                self.graphs.popitem(last=False)
        self.graphs.move_to_end(key)
        graph.replay()
        return None

    def _capture(self, run: Run, wave: Callable[..., Any], windows: list[Window]) -> torch.cuda.CUDAGraph:
        """Record one level; what the trial run has written is put back."""

        def body() -> None:
            results = wave(run, windows)
            for window, outputs in zip(windows, results, strict=True):
                for tap, row, output in run.tapped(window):
                    if tap.name in self.in_lanes:
                        continue
                    if tap.name not in self.stage:
                        self.stage[tap.name] = torch.empty_like(outputs[output][row])
                    self.stage[tap.name].copy_(outputs[output][row])

        kept = {name: buffer.clone() for name, buffer in self.buffers.items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), sdpa_kernel(_ATTENTION, set_priority=True):
            body()
        torch.cuda.current_stream().wait_stream(side)
        for name, buffer in self.buffers.items():
            buffer.copy_(kept[name])
        del kept
        graph = torch.cuda.CUDAGraph()
        with (
            sdpa_kernel(_ATTENTION, set_priority=True),
            torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"),
        ):
            body()
        return graph


def _held_by_lanes(program: Program) -> dict[str, tuple[str, int]]:
    """Taps of a last value that a lane holds anyway once the level has run: (lane, place) by tap."""
    found: dict[str, tuple[str, int]] = {}
    for tap in program.taps:
        layer = tap.value.layer
        if tap.value.kind != "cell" or tap.when[0] != "end" or len(tap.group_outputs) != 1:
            continue
        for lane in program.lanes:
            for feed in lane.feeds:
                same = (feed.group, feed.source) == tap.group_outputs[0] and layer in feed.layers
                target = layer + feed.offset[1]
                if same and target in lane.layers and tuple(lane.shape) and lane.classes is None:
                    found.setdefault(tap.name, (lane.name, lane.layers.index(target)))
    return found
