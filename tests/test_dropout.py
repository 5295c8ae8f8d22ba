"""Random numbers in training mode: dropout and its like anywhere in the model; each cell draws its own."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toys import SEGMENT, WIDTH, Layer, assert_same, features, made

import rmtcompile
from rmtcompile import CaptureError, UnsupportedError, VerificationError

P = 0.25


class Drawing(nn.Module):
    """Each layer draws numbers like its input; what all cells have drawn is returned beside the result.

    Args:
        draw: gives numbers like a tensor.
        carried: whether layers carry a state from segment to segment; otherwise all segments of a layer run
            at once.
        where: "layer", or "glue" for outside of the layers' calls.
    """

    def __init__(
        self, draw: Callable[[Tensor], Tensor], carried: bool = True, n_layers: int = 3, where: str = "layer"
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DrawingLayer(draw, where) for _ in range(n_layers))
        self.carried, self.where, self.draw = carried, where, draw

    def forward(self, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        states = [x.new_zeros(x.shape[0], x.shape[2]) for _ in self.layers]
        out, drawn = [], []
        for s, h in enumerate(x.split(SEGMENT, 1)):
            row = []
            for l, layer in enumerate(self.layers):
                numbers = given[s, l] if given is not None else None
                if self.where == "glue":
                    numbers = self.draw(h) if numbers is None else numbers
                h, state, numbers = layer(h, states[l], numbers)
                states[l] = state if self.carried else states[l]
                row.append(numbers)
            out.append(h)
            drawn.append(torch.stack(row))
        return torch.cat(out, 1), torch.stack(drawn)


class DrawingLayer(nn.Module):
    def __init__(self, draw: Callable[[Tensor], Tensor], where: str) -> None:
        super().__init__()
        self.inner, self.draw, self.where = Layer(), draw, where

    def forward(self, x: Tensor, m: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        numbers = self.draw(x) if given is None else given
        x, m = self.inner(x * numbers, m)
        return x, m, numbers


def probabilities(x: Tensor) -> Tensor:
    return torch.full_like(x[0], 1 - P)


def like(x: Tensor) -> Tensor:
    """Which reads no value of x."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def attention(x: Tensor) -> Tensor:
    """Which of four equal weights attention has kept, by batch, position and key."""
    key = x.new_zeros(x.shape[0], 1, WIDTH, WIDTH)
    value = torch.eye(WIDTH, dtype=x.dtype, device=x.device).expand_as(key)
    return F.scaled_dot_product_attention(x[:, None], key, value, dropout_p=P)[:, 0] * WIDTH


KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(torch.ones_like(x), P),
    "native_dropout": lambda x: torch.native_dropout(torch.ones_like(x), P, True)[0],
    "of_what_depends": lambda x: F.dropout(x * 0 + 1, P),
    "in_place": lambda x: F.dropout(torch.ones_like(x), P, inplace=True),
    "attention": attention,
    "bernoulli": lambda x: torch.bernoulli(torch.full_like(x, 1 - P)) / (1 - P),
    "bernoulli_p": lambda x: torch.bernoulli(x.detach(), p=1 - P) / (1 - P),
    "bernoulli_": lambda x: torch.empty_like(x).bernoulli_(1 - P) / (1 - P),
    "bernoulli_of_shape": lambda x: like(x).bernoulli_(1 - P) / (1 - P),
    "bernoulli_tensor": lambda x: torch.empty_like(x).bernoulli_(probabilities(x).expand_as(x)) / (1 - P),
    "rand_like": lambda x: (torch.rand_like(x) > P) / (1 - P),
    "rand": lambda x: (torch.rand(x.shape, device=x.device) > P).to(x.dtype) / (1 - P),
    "uniform_": lambda x: (torch.empty_like(x).uniform_(-1, 1) > 2 * P - 1) / (1 - P),
    "multinomial": lambda x: torch.multinomial(
        torch.tensor([P, 1 - P], dtype=x.dtype), x.numel(), True
    ).view_as(x).to(x.dtype) / (1 - P),
}  # fmt: skip
"""Ways to keep a number with probability 1 - P and scale it up."""

