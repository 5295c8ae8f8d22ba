"""The kernel of `gated`: a grouped product, persistent, whose tiles hold both halves of their columns.

A tile has 128 rows and 128 columns of each half. The operands come through the tensor memory accelerator, so
that it needs an NVIDIA GPU of compute capability 9.0 or later.  Whether it is faster than a product of
cuBLAS's and a kernel after it is measured; both are within a few per cent of each other.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch._inductor.codecache import PyCodeCache
from torch._subclasses.fake_tensor import unset_fake_temporarily
from triton.tools.tensor_descriptor import TensorDescriptor

from rmtcompile.ir.streams import capture_stream
from rmtcompile.passes.cell.inductor.gated import FUNCTIONS

_log = logging.getLogger(__name__)

TILE = 128
"""Rows of a tile, and its columns in each half."""
DEPTH = 64
"""What a step of a tile takes of the inner dimension."""
ALIGNMENT = 16
"""Bytes, of each address and each stride but the last."""


class Config(NamedTuple):
    """How the kernel is compiled.

    Attributes:
        stages: steps whose operands are on their way at once.
        specialised: whether warps of their own fetch the operands.
    """

    stages: int
    specialised: bool


CONFIGS = (Config(4, True), Config(3, False))


@triton.jit
def exp(x):
    return tl.exp(x)


@triton.jit
def erf(x):
    return tl.erf(x)


@triton.jit
def sigmoid(x):
    return tl.sigmoid(x)


@triton.jit
def tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def relu(x):
    return tl.maximum(x, 0)


@triton.jit
def sqrt(x):
    return tl.sqrt(x)


@triton.jit
def rsqrt(x):
    return tl.rsqrt(x)


@triton.jit
def _tile(i, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Cell, row and column of a tile. Tiles of GROUP rows follow one another, so that the weights that they
    share are in the cache."""
    cell = i // (tiles_m * tiles_n)
    i = i % (tiles_m * tiles_n)
    first = i // (GROUP * tiles_n) * GROUP
    height = min(tiles_m - first, GROUP)
    i = i % (GROUP * tiles_n)
    return cell, first + i % height, i // height


@triton.jit
def gated_product_kernel(
    a,
    b,
    out,
    cells,
    rows,
    half: tl.constexpr,
    inner: tl.constexpr,
    gate: tl.constexpr,
    blocks: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    SPECIALISED: tl.constexpr,
):
    tiles_m = tl.cdiv(rows, TILE)
    tiles_n = tl.cdiv(half, TILE)
    count = cells * tiles_m * tiles_n
    for i in tl.range(tl.program_id(0), count, blocks, flatten=True, warp_specialize=SPECIALISED):
        cell, m, n = _tile(i, tiles_m, tiles_n, 8)
        total = tl.zeros((TILE, 2 * TILE), tl.float32)
        for k in range(tl.cdiv(inner, DEPTH)):
            left = a.load([cell, m * TILE, k * DEPTH]).reshape(TILE, DEPTH)
            right = b.load([cell, 0, n * TILE, k * DEPTH]).reshape(2 * TILE, DEPTH)
            total = tl.dot(left, right.T, total)
        x0, x1 = total.reshape(TILE, 2, TILE).permute(0, 2, 1).split()
        out.store([cell, m * TILE, n * TILE], gate(x0, x1).to(out.dtype).reshape(1, TILE, TILE))


@triton.jit
def _apart(product, out, half, count, gate: tl.constexpr, BLOCK: tl.constexpr):
    """What a kernel after the product does, to be measured against."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = product + i // half * (2 * half) + i % half
    x0 = tl.load(at, i < count).to(tl.float32)
    x1 = tl.load(at + half, i < count).to(tl.float32)
    tl.store(out + i, gate(x0, x1).to(out.dtype.element_ty), i < count)


@functools.cache
def _compiled(gate: str) -> Any:
    """The Triton function of a gate's text; for the text see `gated.Gate`."""
    header = f"import triton\n\nfrom {__name__} import {', '.join(FUNCTIONS)}\n\n\n@triton.jit\n"
    return PyCodeCache.load(header + gate).gate


