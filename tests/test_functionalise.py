"""functionalise: value semantics, the same bits, and the writes named."""

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
from rmtcompile.passes.flat.functionalise import (
    Functional,
    functionalise,
    is_mutating,
    overload_name,
)

torch.manual_seed(0)


def attribute(gm: fx.GraphModule, name: str) -> Any:
    value: Any = gm
    for part in name.split("."):
        value = getattr(value, part)
    return value


def check(f: Callable[..., Any], *args: torch.Tensor) -> Functional:
    """Functionalises a capture and compares outputs and final state with the original graph, bit by bit."""
    gm = capture(f, *args)
    text = str(gm.graph)
    result = functionalise(gm)
    assert str(gm.graph) == text
    result.module.graph.lint()
    assert not any(is_mutating(n) for n in result.module.graph.nodes)

    eager, inputs = copy.deepcopy(gm), [a.clone() for a in args]
    expected = fx.Interpreter(eager).run(*inputs)
    ours = [a.clone() for a in args]
    actual, written = StrictRun(result.module).run(*ours), []
    if result.writes:
        actual, written = actual
    for mine, theirs in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        assert mine is theirs or torch.equal(mine, theirs)
    final = dict(zip(result.writes, written, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ours, args, strict=True)), "an input was written"
    names = [str(n.target) for n in gm.graph.nodes if n.op == "placeholder"]
    for name, before, after in zip(names, args, inputs, strict=True):
        assert torch.equal(final.get(name, before), after), name
    # Write the values back as a runtime would; then every attribute must hold what the original left there.
    with torch.no_grad():
        for name, value in final.items():
            if name not in names:
                attribute(gm, name).copy_(value.clone())
    for name in {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}:
        if isinstance(attribute(gm, name), torch.Tensor):
            assert torch.equal(attribute(gm, name), attribute(eager, name)), name
    return result


def names(result: Functional) -> list[str]:
    return [overload_name(n) for n in result.module.graph.nodes if overload_name(n)]


def rand(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64)


class State(nn.Module):
    """A module with tensors to write into."""

    def __init__(self, body: Callable[..., Any], **state: Any) -> None:
        super().__init__()
        for name, value in state.items():
            setattr(self, name, value)
        self.body = body

    def forward(self, *args: torch.Tensor) -> Any:
        return self.body(self, *args)


# -- the five cases --


def test_fires() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y[0] = y[1] + 1
        y.mul_(3)
        return y

    result = check(f, rand(3, 4))
    assert names(result) == ["mul", "select", "add", "select_scatter", "mul"]
    assert result.writes == {}


def test_leaves_other_graphs_alone() -> None:
    gm = capture(lambda x, y: (x @ y).relu().view(-1), rand(2, 3), rand(3, 4))
    result = functionalise(gm)
    assert result.module is gm
    assert result.writes == {}


def test_several_users() -> None:
    def f(x: torch.Tensor) -> Any:
        y = x + 0
        first, second = y[0], y[1]
        before = first + second
        first.add_(second)
        second.mul_(2)
        return before, first + second, y.sum(0), y.t()

    check(f, rand(2, 3))


def test_nested_chain() -> None:
    def f(x: torch.Tensor) -> Any:
        y = x.clone()
        view = y.view(2, 6, 4).transpose(0, 1)[2:5].unsqueeze(1).select(-1, 2)
        view.add_(1).mul_(view)
        y.view(-1)[::5] = 7
        return y, view.reshape(-1), x

    check(f, rand(3, 4, 4))


def test_identities_go() -> None:
    def f(x: torch.Tensor, m: torch.Tensor) -> Any:
        m = m.to(torch.float64).contiguous().to(m.device)
        return x * m, x.double() + m.float()

    result = check(f, rand(2, 3), rand(2, 3))
    assert names(result) == ["mul", "to", "add"]


# -- operations --