NORMAL: dict[str, Callable[[Tensor], Tensor]] = {
    "randn_like": torch.randn_like,
    "randn": lambda x: torch.randn(x.shape, dtype=x.dtype),
    "normal": lambda x: torch.normal(torch.zeros_like(x), torch.ones_like(x)),
    "normal_": lambda x: torch.empty_like(x).normal_(),
    "alpha_dropout": lambda x: F.alpha_dropout(torch.randn_like(x), P, True),
}
"""Ways to draw numbers of mean 0 and variance 1."""


def drawn_by(draw: Callable[[Tensor], Tensor], segments: int = 12, **options: Any) -> Tensor:
    """What the cells of a model draw, f[S, L, B, T, D]."""
    model = made(lambda: Drawing(draw, **options)).train()
    with torch.no_grad():
        return rmtcompile.optimize(model)(features(segments, batch=64))[1].detach()


def assert_independent(drawn: Tensor) -> None:
    """No cell's numbers say anything of another's, nor an element's of its neighbours."""
    cells = drawn.flatten(0, 1).flatten(1)
    cells = cells - cells.mean()
    together = cells @ cells.T / cells.pow(2).mean() / cells.shape[1]
    off = together - torch.diag(torch.diag(together))
    assert float(off.abs().max()) < 6 / cells.shape[1] ** 0.5
    flat = cells.flatten()
    assert abs(float((flat[1:] * flat[:-1]).mean() / flat.pow(2).mean())) < 6 / flat.numel() ** 0.5


FEW = ["dropout", "attention", "rand", "bernoulli_of_shape", "multinomial"]


@pytest.mark.parametrize(
    ("name", "where"), [*((name, "layer") for name in KEPT), *((f, "glue") for f in FEW)]
)
def test_numbers_are_kept_at_their_rate(name: str, where: str) -> None:
    drawn = drawn_by(KEPT[name], where=where)
    assert drawn.shape == (12, 3, 64, SEGMENT, WIDTH)
    kept = drawn != 0
    torch.testing.assert_close(drawn[kept], torch.full_like(drawn[kept], 1 / (1 - P)))
    assert abs(float(kept.double().mean()) - (1 - P)) < 5 * (P * (1 - P) / drawn.numel()) ** 0.5
    assert_independent(drawn)


@pytest.mark.parametrize("name", NORMAL)
def test_numbers_are_distributed_as_the_model_draws_them(name: str) -> None:
    drawn = drawn_by(NORMAL[name])
    assert abs(float(drawn.mean())) < 5 / drawn.numel() ** 0.5
    assert abs(float(drawn.var()) - 1) < 0.1
    assert_independent(drawn)


@pytest.mark.parametrize("name", FEW)
def test_all_segments_of_a_layer_at_once(name: str) -> None:
    assert_independent(drawn_by(KEPT[name], carried=False))


@pytest.mark.parametrize("kind", [F.dropout1d, F.feature_alpha_dropout])
def test_whole_channels_are_dropped(kind: Callable[..., Tensor]) -> None:
    drawn = drawn_by(lambda x: kind(torch.ones_like(x), P, True))
    assert torch.equal(drawn, drawn[..., :1].expand_as(drawn))
    assert_independent(drawn[..., 0])


def test_permutations_are_drawn() -> None:
    drawn = drawn_by(lambda x: (torch.randperm(WIDTH) + x * 0).to(x.dtype))
    assert torch.equal(drawn.sort(-1).values, torch.arange(WIDTH).double().expand_as(drawn))
    assert len({tuple(cell) for cell in drawn[:, :, 0, 0].flatten(0, 1).tolist()}) > 8


