"""sizes.py and families.py: a batch size or a rest that was never captured, without a
capture."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from inductor_graphs import needs_compiler
from test_end_to_end import armt
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from toys import SEGMENT, WIDTH, AttributeState, Toy, assert_equal_runs, assert_same, made
from zoo.others import ZOO

import rmtcompile
from rmtcompile.compiler.pipeline import compile_forward
from rmtcompile.dispatch import families
from rmtcompile.dispatch.size_vectors import boxes, moved
from rmtcompile.frontend.probe import probe
from rmtcompile.ir.program import Affine
from rmtcompile.ir.size import Size
from rmtcompile.options import Options
from rmtcompile.passes.cell.open_attention import attention
from rmtcompile.passes.emit import emit
from rmtcompile.passes.emit.sizes import opening
from rmtcompile.passes.sizes import Sample, SizesDiffer, _Fit, at, unify
from rmtcompile.report.dump import use
from rmtcompile.runtime.costs import Costs

TOKENS = 8  # in a segment of the transformers


def batch(size: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(97 * size + length)
    return torch.randn(size, length, WIDTH, generator=generator, dtype=torch.float64)


def ids(size: int, length: int) -> Tensor:
    return torch.randint(0, 32, (size, length), generator=torch.Generator().manual_seed(97 * size + length))


def new_captures(model: nn.Module, seen: Sequence[Any], unseen: Sequence[Any], **options: Any) -> int:
    """Captures that `unseen` cost after `seen`; all results equal the model's."""
    fast = rmtcompile.optimize(copy.deepcopy(model), **options)
    assert_equal_runs(model, fast, seen)
    before = fast.captures
    assert_equal_runs(model, fast, unseen)
    return fast.captures - before


# --- integers -----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(-5, 5), min_size=4, max_size=4), st.integers(1, 9), st.integers(1, 9))
def test_two_sizes_are_fitted_with_their_product(factors: list[int], b: int, r: int) -> None:
    a, x, y, z = factors
    value = lambda p: a + x * p["B"] + y * p["R"] + z * p["B"] * p["R"]  # noqa: E731
    points = [{"B": i, "R": j} for i in (b, b + 2) for j in (r, r + 3)]
    size = _Fit(points)([value(p) for p in points], "here")
    for other in [*points, {"B": 11, "R": 6}]:
        assert at(size, other) == value(other)
    assert size == value(points[0])
    assert eval(str(size), {"B": b, "R": r}) == value(points[0])


def test_what_is_no_whole_multiple_is_refused() -> None:
    with pytest.raises(SizesDiffer, match="here: an integer does not follow from the sizes: 1 at"):
        _Fit([{"B": 2}, {"B": 4}])([1, 2], "here")
    with pytest.raises(SizesDiffer):
        _Fit([{"B": 1}, {"B": 2}, {"B": 3}])([1, 4, 9], "here")


def test_a_size_prints_as_an_expression() -> None:
    size = Size(7, ((("B", "R"), 2), (("B",), 1), ((), -3)))
    assert str(size) == f"{size}" == repr(size) == "2 * B * R + B - 3"
    assert size == 7 and copy.deepcopy(size).terms == size.terms
    assert str(Affine(Size(2, ((("R",), 1),)), 3)) == "3 * s + R"
    assert str(Affine(1, Size(3, ((("B",), 1),)))) == "(B) * s + 1"


def test_sizes_are_read_from_arguments() -> None:
    found = opening([("x", (2, Size(10, ((("R",), 2), ((), 4))))), ("y", (Size(3, ((("B",), 1),)),))],
                    [Size(3, ((("R",), 1),)), Size(3, ((("B",), 1),))])  # fmt: skip
    assert found is not None
    assert found.lines == ("B = y.shape[0]", "R = (x.shape[1] - 4) // 2")
    assert found.opened.inputs == ((1,), (0,))
    assert opening([("x", (2, 3))], [Size(3, ((("R",), 1),))]) is None


# --- programs -----------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(model: nn.Module, x: Tensor, **sizes: int) -> Sample:
    compiled = compile_forward(model, (x,), {}, probe(model, (x,), {}), Options())
    return Sample(sizes, compiled.program, compiled.emitted.cells, compiled.leaves, compiled.result)


