"""Runs that go on where others have stopped: any way of cutting a text into calls equals one call."""

from __future__ import annotations

import copy
import functools
import itertools
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_architectures import Chunked
from test_sizes import Table
from torch import Tensor, nn
from toys import SEGMENT, WIDTH, AttributeState, Toy, assert_same, features, made
from zoo.authors import authors_armt
from zoo.others import ZOO

import rmtcompile
from rmtcompile import RunState, StateError, UnsupportedError
from rmtcompile.models import build

pytestmark = pytest.mark.filterwarnings("ignore::rmtcompile.SequentialScheduleWarning")

T = 4
"""Positions in a segment of every model here."""


def reference_armt() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = build(config, segment_size=T, num_mem_tokens=2, d_mem=4).double().eval()
    for name, weight in model.named_parameters():
        if name.endswith("W_mv.weight"):
            nn.init.normal_(weight, std=0.5)
    return model


def mamba() -> nn.Module:
    config = transformers.MambaConfig(
        vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=3, conv_kernel=4, time_step_rank=4,
        residual_in_fp32=False,
    )  # fmt: skip
    return Chunked(transformers.MambaForCausalLM(config).double().eval(), step=T)


def tokens(count: int, batch: int = 2) -> Tensor:
    return torch.randint(0, 32, (batch, count), generator=torch.Generator().manual_seed(count))


def of_zoo(name: str) -> tuple[Callable[[], Any], Callable[[int], Tensor]]:
    entry = ZOO[name]
    longest = entry.inputs(2, 12)[0]
    return entry.build, lambda count: longest[:, :count]


MODELS: dict[str, tuple[Callable[[], Any], Callable[[int], Tensor]]] = {
    "reference armt": (reference_armt, tokens),
    "authors armt": (lambda: authors_armt(n_layers=3, segment_size=T), tokens),
    "mamba": (mamba, tokens),
    "skewed": of_zoo("skewed"),
    "rows": of_zoo("transformer_xl"),
    "the last segment is another": of_zoo("classic_rmt"),
    "several states": of_zoo("hybrid"),
}


