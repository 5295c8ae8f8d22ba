"""Recorded training steps: what is replayed, and what happens when others come in between.

On a CPU a stand-in for a CUDA graph does what was recorded once more, into the same memory, so that all but
the recording itself is tested here; the tests on a GPU are at the end.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from toys import AttributeState, Toy, assert_same, features, made

import rmtcompile
from rmtcompile.errors import RecordingWarning
from rmtcompile.models import build
from rmtcompile.runtime import execute
from rmtcompile.runtime.graphs import Recordings
from rmtcompile.runtime.steps import Steps


class Again:
    """What was recorded, done once more; its results lie where they lay."""

    def __init__(self, body: Callable[[], Any], results: Any) -> None:
        self.body, self.results = body, results
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        with torch.enable_grad():
            found = pytree.tree_leaves(self.body())
        for place, value in zip(pytree.tree_leaves(self.results), found, strict=True):
            if isinstance(place, Tensor):
                place.detach().copy_(value.detach())


class OnCpu(Steps):
    """Steps that are recorded without CUDA."""

    made: ClassVar[list[OnCpu]] = []

    def __init__(self, executor: Any) -> None:
        super().__init__(executor)
        OnCpu.made.append(self)

    _pool = _done = None

    def alone(self) -> Any:
        return nullcontext()

    def captured_once(self, body: Callable[[], Any], workspaces: Any) -> tuple[Any, Any]:
        results = pytree.tree_map_only(Tensor, torch.clone, body())
        return Again(body, results), results

    def wait(self) -> Any:
        return None

    def numbers(self) -> Tensor | None:
        return torch.get_rng_state() if self.draws else None

    @contextmanager
    def drawing(self, numbers: Tensor | None) -> Iterator[None]:
        with torch.random.fork_rng([]):
            if numbers is not None:
                torch.set_rng_state(numbers)
            yield


def without_cuda(self: Any, leaves: Any, replaced: Any) -> None:
    self.leaves, self.replaced = leaves, replaced


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[OnCpu]]:
    """Steps are recorded on a CPU; gives what has recorded them."""
    ready = execute.Executor.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        ready(self, *args, **kwargs)
        self._use_graphs = True

    monkeypatch.setattr(execute.Executor, "__init__", init)
    monkeypatch.setattr(execute, "Steps", OnCpu)
    monkeypatch.setattr(Recordings, "__init__", without_cuda)
    OnCpu.made = []
    yield OnCpu.made
    OnCpu.made = []


def loss_of(result: Any) -> Tensor:
    values = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor) and x.requires_grad]
    torch.manual_seed(1)
    return torch.stack([(x * torch.randn_like(x)).sum() for x in values]).sum()


def step(run: Any, model: nn.Module, *inputs: Tensor) -> list[Tensor | None]:
    for parameter in model.parameters():
        parameter.grad = None
    loss_of(run(*inputs)).backward()
    return [p.grad for p in model.parameters()]


def assert_step(fast: Any, model: nn.Module, *inputs: Tensor) -> None:
    for module in model.modules():
        getattr(module, "reset", lambda: None)()  # what holds a history is not copied
    twin = copy.deepcopy(model)
    mine = [None if g is None else g.clone() for g in step(fast, model, *inputs)]
    theirs = step(twin, twin, *inputs)
    assert [x is None for x in mine] == [x is None for x in theirs]
    assert_same([x for x in theirs if x is not None], [x for x in mine if x is not None], 1e-9)
    assert_same(twin(*inputs), fast(*inputs), 1e-10)


def recordings(made: list[OnCpu]) -> int:
    return sum(len(steps._recordings) for steps in made)


@pytest.mark.parametrize("recompute", ["none", "level", 2])
@pytest.mark.parametrize("build", [Toy, AttributeState, lambda: Toy(3, up=-1), lambda: Toy(3, up=1)])
def test_steps_that_come_again(build: Any, recompute: Any, recording: list[OnCpu]) -> None:
    model = made(build)
    fast = rmtcompile.optimize(model, recompute=recompute)
    for segments in (5, 5, 2, 5, 2, 1, 2, 1, 1):
        assert_step(fast, model, features(segments))
    assert recordings(recording) >= 2


def test_two_forwards_before_their_backwards(recording: list[OnCpu]) -> None:
    model = made(Toy)
    fast, parameters = rmtcompile.optimize(model), list(model.parameters())
    x, y = features(3), features(3) + 1
    step(fast, model, x)
    for _ in range(2):
        a, b = loss_of(fast(x)), loss_of(fast(y))
        mine = [torch.autograd.grad(a, parameters), torch.autograd.grad(b, parameters)]
        theirs = [torch.autograd.grad(loss_of(model(v)), parameters) for v in (x, y)]
        assert_same(theirs, mine, 1e-9)
    assert recordings(recording) == 1


def test_backward_twice(recording: list[OnCpu]) -> None:
    model = made(Toy)
    fast, parameters, x = rmtcompile.optimize(model), list(model.parameters()), features(3)
    step(fast, model, x)
    loss = loss_of(fast(x))
    first = [g.clone() for g in torch.autograd.grad(loss, parameters, retain_graph=True)]
    fast(features(3) + 1)
    second = list(torch.autograd.grad(loss, parameters, retain_graph=True))
    third = list(torch.autograd.grad(loss, parameters))
    assert_same(first, third, 1e-12)
    assert_same(first, second, 1e-12)
    assert recordings(recording) == 1


def test_backward_twice_without_asking_for_it(recording: list[OnCpu]) -> None:
    model, x = made(Toy), features(3)
    fast = rmtcompile.optimize(model)
    step(fast, model, x)
    for _ in range(2):
        loss = loss_of(fast(x))
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


def test_what_is_left_in_the_model_holds_no_recording(recording: list[OnCpu]) -> None:
    model, x = made(AttributeState), features(3)
    fast = rmtcompile.optimize(model)
    for _ in range(3):
        loss_of(fast(x)).backward()
    assert model.layers[0].memory.grad_fn is not None
    steps = weakref.ref(recording.pop())
    recording.clear()
    del fast
    gc.collect()
    assert steps() is None


def test_gradients_add_up(recording: list[OnCpu]) -> None:
    model = made(Toy)
    fast, twin = rmtcompile.optimize(model), copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.grad = None
    kept = []
    for i in range(5):
        for run in (fast, twin):
            loss_of(run(features(3) + i)).backward()
        assert_same([p.grad for p in twin.parameters()], [p.grad for p in model.parameters()], 1e-9)
        if i == 2:
            for parameter in (*model.parameters(), *twin.parameters()):
                kept.append((parameter.grad, parameter.grad.clone()))
                parameter.grad = None
    assert all(torch.equal(a, b) for a, b in kept), "gradients that somebody keeps stay as they were"
    assert recordings(recording) == 1


def test_gradients_are_not_copied(recording: list[OnCpu]) -> None:
    model, x = made(Toy), features(3)
    fast = rmtcompile.optimize(model)
    places = []
    for _ in range(4):
        step(fast, model, x)
        places.append([p.grad.data_ptr() for p in model.parameters() if p.grad is not None])
    assert places[2] == places[3]


def test_gradients_of_other_results(recording: list[OnCpu]) -> None:
    model, x = made(AttributeState), features(3)
    fast, parameters = rmtcompile.optimize(model), list(model.parameters())
    for of in ("last", "last", "all", "all", "all", "last"):
        mine = torch.autograd.grad(fast(x)[of].pow(2).sum(), parameters)
        assert_same(torch.autograd.grad(model(x)[of].pow(2).sum(), parameters), mine, 1e-9)
    assert recordings(recording) == 1


def test_gradients_of_gradients(recording: list[OnCpu]) -> None:
    model, x = made(Toy), features(3).requires_grad_()
    fast, parameters = rmtcompile.optimize(model), list(model.parameters())
    for _ in range(3):
        found = []
        for run in (fast, model):
            (first,) = torch.autograd.grad(loss_of(run(x)), x, create_graph=True)
            found.append([first, *torch.autograd.grad(first.pow(2).sum(), parameters, allow_unused=True)])
        assert_same(found[1], found[0], 1e-8)
        assert_step(fast, model, x.detach())


def test_inputs_with_gradients(recording: list[OnCpu]) -> None:
    model = made(Toy)
    fast = rmtcompile.optimize(model)
    for i in range(4):
        found = []
        for run in (fast, model):
            x = (features(3) + i).requires_grad_()
            loss_of(run(x.exp())).backward()
            found.append(x.grad)
        assert_same(found[1], found[0], 1e-9)
    assert recordings(recording) == 1


def test_a_write_in_between_is_an_error(recording: list[OnCpu]) -> None:
    model, x = made(Toy), features(3)
    fast = rmtcompile.optimize(model)
    step(fast, model, x)
    step(fast, model, x)
    loss = loss_of(fast(x))
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="written in place between"):
        loss.backward()
    assert_step(fast, model, x)


def test_weights_that_move(recording: list[OnCpu]) -> None:
    model, x = made(Toy), features(3)
    fast = rmtcompile.optimize(model)
    for _ in range(3):
        step(fast, model, x)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone() * 1.5
    for _ in range(3):
        assert_step(fast, model, x)


def test_other_weights_are_frozen(recording: list[OnCpu]) -> None:
    model, x = made(Toy), features(3)
    fast = rmtcompile.optimize(model)
    for _ in range(2):
        for frozen in (0, 1, None):
            for i, parameter in enumerate(model.parameters()):
                parameter.requires_grad_(i != frozen)
            for _ in range(2):
                assert_step(fast, model, x)


def test_training(recording: list[OnCpu]) -> None:
    model = made(Toy)
    fast, twin = rmtcompile.optimize(model), copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, twin)]
    for i in range(6):
        for run, optimizer in zip((fast, twin), optimizers, strict=True):
            optimizer.zero_grad(set_to_none=i % 2 == 0)
            loss_of(run(features(3 + i % 2))).backward()
            torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
            optimizer.step()
    assert_same(list(twin.parameters()), list(model.parameters()), 1e-9)
    assert recordings(recording) == 2


def test_the_reference_model(recording: list[OnCpu]) -> None:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, vocab_size=32
    )
    model = build(config, segment_size=4, num_mem_tokens=2, d_mem=4).double()
    for name, parameter in model.named_parameters():
        if "W_mv" in name:
            nn.init.normal_(parameter)
    fast = rmtcompile.optimize(model)
    ids = torch.randint(32, (2, 20), generator=torch.Generator().manual_seed(0))
    for n in (20, 20, 18, 20, 18, 18):
        assert_step(fast, model, ids[:, :n])
    assert recordings(recording) >= 1


def test_what_is_kept_by_hooks_is_seen_by_them(recording: list[OnCpu]) -> None:
    model, x, seen = made(Toy), features(3), []
    fast = rmtcompile.optimize(model)
    for _ in range(3):
        step(fast, model, x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        fast(x)
    assert len(seen) > 10


def test_a_failure_leaves_the_step_as_it_is(recording: list[OnCpu], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = made(Toy), features(3)
    fast = rmtcompile.optimize(model)
    step(fast, model, x)

    def fails(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no memory\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(OnCpu, "captured_once", fails)
        with pytest.warns(RecordingWarning, match="3 segments are not recorded as CUDA graphs: no memory$"):
            step(fast, model, x)
    assert_step(fast, model, x)
    assert recordings(recording) == 0
    step(fast, model, features(2))
    assert_step(fast, model, features(2))
    assert recordings(recording) == 1


# ---- on a GPU ----------------------------------------------------------------------------------------------

on_gpu = pytest.mark.gpu


def recorded(fast: Any) -> int:
    """Steps that the latest program has recorded."""
    return len(fast._last[0].executor.steps._recordings)


def reference(dtype: torch.dtype) -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, vocab_size=64
    )
    model = build(config, segment_size=8, num_mem_tokens=4, d_mem=8).to("cuda", dtype)
    for name, parameter in model.named_parameters():
        if "W_mv" in name:
            nn.init.normal_(parameter)
    return model


def relative_error(expected: Any, got: Any) -> float:
    return float((got - expected).norm() / expected.norm().clamp(min=1e-30))


@on_gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("recompute", ["none", "level", 2])
def test_the_reference_model_on_cuda(recompute: Any, backend: str) -> None:
    model = reference(torch.float32)
    fast = rmtcompile.optimize(model, recompute=recompute, backend=backend)
    twin, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, fused=True) for m in (model, twin)]
    ids = torch.randint(64, (2, 64), device="cuda")
    for n in (48, 48, 48, 16, 16, 45, 45, 48, 45, 16):
        losses = []
        for run, optimizer in zip((fast, twin), optimizers, strict=True):
            optimizer.zero_grad()
            out = next(x for x in run(ids[:, :n]).values() if x.dim() == 3)
            weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(n)).cuda()
            loss = (out * weights).mean()
            loss.backward()
            losses.append(loss.detach())
        assert_same(losses[1], losses[0], 1e-4)
        out = next(x for x in exact(ids[:, :n]).values() if x.dim() == 3)
        (out * weights).mean().backward()
        errors = []
        for (name, mine), theirs, right in zip(
            model.named_parameters(), twin.parameters(), exact.parameters(), strict=True
        ):
            assert (mine.grad is None) == (theirs.grad is None), name
            if mine.grad is not None and right.grad is not None:
                errors.append([relative_error(right.grad, x.grad) for x in (mine, theirs)])
        most, own = (max(column) for column in zip(*errors, strict=True))
        assert most <= max(1e-3, 4 * own), f"the program's {most:.1e}, the model's own {own:.1e}"
        for optimizer in optimizers:
            optimizer.step()
        exact.zero_grad()
        with torch.no_grad():
            for mine, *others in zip(*(m.parameters() for m in (model, twin, exact)), strict=True):
                for other in others:
                    other.copy_(mine)
    assert recorded(fast) >= 1
    assert "recorded as two CUDA graphs" in str(fast.explain())


@on_gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("build_model", [Toy, AttributeState, lambda: Toy(3, up=-1), lambda: Toy(3, up=1)])
def test_steps_that_come_again_on_cuda(build_model: Any, backend: str) -> None:
    model = made(build_model, torch.float64).cuda()
    fast = rmtcompile.optimize(model, backend=backend)
    for segments in (5, 5, 2, 5, 2, 1, 2, 1, 1, 5):
        x = features(segments).cuda()
        parameters = list(model.parameters())
        mine = [g.clone() for g in torch.autograd.grad(on_device(fast(x)), parameters)]
        assert_same(list(torch.autograd.grad(on_device(model(x)), parameters)), mine, 1e-6)
        for module in model.modules():
            getattr(module, "reset", lambda: None)()
    first, other = on_device(fast(x)), on_device(fast(x + 1))
    mine = [
        torch.autograd.grad(loss, parameters, retain_graph=True)[0].clone() for loss in (first, other, first)
    ]
    theirs = [torch.autograd.grad(on_device(model(v)), parameters)[0] for v in (x, x + 1, x)]
    assert_same(theirs, mine, 1e-6)
    assert recorded(fast) >= 1


def on_device(result: Any) -> Tensor:
    values = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor) and x.requires_grad]
    places = [torch.linspace(-1, 2, x.numel(), dtype=x.dtype, device=x.device).view_as(x) for x in values]
    return torch.stack([(x * place).sum() for x, place in zip(values, places, strict=True)]).sum()


@on_gpu
@pytest.mark.filterwarnings("default")
def test_dropout_in_recorded_steps() -> None:
    """Each step draws anew; a forward that is replayed again for its backward draws what it has drawn."""
    from test_dropout import KEPT, Drawing

    model = made(lambda: Drawing(KEPT["dropout"]), torch.float32).cuda().train()
    fast, parameters = rmtcompile.optimize(model, backend="eager"), list(model.parameters())
    x = features(5, 16, torch.float32).cuda()
    seen = []
    for _ in range(5):
        out, drawn = fast(x)
        other = fast(x + 1)[0]
        mine = [g.clone() for g in torch.autograd.grad(out.pow(2).mean(), parameters)]
        expected, _ = model(x, drawn.detach())
        assert_same(list(torch.autograd.grad(expected.pow(2).mean(), parameters)), mine, 1e-3)
        seen.append(drawn.detach().clone())
        del other
    assert all(not torch.equal(a, b) for a, b in pairwise(seen))
    assert recorded(fast) == 1
