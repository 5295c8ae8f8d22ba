"""runtime/likening.py: cells of the first segment and of later ones share a compiled form with gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from toys import Toy, assert_same, features, made

import rmtcompile
from rmtcompile.runtime.likening import fed_with_gradients

pytestmark = pytest.mark.filterwarnings("default")  # torch's own, of a tensor that is no leaf


class Layer(nn.Module):
    """One that gives its memory back."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.mix = nn.Linear(2 * d, d)

    def forward(self, h: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        out = h + torch.tanh(self.mix(torch.cat([h, memory], -1)))
        return out, memory + out


class Remembering(nn.Module):
    """Layers whose memory begins with zeros."""

    def __init__(self, n_layers: int = 3, d: int = 4, detaches: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(d) for _ in range(n_layers))
        self.d, self.detaches = d, detaches

    def forward(self, x: Tensor) -> Tensor:
        memories = [x.new_zeros(x.shape[0], 4, self.d) for _ in self.layers]
        outs = []
        for h in x.split(4, 1):
            for i, layer in enumerate(self.layers):
                h, memories[i] = layer(h, memories[i])
                if self.detaches:
                    memories[i] = memories[i].detach()
            outs.append(h)
        return torch.cat(outs, 1)


def inputs(segments: int) -> Tensor:
    return torch.randn(2, 4 * segments, 4, generator=torch.manual_seed(segments), dtype=torch.float64)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Any:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def step(run: Any, model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    out = run(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("detaches", [False, True])
def test_gradients_are_those_of_the_model(detaches: bool) -> None:
    model = Remembering(detaches=detaches).double()
    twin = copy.deepcopy(model)
    fast = rmtcompile.optimize(twin, backend="aot_eager")
    for segments in (4, 1, 2, 6):
        x = inputs(segments)
        assert_same(step(model, model, x), step(fast, twin, x), 1e-9)


def compiled_in_a_step(model: nn.Module) -> int:
    """Graphs of cells alone that a first step compiles."""
    fast = rmtcompile.optimize(model, backend="aot_eager")
    fast(inputs(2)).square().sum().backward()
    alone = [form for form in fast._last[0].executor.engine.forms if form._about[:1] == (1,)]  # type: ignore[index]
    return sum(_compilations(form) for form in alone)


def _compilations(form: Any) -> int:
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    return len(_debug_get_cache_entry_list(form.function.__code__))


def test_a_cell_alone_has_one_form_with_gradients() -> None:
    """Layer 0 of the first segment finds zeros, the last layer of the last one a memory with a history."""
    assert compiled_in_a_step(Remembering().double()) == 1


def test_what_never_has_gradients_is_left_alone() -> None:
    """No gradient is computed for a memory that is detached: nothing would read it."""
    model = Remembering(detaches=True).double()
    fast = rmtcompile.optimize(model, backend="aot_eager")
    fast(inputs(3)).square().sum().backward()
    engine = fast._last[0].executor.engine  # type: ignore[index]
    lanes = {lane.name for lane in engine.program.lanes}
    (fed,) = set(engine._fed.values())
    assert len(lanes) == 2 and len(fed) == 1


def test_operations_that_look_at_values_are_not_asked() -> None:
    def reads(x: Tensor) -> tuple[Tensor]:
        return (x * x.sum().item(),)

    fast = rmtcompile.optimize(Remembering().double(), backend="aot_eager")
    fast(inputs(3)).square().sum().backward()
    program = fast._last[0].executor.program  # type: ignore[index]
    assert not fed_with_gradients(program, program.groups[0], reads, [torch.ones(1)])


def test_with_levels_recomputed() -> None:
    model = made(lambda: Toy(3))
    twin = copy.deepcopy(model)
    fast = rmtcompile.optimize(twin, backend="aot_eager", recompute="level")
    for segments in (4, 2):
        assert_same(step(model, model, features(segments)), step(fast, twin, features(segments)), 1e-9)


@pytest.mark.parametrize(("has_gradients", "to"), [(True, 16), (False, 64)])
def test_a_training_step_is_followed_less_far(has_gradients: bool, to: int) -> None:
    """Steps of other lengths take their time anyway; documents of other lengths are not to wait."""
    fast = rmtcompile.optimize(Remembering().double(), backend="aot_eager")
    with torch.set_grad_enabled(has_gradients):
        fast(inputs(3))
    assert fast._programs.entries[0].lengths.followed_to == to


class Gated(Layer):
    """A layer of another kind."""

    def forward(self, h: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        out, memory = super().forward(h, torch.nn.functional.layer_norm(memory, (memory.shape[-1],)))
        return out.sin(), torch.sigmoid(memory)


def test_levels_of_two_kinds_of_layers_recomputed() -> None:
    """A form for any number of cells is made at a first call, on copies that a checkpoint does not see."""
    model = Remembering(5).double()
    for i in (0, 1, 4):
        model.layers[i] = Gated(4).double()
    twin = copy.deepcopy(model)
    fast = rmtcompile.optimize(twin, backend="aot_eager", recompute="level")
    for segments in (2, 5):
        x = inputs(segments)
        assert_same(step(model, model, x), step(fast, twin, x), 1e-9)