@pytest.mark.parametrize(
    "write",
    [
        lambda y, x: y.copy_(x),
        lambda y, x: y.copy_(x[0]),
        lambda y, x: y.copy_(x.float()),
        lambda y, x: y.copy_(x.t().contiguous().t()),
        lambda y, x: y.zero_(),
        lambda y, x: y.fill_(2.5),
        lambda y, x: y.fill_(x[0, 0]),
        lambda y, x: y.add_(x[0], alpha=2).sub_(1).div_(x + 1),
        lambda y, x: y.float().add_(x),
        lambda y, x: y.masked_fill_(x > 0.5, 0.0),
        lambda y, x: y.scatter_(1, torch.zeros_like(x, dtype=torch.int64), x),
        lambda y, x: y.index_add_(0, torch.tensor([1, 0]), x[:2]),
        lambda y, x: y.index_copy_(0, torch.tensor([2, 0]), x[:2]),
        lambda y, x: y.__setitem__((slice(None), torch.tensor([0, 2])), 1.0),
        lambda y, x: y.__setitem__((Ellipsis, 1), x[..., 0]),
        lambda y, x: y.clamp_(0.2, 0.7).relu_().sigmoid_().tanh_(),
        lambda y, x: y.addmm_(x, x),
        lambda y, x: y.lerp_(x, 0.25),
        lambda y, x: y.diagonal().mul_(2),
        lambda y, x: y.t().copy_(x),
        lambda y, x: y.unsqueeze_(0).squeeze_(0).t_().add_(x),
        lambda y, x: y.detach_().add_(1),
        lambda y, x: y.detach().add_(1),
        lambda y, x: torch.add(x, x, out=y),
        lambda y, x: torch.as_strided(y, (2,), (4,), 1).add_(1),
        lambda y, x: y.view(-1).view(9).unflatten(0, (3, 3)).flatten()[2:5].copy_(x[0]),
        lambda y, x: [part.add_(i) for i, part in enumerate(y.unbind(1))],
        lambda y, x: [part.mul_(i) for i, part in enumerate(y.split([1, 2], 1))],
        lambda y, x: [part.mul_(i) for i, part in enumerate(y.chunk(2, 0))],
        lambda y, x: nn.functional.dropout(y, 0.5, False).add_(1),
        lambda y, x: y.view(torch.int64).bitwise_xor_(1),
        lambda y, x: y.__iadd__(x).__imul__(2),
        lambda y, x: y.expand(3, 3).add_(x),
        lambda y, x: y.narrow(0, 1, 2).copy_(y.narrow(0, 0, 2).clone()),
        lambda y, x: y.movedim(0, 1).swapaxes(0, 1).mT.select(0, 1).zero_(),
    ],
)  # fmt: skip
def test_operations(write: Callable[..., Any]) -> None:
    def f(x: torch.Tensor) -> Any:
        y = x * 1
        view, row = y.view(-1), y[1]
        write(y, x)
        return y, view + 1, row * 2, y.t().reshape(-1)

    check(f, rand(3, 3))
    # The same on memory that outlives the call, where the capture's record of aliasing is of no help.
    module = State(lambda m, x: (write(m.y, x), m.y.view(-1) + 1, m.y[1] * 2, m.y), y=rand(3, 3))
    used = write.__code__.co_names
    if not {"unsqueeze_", "float"} & set(used):
        assert check(module, rand(3, 3)).writes


def test_scope_of_replays_is_the_readers() -> None:
    def f(x: torch.Tensor) -> Any:
        y = x * 1
        row = y[0]
        y.add_(1)
        return row * 2, row * 3

    gm = capture(f, rand(2, 3))
    for node in gm.graph.nodes:
        node.meta["scope"] = node.name
    graph = functionalise(gm).module.graph
    readers = [n for n in graph.nodes if overload_name(n) == "mul" and overload_name(n.args[0]) == "select"]
    assert [n.meta["scope"] for n in readers] == ["mul_1", "mul_2"]
    assert [n.args[0].meta["scope"] for n in readers] == ["mul_1", "mul_2"]


# -- state --


def test_buffer_updated_with_copy() -> None:
    def body(m: Any, x: torch.Tensor) -> Any:
        out = x + m.memory
        m.memory.copy_(out * 0.5)
        return out, m.memory.sum()

    result = check(State(body, memory=rand(2, 3)), rand(2, 3))
    (value,) = result.writes.values()
    assert overload_name(value) == "mul", "a whole write needs no scatter"


def test_state_of_all_layers_in_one_tensor() -> None:
    def body(m: Any, x: torch.Tensor) -> Any:
        for _ in range(2):
            for layer in range(3):
                x = x + m.state[..., layer]
                m.state[..., layer] = m.state[..., layer] * 0.5 + x
        return x

    result = check(State(body, state=rand(2, 4, 3)), rand(2, 4))
    assert len(result.writes) == 1


def test_carried_view_overwritten_later() -> None:
    def f(x: torch.Tensor, shared: torch.Tensor) -> Any:
        carried: list[Any] = [None, None, None]
        out = x
        for _ in range(2):
            for layer in range(3):
                if carried[layer] is not None:
                    out = out + carried[layer]
                shared.mul_(0.5).add_(out)
                carried[layer] = shared[:2].t().t()
        return out, carried

    result = check(f, rand(2, 3), rand(4, 3)[:1].expand(4, 3)[:2].clone())
    assert list(result.writes) == ["shared_1"]