@functools.cache
def pair(name: str) -> tuple[Any, Any]:
    """A model and its program, which all examples share."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name][0]()
    return model, rmtcompile.optimize(copy.deepcopy(model) if isinstance(model, nn.Module) else model)


def whole(out: Any) -> Tensor:
    """The result that has a row for each position."""
    return out if isinstance(out, Tensor) else out["logits"]


def in_parts(fast: Any, x: Tensor, cuts: Sequence[int]) -> tuple[Tensor, RunState]:
    """All rows of a text that is read in several calls, those read again as they were given last."""
    out, state = fast.run(x[:, : cuts[0]])
    rows = whole(out)
    for start, end in itertools.pairwise((*cuts, x.shape[1])):
        kept = rows[:, : rows.shape[1] - state.pending_tokens]
        out, state = fast.run(x[:, start:end], state=state)
        rows = torch.cat([kept, whole(out)], 1)
    return rows, state


def assert_equal_in_parts(name: str, length: int, cuts: Sequence[int]) -> RunState:
    """Read in parts, a text gives what one call of the model gives; the last state."""
    model, fast = pair(name)
    x = MODELS[name][1](length)
    got, state = in_parts(fast, x, cuts)
    assert_same(whole(model(x)), got)
    assert state.segments * T + state.pending_tokens == length
    return state


@st.composite
def texts(draw: st.DrawFn, ragged: bool) -> tuple[int, list[int]]:
    """A length, and where it is cut; in the middle of segments, too, where the model can."""
    unit = 1 if ragged else T
    length = draw(st.integers(2, 7 * T // unit)) * unit
    count = draw(st.integers(1, 3))
    cuts = draw(st.lists(st.integers(1, length // unit - 1), min_size=1, max_size=count, unique=True))
    return length, sorted(cut * unit for cut in cuts)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_any_cut_at_segments_equals_one_call(name: str) -> None:
    @settings(max_examples=10)
    @example((6 * T, [T, 2 * T]))
    @example((7 * T, [4 * T]))
    @given(texts(ragged=False))
    def check(text: tuple[int, list[int]]) -> None:
        length, cuts = text
        assert_equal_in_parts(name, length, cuts)

    check()


@pytest.mark.parametrize("name", ["reference armt", "skewed", "rows", "the last segment is another"])
@torch.no_grad()
def test_any_cut_inside_segments_equals_one_call(name: str) -> None:
    @settings(max_examples=6)
    @example((5 * T + 3, [2 * T + 1, 2 * T + 2]))
    @example((2 * T, [1]))
    @given(texts(ragged=True))
    def check(text: tuple[int, list[int]]) -> None:
        length, cuts = text
        state = assert_equal_in_parts(name, length, cuts)
        _, once = pair(name)[1].run(MODELS[name][1](length))
        assert state.segments == once.segments
        assert_same(dict(once.values), dict(state.values))

    check()


@torch.no_grad()
def test_a_state_is_a_value() -> None:
    model, fast = pair("reference armt")
    x = tokens(6 * T)
    _, state = fast.run(x[:, : 3 * T])
    before = state.clone()
    rows = [whole(fast.run(x[:, 3 * T :], state=state)[0]) for _ in range(2)]
    other, _ = fast.run(tokens(2 * T), state=state)
    assert_same(whole(model(x))[:, 3 * T :], rows[0])
    assert torch.equal(*rows) and not torch.equal(whole(other), rows[0][:, : 2 * T])
    assert_same(dict(before.values), dict(state.values), 0.0)
    assert not {v.data_ptr() for v in before.values.values()} & {v.data_ptr() for v in state.values.values()}
    assert state.segments == 3 and state.nbytes == before.nbytes > 0


@torch.no_grad()
def test_going_on_at_another_position_costs_no_capture() -> None:
    _, fast = pair("skewed")
    x = MODELS["skewed"][1](12 * T)
    in_parts(fast, x[:, : 8 * T], [3 * T])
    captures, code = fast.captures, fast.code
    in_parts(fast, x, [2 * T, 3 * T, 7 * T, 10 * T])
    assert fast.captures == captures and fast.code == code


@torch.no_grad()
def test_only_some_states_of_a_batch_go_on() -> None:
    model, fast = pair("reference armt")
    x = tokens(6 * T, batch=3)
    _, state = fast.run(x[:, : 3 * T + 1])
    one, two = state.split([1, 2])
    later = x[:, 3 * T + 1 :]
    rows = [whole(fast.run(part, state=state)[0]) for part, state in ((later[:1], one), (later[1:], two))]
    assert_same(whole(model(x))[:, 3 * T :], torch.cat(rows))
    joined = RunState.join([one, two])
    assert_same(dict(state.values), dict(joined.values), 0.0)
    assert_same(whole(model(x))[:, 3 * T :], whole(fast.run(x[:, 3 * T + 1 :], state=joined)[0]))


@torch.no_grad()
def test_a_trusted_rule_that_stops_is_given_up_for_a_capture() -> None:
    model = made(lambda: Table(2))
    fast = rmtcompile.optimize(copy.deepcopy(model))
    for size, captures in ((2, 1), (3, 2), (4, 2), (7, 3)):
        x = features(5, batch=size)
        got, _ = in_parts(fast, x, [2 * SEGMENT])
        assert_same(model(x), got)
        assert fast.captures == captures


class Explicit(nn.Module):
    """Takes its states as arguments and gives them back, so that its own loop can be cut by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Toy()

    def forward(self, x: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        out = []
        for h in x.split(SEGMENT, 1):
            for l, layer in enumerate(self.inner.layers):
                h, states[l] = layer(h, states[l])
            out.append(h)
        return torch.cat(out, 1), states


@pytest.mark.parametrize("is_cut", [False, True], ids=["through", "detached"])
def test_gradients_through_borders(is_cut: bool) -> None:
    """Of three calls: as through one, or truncated where the state is detached."""
    model = made(Explicit)
    fast = rmtcompile.optimize(model.inner)
    x = features(6)
    weights = list(model.parameters())
    states = [x.new_zeros(2, WIDTH) for _ in range(3)]
    loss, mine, state = x.new_zeros(()), x.new_zeros(()), None
    for part in x.split(2 * SEGMENT, 1):
        out, states = model(part, list(states))
        got, state = fast.run(part, state=state)
        loss, mine = loss + out.pow(3).sum(), mine + got.pow(3).sum()
        if is_cut:
            states, state = [m.detach() for m in states], state.detach()
    expected = torch.autograd.grad(loss, weights)
    assert_same(expected, torch.autograd.grad(mine, weights), 1e-9)
    whole_text = torch.autograd.grad(model.inner(x).pow(3).sum(), weights)
    differs = max(float((a - b).abs().max()) for a, b in zip(expected, whole_text, strict=True))
    assert (differs > 1e-6) == is_cut


@torch.no_grad()
def test_the_modules_are_left_as_after_one_call() -> None:
    model = made(AttributeState)
    twin = copy.deepcopy(model)
    x = features(6)
    model(x)
    _, state = (fast := rmtcompile.optimize(twin)).run(x[:, : 4 * SEGMENT])
    fast.run(x[:, 4 * SEGMENT :], state=state)
    for mine, other in zip(model.layers, twin.layers, strict=True):
        assert (mine.first, mine.count) == (other.first, other.count)
        assert_same(mine.memory, other.memory)


# ---- files -------------------------------------------------------------------------------------------------

READER = """
import sys
import torch
sys.path[:0] = {paths!r}
from toys import SEGMENT, Toy, features, made
import rmtcompile
fast = rmtcompile.optimize(made(Toy))
state = rmtcompile.RunState.load({state!r})
with torch.no_grad():
    out, _ = fast.run(features(6)[:, 3 * SEGMENT + 1 :], state=state)
torch.save(out, {out!r})
"""


@torch.no_grad()
def test_another_process_goes_on(tmp_path: Path) -> None:
    model, x = made(Toy), features(6)
    fast = rmtcompile.optimize(model)
    _, state = fast.run(x[:, : 3 * SEGMENT + 1])
    state.save(tmp_path / "state.safetensors")
    root = Path(__file__).parent
    file, out = tmp_path / "state.safetensors", tmp_path / "out"
    text = READER.format(paths=[str(root.parent), str(root)], state=str(file), out=str(out))
    subprocess.run([sys.executable, "-c", text], check=True, timeout=300)
    assert_same(model(x)[:, 3 * SEGMENT :], torch.load(tmp_path / "out"))
    again = RunState.load(tmp_path / "state.safetensors")
    assert (again.segments, again.plan, again.dims) == (state.segments, state.plan, state.dims)
    assert_same(dict(state.values), dict(again.values), 0.0)
    with torch.no_grad():
        model.layers[1].mix.weight.mul_(1.001)
    with pytest.raises(StateError, match="made with other weights"):
        fast.run(x, state=again)
    fast.run(x, state=state)  # made in this process, whose weights are the caller's own affair


def test_files_that_hold_no_state_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, str(tmp_path / "a"))
    (tmp_path / "b").write_text("no tensors")
    for name in "ab":
        with pytest.raises(StateError, match="holds no state"):
            RunState.load(tmp_path / name)