@pytest.mark.parametrize(
    ("name", "carried"), [*((n, True) for n in KEPT | NORMAL), *((f, False) for f in FEW)]
)
def test_results_and_gradients_are_those_of_the_numbers_drawn(name: str, carried: bool) -> None:
    """The model, given the numbers that the program has drawn, gives the same, gradients too."""
    model = made(lambda: Drawing((KEPT | NORMAL)[name], carried)).train()
    fast = rmtcompile.optimize(model)
    for segments, batch in ((4, 2), (1, 2), (2, 1), (7, 2)):
        x = features(segments, batch).requires_grad_()
        got, drawn = fast(x)
        mine = torch.autograd.grad(got.pow(2).sum(), [x, *model.parameters()])
        expected, _ = model(x, drawn.detach())
        theirs = torch.autograd.grad(expected.pow(2).sum(), [x, *model.parameters()])
        assert_same(expected, got)
        assert_same(theirs, mine, 1e-9)
    assert fast.schedule.width == (3 if carried else 7)


@pytest.mark.parametrize("segments", [2, 3, 5])
def test_a_shorter_last_segment(segments: int) -> None:
    model = made(lambda: Drops(P)).train()
    fast = rmtcompile.optimize(model, verify=True)
    x = features(segments)[:, :-1]
    assert fast(x).shape == x.shape and not torch.equal(fast(x), fast(x))


# --- where numbers are drawn --------------------------------------------------------------------------------


class Drops(nn.Module):
    """Dropout of the whole input, of each segment, between layers, inside them, and of the result."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.inside = nn.ModuleList(nn.Dropout(p) for _ in range(3))
        self.drop, self.head = nn.Dropout(p), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        states = [x.new_zeros(x.shape[0], WIDTH) for _ in self.layers]
        out = []
        for h in self.drop(x).split(SEGMENT, 1):
            h = self.drop(h)
            for l, layer in enumerate(self.layers):
                h, states[l] = layer(self.inside[l](self.drop(h)), self.drop(states[l]))
            out.append(self.head(self.drop(h)))
        return self.drop(torch.cat(out, 1))


def test_places() -> None:
    model = made(lambda: Drops(P)).train()
    fast = rmtcompile.optimize(model)
    x = features(5)
    assert not torch.equal(fast(x), fast(x)), "numbers are drawn anew at each call"
    torch.manual_seed(3)
    one = fast(x)
    torch.manual_seed(3)
    assert torch.equal(fast(x), one)
    assert abs(float((one == 0).double().mean()) - P) < 0.2
    assert fast.schedule.width == 3


def test_the_first_call_draws_what_later_ones_do() -> None:
    """What compiling tries and compares draws nothing that the caller notices."""
    x, found = features(9), []
    fast = rmtcompile.optimize(made(lambda: Drops(P)).train())
    for _ in range(2):
        torch.manual_seed(3)
        found.append(fast(x))
    assert torch.equal(*found)


def test_the_mean_is_that_of_evaluation() -> None:
    """Where the result is linear in what is dropped."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            states, out = [x.new_zeros(()) for _ in self.layers], []
            for h in x.split(SEGMENT, 1):
                for l, layer in enumerate(self.layers):
                    h = F.dropout(layer(h), P, self.training) + 0.5 * states[l]
                    states[l] = h.mean(1, keepdim=True)
                out.append(h)
            return torch.cat(out, 1)

    model = made(Linear)
    fast = rmtcompile.optimize(model)
    x = features(5, batch=1).expand(4000, -1, -1)
    with torch.no_grad():
        expected = fast(x)[0]
        drawn = fast.train()(x)
    error = (drawn.mean(0) - expected) / (drawn.std(0) / 4000**0.5)
    assert float(error.abs().max()) < 5


@pytest.mark.parametrize("grad", [False, True])
def test_probability_zero_is_evaluation(grad: bool) -> None:
    model = made(lambda: Drops(0.0))
    fast = rmtcompile.optimize(model)
    with torch.set_grad_enabled(grad):
        expected = fast(features(4))
        got = fast.train()(features(4))
    assert torch.equal(expected, got)
    assert_same(model(features(4)), got)


