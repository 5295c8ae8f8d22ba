"""Operations that cannot be done for several cells at once: they run cell by cell, all else stays grouped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_dropout import assert_independent
from torch import Tensor, nn
from toys import SEGMENT, WIDTH, Layer, assert_same, features, made

import rmtcompile
from rmtcompile import UnsupportedError
from rmtcompile.passes.cell.lift import cell_by_cell
from rmtcompile.passes.flat.foreach import part_by_part

# --- operators of other libraries ---------------------------------------------------------------------------


@torch.library.custom_op("rmtcompile_tests::twist", mutates_args=())
def twist(x: Tensor, w: Tensor, power: int) -> tuple[Tensor, Tensor]:
    return torch.tanh(x * w), x.pow(power).mean(-1)


@twist.register_fake
def _(x: Tensor, w: Tensor, power: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:-1])


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:2], output[0])
    ctx.power = inputs[2]


def _backward(ctx: Any, grad: Tensor, grad_mean: Tensor) -> tuple[Tensor, Tensor, None]:
    x, w, y = ctx.saved_tensors
    inner = grad * (1 - y * y)
    mean = grad_mean[..., None] * ctx.power * x.pow(ctx.power - 1) / x.shape[-1]
    return inner * w + mean, (inner * x).flatten(0, -2).sum(0), None


twist.register_autograd(_backward, setup_context=_save)

LIBRARY = torch.library.Library("rmtcompile_tests_low", "DEF")
LIBRARY.define("double(Tensor x) -> Tensor")
LIBRARY.define("count_(Tensor(a!) x) -> ()")
LIBRARY.impl("double", lambda x: 2 * x, "CompositeExplicitAutograd")
LIBRARY.impl("count_", lambda x: [x.add_(1)][1:] or None, "CompositeExplicitAutograd")


class Walk(nn.Module):
    """Layers (x, state) -> (x', state'), state by state or without any."""

    def __init__(self, build: Callable[[], nn.Module], carried: bool = True, n_layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(build() for _ in range(n_layers))
        self.carried = carried

    def forward(self, x: Tensor) -> Tensor:
        states = [layer.start(x) for layer in self.layers]
        out = []
        for h in x.split(SEGMENT, 1):
            for l, layer in enumerate(self.layers):
                h, state = layer(h, states[l])
                states[l] = state if self.carried else states[l]
            out.append(h)
        return torch.cat(out, 1)


class Plain(Layer):
    def start(self, x: Tensor) -> Any:
        return x.new_zeros(x.shape[0], WIDTH)


class Custom(Plain):
    """With a weight of its own, and two results."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        x, m = super().forward(x, m)
        y, mean = torch.ops.rmtcompile_tests.twist(x, self.weight, 2)
        return x + y + mean[..., None], m