# ---- refusals ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_states_of_others_are_refused() -> None:
    x = features(5)
    _, state = rmtcompile.optimize(made(Toy)).run(x)
    for other, part, what in (
        (made(lambda: Toy(n_layers=4)), x, "another plan"),
        (made(lambda: Toy(back=2)), x, "another plan"),
        (made(Toy, torch.float32), x.float(), "inputs of another kind"),
    ):
        with pytest.raises(StateError, match=what):
            rmtcompile.optimize(other).run(part, state=state)
    fast = rmtcompile.optimize(made(Toy))
    with pytest.raises(StateError, match="inputs of another shape"):
        fast.run(features(5, batch=3), state=state)
    with pytest.raises(StateError, match="made with other weights"):
        rmtcompile.optimize(made(Toy, seed=1)).run(x, state=state)
    lacking = replace(state, values=dict(list(state.values.items())[1:]))
    with pytest.raises(StateError, match=r"lacks values .*\n  cell 0: .*, segment 4"):
        fast.run(x, state=replace(lacking, origin=None, weights=state.weighed()))
    halves = replace(state, values={key: value[:1] for key, value in state.values.items()})
    low = replace(state, values={key: value.float() for key, value in state.values.items()})
    for broken in (halves, low):
        with pytest.raises(StateError, match=r"cell 0: aten.*\n.*the program: torch.float64\[2, 4\]"):
            fast.run(x, state=broken)