def test_two_batches_give_one_program() -> None:
    model = made(lambda: Toy(2))
    samples = [sample(model, batch(b, 12), B=b) for b in (2, 3)]
    found = unify(samples)
    source = emit(found.program, sized=found.sized).source
    assert "B = 2  # sizes of the inputs" in source
    assert f"reshape(v0, [-1, {SEGMENT} * B, {WIDTH}])" in source
    lane = next(lane for lane in found.program.lanes if len(lane.shape) == 3)
    assert at(lane.shape, {"B": 7}) == (7, SEGMENT, WIDTH)


def test_a_rectangle_gives_products() -> None:
    model = made(lambda: Toy(2))
    found = unify([sample(model, batch(b, 12 + r), B=b, R=r) for b in (2, 3) for r in (1, 2)])
    assert f"reshape(v0, [-1, B * R, {WIDTH}])" in emit(found.program, sized=found.sized).source


class Mean(Toy):
    """Divides by the batch size, a Python number."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 / x.shape[0])


class Flipped(Toy):
    """Turns an axis that depends on the batch size."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flip(1 + x.shape[0] % 2)


class Longer(Toy):
    """Does one operation more for larger batches."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y.sin() if x.shape[0] > 2 else y


@pytest.mark.parametrize("build", [Mean, Flipped, Longer])
def test_other_differences_are_refused(build: Callable[[int], nn.Module]) -> None:
    model = made(lambda: build(2))
    with pytest.raises(SizesDiffer, match="against"):
        unify([sample(model, batch(b, 12), B=b) for b in (2, 3)])


# --- which programs to read rules from ----------------------------------------------------------------------


def test_sizes_that_change_together_are_one() -> None:
    assert moved((2, 8, 2, 5), (3, 8, 3, 6)) == [(0, 2), (3,)]


def test_corners() -> None:
    cut = [None, 8]
    assert next(boxes([(2, 0)], (3, 0), cut)) == [(2, 0), (3, 0)]
    assert next(boxes([(2, 5)], (3, 6), cut)) == [(2, 5), (3, 6), (3, 5), (2, 6)]
    assert next(boxes([(2, 5), (2, 6)], (3, 6), cut)) == [(2, 6), (3, 6), (2, 5), (3, 5)]
    assert list(boxes([(1, 0)], (4, 0), cut))[-1] == [(4, 0), (5, 0)]
    assert list(boxes([(2, 1)], (2, 7), cut))[-1] == [(2, 7), (2, 6)]


# --- batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "seen"), [(Toy, (1, 2)), (Toy, (3, 2)), (AttributeState, (1, 2)), (AttributeState, (2, 1))]
)
@torch.no_grad()
def test_a_third_batch_size(build: Callable[[int], nn.Module], seen: tuple[int, ...]) -> None:
    unseen = [batch(size, length) for size in (4, 7) for length in (12, 3, 18)]
    assert new_captures(made(lambda: build(2)), [batch(size, 12) for size in seen], unseen) == 0


@torch.no_grad()
def test_the_code_is_the_same_for_later_batch_sizes() -> None:
    fast = rmtcompile.optimize(made(lambda: Toy(2)))
    codes = []
    for size in (2, 3, 4, 5, 4):
        fast(batch(size, 12))
        codes.append(fast.code)
    assert len(set(codes[2:])) == 1 and codes[2] not in codes[:2]


@torch.no_grad()
def test_an_edited_dump_runs_at_the_sizes_of_its_call(tmp_path: Path) -> None:
    model = made(lambda: Toy(2))
    fast = rmtcompile.optimize(copy.deepcopy(model))
    assert_equal_runs(model, fast, [batch(size, 12) for size in (2, 3, 5)])
    use(fast, fast.dump(tmp_path)[-1])
    assert_equal_runs(model, fast, [batch(5, 12)])


@torch.no_grad()
def test_weights_are_held_once_for_all_sizes() -> None:
    model = made(lambda: Toy(2))
    fast = rmtcompile.optimize(model)
    fast(batch(2, 12))
    place = model.layers[1].mix.weight.data_ptr()
    for size in (3, 4, 2):
        fast(batch(size, 12))
        assert model.layers[1].mix.weight.data_ptr() == place


@pytest.mark.parametrize("build", [Mean, Flipped, Longer])
@torch.no_grad()
def test_sizes_without_a_rule_are_right(build: Callable[[int], nn.Module]) -> None:
    model = made(lambda: build(2))
    fast = rmtcompile.optimize(copy.deepcopy(model))
    assert_equal_runs(model, fast, [batch(size, 12) for size in (2, 3, 4, 5, 3)])
    assert fast.captures <= 4


class Threshold(Toy):
    """An integer that two batch sizes do not show to be none of theirs: (B // 2) of 2 and 3 is 1."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.shape[0] // 2


class Squares(Toy):
    """The square of the batch size, as a value."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.full((1,), x.shape[0] ** 2, dtype=x.dtype)


@pytest.mark.parametrize("build", [Threshold, Squares])
@torch.no_grad()
def test_a_wrong_rule_is_found_at_its_first_use(build: Callable[[int], nn.Module]) -> None:
    model = made(lambda: build(2))
    fast = rmtcompile.optimize(copy.deepcopy(model))
    assert_equal_runs(model, fast, [batch(size, 12) for size in (2, 3)])
    assert fast.captures == 2
    assert_equal_runs(model, fast, [batch(size, 12) for size in (4, 5)])
    assert fast.captures > 2


class Clamped(Toy):
    """A value that grows with the batch up to five."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + min(x.shape[0], 5)


class Table(Toy):
    """Has rows of its own for the first five of a batch."""

    def __init__(self, n_layers: int) -> None:
        super().__init__(n_layers)
        self.rows = nn.Parameter(torch.randn(5, 1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        n = min(x.shape[0], 5)
        return super().forward(torch.cat([x[:n] + self.rows[:n], x[n:]]))


@torch.no_grad()
def test_a_trusted_rule_that_stops_is_given_up_for_a_capture() -> None:
    model = made(lambda: Table(2))
    fast = rmtcompile.optimize(copy.deepcopy(model))
    assert_equal_runs(model, fast, [batch(size, 12) for size in (2, 3, 4)])
    assert fast.captures == 2
    assert_equal_runs(model, fast, [batch(size, 12) for size in (7, 7)])
    assert fast.captures == 3


@torch.no_grad()
def test_only_the_first_use_of_a_rule_is_tried_without_values(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    dry_run = families.dry_run
    monkeypatch.setattr(families, "dry_run", lambda *args: tried.append(1) or dry_run(*args))
    model = made(lambda: Toy(2))
    fast = rmtcompile.optimize(copy.deepcopy(model))
    assert_equal_runs(model, fast, [batch(size, 12) for size in (2, 3, 4, 5, 6)])
    assert fast.captures == 2 and len(tried) == 1


@torch.no_grad()
def test_verify_compares_each_new_size() -> None:
    fast = rmtcompile.optimize(made(lambda: Clamped(2)), verify=True)
    for size in (2, 3, 4, 5):
        fast(batch(size, 12))
    assert fast.captures == 2
    assert_same(fast.model(batch(6, 12)), fast(batch(6, 12)))
    assert fast.captures > 2


@torch.no_grad()
def test_a_flag_that_changed_is_no_size() -> None:
    class Scaled(Toy):
        factor = 2

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.factor

    model = made(Scaled)
    model.factor = 2
    fast = rmtcompile.optimize(model)
    for size, factor in ((2, 2), (3, 5), (4, 5), (5, 5), (4, 2)):
        model.factor = factor
        assert_same(model(batch(size, 12)), fast(batch(size, 12)))


class Told(AttributeState):
    """Leaves the batch size and the length behind, and returns them."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        self.size, self.seen = x.shape[0], x.shape[0] * x.shape[1]
        return {**super().forward(x), "size": x.shape[0]}


@torch.no_grad()
def test_sizes_in_results_and_in_what_is_left_behind() -> None:
    model = made(lambda: Told(2))
    twin = copy.deepcopy(model)
    fast = rmtcompile.optimize(twin)
    for size in (2, 3, 4, 6):
        assert_same(model(batch(size, 12)), fast(batch(size, 12)))
        assert (twin.size, twin.seen) == (model.size, model.seen) == (size, 12 * size)
    assert fast.captures == 2


def test_gradients_of_a_new_batch_size() -> None:
    model = made(lambda: AttributeState(2))
    twin = copy.deepcopy(model)
    fast = rmtcompile.optimize(twin)
    for size in (2, 3, 5):
        for run in (model, fast):
            run(batch(size, 12))["all"].square().sum().backward()
    assert fast.captures == 2
    assert_same([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()], 1e-9)


@torch.no_grad()
def test_the_plan_chosen_for_one_size_holds_for_later_ones() -> None:
    model = made(lambda: Toy(2))
    fast = rmtcompile.optimize(copy.deepcopy(model))
    assert_equal_runs(model, fast, [batch(size, 12) for size in (2, 3, 4)])
    assert fast._last is not None
    fast._programs._families.run_in_order(fast._last[0], Costs(1.0, 3.0, 2, 2, 1))
    assert_equal_runs(model, fast, [batch(4, 12), batch(5, 12)])
    assert fast.schedule.alpha == 2 and fast.captures == 2
    assert fast._last[0].executor.costs is not None


# --- rests --------------------------------------------------------------------------------------------------


class Wide(Toy):
    """Segments of six."""

    def forward(self, x: Tensor) -> Tensor:
        return self.walk(x, list(range(0, x.shape[1], 6)))

    def walk(self, x: Tensor, starts: list[int]) -> Tensor:
        states = [x.new_zeros(x.shape[0], WIDTH)] * len(self.layers)
        out = []
        for start, end in zip(starts, [*starts[1:], x.shape[1]], strict=True):
            h = x[:, start:end]
            for l, layer in enumerate(self.layers):
                h, states[l] = layer(h, states[l])
            out.append(h)
        return torch.cat(out, 1)


class Right(Wide):
    """Segments of six, the first one shorter."""

    def forward(self, x: Tensor) -> Tensor:
        return self.walk(x, [0, *range((x.shape[1] - 1) % 6 + 1, x.shape[1], 6)])


@pytest.mark.parametrize(("build", "seen"), [(Wide, (1, 2)), (Right, (5, 3))])
@torch.no_grad()
def test_a_third_rest(build: Callable[[int], nn.Module], seen: tuple[int, int]) -> None:
    model = made(lambda: build(2))
    fast = rmtcompile.optimize(copy.deepcopy(model))
    assert_equal_runs(model, fast, [batch(2, 18 + rest) for rest in seen])
    before, codes = fast.captures, {fast.code}
    for rest in set(range(1, 6)) - set(seen):
        assert_equal_runs(model, fast, [batch(2, 6 * k + rest) for k in (3, 1, 5)])
        codes.add(fast.code)
    assert fast.captures == before and len(codes) == 1


class Closed(Wide):
    """Texts without a rest, of more than `after` segments, end in another way."""

    after = 0

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y.sin() if x.shape[1] % 6 == 0 and x.shape[1] // 6 > self.after else y


class ClosedLate(Closed):
    after = 11


@pytest.mark.parametrize(("build", "captures"), [(Wide, 0), (Right, 0), (Closed, 1)])
@torch.no_grad()
def test_a_text_without_a_rest_after_texts_with_one(build: Callable[[int], nn.Module], captures: int) -> None:
    """Its rest is a whole segment, unless the model treats such texts in another way."""
    seen, unseen = [batch(2, n) for n in (20, 21)], [batch(2, 6 * k) for k in (5, 14, 4, 40)]
    assert new_captures(made(lambda: build(2)), seen, [*unseen, batch(2, 22)]) == captures


@torch.no_grad()
def test_parts_and_queues_have_a_program_without_a_rest() -> None:
    """A rest is read again by the next part, and cuts a wavefront of several texts in two."""
    model = made(lambda: Wide(2))
    fast = rmtcompile.optimize(copy.deepcopy(model))
    assert_equal_runs(model, fast, [batch(2, n) for n in (20, 21, 24)])
    assert fast.captures == 2
    out, state = fast.run(batch(2, 24))
    assert (out.shape[1], state.segments, state.pending_tokens) == (24, 4, 0) and fast.captures == 3
    assert_same(model(batch(2, 24)), out)
    documents = [batch(2, n) for n in (24, 30, 18)]
    stream = fast.stream(documents)
    for document, result in zip(documents, stream, strict=True):
        assert_same(model(document), result)
    assert not stream.alone and fast.captures == 3


@torch.no_grad()
def test_a_text_without_a_rest_is_followed_by_itself() -> None:
    """What the model does to long ones alone shows."""
    model = made(lambda: ClosedLate(2))
    fast = rmtcompile.optimize(copy.deepcopy(model))
    assert_equal_runs(model, fast, [batch(2, n) for n in (20, 21, 30, 200)])
    captures = fast.captures
    assert_equal_runs(model, fast, [batch(2, 84)])
    assert fast.captures > captures


class Even(Wide):
    """Refuses rests of odd lengths."""

    def walk(self, x: Tensor, starts: list[int]) -> Tensor:
        if (x.shape[1] - starts[-1]) % 2:
            raise ValueError("pass an even number of positions")
        return super().walk(x, starts)


@torch.no_grad()
def test_a_model_need_not_run_on_every_rest() -> None:
    """Rules are tried on rests that nobody has called for."""
    model = made(lambda: Even(2))
    fast = rmtcompile.optimize(copy.deepcopy(model))
    assert_equal_runs(model, fast, [batch(2, 20), batch(2, 22), batch(2, 28), batch(2, 14)])
    with pytest.raises(rmtcompile.CaptureError, match="even number"):
        fast(batch(2, 21))


@torch.no_grad()
def test_less_than_one_segment() -> None:
    seen, unseen = [batch(2, n) for n in (2, 3)], [batch(2, n) for n in (1, 4, 5)]
    assert new_captures(made(lambda: Wide(2)), seen, unseen) == 0


@torch.no_grad()
def test_one_layer_and_one_segment() -> None:
    seen, unseen = [batch(b, n) for b, n in ((2, 3), (3, 4))], [batch(4, 5), batch(5, 1), batch(2, 11)]
    assert new_captures(made(lambda: Wide(1)), seen, unseen) == 0


@torch.no_grad()
def test_a_rest_of_one_position_stays_a_segment_of_its_own() -> None:
    model = made(lambda: AttributeState(2))
    assert_equal_runs(model, rmtcompile.optimize(copy.deepcopy(model)), [batch(2, 13), batch(3, 13)])


@pytest.mark.parametrize("build", [Right, AttributeState])
@torch.no_grad()
def test_batches_and_rests_together(build: Callable[[int], nn.Module]) -> None:
    length = 6 if build is not AttributeState else SEGMENT
    seen = [batch(b, 3 * length + r) for b, r in ((2, 1), (3, 2))]
    unseen = [batch(b, k * length + r) for b, k, r in ((3, 3, 1), (2, 3, 2), (4, 4, 1), (5, 3, 2))]
    unseen += [] if build is AttributeState else [batch(4, 23), batch(7, 21)]
    assert new_captures(made(lambda: build(2)), seen, unseen) == 0


@torch.no_grad()
def test_one_after_the_other() -> None:
    """Two rests of one batch size, then another batch size: from then on all combinations."""
    seen = [batch(2, 19), batch(2, 20), batch(3, 20)]
    assert new_captures(made(lambda: Wide(2)), seen, [batch(3, 22), batch(4, 19), batch(5, 23)]) == 0


# --- models -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_batches_of_an_armt() -> None:
    """Its programs for one row and for several differ."""
    model = armt("llama", torch.float64, n_layers=2)
    fast = rmtcompile.optimize(copy.deepcopy(model))
    run = lambda x: assert_same(dict(model(x)), dict(fast(x)))  # noqa: E731
    for size in (1, 2):
        run(ids(size, 3 * TOKENS))
    before = fast.captures
    for size, segments in ((3, 3), (5, 3), (4, 1)):
        run(ids(size, segments * TOKENS))
    assert fast.captures == before


@pytest.mark.skipif(transformers.__version__ < "5", reason="the decoder branches on the mask's values")
@torch.no_grad()
def test_rests_of_an_armt_with_masks() -> None:
    model = armt("gpt2", torch.float64, n_layers=2)
    fast = rmtcompile.optimize(copy.deepcopy(model))

    def run(size: int, length: int) -> None:
        mask = torch.ones(size, length, dtype=torch.int64)
        mask[0, :3] = 0
        tokens = ids(size, length)
        assert_same(dict(model(tokens, attention_mask=mask)), dict(fast(tokens, attention_mask=mask)))

    for length in (27, 29):
        run(2, length)
    before, code = fast.captures, fast.code
    for length in (30, 25, 12):
        run(2, length)
    assert fast.captures == before and fast.code == code


@pytest.mark.parametrize("name", ["parallel_rmt", "skewed", "no_carry", "lstm_layer_major"])
@torch.no_grad()
def test_batches_of_other_models(name: str) -> None:
    entry = ZOO[name]
    model = entry.build()
    fast = rmtcompile.optimize(copy.deepcopy(model))
    for size in (1, 2):
        assert_same(model(*entry.inputs(size, 3)), fast(*entry.inputs(size, 3)))
    before = fast.captures
    for size, segments in ((3, 3), (5, 4)):
        assert_same(model(*entry.inputs(size, segments)), fast(*entry.inputs(size, segments)))
    assert fast.captures == before


# --- torch.compile ------------------------------------------------------------------------------------------


class Attending(nn.Module):
    """Grouped attention, with a mask that depends on how long a segment is; segments of 24, two memory tokens
    in front of each."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Parameter(torch.randn(2, WIDTH, dtype=torch.float64))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH, dtype=torch.float64) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        states, out = [x.new_zeros(x.shape[0], WIDTH)] * len(self.layers), []
        for h in x.split(24, 1):
            h = torch.cat([self.memory.expand(x.shape[0], -1, -1), h], 1)
            places = torch.arange(h.shape[1])
            mask = (places[:, None] - places).abs() < 5
            for l, layer in enumerate(self.layers):
                q, k = layer(h + states[l][:, None]).unflatten(-1, (4, -1)).transpose(1, 2).split([2, 2], 1)
                k = k[:, :1]
                attended = scaled_dot_product_attention(q, k, k, mask, scale=0.7, enable_gqa=True)
                h = h + attended.transpose(1, 2).flatten(2)
                states[l] = torch.tanh(h.mean(1) + states[l])
            out.append(h[:, 2:].square())
        return torch.cat(out, 1)


@pytest.mark.slow
@needs_compiler
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_attention_of_any_rest_is_compiled_once() -> None:
    """Rests that are multiples of 16, too; gradients."""
    from torch._dynamo.utils import counters

    model = made(Attending)
    fast = rmtcompile.optimize(copy.deepcopy(model), backend="inductor")

    def run(rest: int) -> None:
        x = batch(2, 3 * 24 + rest)
        expected, got = model(x), fast(x)
        assert_same(expected, got)
        assert_same(
            torch.autograd.grad(expected.square().sum(), list(model.parameters())),
            torch.autograd.grad(got.square().sum(), list(fast.parameters())),
            1e-9,
        )

    for rest in (7, 13):
        run(rest)
    assert "torch.ops.rmtcompile.attention" in fast.code
    compiled = counters["stats"]["unique_graphs"]
    for rest in (16, 9, 1, 23):
        run(rest)
    assert counters["stats"]["unique_graphs"] == compiled


@pytest.mark.parametrize(
    ("kind", "is_causal"), [("none", False), ("none", True), ("bool", False), ("added", False)]
)
def test_own_attention_is_attention(kind: str, is_causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    )
    mask = None if kind == "none" else torch.randn(5, 5, generator=generator, dtype=torch.float64)
    mask = mask > -1 if kind == "bool" and mask is not None else mask
    operands = [q, k, v]
    if kind == "added" and mask is not None:
        operands.append(mask.requires_grad_())
    expected, got = (
        function(q, k, v, mask, 0.0, is_causal, scale=0.3, enable_gqa=True)
        for function in (scaled_dot_product_attention, attention)
    )
    assert_same(expected, got)
    weights = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    assert_same(torch.autograd.grad(expected, operands, weights), torch.autograd.grad(got, operands, weights))


BACKENDS = ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, needs_compiler])]


def fixed(backend: str) -> Any:
    """Around the sizes whose forms have all sizes fixed. C++ takes seconds a form, and those of fixed sizes
    are compiled in test_end_to_end.py."""
    return torch.compiler.set_stance("force_eager" if backend == "inductor" else "default")


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_nothing_is_compiled_for_a_third_rest(backend: str) -> None:
    from torch._dynamo.utils import counters

    model = made(lambda: Wide(2))
    fast = rmtcompile.optimize(copy.deepcopy(model), backend=backend)
    counters.clear()
    with fixed(backend):
        assert_equal_runs(model, fast, [batch(2, 18 + 3)])
    assert_equal_runs(model, fast, [batch(2, 18 + 2)])
    compiled = counters["stats"]["unique_graphs"]
    assert compiled > 0
    assert_equal_runs(model, fast, [batch(2, n) for n in (22, 17, 31, 19)])
    assert counters["stats"]["unique_graphs"] == compiled


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_later_batch_sizes_are_compiled_once(backend: str) -> None:
    from torch._dynamo.utils import counters

    model = made(lambda: AttributeState(2))
    fast = rmtcompile.optimize(copy.deepcopy(model), backend=backend)
    counters.clear()
    with fixed(backend):
        assert_equal_runs(model, fast, [batch(size, 12) for size in (2, 3)])
    assert_equal_runs(model, fast, [batch(4, 12)])
    compiled = counters["stats"]["unique_graphs"]
    assert compiled > 0
    assert_equal_runs(model, fast, [batch(size, 12) for size in (5, 7)])
    assert counters["stats"]["unique_graphs"] == compiled


class Gated(Toy):
    """Does something more where a length is `when`, times a gate, which may be zero."""

    def __init__(self, when: Callable[[int, int], bool]) -> None:
        super().__init__()
        self.gates = nn.Parameter(torch.zeros(len(self.layers)))
        self.when = when

    def forward(self, x: Tensor) -> Tensor:
        states, out = [x.new_zeros(x.shape[0], WIDTH)] * len(self.layers), []
        for h in x.split(SEGMENT, 1):
            for l, layer in enumerate(self.layers):
                h, states[l] = layer(h, states[l])
                if self.when(h.shape[1], x.shape[1]):
                    h = h + self.gates[l] * torch.sin(h)
            out.append(h)
        return torch.cat(out, 1)


@pytest.mark.parametrize(
    ("when", "lengths"),
    [
        (lambda piece, whole: piece == SEGMENT, (11, 10, 12, 15)),
        (lambda piece, whole: whole <= SEGMENT, (12, 3)),
        (lambda piece, whole: whole > SEGMENT, (12, 3)),
        (lambda piece, whole: piece == 1, (11, 14, 10, 13)),
    ],
    ids=["whole", "one segment", "several", "one position"],
)
def test_what_zero_hides_is_seen(when: Callable[[int, int], bool], lengths: tuple[int, ...]) -> None:
    """Rules for other lengths are not trusted for their values alone."""
    model = made(lambda: Gated(when))
    fast = rmtcompile.optimize(copy.deepcopy(model))
    mine = fast.model
    for gate in (0.0, 1.0):
        for length in lengths:
            x = torch.randn(2, length, WIDTH, dtype=torch.float64)
            grads = []
            for owner, run in ((model, model), (mine, fast)):
                owner.zero_grad()
                with torch.no_grad():
                    owner.gates.fill_(gate)
                out = run(x)
                out.square().sum().backward()
                grads.append((out.detach(), owner.gates.grad))
            (a, ga), (b, gb) = grads
            assert_same(a, b)
            assert (ga is None) == (gb is None)
            if ga is not None:
                assert_same(ga, gb)