def test_probability_one_drops_all() -> None:
    model = made(lambda: Drops(1.0)).train()
    assert_same(model(features(4)), rmtcompile.optimize(model)(features(4)))


def test_modes_and_probabilities_are_seen() -> None:
    model = made(lambda: Drops(P))
    fast = rmtcompile.optimize(model)
    x = features(4)
    with torch.no_grad():
        expected = fast(x)
        assert not torch.equal(fast.train()(x), expected)
        model.drop.p = 0.0
        for drop in model.inside:
            drop.p = 0.0
        assert torch.equal(fast(x), expected)
        assert torch.equal(fast.eval()(x), expected)


def test_two_of_equal_operands_are_two() -> None:
    class Twice(Layer):
        def forward(self, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
            ones = torch.ones_like(x)
            difference = F.dropout(ones, 0.5) - F.dropout(ones, 0.5)
            x, m = super().forward(x, m)
            return x * 0 + difference, m

    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Twice() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            states, out = [x.new_zeros(x.shape[0], WIDTH) for _ in self.layers], []
            for h in x.split(SEGMENT, 1):
                for l, layer in enumerate(self.layers):
                    h, states[l] = layer(h, states[l])
                out.append(h)
            return torch.cat(out, 1)

    got = rmtcompile.optimize(made(Twins).train())(features(4, batch=50))
    assert abs(float((got != 0).double().mean()) - 0.5) < 0.05
    pieces = got.split(SEGMENT, 1)
    assert not any(torch.equal(pieces[0], piece) for piece in pieces[1:])


class Locked(nn.Module):
    """One mask for all segments, drawn once a call, and weights that are dropped for each use."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.weights = nn.ParameterList(torch.ones(WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mask = F.dropout(x.new_ones(x.shape[0], 1, WIDTH), 0.5)
        states, out, masks, used = [x.new_zeros(x.shape[0], WIDTH) for _ in self.layers], [], [], []
        for h in x.split(SEGMENT, 1):
            for l, layer in enumerate(self.layers):
                weight = F.dropout(self.weights[l], 0.5)
                h, states[l] = layer(h * mask * weight, states[l])
                used.append(weight)
            masks.append(mask * torch.ones_like(h))
            out.append(h)
        return torch.cat(out, 1), torch.cat(masks, 1), torch.stack(used)


def test_a_mask_that_all_segments_share() -> None:
    fast = rmtcompile.optimize(made(Locked).train(), verify=True)
    x = features(8, batch=9)
    _, masks, used = fast(x)
    assert torch.equal(masks, masks[:, :1].expand_as(masks)) and 0 < float((masks == 0).double().mean()) < 1
    assert not torch.equal(fast(x)[1], masks)
    assert len({tuple(row) for row in used.tolist()}) > 8
    with pytest.raises(UnsupportedError, match="draws numbers once for all segments"):
        fast.run(x)


def test_a_text_in_parts() -> None:
    model = made(lambda: Drawing(KEPT["dropout"])).train()
    fast = rmtcompile.optimize(model)
    x, outs, drawn, state = features(6), [], [], None
    for part in x.split(2 * SEGMENT, 1):
        (out, numbers), state = fast.run(part, state=state)
        outs.append(out)
        drawn.append(numbers)
    assert_same(model(x, torch.cat(drawn))[0], torch.cat(outs, 1))


def test_what_is_read_by_nobody_is_not_drawn() -> None:
    class Dead(Layer):
        def forward(self, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
            F.dropout(m, 0.5)
            x, m = super().forward(x, m)
            return x, F.dropout(m, 0.5)

    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Dead() for _ in range(3))

        forward = Drops.forward

    model = made(lambda: _with(Ends(), drop=nn.Identity(), head=nn.Identity(), inside=[nn.Identity()] * 3))
    fast = rmtcompile.optimize(model.train())
    assert fast(features(4)).shape == (2, 4 * SEGMENT, WIDTH)
    cell = fast.code[fast.code.index("def cell_") :]
    assert cell[: cell.index("\n\n\n")].count("aten.dropout(") == 1


def _with(module: nn.Module, **attributes: Any) -> nn.Module:
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


# --- checks of the program ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KEPT | NORMAL)
def test_checks_raise_no_false_alarm(name: str) -> None:
    model = made(lambda: Drawing((KEPT | NORMAL)[name])).train()
    fast = rmtcompile.optimize(model, verify=True)
    for segments in (9, 1):
        torch.manual_seed(5)
        before = torch.get_rng_state()
        fast.prepare(features(segments))
        assert torch.equal(before, torch.get_rng_state())
        fast(features(segments))


@torch.no_grad()
def test_checks_find_a_broken_program() -> None:
    fast = rmtcompile.optimize(made(lambda: Drops(P)).train(), verify=True).prepare(features(9))
    cells = fast.compiled.namespace["CELLS"]
    for name, function in list(cells.items()):

        def altered(run: Any, window: Any, function: Any = function) -> dict[str, Tensor]:
            outputs = function(run, window)
            for row, cell in enumerate(zip(window.segments, window.layers, strict=True)):
                if cell == (1, 1):
                    max(outputs.values(), key=lambda value: value.dim())[row] += 0.5
            return outputs

        cells[name] = altered
    with pytest.raises(VerificationError, match="first in segment 1, layer 1: "):
        fast(features(4))


def test_rules_that_fail_later_are_found() -> None:
    """A carry that is read four segments later, which short captures do not show."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            zero, written, out = x.new_zeros(x.shape[0], WIDTH), {}, []
            for s, h in enumerate(x.split(SEGMENT, 1)):
                for l, layer in enumerate(self.layers):
                    h, written[s, l] = layer(F.dropout(h, P, self.training), written.get((s - 3, l), zero))
                out.append(h)
            return torch.cat(out, 1)

    fast = rmtcompile.optimize(made(Late).train())
    fast(features(9))
    assert set(fast.schedule.offsets) == {(0, 1), (3, 0)}


# --- training -----------------------------------------------------------------------------------------------


def test_a_checkpoint_around_the_program_draws_the_same_again() -> None:
    model = made(lambda: Drops(P)).train()
    fast = rmtcompile.optimize(model)
    x = features(5).requires_grad_()
    fast(x)
    found = []
    for run in (fast, lambda x: checkpoint(fast, x, use_reentrant=False)):
        torch.manual_seed(7)
        out = run(x)
        found.append((out, *torch.autograd.grad(out.pow(2).sum(), [x, *model.parameters()])))
    assert_same(*found)


class Checkpointed(Drawing):
    """Each layer recomputes itself for its gradients."""

    def __init__(self) -> None:
        super().__init__(KEPT["dropout"])
        for layer in self.layers:
            inner = layer.forward
            layer.forward = lambda *args, inner=inner: checkpoint(inner, *args, use_reentrant=False)


def test_layers_that_recompute_themselves() -> None:
    model = made(Checkpointed).train()
    fast = rmtcompile.optimize(model)
    x = features(4).requires_grad_()
    got, drawn = fast(x)
    expected, _ = model(x, drawn.detach())
    assert_same(expected, got)
    parameters = [x, *model.parameters()]
    theirs = torch.autograd.grad(expected.sum(), parameters)
    assert_same(theirs, torch.autograd.grad(got.sum(), parameters), 1e-9)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("name", "carried"),
    [("dropout", True), ("attention", True), ("bernoulli_of_shape", True), ("rand", False)],
)
def test_compiled_cells(name: str, carried: bool) -> None:
    model = made(lambda: Drawing((KEPT | NORMAL)[name], carried), torch.float32).train()
    fast = rmtcompile.optimize(model, backend="inductor", verify=True)
    for segments in (5, 2, 8):
        x = features(segments, 64, torch.float32).requires_grad_()
        got, drawn = fast(x)
        expected, _ = model(x, drawn.detach())
        assert_same(expected, got)
        parameters = [x, *model.parameters()]
        mine = torch.autograd.grad(got.pow(2).mean(), parameters)
        assert_same(torch.autograd.grad(expected.pow(2).mean(), parameters), mine, 1e-4)
    assert_independent(drawn.double())
    assert not torch.equal(fast(x)[1], drawn)