def test_two_names_for_one_tensor() -> None:
    tensor = rand(2, 3)

    def body(m: Any, x: torch.Tensor) -> Any:
        y = x + m.b
        m.a.add_(y)
        z = m.b * 2
        m.b[0] = z[1]
        return m.a + z, m.b.view(-1)

    module = State(body)
    module.register_buffer("a", tensor)
    module.register_buffer("b", tensor.view(2, 3))
    gm = capture(module, rand(2, 3))
    assert len({n.target for n in gm.graph.nodes if n.op == "get_attr"}) == 2
    assert len(check(module, rand(2, 3)).writes) == 1


@pytest.mark.parametrize(
    "part",
    [
        lambda t: t[1],
        lambda t: t[:, 1:3],
        lambda t: t[..., 2],
        lambda t: t.transpose(0, 2),
        lambda t: t.transpose(0, 2)[1:3, 1],
        lambda t: t.view(-1),
        lambda t: t[0:1, 2],
    ],
)
def test_attributes_that_are_views_of_each_other(part: Callable[[torch.Tensor], torch.Tensor]) -> None:
    whole = rand(2, 3, 4)

    def body(m: Any, x: torch.Tensor) -> Any:
        a = m.part * 2
        m.whole.add_(1)
        b = m.part * 2
        m.part.mul_(3)
        return a, b, m.whole * x, m.part

    assert len(check(State(body, part=part(whole), whole=whole), rand(2, 3, 4)).writes) == 1


def test_disjoint_attributes_of_one_storage() -> None:
    whole = rand(3, 2)

    def body(m: Any, x: torch.Tensor) -> Any:
        m.a.add_(x)
        m.b.mul_(m.a)
        return m.a + m.b

    assert len(check(State(body, a=whole[:, 0], b=whole[:, 1]), rand(3)).writes) == 2


def test_gradients_do_not_pass_a_copy_without_gradients() -> None:
    def body(m: Any, x: torch.Tensor) -> Any:
        y = x * 2
        with torch.no_grad():
            m.memory.copy_(y)
        return (y + m.memory).sum()

    x = rand(3).requires_grad_()
    result = functionalise(capture(State(body, memory=rand(3)), x))
    loss, _ = result.module(x)
    (gradient,) = torch.autograd.grad(loss, x)
    assert torch.equal(gradient, torch.full_like(x, 2))