@torch.no_grad()
def test_states_that_do_not_fit_each_other_are_not_joined() -> None:
    x = features(5)
    fast = rmtcompile.optimize(made(Toy))
    _, a = fast.run(x)
    _, b = fast.run(x[:, :-SEGMENT])
    _, c = fast.run(x[:, : -SEGMENT + 1])
    _, d = fast.run(x[:, : -SEGMENT + 2])
    with pytest.raises(StateError, match="same segment"):
        RunState.join([a, b])
    with pytest.raises(StateError, match="equally long"):
        RunState.join([c, d])
    for sizes in ([1, 2], [0, 2], 3):
        with pytest.raises(StateError, match="no parts of"):
            a.split(sizes)
    with pytest.raises(StateError, match="no states to join"):
        RunState.join([])
    other: Any = {"a": 1}
    with pytest.raises(StateError, match="must be a RunState"):
        fast.run(x, state=other)
    assert repr(d) == "RunState(4 segments, 2 pending; 3 values, 320 bytes)"
    square = replace(a, values={key: value[:, :2].T.expand(2, 2)[None] for key, value in a.values.items()})
    with pytest.raises(StateError, match="does not show which dim"):
        square.split()


class Whole(Toy):
    """A forward that needs its whole input: how, is the argument."""

    def __init__(self, enter: Callable[[Tensor, Tensor, int], Tensor]) -> None:
        super().__init__()
        self.enter = enter

    def forward(self, x: Tensor) -> Tensor:
        states = [x.new_zeros(x.shape[0], x.shape[2]) for _ in self.layers]
        out = []
        for s in range(x.shape[1] // SEGMENT):
            h = self.enter(x, cut(x, s), s)
            for l, layer in enumerate(self.layers):
                h, states[l] = layer(h, states[l])
            out.append(h)
        return torch.cat(out, 1)


def cut(x: Tensor, s: int) -> Tensor:
    return x[:, s * SEGMENT : (s + 1) * SEGMENT]


def shifted(x: Tensor, h: Tensor, s: int) -> Tensor:
    start = max(s * SEGMENT - 1, 0)
    return h + x[:, start : start + 1]


@pytest.mark.parametrize(
    ("enter", "what"),
    [
        (lambda x, h, s: h + x.mean((1, 2))[:, None, None], "aten.mean.dim at .*test_advancing"),
        (lambda x, h, s: cut(x.cumsum(1), s), "aten.cumsum.*needs the whole input"),
        (lambda x, h, s: h + cut(x.flip(1), s), "aten.flip"),
        (shifted, "reads more of the input than its own segment"),
        (lambda x, h, s: h + x[:, :1], "aten.slice.*needs the whole input"),
        (lambda x, h, s: h + cut(x[:, 1:], s).mean(1, keepdim=True), "reads more of the input than"),
        (lambda x, h, s: cut(x / x.shape[1], s), "aten.div.*depends on how long the text becomes"),
        (lambda x, h, s: h + torch.linspace(0, 1, x.shape[1])[s * SEGMENT], "linspace.*how long the text"),
    ],
    ids=["mean", "cumsum", "flip", "before", "first token", "behind", "length", "scale of positions"],
)
@torch.no_grad()
def test_forwards_that_need_the_whole_input_are_refused(enter: Any, what: str) -> None:
    model = made(lambda: Whole(enter))
    fast = rmtcompile.optimize(model)
    assert_same(model(features(5)), fast(features(5)))
    with pytest.raises(UnsupportedError, match=f"cannot be run in parts: .*{what}"):
        fast.run(features(5))


class Counting(Toy):
    """Goes on from where its last call has stopped, by a number of its own."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.read, self.kept = 0, {"read": 0}
        self.where = where

    def forward(self, x: Tensor) -> Tensor:
        start = self.read if self.where == "number" else self.kept["read"]
        out = super().forward(x + start / 8)
        if self.where == "number":
            self.read = start + x.shape[1]
        else:
            self.kept = {"read": start + x.shape[1]}
        return out


@pytest.mark.parametrize("where", ["number", "dict"])
@torch.no_grad()
def test_forwards_that_go_on_by_themselves_are_refused(where: str) -> None:
    model = made(lambda: Counting(where))
    with pytest.raises(UnsupportedError, match=r"goes on by itself from a number .* Counting\.(read|kept)"):
        rmtcompile.optimize(model).run(features(5))


class Writing(Toy):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        x.mul_(0.5)
        return out


@torch.no_grad()
def test_forwards_that_write_into_their_input_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="it writes into its input"):
        rmtcompile.optimize(made(Writing)).run(features(5))


@torch.no_grad()
def test_row_wise_work_on_the_whole_input_is_done_on_the_part() -> None:
    model = made(lambda: Whole(lambda x, h, s: cut(2 * x + 1, s).tanh()))
    got, _ = in_parts(rmtcompile.optimize(model), features(7), [2 * SEGMENT, 5 * SEGMENT])
    assert_same(model(features(7)), got)


@torch.no_grad()
def test_tables_of_positions_may_be_as_long_as_the_text() -> None:
    def enter(x: Tensor, h: Tensor, s: int) -> Tensor:
        angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] / 7
        return h + angles.sin()[s * SEGMENT : (s + 1) * SEGMENT]

    model = made(lambda: Whole(enter))
    got, _ = in_parts(rmtcompile.optimize(model), features(7), [2 * SEGMENT, 5 * SEGMENT])
    assert_same(model(features(7)), got)


@torch.no_grad()
def test_parts_that_keep_other_values_are_told_from_other_models() -> None:
    """A memory that an incomplete segment does not write, and that is returned."""

    class Skips(Toy):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            states, out = [x.new_zeros(x.shape[0], x.shape[2])] * len(self.layers), []
            for h in x.split(SEGMENT, 1):
                for l, layer in enumerate(self.layers):
                    h, new = layer(h, states[l])
                    states[l] = new if x.shape[1] % SEGMENT == 0 else states[l]
                out.append(h)
            return torch.cat(out, 1), torch.stack(states)

    fast = rmtcompile.optimize(made(Skips))
    x = features(5)
    _, state = fast.run(x[:, : 3 * SEGMENT])
    with pytest.raises(StateError, match="carries other values than the one that made the state"):
        fast.run(x[:, 3 * SEGMENT : 5 * SEGMENT - 1], state=state)


@torch.no_grad()
def test_the_last_segment_of_a_part_knows_its_number_in_the_text() -> None:
    """Its epilogue also joins the parts of all segments, which are counted from the start of the part."""

    class Numbered(Toy):
        def forward(self, x: Tensor) -> Tensor:
            parts = super().forward(x).split(SEGMENT, 1)
            return torch.cat([part / (s + 1) for s, part in enumerate(parts)], 1)

    model = made(Numbered)
    got, _ = in_parts(rmtcompile.optimize(model), features(7), [2 * SEGMENT, 5 * SEGMENT])
    assert_same(model(features(7)), got)


class TimeFirst(Toy):
    """f[T, B, D] -> f[T, B, D]."""

    def forward(self, x: Tensor) -> Tensor:
        states = [x.new_zeros(x.shape[1], x.shape[2]) for _ in self.layers]
        out = []
        for h in x.split(SEGMENT, 0):
            h = h.transpose(0, 1)
            for l, layer in enumerate(self.layers):
                h, states[l] = layer(h, states[l])
            out.append(h.transpose(0, 1))
        return torch.cat(out, 0)


@torch.no_grad()
def test_batches_of_time_first_texts() -> None:
    model, x = made(TimeFirst), features(6).transpose(0, 1).contiguous()
    fast = rmtcompile.optimize(model)
    at = 3 * SEGMENT + 1
    _, state = fast.run(x[:at])
    parts = state.split()
    rows = [whole(fast.run(x[at:, i : i + 1], state=one)[0]) for i, one in enumerate(parts)]
    assert_same(model(x)[3 * SEGMENT :], torch.cat(rows, 1))
    joined = RunState.join(parts)
    assert_same(dict(state.values), dict(joined.values), 0.0)
    assert_same(state.pending, joined.pending, 0.0)


@torch.no_grad()
def test_positions_count_from_the_start_of_the_text() -> None:
    def enter(x: Tensor, h: Tensor, s: int) -> Tensor:
        return h + torch.arange(s * SEGMENT, (s + 1) * SEGMENT)[:, None] / 7

    model = made(lambda: Whole(enter))
    got, _ = in_parts(rmtcompile.optimize(model), features(7), [2 * SEGMENT, 5 * SEGMENT])
    assert_same(model(features(7)), got)