# --- what is refused ----------------------------------------------------------------------------------------


def test_generators_of_the_model_are_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    model = made(lambda: Drawing(lambda x: torch.empty_like(x).bernoulli_(0.5, generator=generator)))
    with pytest.raises(CaptureError, match="an operator takes a Generator: bernoulli_"):
        rmtcompile.optimize(model)(features(3))


class LayerDrop(Drops):
    def __init__(self, draw: Callable[[], Any]) -> None:
        super().__init__(P)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        for h in x.split(SEGMENT, 1):
            for layer in self.layers:
                if self.draw() > 0.1:
                    h, _ = layer(h, h[:, 0])
        return h


@pytest.mark.parametrize(
    ("draw", "said"),
    [
        (lambda: torch.rand(()), "depends on the values of a tensor"),
        (lambda: 1 - random.random(), "draws random numbers in Python"),
        (lambda: 1 - np.random.uniform(), "draws random numbers in Python"),
    ],
)
def test_layers_that_are_left_out_at_random_are_refused(draw: Callable[[], Any], said: str) -> None:
    with pytest.raises(CaptureError, match=said) as caught:
        rmtcompile.optimize(made(lambda: LayerDrop(draw)).train())(features(3))
    assert "test_dropout.py:" in str(caught.value)
    random.random()


