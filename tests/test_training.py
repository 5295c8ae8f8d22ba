"""Training runs: gradients of stacked weights, and what backward computes again."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from toys import SEGMENT, WIDTH, Toy, assert_same, features, made
from zoo.others import ZOO

import rmtcompile
from rmtcompile.runtime import costs
from rmtcompile.runtime.gradients import Rows

HOW: list[str | int] = ["none", "level", 2, 3, 100]


def gradients(run: Callable[..., Any], model: nn.Module, *inputs: Tensor) -> list[Tensor | None]:
    """Of a loss in which each element of the result has a weight of its own."""
    model.zero_grad()
    torch.manual_seed(1)
    result = run(*inputs)
    values = result if isinstance(result, Tensor) else next(v for v in result.values() if v.dim() > 1)
    (values * torch.randn_like(values)).sum().backward()
    return [p.grad for p in model.parameters()]


def assert_same_gradients(mine: list[Tensor | None], theirs: list[Tensor | None]) -> None:
    assert [x is None for x in mine] == [x is None for x in theirs]
    for x, y in zip(mine, theirs, strict=True):
        if x is not None and y is not None:
            assert_same(y, x, 1e-9)


class Saved:
    """What autograd keeps for backward, in bytes; what checkpoints hide is not seen."""

    def __init__(self) -> None:
        self.bytes = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        def pack(x: Tensor) -> Tensor:
            self.bytes += x.numel() * x.element_size()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            yield


def saved_bytes(run: Callable[..., Any], *inputs: Tensor) -> int:
    saved = Saved()
    with saved.counting():
        run(*inputs)
    return saved.bytes


# ---- recomputation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", HOW)
@pytest.mark.parametrize(
    "build", [Toy, lambda: Toy(up=1), lambda: Toy(back=2), lambda: Toy(up=-1, n_layers=4)]
)
def test_gradients_are_the_same(build: Callable[[], Toy], recompute: str | int) -> None:
    """Levels s + l, 3 s + l and l (all segments of a layer at once), and carries over two segments."""
    model = made(build)
    twin = copy.deepcopy(model)
    fast = rmtcompile.optimize(twin, recompute=recompute)
    for segments in (4, 1, 9, 2):
        x, y = features(segments).requires_grad_(), features(segments).requires_grad_()
        assert_same_gradients(gradients(fast, twin, y), gradients(model, model, x))
        assert_same(x.grad, y.grad, 1e-9)
    assert fast.captures == 1


@pytest.mark.parametrize("recompute", ["level", 3])
@pytest.mark.parametrize("name", ["infini_attention", "hybrid", "no_carry", "transformer_xl", "in_place"])
def test_gradients_of_the_zoo(name: str, recompute: str | int) -> None:
    entry = ZOO[name]
    model = entry.build()
    twin = copy.deepcopy(model)
    fast = rmtcompile.optimize(twin, recompute=recompute)
    for segments in (5, 3):
        inputs = entry.inputs(2, segments)
        assert_same_gradients(gradients(fast, twin, *inputs), gradients(model, model, *inputs))


@pytest.mark.parametrize("recompute", ["level", 3])
def test_parts_whose_last_levels_are_fewer_than_a_block(recompute: str | int) -> None:
    """The last levels of a part may be fewer than a block."""
    model = made(Toy)
    fast, x = rmtcompile.optimize(copy.deepcopy(model), recompute=recompute), features(8)
    first, state = fast.run(x[:, : 4 * SEGMENT])
    second, _ = fast.run(x[:, 4 * SEGMENT :], state=state)
    parts = torch.cat([first, second], 1)
    assert_same(model(x), parts)
    for out in (model(x), parts):
        out.square().sum().backward()
    assert_same([p.grad for p in model.parameters()], [p.grad for p in fast.parameters()], 1e-9)


@pytest.mark.parametrize("recompute", ["level", 2])
def test_an_incomplete_segment(recompute: str | int) -> None:
    model = made(Toy)
    fast = rmtcompile.optimize(copy.deepcopy(model), recompute=recompute)
    for length in (3 * SEGMENT + 1, 4 * SEGMENT + 2, 5 * SEGMENT + 1):
        x = features(6)[:, :length]
        assert_same_gradients(gradients(fast, fast.model, x), gradients(model, model, x))


def test_levels_are_not_kept() -> None:
    everything, levels, blocks = (
        saved_bytes(rmtcompile.optimize(made(Toy), recompute=how), features(12))
        for how in ("none", "level", 7)
    )
    assert blocks <= levels < everything / 2


def test_nothing_is_held_in_a_circle() -> None:
    """When the result is gone, so is what backward would have needed, without the garbage collector."""
    fast = rmtcompile.optimize(made(Toy), recompute=2)
    fast(features(4).requires_grad_())
    gc.collect()
    gc.disable()
    try:
        x = features(4).requires_grad_()
        inside = weakref.ref(x)
        result = fast(x)
        del x
        assert inside() is not None
        del result
        assert inside() is None
    finally:
        gc.enable()


def test_a_text_in_parts() -> None:
    model = made(Toy)
    fast = rmtcompile.optimize(copy.deepcopy(model), recompute="level")
    x = features(6)

    def in_parts(x: Tensor) -> Tensor:
        first, state = fast.run(x[:, : 2 * SEGMENT])
        second, _ = fast.run(x[:, 2 * SEGMENT :], state=state)
        return torch.cat([first, second], 1)

    assert_same_gradients(gradients(in_parts, fast.model, x), gradients(model, model, x))


def test_what_is_said() -> None:
    for recompute, words in (("level", "each level again"), (4, "blocks of 4 levels again")):
        fast = rmtcompile.optimize(made(Toy), recompute=recompute)
        fast(features(3))
        assert f"backward computes {words}" in str(fast.explain())
    for wrong in ("levels", 0, True, None):
        with pytest.raises(ValueError, match="recompute must be"):
            rmtcompile.optimize(made(Toy), recompute=wrong)  # type: ignore[arg-type]


class Checkpointed(Toy):
    """A model that trains with checkpoints, as the layers of Hugging Face do."""

    reentrant = False
    active = True

    def forward(self, x: Tensor) -> Tensor:
        memory = [x.new_zeros(x.shape[0], WIDTH)] * len(self.layers)
        out = []
        for h in x.split(SEGMENT, 1):
            for l, layer in enumerate(self.layers):
                if self.active:
                    h, memory[l] = checkpoint(layer, h, memory[l], use_reentrant=self.reentrant)
                else:
                    h, memory[l] = layer(h, memory[l])
            out.append(h)
        return torch.cat(out, 1)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_of_the_model_are_honoured(reentrant: bool) -> None:
    model = made(Checkpointed)
    model.reentrant = reentrant
    twin = copy.deepcopy(model)
    fast = rmtcompile.optimize(twin)
    x, y = features(5).requires_grad_(), features(5).requires_grad_()
    assert_same_gradients(gradients(fast, twin, y), gradients(model, model, x))
    assert_same(x.grad, y.grad, 1e-9)
    assert "test_training.py:" in fast.explain().checkpoint
    assert "the forward uses checkpoints at" in " ".join(str(fast.explain()).split())
    plain = rmtcompile.optimize(made(Toy))
    assert saved_bytes(fast, y) < saved_bytes(plain, y) / 2
    twin.active = False  # `model.gradient_checkpointing_disable()`
    assert saved_bytes(fast, y) > saved_bytes(plain, y) / 2
    assert "checkpoints" not in str(fast.explain())


def test_checkpoints_may_be_ignored_on_request() -> None:
    fast = rmtcompile.optimize(made(Checkpointed), recompute="none")
    fast(features(3).requires_grad_())
    assert "as recompute='none' says" in " ".join(str(fast.explain()).split())


# ---- gradients of stacks -----------------------------------------------------------------------------------


def test_rows_add_up() -> None:
    stack = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    windows = [[0], [0, 1, 2], [1, 3, 4], [2, 4], [4]]
    for _ in range(2):  # also when backward comes twice
        rows = Rows(stack)
        loss = sum(((i + 1) * rows.of(window) ** 2).sum() for i, window in enumerate(windows))
        assert isinstance(loss, Tensor)
        expected = torch.zeros_like(stack)
        for i, window in enumerate(windows):
            expected[window] += 2 * (i + 1) * stack.detach()[window]
        (first,) = torch.autograd.grad(loss, stack, retain_graph=True)
        (second,) = torch.autograd.grad(loss, stack)
        assert_same(expected, first)
        assert_same(expected, second)


def test_windows_gradients_are_not_padded() -> None:
    """Backward makes no tensor of a stack's size for each level."""
    fast = rmtcompile.optimize(made(lambda: Toy(n_layers=6)))
    x = features(9)
    result = fast(x).sum()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        result.backward()
    padded = [event for event in profile.key_averages() if event.key == "aten::slice_backward"]
    assert sum(event.count for event in padded) < 9  # of the inputs' parts at most