class Low(Plain):
    """An operator without gradients, through the old interface."""

    def forward(self, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        x, m = super().forward(x, m)
        return x + torch.ops.rmtcompile_tests_low.double(x).detach(), m


class Recurrent(nn.Module):
    """A fused recurrent layer, whose state is carried."""

    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.inner = kind(WIDTH, WIDTH, batch_first=True, **options)

    def start(self, x: Tensor) -> Any:
        zero = x.new_zeros(self.inner.num_layers, x.shape[0], WIDTH)
        return (zero, zero) if isinstance(self.inner, nn.LSTM) else zero

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.inner(x, state)
        return x + y, state


class Foreach(Plain):
    """A state of two tensors, updated as optimizers do."""

    def start(self, x: Tensor) -> Any:
        return x.new_zeros(x.shape[0], WIDTH), x.new_ones(x.shape[0], 1)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, m = super().forward(x, state[0])
        kept = torch._foreach_mul(list(state), 0.5)
        torch._foreach_add_(kept, [m, m.mean(-1, keepdim=True)], alpha=2.0)
        kept = torch._foreach_addcmul(kept, kept, kept, 0.1)
        return y + torch._foreach_tanh(kept)[1][..., None], tuple(kept)


class NormGradient(Plain):
    """An inner gradient through a norm of which one weight has none."""

    def forward(self, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        x, m = super().forward(x, m)

        def loss(y: Tensor) -> Tensor:
            return F.layer_norm(y, (WIDTH,), self.mix.bias, self.mix.weight[0]).pow(2).sum()

        return x - 0.1 * torch.func.grad(loss)(x), m


LAYERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "custom": (Custom, "torch.ops.rmtcompile_tests.twist"),
    "low": (Low, "torch.ops.rmtcompile_tests_low.double"),
    "lstm": (lambda: Recurrent(nn.LSTM), "aten.lstm.input"),
    "lstm_of_two": (lambda: Recurrent(nn.LSTM, num_layers=2, bias=False), "aten.lstm.input"),
    "gru": (lambda: Recurrent(nn.GRU), "aten.gru.input"),
    "rnn": (lambda: Recurrent(nn.RNN), "aten.rnn_tanh.input"),
    "foreach": (Foreach, ""),
    "norm_gradient": (NormGradient, ""),
}
"""A layer, and the operation that runs cell by cell."""


@pytest.mark.parametrize(
    ("name", "carried"), [*((n, True) for n in LAYERS), ("custom", False), ("lstm", False)]
)
def test_equal_with_gradients(name: str, carried: bool) -> None:
    build, operation = LAYERS[name]
    model = made(lambda: Walk(build, carried))
    fast = rmtcompile.optimize(model)
    for segments in (4, 1, 6):
        x = features(segments).requires_grad_()
        expected, got = model(x), fast(x)
        assert_same(expected, got)
        parameters = [x, *model.parameters()]
        theirs = torch.autograd.grad(expected.pow(2).sum(), parameters, allow_unused=True)
        mine = torch.autograd.grad(got.pow(2).sum(), parameters, allow_unused=True)
        assert_same(theirs, mine, 1e-9)
    assert fast.schedule.width == (3 if carried else 6)
    assert ("cell_by_cell(" in fast.code) == bool(operation)
    assert fast.explain().apart == () if not operation else fast.explain().apart[0].startswith(operation)


@pytest.mark.parametrize("name", ["low", "lstm"])
@torch.no_grad()
def test_it_is_said(name: str) -> None:
    build, operation = LAYERS[name]
    fast = rmtcompile.optimize(made(lambda: Walk(build)))
    fast(features(3))
    (line,) = [line for line in str(fast.explain()).splitlines() if line.startswith("cell by cell")]
    assert operation in line and ".py:" in line
    assert "cell by cell" not in str(rmtcompile.explain(made(lambda: Walk(Plain)), features(3)))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("name", "carried"), [("custom", True), ("lstm", True), ("custom", False)])
def test_compiled_cells(name: str, carried: bool) -> None:
    """All but these operations is compiled; new lengths are right as well."""
    model = made(lambda: Walk(LAYERS[name][0], carried), torch.float32)
    fast = rmtcompile.optimize(model, backend="inductor")
    for segments in (5, 2):
        x = features(segments, dtype=torch.float32).requires_grad_()
        expected, got = model(x), fast(x)
        assert_same(expected, got)
        parameters = [x, *model.parameters()]
        theirs = torch.autograd.grad(expected.pow(2).mean(), parameters)
        assert_same(theirs, torch.autograd.grad(got.pow(2).mean(), parameters), 1e-4)
        with torch.no_grad():
            assert_same(model(x), fast(x))


@torch.no_grad()
def test_batches_and_rests() -> None:
    model = made(lambda: Walk(Custom))
    fast = rmtcompile.optimize(model, verify=True)
    for batch, length in ((2, 9), (3, 9), (4, 12), (2, 8)):
        x = features(4, batch)[:, :length]
        assert_same(model(x), fast(x))


@torch.no_grad()
def test_a_text_in_parts() -> None:
    model = made(lambda: Walk(LAYERS["lstm"][0]))
    fast = rmtcompile.optimize(model)
    x = features(6)
    first, state = fast.run(x[:, : 2 * SEGMENT])
    second, _ = fast.run(x[:, 2 * SEGMENT :], state=state)
    assert_same(model(x), torch.cat([first, second], 1))