# --- on CUDA ------------------------------------------------------------------------------------------------


def device_numbers(model: nn.Module, fast: Any, x: Tensor) -> Tensor:
    """What a call draws; its result is that of the model, given these numbers."""
    got, drawn = fast(x)
    assert_same(model(x, drawn.detach())[0], got, 1e-4)
    return drawn.detach()


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("name", ["dropout", "attention", "rand", "bernoulli_of_shape"])
def test_recorded_runs_draw_anew(name: str, backend: str) -> None:
    model = made(lambda: Drawing(KEPT[name]), torch.float32).cuda().train()
    fast = rmtcompile.optimize(model, backend=backend, plan="diagonal")
    with torch.no_grad():
        device_numbers(model, fast, features(24, 16, torch.float32).cuda())
        assert "recorded as CUDA graphs" in str(fast.explain())
        for segments in (24, 5, 24, 1):
            x = features(segments, 16, torch.float32).cuda()
            seen = [device_numbers(model, fast, x) for _ in range(4)]
            assert len({tuple(drawn.flatten().tolist()) for drawn in seen}) == 4
            assert_independent(torch.cat(seen).double().cpu())
            kept = float((torch.stack(seen) != 0).double().mean())
            assert abs(kept - (1 - P)) < 5 * (P * (1 - P) / (4 * seen[0].numel())) ** 0.5
            torch.manual_seed(3)
            one = device_numbers(model, fast, x)
            torch.manual_seed(3)
            assert torch.equal(device_numbers(model, fast, x), one)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("name", ["dropout", "attention", "rand_like"])
@pytest.mark.parametrize("recompute", ["none", "level", 2])
def test_gradients_on_cuda(name: str, backend: str, recompute: str | int) -> None:
    model = made(lambda: Drawing(KEPT[name]), torch.float32).cuda().train()
    fast = rmtcompile.optimize(model, backend=backend, recompute=recompute)
    for segments in (5, 2):
        x = features(segments, 16, torch.float32).cuda().requires_grad_()
        got, drawn = fast(x)
        expected, _ = model(x, drawn.detach())
        parameters = [x, *model.parameters()]
        mine = torch.autograd.grad(got.pow(2).mean(), parameters)
        assert_same(torch.autograd.grad(expected.pow(2).mean(), parameters), mine, 1e-3)
        torch.manual_seed(3)
        one = fast(x)[1]
        torch.manual_seed(3)
        assert torch.equal(fast(x)[1], one)