def test_gradients_are_views_of_the_stacked_one() -> None:
    model = made(Toy)
    rmtcompile.optimize(model)(features(4)).sum().backward()
    grads = [layer.mix.weight.grad for layer in model.layers]
    assert len({grad.untyped_storage().data_ptr() for grad in grads if grad is not None}) == 1


def test_gradients_accumulate_and_are_cleared() -> None:
    model = made(Toy)
    twin = copy.deepcopy(model)
    fast = rmtcompile.optimize(twin)
    for run in (model, fast):
        for segments in (3, 5, 2):
            run(features(segments)).square().sum().backward()
    assert_same_gradients([p.grad for p in twin.parameters()], [p.grad for p in model.parameters()])
    twin.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in twin.parameters())


def test_a_step_between_forward_and_backward_is_no_silent_error() -> None:
    model = made(Toy)
    fast = rmtcompile.optimize(model)
    loss = fast(features(3)).sum()
    torch.optim.SGD(model.parameters(), lr=0.1).zero_grad()
    with torch.no_grad():
        model.layers[1].mix.weight.mul_(2)
    with pytest.raises(RuntimeError, match="written in place between the forward and its backward"):
        loss.backward()


def test_gradients_of_gradients() -> None:
    model = made(Toy)
    twin = copy.deepcopy(model)

    def twice(run: Callable[..., Any], own: nn.Module) -> list[Tensor]:
        own.zero_grad()
        x = features(3).requires_grad_()
        (first,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
        weights = list(own.parameters())
        grads = torch.autograd.grad(run(x).square().sum(), weights, create_graph=True)
        penalty = first.square().sum() + sum(g.square().sum() for g in grads)
        assert isinstance(penalty, Tensor)
        return list(torch.autograd.grad(penalty, weights))

    for mine, theirs in zip(twice(rmtcompile.optimize(twin), twin), twice(model, model), strict=True):
        assert_same(theirs, mine, 1e-9)


def test_some_weights_are_frozen() -> None:
    model = made(Toy)
    for layer in model.layers[:2]:
        layer.mix.requires_grad_(False)
    twin = copy.deepcopy(model)
    x = features(4)
    assert_same_gradients(gradients(rmtcompile.optimize(twin), twin, x), gradients(model, model, x))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # fake tensors
def test_weights_that_are_computed() -> None:
    """A network that makes the weights of another one: they are no leaves of autograd."""
    model = made(Toy)
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    fast = rmtcompile.optimize(lambda own, x: functional_call(model, own, (x,)))
    found = []
    for run in (fast, lambda own, x: functional_call(model, own, (x,))):
        own = {name: p.detach() * scale for name, p in model.named_parameters()}
        found.append(torch.autograd.grad(run(own, features(4)).square().sum(), scale)[0])
    assert_same(found[1], found[0], 1e-9)


@pytest.mark.parametrize("recompute", ["level", 2])
def test_levels_draw_the_same_numbers_again(recompute: str | int) -> None:
    """Dropout in training mode: with one seed, the gradients of a program that keeps everything."""

    class Dropping(Toy):
        def forward(self, x: Tensor) -> Tensor:
            memory = [x.new_zeros(x.shape[0], WIDTH)] * len(self.layers)
            out = []
            for h in x.split(SEGMENT, 1):
                for l, layer in enumerate(self.layers):
                    h, memory[l] = layer(nn.functional.dropout(h, 0.3, self.training), memory[l])
                out.append(h)
            return torch.cat(out, 1)

    model, x = made(Dropping).train(), features(4)
    found = []
    for how in ("none", recompute):
        fast = rmtcompile.optimize(copy.deepcopy(model), recompute=how)
        fast(x)
        found.append(gradients(fast, fast.model, x))
    assert_same_gradients(*found)


@pytest.mark.filterwarnings("default")  # Dynamo looks at .grad
def test_a_training_step_compiles_nothing_to_choose_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device levels are measured without gradients, in forms of their own."""
    asked = []
    monkeypatch.setattr(costs, "measured", lambda *_: asked.append(torch.is_grad_enabled()))
    fast, x = rmtcompile.optimize(made(Toy), backend="aot_eager", cuda_graphs=False), features(5)
    fast(x).sum().backward()
    executor = fast._last[0].executor  # type: ignore[index]
    monkeypatch.setattr(executor, "_use_graphs", True)
    assert executor.measure([x]) is None and not asked
    with torch.no_grad():
        executor.measure([x])
    assert asked == [False]