def gated_product(a: torch.Tensor, b: torch.Tensor, gate: str, config: Config) -> torch.Tensor:
    """`gate` of the two halves of a @ b.

    Args:
        a: [n, N, K], of 16 bits an element.
        b: [n, K, 2 M], whose transpose is contiguous along K.
        gate: text of a function of two values.
        config: one of `CONFIGS`.

    Returns:
        [n, N, M]
    """
    cells, rows, inner = a.shape
    half = b.shape[-1] // 2
    out = a.new_empty(cells, rows, half)
    operands = (
        _descriptor(a, [1, TILE, DEPTH]),
        _descriptor(b.transpose(1, 2).unflatten(1, (2, half)), [1, 2, TILE, DEPTH]),
        _descriptor(out, [1, TILE, TILE]),
    )
    tiles = cells * triton.cdiv(rows, TILE) * triton.cdiv(half, TILE)
    blocks = min(tiles, torch.cuda.get_device_properties(a.device).multi_processor_count)
    with torch.cuda.device(a.device):
        gated_product_kernel[(blocks,)](
            *operands, cells, rows, half, inner, _compiled(gate), blocks, TILE, DEPTH, config.specialised,
            num_stages=config.stages, num_warps=8,
        )  # fmt: skip
    return out


def _descriptor(tensor: torch.Tensor, block: list[int]) -> TensorDescriptor:
    steps = [stride * tensor.element_size() for stride in tensor.stride()[:-1]]
    is_aligned = all(size % ALIGNMENT == 0 for size in (tensor.data_ptr(), *steps))
    if not is_aligned or tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    return TensorDescriptor.from_tensor(tensor, block)


MOST_CELLS = 4
"""More cells are not measured: with the tiles of four any GPU of today has its hands full."""

LEAST_GAIN = 0.01
"""Below it nothing is changed."""


@functools.cache
def fastest(
    device: torch.device, dtype: torch.dtype, cells: int, rows: int, inner: int, half: int, gate: str
) -> Config | None:
    """The fastest way to compile the kernel for these sizes; None where a product and a kernel after it are
    as fast, or where Triton cannot compile it here. Measured on random values, once in a process."""
    cells = min(cells, MOST_CELLS)
    with unset_fake_temporarily(), torch.inference_mode(False), torch.no_grad(), torch.cuda.device(device):
        generator = torch.Generator(device).manual_seed(0)
        a = torch.randn(cells, rows, inner, device=device, generator=generator).to(dtype)
        b = torch.randn(cells, 2 * half, inner, device=device, generator=generator).to(dtype)
        b = b.mul_(inner**-0.5).transpose(1, 2)
        ways: dict[Config | None, Callable[[], torch.Tensor]] = {
            None: functools.partial(_product_apart, a, b, gate),
            **{config: functools.partial(gated_product, a, b, gate, config) for config in CONFIGS},
        }
        results = {config: result for config, way in ways.items() if (result := _tried(way)) is not None}
        if None not in results:
            return None
        expected = results[None]
        near = [c for c, result in results.items() if (result - expected).norm() <= 0.01 * expected.norm()]
        for config in results.keys() - near:
            _log.warning("%s computes something else here, and is not used", config)
        seconds = _measured({config: ways[config] for config in near}, expected.device)
    best = min(seconds, key=seconds.__getitem__)
    _log.debug("%s cells of %s rows, %s to 2 x %s: %s", cells, rows, inner, half, seconds)
    return best if seconds[best] < (1 - LEAST_GAIN) * seconds[None] else None


def _tried(way: Callable[[], torch.Tensor]) -> torch.Tensor | None:
    try:
        result = way()
        torch.cuda.synchronize()
    except Exception as error:  # Triton has no common class for what it cannot compile or launch
        _log.debug("does not run here: %s", error)
        return None
    return result


def _product_apart(a: torch.Tensor, b: torch.Tensor, gate: str) -> torch.Tensor:
    product = torch.bmm(a, b)
    out = product.new_empty(*a.shape[:2], b.shape[-1] // 2)
    grid = (triton.cdiv(out.numel(), 1024),)
    _apart[grid](product, out, out.shape[-1], out.numel(), _compiled(gate), 1024)
    return out


def _measured(
    ways: dict[Config | None, Callable[[], Any]], device: torch.device, launches: int = 4
) -> dict[Config | None, float]:
    """Seconds of each way, in turn: medians of bursts that keep the device busy."""
    graphs = {}
    for config, way in ways.items():
        graphs[config] = torch.cuda.CUDAGraph()
        own = capture_stream(device)
        with torch.cuda.graph(graphs[config], stream=own, capture_error_mode="thread_local"):
            for _ in range(launches):
                way()
    times: dict[Config | None, list[float]] = {config: [] for config in graphs}
    for _ in range(12):
        for config, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(2):
                graph.replay()
            end.record()
            end.synchronize()
            times[config].append(start.elapsed_time(end) / 2 / launches / 1e3)
    return {config: sorted(values)[len(values) // 2] for config, values in times.items()}
