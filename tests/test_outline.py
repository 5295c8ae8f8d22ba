"""outline.py, steady.py: the calls of a long forward against those that two short ones promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from toys import SEGMENT, WIDTH, AttributeState, Toy, features, made

from rmtcompile.frontend.outline import Outline, Outliner
from rmtcompile.frontend.outline_arguments import OutlineError
from rmtcompile.frontend.steady import Departure, departure

LONG = 14


class Loop(nn.Module):
    """Two layers with a memory; subclasses change one thing in some segments, `s` of `n`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.table = nn.Parameter(torch.randn(LONG, WIDTH))

    def enter(self, h: Tensor, s: int, n: int) -> Tensor:
        return h

    def cell(self, l: int, h: Tensor, m: list[Tensor], s: int) -> Tensor:
        h = torch.tanh(self.layers[l](h) + m[l][:, None])
        m[l] = 0.5 * m[l] + h.mean(1)
        return h

    def join(self, out: list[Tensor]) -> Any:
        return torch.cat(out, 1)

    def forward(self, x: Tensor) -> Any:
        m = [x.new_zeros(x.shape[0], WIDTH) for _ in self.layers]
        out = []
        pieces = x.split(SEGMENT, 1)
        for s, h in enumerate(pieces):
            h = self.enter(h, s, len(pieces))
            for l in range(len(self.layers)):
                h = self.cell(l, h, m, s)
            out.append(h)
        return self.join(out)


def loop(**methods: Any) -> Callable[[], Loop]:
    return type("Changed", (Loop,), methods)


def of_ten_before(self: Loop, l: int, h: Tensor, m: list[Tensor], s: int) -> Tensor:
    """Reads its own segment, from segment 10 on the one of three before."""
    if (s, l) == (0, 0):
        self.kept: list[Tensor] = []
    if l == 0:
        self.kept.append(h)
    return Loop.cell(self, l, h + (self.kept[-1] if s < 10 else self.kept[-4]), m, s)


def in_place(self: Loop, l: int, h: Tensor, m: list[Tensor], s: int) -> Tensor:
    """The very same operations on the same tensors, in another order from segment 10 on."""
    if s < 10:
        new = torch.tanh(h + m[l][:, None])
        m[l].add_(h.mean(1))
    else:
        mean = h.mean(1)
        m[l].add_(mean)
        new = torch.tanh(h + m[l][:, None])
    return new


