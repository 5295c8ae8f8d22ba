"""The parts of a schedule: types in short, windows, carries."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from rmtcompile.schedule.paths import Offset

_SHORT_DTYPES = {
    "float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16",
    "int64": "i64", "int32": "i32", "int16": "i16", "int8": "i8", "uint8": "u8", "bool": "b8",
    "complex64": "c64", "complex128": "c128",
}  # fmt: skip


def short_type(dtype: str, shape: Sequence[int | str]) -> str:
    """`bf16[8,64,64]` for ("torch.bfloat16", (8, 64, 64))."""
    name = dtype.removeprefix("torch.")
    return f"{_SHORT_DTYPES.get(name, name)}[{','.join(map(str, shape))}]"


class Operation(Protocol):
    """One operation of a cell, as `Schedule.to_dot(expand=...)` needs it (the viewer's `OpView` is one)."""

    @property
    def name(self) -> str: ...
    @property
    def op(self) -> str: ...
    @property
    def inputs(self) -> Sequence[str]: ...


class Window(NamedTuple):
    """The layers alive on one level: `range(start, stop, step)`."""

    start: int
    stop: int
    step: int

    @property
    def layers(self) -> range:
        """The layers as a range, lowest first."""
        return range(self.start, self.stop, self.step)


@dataclasses.dataclass(frozen=True)
class Carry:
    """A value that flows from a cell to a later segment.

    Args:
        name: what the user's program calls it (`W_mem`).
        offset: (segments, layers) from the cell that writes it to the cell that reads it.
        shape, dtype: of the value of one cell.
        nbytes: of the value of one cell.
        producer_layers: the layers that write it; empty means every layer.
        source: the user's `file:line` that writes it.
        through: the regions that it passes on its way ("the prologue"); "" if cells hand it to cells.
    """

    name: str
    offset: Offset
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    producer_layers: tuple[int, ...] = ()
    source: str = ""
    through: str = ""

    @property
    def type(self) -> str:
        """`f32[8,64,64]`."""
        return short_type(self.dtype, self.shape)

    def writers(self, n_layers: int) -> tuple[int, ...]:
        """The layers whose value some layer of a later segment reads."""
        layers = self.producer_layers or range(n_layers)
        return tuple(i for i in layers if 0 <= i + self.offset[1] < n_layers)

    def total_bytes(self, n_layers: int) -> int:
        """The bytes of this carry that stay alive from one segment to the next, over all layers."""
        return self.nbytes * len(self.writers(n_layers))

    def __str__(self) -> str:
        ds, dl = self.offset
        return f"{self.name}: {self.type} offset ({ds},{dl})"