def test_markers_keep_their_order() -> None:
    def f(x: torch.Tensor) -> Any:
        y = x + 1
        with torch.no_grad():
            y.mul_(2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = y.float() @ y.float().t()
            z.exp_()
        return z

    result = check(f, rand(3, 3))
    order = [n.name for n in result.module.graph.nodes if n.op == "call_function"]
    marks = [name for name in order if "grad_enabled" in name or "autocast" in name]
    assert marks == ["_set_grad_enabled", "_set_grad_enabled_1", "_enter_autocast", "_exit_autocast"]
    assert order.index("_set_grad_enabled") < order.index("mul_tensor") < order.index("_set_grad_enabled_1")


# -- refusals --


def refusal(f: Callable[..., Any], *args: torch.Tensor) -> list[str]:
    with pytest.raises(UnsupportedError) as caught:
        functionalise(capture(f, *args))
    return str(caught.value).splitlines()


def test_refuses_shape_change_of_an_input() -> None:
    lines = refusal(lambda x: x.unsqueeze_(0) + 1, rand(2))
    assert lines[0] == "a change of an input's or attribute's shape in place: aten.unsqueeze_.default"
    assert "unsqueeze_(" in lines[1] or "unsqueeze_.default](args" in lines[1]
    assert lines[2].startswith("  help: write it out of place")


def test_refuses_new_storage() -> None:
    lines = refusal(lambda x: (x * 1).resize_(2), rand(4))
    assert (
        lines[0] == "an operation that changes what a tensor is, not only what it holds: aten.resize_.default"
    )


def test_refuses_statistics() -> None:
    lines = refusal(State(lambda m, x: m.norm(x), norm=nn.BatchNorm1d(3).double()), rand(4, 3))
    assert lines[0] == "running statistics that are updated in training mode: aten.batch_norm.default"


def test_refuses_a_view_without_inverse() -> None:
    lines = refusal(lambda x: (x * 1).unfold(0, 2, 2).mul_(2), rand(4))
    assert lines[0] == "a write through a view that cannot be undone: aten.unfold.default"
    assert "mul_" in lines[1]


def test_refuses_an_undeclared_view() -> None:
    lines = refusal(lambda x: torch.einsum("ij->ji", x * 1).add_(1), rand(2, 2))
    assert lines[0] == "a write through a view that cannot be undone: aten.einsum.default"


def test_refuses_tangled_attributes() -> None:
    whole = rand(12)
    lines = refusal(State(lambda m, x: m.a.add_(m.b.sum() + x), a=whole[:8], b=whole[4:]), rand(8))
    assert lines[0] == "a write into memory that another attribute sees in a way that is no plain view"
    assert any("overlap" in line for line in lines)


# -- random programs --

SHAPES = [(2, 3, 4), (6, 4), (24,)]


@st.composite
def programs(draw: st.DrawFn) -> list[tuple[Any, ...]]:
    """Instructions on a growing list of tensors; operands are indices modulo what there is."""
    number = st.integers(0, 1000)
    kinds = st.sampled_from(
        ["select", "slice", "permute", "reshape", "split", "detach", "expand", "squeeze", "add", "clone",
         "copy_", "add_", "mul_", "fill_", "setitem", "masked", "keep"]
    )  # fmt: skip
    return draw(st.lists(st.tuples(kinds, number, number, number), min_size=3, max_size=25))


def run_program(program: list[tuple[Any, ...]], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    pool = list(tensors)
    for kind, a, b, c in program:
        x, y = pool[a % len(pool)], pool[b % len(pool)]
        d = b % x.dim() if x.dim() else 0
        n = x.shape[d] if x.dim() else 1
        if kind == "select" and x.dim() > 1:
            pool.append(x.select(d, c % n))
        elif kind == "slice" and x.dim():
            low = c % n
            pool.append(x[(slice(None),) * d + (slice(low, n, 1 + c % 2),)])
        elif kind == "permute":
            pool.append(x.permute(tuple(reversed(range(x.dim())))) if c % 2 else x.transpose(0, d))
        elif kind == "reshape":
            pool.append(x.reshape(-1) if c % 2 else x.unsqueeze(d))
        elif kind == "split":
            pool.extend(x.unbind(d) if c % 2 and x.dim() > 1 else x.chunk(2, d))
        elif kind == "detach":
            pool.append(x.detach() if c % 2 else x.contiguous())
        elif kind == "expand":
            pool.append(x.unsqueeze(0).expand(2, *x.shape) * 1)
        elif kind == "squeeze":
            pool.append(x.unsqueeze(0).squeeze())
        elif kind == "add":
            pool.append(x + y.sum() * 0.25)
        elif kind == "clone":
            pool.append(x.clone())
        elif kind == "copy_":
            x.copy_((y.reshape(-1)[:1] if y.shape != x.shape else y).clone() if x.numel() else x)
        elif kind == "add_":
            x.add_(y.mean() if y.numel() else 1)
        elif kind == "mul_":
            x.mul_(0.5)
        elif kind == "fill_":
            x.fill_(c % 5) if c % 2 else x.zero_()
        elif kind == "setitem":
            x[..., c % x.shape[-1]] = x[..., 0] * 0.5 + 1
        elif kind == "masked":
            x.masked_fill_(x > 0.5, 0.25)
    return [t + 0 for t in pool] + pool[-3:]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs())
def test_random_programs(program: list[tuple[Any, ...]]) -> None:
    def f(x: torch.Tensor, y: torch.Tensor) -> Any:
        return run_program(program, [x, y, x * 2])

    check(f, rand(2, 3, 4), rand(4, 3).t())


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs())
def test_random_programs_on_state(program: list[tuple[Any, ...]]) -> None:
    module = State(lambda m, x: run_program(program, [m.s, x, m.v]), s=rand(3, 2, 4), v=rand(4, 3).t())
    check(module, rand(2, 3))


def test_is_fast() -> None:
    """Far from quadratic: ten thousand nodes within a few seconds on one slow core."""
    import time

    def f(x: torch.Tensor) -> Any:
        state = torch.zeros(4, 50, dtype=torch.float64)
        for i in range(500):
            state[:, i % 50] = state[:, i % 50] + x
            x = x * 2
        return x, state

    gm = capture(f, rand(4))
    start = time.perf_counter()
    functionalise(gm)
    assert time.perf_counter() - start < 10