LATE: dict[str, Callable[[], Loop]] = {
    "operation": loop(enter=lambda self, h, s, n: h if s < 10 else h.relu()),
    "one segment": loop(enter=lambda self, h, s, n: h.relu() if s == 10 else h),
    "float": loop(enter=lambda self, h, s, n: h * 0.9 ** max(1, s - 8)),
    "slice": loop(enter=lambda self, h, s, n: h + self.table[min(s, 9)]),
    "quotient": loop(enter=lambda self, h, s, n: h + self.table[s // 4]),
    "size": loop(enter=lambda self, h, s, n: h + self.table[s : s + 5].sum(0)),
    "dtype": loop(enter=lambda self, h, s, n: h.float().double() if s > 9 else h.double().double()),
    "operand": loop(cell=of_ten_before),
    "order": loop(cell=in_place),
    "result": loop(join=lambda self, out: torch.cat(out[-10:], 1)),
    "number of results": loop(join=lambda self, out: out[:10]),
    "number of segments": loop(enter=lambda self, h, s, n: h if n <= 10 else 0.5 * h),
    "layer": loop(cell=lambda self, l, h, m, s: Loop.cell(self, l if s < 10 else 1 - l, h, m, s)),
}



def nothing_at_first(self: Loop, l: int, h: Tensor, m: list[Tensor], s: int) -> Tensor:
    """Two additions less in the first segment, so that its result is not the one of that number before."""
    h = h + torch.tanh(self.layers[l](h if s == 0 else h + m[l][:, None]))
    m[l] = h.mean(1) if s == 0 else 0.5 * m[l] + h.mean(1)
    return h


REGULAR: dict[str, Callable[[], nn.Module]] = {
    "toy": Toy,
    "no memory at first": loop(cell=nothing_at_first),
    "attributes": AttributeState,
    "first and last": loop(enter=lambda self, h, s, n: h.relu() if s in (0, n - 1) else h),
    "positions": loop(
        enter=lambda self, h, s, n: h + torch.arange(s * SEGMENT, s * SEGMENT + h.shape[1])[:, None]
    ),
    "rows": loop(enter=lambda self, h, s, n: h + self.table[s]),
    "dictionary": loop(join=lambda self, out: {f"y{s}": h for s, h in enumerate(out)}),
    "woven": loop(join=lambda self, out: [(h, h.mean()) for h in out]),
    "lists of lists": loop(
        join=lambda self, out: torch.stack([torch.stack([h.mean(), h.sum()]).prod() for h in out])
    ),
    "indices": loop(
        join=lambda self, out: torch.cat(out, 1).tensor_split([SEGMENT * s for s in range(1, len(out))], 1)
    ),
    "stacked": loop(join=lambda self, out: torch.stack([h.mean() for h in out]).sum() / len(out)),
    "window": loop(join=lambda self, out: torch.cat(out, 1)[:, -SEGMENT - 1 :]),
}


def departs(
    model: nn.Module, count: int = LONG, rest: int = 0, below: bool = False, grad: bool = False
) -> Departure | None:
    outliner = Outliner(model, below)

    def outline(n: int) -> Outline:
        return outliner.outline((features(n)[:, : n * SEGMENT - rest],), {}, n)[0]

    with torch.set_grad_enabled(grad):
        return departure(outline(2), outline(3), outline(count))


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("name", LATE)
def test_a_rule_that_changes_late(name: str, below: bool) -> None:
    assert departs(made(LATE[name]), LONG, below=below) is not None
    if name not in ("slice", "quotient", "size", "float"):
        assert departs(made(LATE[name]), 10, below=below) is None, "up to there it holds"


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("name", REGULAR)
def test_a_rule_that_does_not(name: str, below: bool) -> None:
    model = made(REGULAR[name])
    for count in (4, 5, LONG):
        assert departs(model, count, below=below) is None
    assert departs(model, LONG, rest=1, below=below) is None


@pytest.mark.parametrize("until", [0, 10])
def test_regions_without_gradients(until: int) -> None:
    """One in each segment, and one in each from the tenth on."""

    def enter(self: Loop, h: Tensor, s: int, n: int) -> Tensor:
        with torch.set_grad_enabled(s < until):
            return h + self.table[0].sin()

    for count in (4, 5, LONG):
        found = departs(made(loop(enter=enter)), count, grad=True)
        assert (found is None) == (until == 0 or count < LONG)
    assert torch.is_grad_enabled()


def test_the_line_is_named() -> None:
    outliner = Outliner(made(LATE["operation"]))
    two, three, long = (outliner.outline((features(n),), {}, n)[0] for n in (2, 3, 11))
    place = departure(two, three, long)
    assert place is not None and outliner.name(place.label) == "relu"
    _, line = outliner.outline((features(11),), {}, 11, (place.label, place.number))
    assert line.rpartition(":")[0].endswith("test_outline.py")


def test_the_model_is_left_as_it_was() -> None:
    class Counts(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(2))
            self.log: list[Any] = []

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            self.log.append(x)
            self.last = x
            return super().forward(x)

    model = made(Counts)
    Outliner(model).outline((features(5),), {}, 5)
    assert model.log == [] and not hasattr(model, "last") and not model.calls.any()


def test_numbers_read_of_weights_are_followed_and_those_of_values_are_not() -> None:
    weight = loop(enter=lambda self, h, s, n: h * float(self.table[0, 0]))
    value = loop(enter=lambda self, h, s, n: h if h.sum() > 0 else -h)
    plain = loop(enter=lambda self, h, s, n: h * self.layers[0].bias.tolist()[0])
    assert departs(made(plain)) is None
    for build in (weight, value):
        with pytest.raises(OutlineError, match=r"test_outline\.py:\d+"):
            departs(made(build))


class Keyless(dict[str, Any]):
    """A result whose class does not say its keys, as those of transformers before 5."""


pytree._private_register_pytree_node(
    Keyless, lambda x: (list(x.values()), list(x)), lambda values, keys: Keyless(zip(keys, values))
)


def test_results_without_keys_are_followed() -> None:
    class Named(Toy):
        def forward(self, x: Tensor) -> Any:
            return Keyless(out=super().forward(x))

    assert departs(made(Named)) is None


def test_calls_that_are_alike_are_computed_once() -> None:
    model = made(Toy)
    outliner = Outliner(model)
    with torch.no_grad():
        outliner.outline((features(3),), {}, 3)
        known = len(outliner.known)
        outline, _ = outliner.outline((features(30),), {}, 30)
    assert outline.size > 500 and len(outliner.known) < known + 10


def test_a_counter_that_is_left_as_it_was() -> None:
    """The last call had as many segments as one of the outlines."""

    class Counts(Toy):
        counted = 0

        def forward(self, x: Tensor) -> Tensor:
            self.counted = x.shape[1] // SEGMENT
            return super().forward(x)

    for before in (2, 3, LONG):
        model = made(Counts)
        model.counted = before
        assert departs(model, LONG) is None and model.counted == before
