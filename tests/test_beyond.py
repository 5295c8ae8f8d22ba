"""lengths.py: rules that no short capture shows are found or refused at the first long input."""

from __future__ import annotations

import contextlib
import copy
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import SEGMENT, WIDTH, Toy, assert_equal_runs, assert_same, features, made

import rmtcompile
import rmtcompile.dispatch.followed
from rmtcompile.dispatch import told, verify
from rmtcompile.dispatch.compared import CHECKED, of_segments
from rmtcompile.dispatch.programs import Programs
from rmtcompile.dispatch.verify import TOLERANCE
from rmtcompile.errors import RerollError
from rmtcompile.frontend.outline import Outliner
from rmtcompile.frontend.outline_arguments import OutlineError
from rmtcompile.frontend.probe import probe


@pytest.mark.parametrize(("back", "up"), [(3, 0), (3, 2)])
def test_a_carry_that_short_captures_do_not_show(back: int, up: int) -> None:
    model = made(lambda: Toy(3, back=back, up=up))
    fast = rmtcompile.optimize(copy.deepcopy(model))
    assert_equal_runs(model, fast, [features(segments) for segments in (2, 3)])
    assert fast.captures == 1, "up to three segments the program is proved"
    assert_equal_runs(model, fast, [features(segments) for segments in (9, 5, 2, 12)])
    assert any(offset[0] for offset in fast.compiled.dependences)