def test_dropout_between_recurrent_layers() -> None:
    """Each cell draws its own: with weights of zero but the last bias, what is kept shows in the result."""

    class Shows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.RNN(1, 1, num_layers=2, nonlinearity="relu", dropout=0.5, batch_first=True)
            for name, parameter in self.inner.named_parameters():
                nn.init.constant_(parameter, float(name in ("bias_ih_l0", "weight_ih_l1")))

        def start(self, x: Tensor) -> Tensor:
            return x.new_zeros(2, x.shape[0], 1)

        def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            y, _ = self.inner(x, state)
            return y, state * 0.5 + y[:, :1].transpose(0, 1)

    class Listed(Walk):
        def forward(self, x: Tensor) -> Tensor:
            states, drawn = [layer.start(x) for layer in self.layers], []
            for h in x.split(SEGMENT, 1):
                row = []
                for l, layer in enumerate(self.layers):
                    h, states[l] = layer(h, states[l])
                    row.append(h)
                drawn.append(torch.stack(row))
            return torch.stack(drawn)

    model = made(lambda: Listed(Shows)).train()
    fast = rmtcompile.optimize(model)
    drawn = fast(features(8, 64, d=1)).detach()
    assert set(drawn.unique().tolist()) == {0.0, 2.0}
    assert_independent(drawn)
    assert torch.equal(fast.eval()(features(8, 2, d=1)), torch.ones(8, 3, 2, SEGMENT, 1).double())


# --- the pieces ---------------------------------------------------------------------------------------------

ARGUMENTS: dict[str, list[tuple[Any, ...]]] = {
    "add": [(2.0,), ("list",), ([1.0, 2.0],)],
    "sub": [("list",)],
    "mul": [(0.5,), ("list",), ([1.0, 2.0],), (torch.tensor(3.0),)],
    "div": [(0.5,), ("list",)],
    "maximum": [("list",), (0.1,), ([0.1, 0.2],)],
    "minimum": [(0.1,)],
    "clamp_min": [(0.1,)],
    "pow": [(2.0,)],
    "lerp": [("list", 0.3), ("list", "list"), ("list", [0.1, 0.2])],
    "addcmul": [("list", "list", 0.5), ("list", "list", [0.1, 0.2]), ("list", "list")],
    "addcdiv": [("list", "list", 0.5)],
    "norm": [(), (1,)],
    "exp": [()],
    "neg": [()],
    "sigmoid": [()],
    "max": [()],
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_lists_part_by_part(name: str) -> None:
    for arguments in ARGUMENTS[name]:
        values = [[torch.randn(3), torch.randn(2, 2)] for _ in range(len(arguments) + 1)]
        filled = [v if a == "list" else a for a, v in zip(arguments, values[1:], strict=True)]
        packet = getattr(torch.ops.aten, f"_foreach_{name}")
        _, overload = _resolved(packet, values[0], *filled)
        part = part_by_part(overload)
        assert part is not None
        assert_same(list(packet(values[0], *filled)), part(values[0], *filled))


def _resolved(packet: Any, *args: Any) -> tuple[Any, Any]:
    for name in packet.overloads():
        try:
            return getattr(packet, name)(*args), getattr(packet, name)
        except (RuntimeError, TypeError):
            continue
    raise AssertionError(f"{packet} takes no such arguments")


def test_unknown_lists_are_left_alone() -> None:
    assert part_by_part(torch.ops.aten._foreach_addcmul.Tensor) is None
    assert part_by_part(torch.ops.aten.add.Tensor) is None


def test_results_that_are_none() -> None:
    def both(x: Tensor, y: Tensor) -> tuple[Tensor, None, int]:
        return x + y, None, 3

    x, y = torch.randn(4, 2), torch.randn(2)
    total, nothing, number = cell_by_cell(both, (0, None), (x, y), {})
    assert torch.equal(total, x + y) and nothing is None and number == 3


def test_an_operator_that_writes_is_refused() -> None:
    class Counts(Plain):
        def forward(self, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
            x, m = super().forward(x, m)
            m = m.clone()
            torch.ops.rmtcompile_tests_low.count_(m)
            return x, m

    with pytest.raises(UnsupportedError, match="count_") as caught, torch.no_grad():
        rmtcompile.optimize(made(lambda: Walk(Counts)))(features(3))
    assert "no functional form" in str(caught.value)
