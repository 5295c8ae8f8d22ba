"""forward: loads read what was stored; the same values, and no dependence that the values do not have."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.utils._pytree import tree_leaves
from traced import StrictRun, capture

from rmtcompile.errors import UnsupportedError
from rmtcompile.passes.flat.functionalise import functionalise, overload_name
from rmtcompile.passes.flat.store_forwarding import _blocks, forward_stores

torch.manual_seed(0)


def run(f: Callable[..., Any], *args: torch.Tensor) -> fx.GraphModule:
    """Both passes on a capture, compared with the callable itself, bit by bit."""
    functional = functionalise(capture(f, *args))
    text = str(functional.module.graph)
    result = forward_stores(functional.module)
    assert str(functional.module.graph) == text
    result.graph.lint()
    expected = copy.deepcopy(f)(*[a.clone() for a in args])
    actual = StrictRun(result).run(*[a.clone() for a in args])
    if functional.writes:
        actual = actual[0]
    for mine, theirs in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        assert mine is theirs or torch.equal(mine, theirs)
    assert forward_stores(result) is result, "one walk reaches the fixed point"
    return result


def names(gm: fx.GraphModule) -> list[str]:
    return [overload_name(n) for n in gm.graph.nodes if overload_name(n)]


def ancestors(node: fx.Node) -> set[str]:
    """Names of the placeholders, attributes and random inputs that a node is computed from."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        at = stack.pop()
        if at not in seen:
            seen.add(at)
            stack.extend(at.all_input_nodes)
    return {str(n.target) for n in seen if n.op in ("placeholder", "get_attr")}


def outputs(gm: fx.GraphModule) -> list[fx.Node]:
    (node,) = gm.graph.find_nodes(op="output")
    return [leaf for leaf in tree_leaves(node.args[0]) if isinstance(leaf, fx.Node)]


def rand(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64)


class State(nn.Module):
    def __init__(self, body: Callable[..., Any], **state: Any) -> None:
        super().__init__()
        for name, value in state.items():
            setattr(self, name, value)
        self.body = body

    def forward(self, *args: torch.Tensor) -> Any:
        return self.body(self, *args)


# -- the five cases --


def test_fires() -> None:
    result = run(lambda a, b: torch.stack([a, b])[1] * 2, rand(3), rand(3))
    assert names(result) == ["mul"]
    assert ancestors(outputs(result)[0]) == {"b_1"}


def test_leaves_other_graphs_alone() -> None:
    gm = capture(lambda x, y: (x[0] + y.t()[1:], torch.stack([x, y]).sum()), rand(4, 4), rand(4, 4))
    assert forward_stores(gm) is gm


def test_several_users() -> None:
    def f(a: torch.Tensor, b: torch.Tensor) -> Any:
        s = torch.stack([a, b])
        return s * 2, s[0] + 1, s[1] + s[0], s.unbind(0)

    result = run(f, rand(3), rand(3))
    assert names(result).count("stack") == 1
    assert "select" not in names(result)