class At(nn.Module):
    """Does something else at one segment."""

    def __init__(self, special: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.special = special

    def forward(self, x: Tensor) -> Tensor:
        memory = [x.new_zeros(x.shape[0], WIDTH)] * 2
        out = []
        for s, h in enumerate(x.split(SEGMENT, 1)):
            for l, layer in enumerate(self.layers):
                h = torch.tanh(layer(h + memory[l][:, None]))
                memory[l] = h.mean(1) * self.scale(s)
            out.append(h)
        return torch.cat(out, 1)

    def scale(self, s: int) -> float:
        return 2 if s == self.special else 1


@torch.no_grad()
@pytest.mark.parametrize("special", [4, 6])
def test_a_segment_that_no_short_capture_shows(special: int) -> None:
    """It becomes a class of its own, or the model is refused."""
    model = made(lambda: At(special))
    fast = rmtcompile.optimize(copy.deepcopy(model))
    with contextlib.suppress(RerollError):
        assert_equal_runs(model, fast, [features(segments) for segments in (3, 9, 12)])
        assert fast.captures > 1


@pytest.mark.parametrize("back", [4, 9])
@torch.no_grad()
def test_what_comes_later_than_the_usual_captures_is_captured_too(back: int) -> None:
    model = made(lambda: Toy(2, back=back))
    fast = rmtcompile.optimize(copy.deepcopy(model))
    assert_equal_runs(model, fast, [features(segments) for segments in (11, 2, 20)])


class Squares(nn.Module):
    """Reads a row of a table at s * s: a line, as far as the length of a segment tells."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(200, WIDTH))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        memory = x.new_zeros(x.shape[0], WIDTH)
        out = []
        for s, h in enumerate(x.split(SEGMENT, 1)):
            h = h + self.table[s * s : s * s + 1] if s else h
            for layer in self.layers:
                h = torch.tanh(layer(h + memory[:, None]))
            out.append(h)
        return torch.cat(out, 1)


def test_a_square_is_no_line() -> None:
    model = made(Squares)
    fast = rmtcompile.optimize(copy.deepcopy(model))
    with contextlib.suppress(RerollError):
        assert_equal_runs(model, fast, [features(segments) for segments in (6, 3)])


def test_it_is_compared_once() -> None:
    calls: list[int] = []

    class Counted(Toy):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(x.shape[1] // SEGMENT if type(x) is Tensor else 0)  # 0: only followed
            return super().forward(x)

    fast = rmtcompile.optimize(made(Counted))
    with torch.no_grad():
        for segments in (2, 3, 5, 4, 20, 9, 30):
            fast(features(segments))
    assert [n for n in calls if n > 3] == [5, CHECKED]


def test_the_of_segments_of_an_input() -> None:
    def forward(x: Tensor, mask: Tensor, scale: float) -> Tensor:
        return torch.cat([h * m * scale for h, m in zip(x.split(SEGMENT, 1), mask.split(SEGMENT, 1))], 1)

    x, mask = features(6)[:, :-1], torch.rand(1, 6 * SEGMENT - 1, 1).double()
    args: tuple[Any, ...] = (x, mask, 2.0)
    segmentation = probe(forward, args, {}, SEGMENT)
    (a, b, scale), _ = of_segments(args, {}, segmentation, 4)
    assert a.shape[1] == b.shape[1] == 4 * SEGMENT - 1 and scale == 2.0
    assert torch.equal(a, x[:, : a.shape[1]]) and a.data_ptr() != x.data_ptr()


@torch.no_grad()
def test_rounding_is_no_difference() -> None:
    """With bfloat16 inside, the two may differ by more than float32 allows; the program stays."""

    class Rounded(Toy):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x)

    fast = rmtcompile.optimize(made(Rounded, torch.float32))
    fast(features(9, dtype=torch.float32))
    assert fast.captures == 1


class LastSegment(Toy):
    """Something happens to the last segment alone, wherever that is."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x)[:, -SEGMENT:])


@pytest.mark.parametrize("build", [Toy, LastSegment])
@torch.no_grad()
def test_longer_captures_settle_what_may_be_rounding(
    build: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results in 16 bits that differ altogether: captured once more, and that gives the same rules."""
    monkeypatch.setattr(Programs, "difference", lambda *_, **__: "the result differs")
    fast = rmtcompile.optimize(made(build, torch.bfloat16))
    for _ in range(2):
        fast(features(9, dtype=torch.bfloat16))
    assert fast.captures == 2


@pytest.mark.parametrize(("margin", "captures"), [(verify.MARGIN, 1), (0, 2)])
@torch.no_grad()
def test_slight_differences_in_float32(
    margin: float, captures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deep recurrences amplify rounding beyond what one operation may round. The model itself shows that they
    do; where it does not, longer captures settle it."""
    monkeypatch.setitem(TOLERANCE, torch.float32, 0.0)
    monkeypatch.setattr(verify, "MARGIN", margin)
    fast = rmtcompile.optimize(made(Toy, torch.float32))
    fast(features(9, dtype=torch.float32))
    assert fast.captures == captures


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_other_differences_are_not(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Programs, "difference", lambda *_, **__: "the result differs")
    fast = rmtcompile.optimize(made(Toy, dtype))
    with pytest.raises(RerollError, match=r"does not hold for 9\n.*the result differs"):
        fast(features(9, dtype=dtype))


class FirstSegment(nn.Module):
    """Every segment reads what the layer below gave of the first one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Toy(3).layers

    def forward(self, x: Tensor) -> Tensor:
        zero = x.new_zeros(x.shape[0], WIDTH)
        first: list[Tensor] = []
        out = []
        for s, h in enumerate(x.split(SEGMENT, 1)):
            for l, layer in enumerate(self.layers):
                h, given = layer(h, first[l - 1] if s and l else zero)
                if s == 0:
                    first.append(given)
            out.append(h)
        return torch.cat(out, 1)


@pytest.mark.parametrize(("plan", "alpha"), [("auto", 0), ("sequential", 3)])
def test_what_one_segment_gave_is_read_by_all(plan: str, alpha: int) -> None:
    model = made(FirstSegment)
    fast = rmtcompile.optimize(copy.deepcopy(model), plan=plan)
    assert_equal_runs(model, fast, [features(segments) for segments in (5, 1, 2, 3, 9)])
    assert fast.schedule.alpha == alpha


class By(At):
    """Scales its memory by what is said of the segment."""

    def __init__(self, said: Callable[[int], float]) -> None:
        super().__init__(-1)
        self.said = said

    def scale(self, s: int) -> float:
        return self.said(s)


@pytest.mark.parametrize(
    "build",
    [
        lambda: At(9),
        lambda: At(20),
        lambda: By(lambda s: 1.0 if s < 10 else 0.5),
        lambda: By(lambda s: 1.0 if s < 12 else 2.0 if s < 19 else 0.5),
        lambda: By(lambda s: 0.5 if 12 < s < 31 else 1.0),
    ],
    ids=["tenth", "twenty-first", "from the tenth on", "twice", "for a while"],
)
@torch.no_grad()
def test_another_rule_late(build: Callable[[], nn.Module]) -> None:
    """It is followed, and read from captures that show it."""
    model = made(build)
    fast = rmtcompile.optimize(copy.deepcopy(model))
    assert_equal_runs(model, fast, [features(segments) for segments in (9, 12, 1, 14, 5, 30, 70)])
    assert fast.schedule.alpha == 1


@torch.no_grad()
def test_rules_that_change_again_and_again_are_refused() -> None:
    """They run as long as they hold, in 16 bits too, and are refused with the line that departs."""

    def prime(s: int) -> float:
        return 0.5 if s > 8 and all(s % d for d in range(2, s)) else 1.0

    for dtype in (torch.float64, torch.bfloat16):
        model = made(lambda: By(prime), dtype)
        fast = rmtcompile.optimize(model)
        assert torch.allclose(model(features(9, dtype=dtype)), fast(features(9, dtype=dtype)), rtol=0.2)
        with pytest.raises(RerollError) as caught:
            fast(features(60, dtype=dtype))
        assert re.match(r"what holds for up to \d+ segments does not hold for \d+", str(caught.value))
        assert re.search(r"mul at tests/test_beyond\.py:\d+ ", str(caught.value))
        for count in (9, 40) if dtype is torch.float64 else ():
            assert_same(model(features(count)), fast(features(count)))
    model = made(lambda: By(prime))
    x = features(60)
    with pytest.warns(rmtcompile.FallbackWarning, match=r"what holds for up to \d+ segments"):
        assert torch.equal(rmtcompile.optimize(model, fallback="sequential")(x), model(x))


@torch.no_grad()
def test_a_layer_that_is_left_out_late() -> None:
    """Captures of such lengths show no layers at all; what is said is where the rule ends."""

    class Shallow(Toy):
        def forward(self, x: Tensor) -> Tensor:
            memory = [x.new_zeros(x.shape[0], WIDTH)] * len(self.layers)
            out = []
            for s, h in enumerate(x.split(SEGMENT, 1)):
                for l, layer in enumerate(self.layers):
                    if s < 9 or l != 1:
                        h, memory[l] = layer(h, memory[l])
                out.append(h)
            return torch.cat(out, 1)

    with pytest.raises(RerollError, match=r"up to 9 segments does not hold for 10\n.* linear at .*\.py:\d+ "):
        rmtcompile.optimize(made(Shallow))(features(12))


class Unseen(At):
    """Computes something at one segment that nobody reads."""

    def forward(self, x: Tensor) -> Tensor:
        for s, h in enumerate(x.split(SEGMENT, 1)):
            if s == self.special:
                h.mean()
        self.special, special = -1, self.special
        out = super().forward(x)
        self.special = special
        return out


@torch.no_grad()
def test_what_no_result_shows_is_settled_by_longer_captures() -> None:
    model = made(lambda: Unseen(5))
    fast = rmtcompile.optimize(copy.deepcopy(model))
    assert_equal_runs(model, fast, [features(segments) for segments in (4, 9)])
    assert fast.captures == 2 and fast.explain().proved_on == (6, 7)


@torch.no_grad()
def test_it_is_followed_at_each_doubling(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    outline = Outliner.outline
    monkeypatch.setattr(
        Outliner, "outline", lambda self, *args: lengths.append(args[2]) or outline(self, *args)
    )
    fast = rmtcompile.optimize(made(Toy))
    for segments in (3, 5, 6, 4, 13, 14, 26, 27):
        fast(features(segments))
    assert [n for n in lengths if n > 4] == [8, 16, 32]
    found = fast.explain()
    assert (found.followed_to, found.compared_to, found.unfollowed) == (32, CHECKED, "")
    assert "extrapolated beyond 32, until such an input comes" in str(found)


@torch.no_grad()
def test_compiled_cells_are_followed_far_at_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that later calls, rests among them, need not be."""
    lengths: list[int] = []
    outline = Outliner.outline
    monkeypatch.setattr(
        Outliner, "outline", lambda self, *args: lengths.append(args[2]) or outline(self, *args)
    )
    fast = rmtcompile.optimize(made(Toy), backend="aot_eager")
    fast(features(3))
    assert max(lengths) == fast.explain().followed_to == 64
    lengths.clear()
    for segments in (5, 40, 64):
        fast(features(segments))
    assert not lengths


@torch.no_grad()
def test_a_table_may_end_where_the_input_does() -> None:
    """Twice as long as the last check, the model itself fails."""

    class Positions(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(1, 7 * SEGMENT, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.table[:, : x.shape[1]])

    model = made(Positions)
    fast = rmtcompile.optimize(copy.deepcopy(model))
    assert_equal_runs(model, fast, [features(segments) for segments in (5, 7)])
    assert fast.explain().followed_to == 7


@torch.no_grad()
def test_very_long_inputs_are_not_followed_to_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rmtcompile.dispatch.followed, "FOLLOWED", 400)
    monkeypatch.setattr(rmtcompile.dispatch.followed, "CAPTURED", 100)
    model = made(Toy)
    fast = rmtcompile.optimize(copy.deepcopy(model))
    assert_equal_runs(model, fast, [features(40)])
    found = fast.explain()
    assert 3 < found.followed_to < 40
    assert f"extrapolated beyond {found.followed_to}" in str(found)
    assert found.unfollowed.endswith("more than 400 operations")

    def outlined(*_: Any) -> Any:
        raise AssertionError("as far as it can be followed it was")

    monkeypatch.setattr(Outliner, "outline", outlined)
    assert_equal_runs(model, fast, [features(segments) for segments in (90, 200)])


@torch.no_grad()
def test_where_it_cannot_be_followed_longer_captures_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> Any:
        raise OutlineError("for this test")

    monkeypatch.setattr(Outliner, "outline", refused)
    model = made(Toy)
    fast = rmtcompile.optimize(copy.deepcopy(model))
    assert_equal_runs(model, fast, [features(9)])
    assert fast.explain().followed_to == 9 and fast.captures == 2
    monkeypatch.setattr(rmtcompile.dispatch.followed, "CAPTURED", 100)
    assert_equal_runs(model, fast, [features(19)])
    assert fast.explain().unfollowed == "for this test"


@torch.no_grad()
def test_a_compiled_program_knows_shorter_inputs_after_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(Toy)
    fast = rmtcompile.optimize(model, backend=lambda module, inputs: module.forward)
    assert_same(model(features(6)), fast(features(6)))
    compared: list[int] = []
    difference = type(fast._programs).difference

    def noting(self: Any, entry: Any, count: int, *given: Any, **more: Any) -> Any:
        compared.append(count)
        return difference(self, entry, count, *given, **more)

    monkeypatch.setattr(type(fast._programs), "difference", noting)
    for segments in (1, 2, 4):
        assert_same(model(features(segments)), fast(features(segments)))
    assert not compared


@torch.no_grad()
def test_a_program_that_is_slower_than_its_model_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a CPU, once, from the comparison that is made anyway."""
    for limit, times in ((0.0, 1), (1e9, 0)):
        monkeypatch.setattr(told, "SLOWER", limit)
        caplog.clear()
        fast = rmtcompile.optimize(made(Toy))
        with caplog.at_level(logging.WARNING, "rmtcompile"):
            for x in (features(8), features(9), features(8)[:, :-1], features(9)[:, :-2]):
                fast(x)
        said = [one.getMessage() for one in caplog.records]
        assert sum("better called as it is" in text for text in said) == times, said