def test_nested_chain() -> None:
    def f(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> Any:
        s = torch.stack([torch.cat([a, b], 1), torch.cat([b, c], 1)], 1).transpose(0, 1)
        return s.contiguous().roll(1, 0).flip(0)[0][:, 1:3].detach().unsqueeze(0).squeeze(0)[:, :1] * 2

    result = run(f, rand(2, 2), rand(2, 2), rand(2, 2))
    assert ancestors(outputs(result)[0]) == {"a_1"}


# -- one rule each: the outputs, by the inputs that they may depend on --


@pytest.mark.parametrize(
    ("f", "depends"),
    [
        (lambda a, b, c: torch.stack([a, b, c], -1)[..., 1], "b"),
        (lambda a, b, c: torch.stack([a, b, c])[1:][1], "c"),
        (lambda a, b, c: torch.stack([a, b, c])[:2], "ab"),
        (lambda a, b, c: torch.cat([a, b, c])[4:6], "b"),
        (lambda a, b, c: torch.cat([a, b, c], 1)[:, 5:10], "bc"),
        (lambda a, b, c: torch.cat([a, b, c])[::4], "abc"),
        (lambda a, b, c: torch.cat([a, b, c]).split(4)[2], "c"),
        (lambda a, b, c: torch.cat([a, b, c]).chunk(3)[0], "a"),
        (lambda a, b, c: torch.cat([a, b, c]).narrow(0, 5, 2), "b"),
        (lambda a, b, c: torch.stack([a, b, c]).unbind(0)[2], "c"),
        (lambda a, b, c: torch.stack([a, b, c]).roll(1, 0)[0], "c"),
        (lambda a, b, c: torch.stack([a, b, c]).roll(1, 0)[1:], "ab"),
        (lambda a, b, c: torch.stack([a, b, c]).roll((1, 1), (0, 1))[1], "a"),
        (lambda a, b, c: torch.cat([a, b, c]).roll(4, 0)[2:6], "ac"),
        (lambda a, b, c: torch.stack([a, b, c]).flip(0)[0], "c"),
        (lambda a, b, c: torch.stack([a, b, c]).flip(0, 1)[:2], "bc"),
        (lambda a, b, c: torch.stack([a, b, c]).transpose(0, 2)[:, :, 1], "b"),
        (lambda a, b, c: torch.stack([a, b, c]).permute(1, 2, 0)[0, 1, 2], "c"),
        (lambda a, b, c: torch.stack([a, b, c]).view(3, -1)[1], "b"),
        (lambda a, b, c: torch.stack([a, b, c]).flatten(0, 1)[4:8], "b"),
        (lambda a, b, c: torch.stack([a, b, c]).flatten()[17], "b"),
        (lambda a, b, c: torch.cat([a, b, c]).view(3, 4, 4)[2], "c"),
        (lambda a, b, c: torch.cat([a, b, c]).unflatten(0, (3, 2, 2))[0, 1], "a"),
        (lambda a, b, c: torch.stack([a, b, c]).unsqueeze(1)[:, 0][1], "b"),
        (lambda a, b, c: torch.stack([a, b, c]).detach().clone()[1], "b"),
        (lambda a, b, c: torch.stack([a, b, c]).expand(2, 3, 4, 4)[1, 0], "a"),
        (lambda a, b, c: torch.stack([a, b, c])[torch.tensor([2, 0])], "ac"),
        (lambda a, b, c: torch.stack([a, b, c]).index_select(0, torch.tensor([1, 1])), "b"),
        (lambda a, b, c: torch.cat([a, b, c])[torch.arange(4, 8)], "b"),
        (lambda a, b, c: torch.cat([a, b, c], 1)[:, torch.arange(6) * 2][:, :4], "ab"),
        (lambda a, b, c: torch.cat([a, b, c])[torch.arange(12)][8:], "c"),
        (lambda a, b, c: torch.stack([a, b, c])[:, 2][0], "a"),
        (lambda a, b, c: torch.stack([a, b, c])[..., 1:3][:, :, 0][1], "b"),
        (lambda a, b, c: torch.stack([torch.stack([a, b]), torch.stack([b, c])], 1)[1, 1], "c"),
        (lambda a, b, c: torch.select_scatter(a, b[0], 0, 1)[1], "b"),
        (lambda a, b, c: torch.select_scatter(a, b[0], 0, 1)[2], "a"),
        (lambda a, b, c: torch.select_scatter(a, b[0], 0, 1)[1:2], "b"),
        (lambda a, b, c: torch.select_scatter(torch.select_scatter(a, b[0], 0, 1), c[0], 0, 1)[::2], "a"),
        (lambda a, b, c: torch.slice_scatter(a, b[:2], 0, 1, 3)[1:3], "b"),
        (lambda a, b, c: torch.slice_scatter(a, b[:2], 0, 1, 3)[2], "b"),
        (lambda a, b, c: torch.slice_scatter(a, b[:2], 0, 1, 3)[3:], "a"),
        (lambda a, b, c: torch.slice_scatter(a, b[:2], 0, 1, 3)[2:], "ab"),
        (lambda a, b, c: torch.slice_scatter(a, b[:2], 0, 0, 4, 2)[::2], "b"),
        (lambda a, b, c: torch.slice_scatter(a, b[:2], 0, 0, 4, 2)[1::2], "a"),
        (lambda a, b, c: torch.slice_scatter(a, b[:2], 0, 0, 4, 2)[3], "a"),
        (lambda a, b, c: torch.slice_scatter(torch.cat([a, c], 1), torch.cat([b, b], 1)[:2], 0, 1, 3)[:, 0],
         "ab"),
        (lambda a, b, c: torch.slice_scatter(torch.stack([a, c], 2), torch.stack([b, a], 2)[:2], 0, 0, 2)
         [..., 0],
         "ab"),
        (lambda a, b, c: torch.slice_scatter(a, b), "b"),
        (lambda a, b, c: torch.cat([b]), "b"),
        (lambda a, b, c: torch.stack([b])[0], "b"),
        (lambda a, b, c: a.t().t().unsqueeze(0).squeeze(0)[:].view(4, 4), "a"),
        (lambda a, b, c: torch.stack([a, b, c]).view(-1, 4).t().reshape(4, 3, 4)[:, 1], "b"),
    ],
)  # fmt: skip
def test_rules(f: Callable[..., torch.Tensor], depends: str) -> None:
    result = run(lambda a, b, c: f(a, b, c) + 0, rand(4, 4), rand(4, 4), rand(4, 4))
    assert ancestors(outputs(result)[0]) == {f"{letter}_1" for letter in depends}


# -- layouts --


def test_views_of_other_layouts() -> None:
    def f(a: torch.Tensor, b: torch.Tensor) -> Any:
        s = torch.stack([a.t(), b])
        x = s[0].view(-1) * 2
        y = torch.stack([a.t(), b], -1)[..., 0] * 3
        return (
            x,
            y.permute(1, 0).view(2, 2, 3) if not y.is_contiguous() else y.view(-1),
            s[0].view(torch.int64),
        )

    run(f, rand(3, 4), rand(4, 3))


def test_strided_reads_keep_their_layout() -> None:
    def f(a: torch.Tensor, b: torch.Tensor) -> Any:
        s = torch.stack([a.t(), b])
        inner = (s[0] * 2).contiguous()
        return torch.as_strided(s, (3,), (5,), 2), torch.as_strided(inner, (2, 2), (1, 4), 1), s[1]

    run(f, rand(3, 4), rand(4, 3))


def test_outputs_do_not_become_inputs() -> None:
    def f(a: torch.Tensor, b: torch.Tensor) -> Any:
        return torch.stack([a, b])[0], a

    result = run(f, rand(3), rand(3))
    a = rand(3)
    first, second = result(a, rand(3))
    assert first.data_ptr() != a.data_ptr()
    assert second.data_ptr() == a.data_ptr()


def test_gradients_stay_cut() -> None:
    def f(a: torch.Tensor, b: torch.Tensor) -> Any:
        with torch.no_grad():
            kept = torch.stack([a * 2, b])
        return (kept[0] * a + torch.stack([a, b]).detach()[0] * a + torch.stack([a, b])[0]).sum()

    a, b = rand(3).requires_grad_(), rand(3)
    result = forward_stores(functionalise(capture(f, a, b)).module)
    (mine,) = torch.autograd.grad(result(a, b), a)
    (theirs,) = torch.autograd.grad(f(a, b), a)
    assert torch.equal(mine, theirs)


# -- recurrences --


def layer_dependences(f: Callable[..., Any], *args: torch.Tensor) -> list[set[str]]:
    return [ancestors(node) for node in outputs(run(f, *args))]


def test_state_of_all_layers_in_one_tensor() -> None:
    """Every layer reads its own memory only, though all memories are one tensor, written by slices."""

    def body(m: Any, *xs: torch.Tensor) -> Any:
        for _ in range(3):
            for layer, x in enumerate(xs):
                m.state[..., layer] = m.state[..., layer] * 0.5 + x
                m.state[..., layer] += 1
        return [m.state[..., layer] + 0 for layer in range(len(xs))]

    module = State(body, state=rand(2, 4, 3))
    gm = run(module, rand(2, 4), rand(2, 4), rand(2, 4))
    for layer in range(3):
        seen = ancestors(outputs(gm)[layer])
        assert len([name for name in seen if name.startswith("xs")]) <= 1, seen
        inputs = [n for n in gm.graph.nodes if n.op == "placeholder" and str(n.target) in seen]
        assert [list(gm.graph.find_nodes(op="placeholder")).index(n) for n in inputs] == [layer]


def test_state_sliced_in_two_dimensions() -> None:
    def body(m: Any, a: torch.Tensor, b: torch.Tensor) -> Any:
        for _ in range(2):
            m.state[0, :, :2] = m.state[0, :, :2] * 0.5 + a
            m.state[1][:, :2] = m.state[1, :, :2] + b
            m.state[:, :, 3] = 0
        return m.state[0, :, 0] + 0, m.state[1, :, 1] + 0, m.state[0, :, 2] + 0

    first, second, untouched, *_ = layer_dependences(State(body, state=rand(2, 3, 4)), rand(3, 2), rand(3, 2))
    assert len(untouched) == 1
    assert len(first - untouched) == len(second - untouched) == 1
    assert first != second


def test_stack_and_roll_between_steps() -> None:
    def f(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> Any:
        memory = torch.stack([a, b, c])
        for _ in range(2):
            new = [memory[layer] * 2 for layer in range(3)]
            memory = torch.stack(new).roll(1, 0)
        return [m + 0 for m in memory.unbind(0)]

    assert layer_dependences(f, rand(2), rand(2), rand(2)) == [{"b_1"}, {"c_1"}, {"a_1"}]


def test_carried_view_overwritten_later() -> None:
    """The view that layer 0 carries is overwritten by layer 1: the dependence is on layer 1."""

    def f(a: torch.Tensor, b: torch.Tensor) -> Any:
        shared = torch.zeros_like(a)
        shared.copy_(a)
        carried = shared[:2]
        shared.copy_(b)
        return carried + 0

    assert layer_dependences(f, rand(3), rand(3)) == [{"b_1"}]


def test_buffer_window() -> None:
    """A cache that drops its oldest segment: what is read of it is what was appended."""

    def body(m: Any, a: torch.Tensor, b: torch.Tensor) -> Any:
        m.cache.copy_(torch.cat([m.cache[:, 2:], a], 1))
        m.cache.copy_(torch.cat([m.cache[:, 2:], b], 1))
        return m.cache[:, :2] + 0, m.cache[:, 2:4] + 0, m.cache[:, 4:] + 0

    oldest, middle, newest, *_ = layer_dependences(State(body, cache=rand(2, 6)), rand(2, 2), rand(2, 2))
    assert len(oldest) == len(middle) == len(newest) == 1
    assert len(oldest | middle | newest) == 3


def test_scope_of_loads_is_the_readers() -> None:
    gm = capture(lambda a: (torch.cat([a, a])[1:3] * 2, torch.cat([a, a])[1:3] * 3), rand(2))
    for node in gm.graph.nodes:
        node.meta["scope"] = node.name
    for node in forward_stores(gm).graph.nodes:
        assert node.meta["scope"]


def test_refuses_graphs_that_write() -> None:
    gm = capture(lambda x: (x * 2).add_(1), rand(2))
    with pytest.raises(UnsupportedError) as caught:
        forward_stores(gm)
    lines = str(caught.value).splitlines()
    assert lines[0] == "forward needs a functional graph"
    assert "add_" in lines[1]
    assert lines[2] == "  help: functionalise first"


def test_deep_chains() -> None:
    """A thousand stores before the load: no recursion limit, and time far from quadratic."""

    def f(x: torch.Tensor) -> Any:
        state = torch.zeros(2000, 2, dtype=torch.float64)
        for i in range(2000):
            state = torch.select_scatter(state, x, 0, i)
        return state[0] + 0, state[:, 0][1] + 0

    gm = capture(f, rand(2))
    result = forward_stores(gm)
    assert names(result).count("select_scatter") == 0
    assert torch.equal(result(torch.ones(2, dtype=torch.float64))[0], torch.ones(2, dtype=torch.float64))


# -- properties --


@given(st.lists(st.sampled_from([1, 2, 3, 4]), max_size=4), st.randoms())
def test_blocks_cover(inner: list[int], random: Any) -> None:
    factors = [p for size in inner for p in ([2, 2] if size == 4 else [size])]
    random.shuffle(factors)
    outer: list[int] = []
    for factor in factors:
        if outer and random.random() < 0.5:
            outer[-1] *= factor
        else:
            outer.append(factor)
    blocks = _blocks(inner, outer)
    assert sorted(d for a, _ in blocks for d in a) == list(range(len(inner)))
    assert sorted(d for _, b in blocks for d in b) == list(range(len(outer)))


@st.composite
def programs(draw: st.DrawFn) -> list[tuple[Any, ...]]:
    number = st.integers(0, 1000)
    kinds = st.sampled_from(
        ["stack", "stack", "cat", "cat", "select", "select", "select", "slice", "slice", "slice", "permute",
         "reshape", "unsqueeze", "squeeze", "roll", "flip", "select_scatter", "select_scatter",
         "slice_scatter", "slice_scatter", "clone", "detach", "unbind", "split", "index", "expand", "mul",
         "select_write", "slice_write", "flatten"]
    )  # fmt: skip
    return draw(st.lists(st.tuples(kinds, number, number, number), min_size=4, max_size=30))


# A sum would depend on the layout of what it adds up, in its last bits; a maximum does not.
def run_program(program: list[tuple[Any, ...]], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    pool = list(tensors)
    for kind, a, b, c in program:
        x, y = pool[-1 - a % min(len(pool), 6)], pool[b % len(pool)]
        if not x.dim() or x.numel() > 2000:
            continue
        d = b % x.dim()
        n = x.shape[d]
        low = c % n
        high = low + 1 + b % (n - low)
        step = 1 + c % 3 // 2
        same = [t for t in pool if t.shape == x.shape]
        if kind == "stack":
            parts = [same[a % len(same)], x, same[c % len(same)]]
            pool.append(torch.stack(parts[: 1 + c % 3], b % (x.dim() + 1)))
        elif kind == "cat":
            pool.append(torch.cat([x, same[c % len(same)], x][: 1 + c % 3], d))
        elif kind == "select":
            pool.append(x.select(d, c % n))
        elif kind == "slice":
            pool.append(x[(slice(None),) * d + (slice(low, high, step),)])
        elif kind == "permute":
            backwards = tuple(reversed(range(x.dim())))
            pool.append(x.transpose(d, c % x.dim()) if c % 2 else x.permute(backwards))
        elif kind == "reshape" and n % 2 == 0:
            pool.append(x.unflatten(d, (2, n // 2) if c % 2 else (n // 2, 2)))
        elif kind == "flatten":
            pool.append(x.flatten(d, min(d + 1, x.dim() - 1)))
        elif kind == "unsqueeze":
            pool.append(x.unsqueeze(d))
        elif kind == "squeeze":
            pool.append(x.squeeze())
        elif kind == "roll":
            pool.append(x.roll(c % 5, d))
        elif kind == "flip":
            pool.append(x.flip(d))
        elif kind == "select_scatter":
            pool.append(torch.select_scatter(x, y.amax() + x.select(d, c % n), d, low))
        elif kind == "slice_scatter":
            source = x[(slice(None),) * d + (slice(low, high, step),)]
            pool.append(torch.slice_scatter(x, source * 2 + y.amax(), d, low, high, step))
        elif kind == "clone":
            pool.append(x.clone() if c % 2 else x.contiguous())
        elif kind == "detach":
            pool.append(x.detach())
        elif kind == "unbind":
            pool.extend(x.unbind(d)[:2])
        elif kind == "split":
            pool.extend(x.split(1 + c % n, d)[:3])
        elif kind == "index":
            pool.append(x.index_select(d, torch.tensor([low, 0])))
        elif kind == "expand":
            pool.append(x.unsqueeze(0).expand(2, *x.shape))
        elif kind == "mul":
            pool.append(x * 0.5)
        elif kind == "select_write":
            z = x.clone()
            z.select(d, low).add_(y.amax())
            pool.append(z)
        elif kind == "slice_write":
            z = x.clone()
            z[(slice(None),) * d + (slice(low, high, step),)] *= 2
            pool.append(z)
    return [t * 1 for t in pool]


@pytest.mark.parametrize(
    ("f", "left"),
    [
        (lambda x: torch.cat([x[:0], x * 2, x[3:]], 0), []),
        (lambda x: torch.cat([torch.tensor([]), x * 2], 0), []),
        (lambda x: torch.cat([x[:, :0], x * 2, x, x[:, :0]], 1), ["cat"]),
        (lambda x: torch.cat([x[:0], x[:0]], 0), ["cat"]),
        (lambda x: torch.cat([x[:0], x.double()], 0), []),
        (lambda x: torch.cat([x[:0].double(), x], 0), ["cat"]),
    ],
)
def test_empty_parts_are_left_out(f: Callable[[torch.Tensor], Any], left: list[str]) -> None:
    gm = run(f, rand(3, 4).float())
    assert [name for name in names(gm) if name == "cat"] == left


POSITIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "index_copy": lambda b, x: b.index_copy(0, torch.arange(3) + 2, x)[2:5],
    "index_put": lambda b, x: b.index_put((torch.arange(2, 5),), x)[2:5],
    "from the end": lambda b, x: b.index_put((torch.arange(-3, 0),), x)[3:],
    "every second": lambda b, x: b.index_copy(0, torch.arange(3) * 2, x)[0:5:2],
    "written out": lambda b, x: b.index_copy(0, torch.tensor([1, 2, 3]), x)[1:4],
}


@pytest.mark.parametrize("name", POSITIONS)
def test_a_load_of_what_was_stored_at_known_positions(name: str) -> None:
    gm = run(POSITIONS[name], rand(6, 4), rand(3, 4))
    assert not [n for n in names(gm) if n in ("index_copy", "index_put")]


@pytest.mark.parametrize(
    "f",
    [
        lambda b, x: b.index_copy(0, torch.tensor([3, 2, 1]), x)[1:4],
        lambda b, x: b.index_copy(0, x[:, 0].argsort(), x)[0:3],
        lambda b, x: b.index_put((torch.arange(3),), x, accumulate=True)[:3],
        lambda b, x: b.index_put((torch.arange(3),), x[0])[:3],
        lambda b, x: b.index_put((torch.tensor([True, True, True, False, False, False]),), x)[:3],
    ],
)
def test_stores_at_other_positions_stay(f: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    assert {"index_copy", "index_put"} & set(names(run(f, rand(6, 4), rand(3, 4))))


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs())
def test_random_programs(program: list[tuple[Any, ...]]) -> None:
    run(lambda x, y, z: run_program(program, [x, y, z]), rand(2, 3, 4), rand(4, 3).t(), rand(6))
