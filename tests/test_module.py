"""What `optimize` gives for a module is a module, and what people do around it has an effect."""

from __future__ import annotations

import copy
import inspect
import pickle
import types
from datetime import timedelta
from typing import Any

import pytest
import torch
from test_end_to_end import Scaled
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from toys import SEGMENT, WIDTH, Toy, assert_same, features, leave_quietly, made

import rmtcompile
from rmtcompile.errors import CaptureError, FallbackWarning, IgnoredWarning, UnsupportedError


class Outer(nn.Module):
    """A module with an optimized one inside."""

    def __init__(self) -> None:
        super().__init__()
        self.fast = rmtcompile.optimize(made(Toy))
        self.head = nn.Linear(WIDTH, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fast(x))


def names(tensors: Any) -> list[str]:
    return [name for name, _ in tensors]


# --- a module -----------------------------------------------------------------------------------------------


def test_it_is_a_module_with_the_names_of_the_model() -> None:
    model = made(Toy)
    fast = rmtcompile.optimize(model)
    assert isinstance(fast, nn.Module) and isinstance(fast, rmtcompile.Optimized)
    for list_of in (nn.Module.named_parameters, nn.Module.named_buffers, nn.Module.named_modules):
        method = list_of.__name__
        assert names(getattr(fast, method)()) == names(getattr(model, method)())
    assert all(a is b for a, b in zip(fast.parameters(), model.parameters(), strict=True))
    assert list(fast.state_dict()) == list(model.state_dict())
    assert inspect.signature(fast.forward) == inspect.signature(fast) == inspect.signature(model.forward)
    assert not isinstance(rmtcompile.optimize(model.forward), nn.Module)


@torch.no_grad()
def test_weights_are_loaded_into_the_model() -> None:
    model, other = made(Toy), made(Toy, seed=1)
    fast = rmtcompile.optimize(model)
    fast(features(3))
    assert not fast.load_state_dict(other.state_dict()).missing_keys
    assert_same(other(features(4)), fast(features(4)))
    with pytest.raises(RuntimeError, match="Missing key"):
        fast.load_state_dict({})
    assert fast.captures == 1


@torch.no_grad()
def test_methods_reach_the_model_and_return_the_module() -> None:
    model = made(Toy, torch.float32)
    fast = rmtcompile.optimize(model)
    fast(features(3, dtype=torch.float32))
    for change in ("double", "eval", "train", "half", "float"):
        assert getattr(fast, change)() is fast
    assert fast.to(torch.float64) is fast and fast.requires_grad_(False) is fast
    seen: list[nn.Module] = []
    assert fast.apply(seen.append) is fast and model in seen and fast not in seen
    assert model.layers[0].mix.weight.dtype is torch.float64
    assert model.training and fast.training
    model.eval()
    assert not fast.training
    fast.training = True
    assert model.training and "training" not in vars(fast)
    assert not any(p.requires_grad for p in model.parameters())
    assert_same(model(features(4)), fast(features(4)))


def test_attributes_of_the_model_are_read_set_and_deleted_there() -> None:
    model = made(Scaled)
    fast = rmtcompile.optimize(model)
    fast.scale = 3.0
    fast._private = 1
    fast.extra = nn.Linear(2, 2)
    fast.register_buffer("table", torch.zeros(2))
    assert model.scale == 3.0 and model._private == 1 and model.extra is fast.extra
    assert "extra.weight" in fast.state_dict() and "table" in dict(model.named_buffers())
    del fast.extra, fast._private
    assert not hasattr(model, "extra") and not hasattr(model, "_private")
    assert {"schedule", "scale", "layers"} <= set(dir(fast))
    assert not hasattr(fast, "nothing")


class Overrides(Toy):
    """A model with a say in what torch asks of modules."""

    def train(self, mode: bool = True) -> Any:
        self.trained = mode
        return super().train(mode)

    def get_extra_state(self) -> Any:
        return {"trained": getattr(self, "trained", None)}

    def set_extra_state(self, state: Any) -> None:
        self.trained = state["trained"]


def test_the_methods_of_the_model_are_the_ones_that_run() -> None:
    outer = nn.Sequential(rmtcompile.optimize(made(Overrides)))
    outer.eval()
    assert outer[0].model.trained is False
    state = outer.state_dict()
    assert state["0._extra_state"] == {"trained": False}
    again = nn.Sequential(rmtcompile.optimize(made(Overrides, seed=1)))
    again.load_state_dict(state)
    assert again[0].model.trained is False
    assert_same(outer(features(3)), again(features(3)))


def test_inside_of_a_module() -> None:
    outer = Outer()
    inner = outer.fast.model
    assert list(outer.state_dict()) == [
        *(f"fast.{name}" for name in inner.state_dict()), "head.weight", "head.bias"
    ]  # fmt: skip
    assert names(outer.named_parameters()) == list(outer.state_dict())
    optimizer = torch.optim.SGD(outer.parameters(), lr=0.1)
    before = inner.layers[0].mix.weight.detach().clone()
    outer(features(4)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, inner.layers[0].mix.weight)
    outer.zero_grad()
    assert inner.layers[0].mix.weight.grad is None
    other = Outer()
    other.load_state_dict(outer.state_dict())
    assert_same(outer(features(3)), other(features(3)))
    outer.float().eval()
    assert inner.layers[0].mix.weight.dtype is torch.float32 and not inner.training
    assert_same(outer.head(inner(features(3).float())), outer(features(3).float()))


@torch.no_grad()
def test_a_model_with_an_optimized_module_inside_is_captured_as_a_whole() -> None:
    outer = Outer()
    expected = outer.head(outer.fast.model(features(4)))
    whole = rmtcompile.optimize(outer)
    assert_same(expected, whole(features(4)))
    x = features(20)  # a length that is followed first
    assert_same(outer.head(outer.fast.model(x)), whole(x))
    assert whole.schedule.width == 3 and outer.fast.captures == 0 and whole.captures < 6
    handle = outer.fast.register_forward_hook(lambda module, args, out: out * 2)  # it is seen
    assert_same(outer(features(4)), whole(features(4)))
    handle.remove()
    assert_same(expected, whole(features(4)))
    outer.fast.layers[0].mix.weight.zero_()
    assert_same(outer(features(4)), whole(features(4)))


@torch.no_grad()
def test_hooks_run_at_each_call_around_the_program() -> None:
    model = made(Toy)
    expected, seen = model(features(3) + 1), []
    fast = rmtcompile.optimize(model)
    handles = [
        fast.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
        fast.register_forward_hook(lambda module, args, out: seen.append(module) or out * 2),
    ]
    for _ in range(3):
        assert_same(expected * 2, fast(features(3)))
    assert seen == [fast] * 3 and fast.captures == 1
    for handle in handles:
        handle.remove()
    assert_same(model(features(3)), fast(features(3)))
    assert fast.captures == 1


@torch.no_grad()
@pytest.mark.parametrize("way", ["optimized", "installed"])
def test_hooks_of_all_modules_run_once(way: str) -> None:
    model = made(Toy)
    handle = nn.modules.module.register_module_forward_hook(shifted)
    try:
        expected = model(features(3))
        fast: Any = rmtcompile.optimize(model) if way == "optimized" else model
        if way == "installed":
            rmtcompile.install(model)
        assert_same(expected, fast(features(3)))
        fast.register_forward_hook(doubled)
        if way == "installed":
            assert_same(expected * 2, fast(features(3)))
        else:
            with pytest.raises(UnsupportedError, match="would run twice"):
                fast(features(3))
    finally:
        handle.remove()


def shifted(module: nn.Module, args: Any, out: Any) -> Any:
    return out + 1 if isinstance(out, Tensor) else None


@pytest.mark.parametrize("way", ["optimized", "installed"])
def test_backward_hooks_around_the_program(way: str) -> None:
    model, seen = made(Toy), []
    fast: Any = rmtcompile.optimize(model) if way == "optimized" else model
    if way == "installed":
        rmtcompile.install(model)
    fast.register_full_backward_hook(lambda module, inner, outer: seen.append(outer[0].shape))
    fast(features(3).requires_grad_()).sum().backward()
    assert seen == [features(3).shape] and model.layers[0].mix.weight.grad is not None


@torch.no_grad()
def test_copies_have_weights_programs_and_hooks_of_their_own() -> None:
    outer = Outer()
    outer.fast.register_forward_hook(doubled)
    expected = outer(features(4))
    for again in (copy.deepcopy(outer), pickle.loads(pickle.dumps(outer))):
        assert_same(expected, again(features(4)))
        assert again.fast.forward != outer.fast.forward and again.fast.captures == 1
        again.fast.layers[0].mix.weight.zero_()
        assert not torch.equal(expected, again(features(4)))
    assert_same(expected, outer(features(4)))


def doubled(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * 2


# --- what wraps modules -------------------------------------------------------------------------------------


def prepared(model: nn.Module) -> nn.Module:
    """What accelerate does for mixed precision: another forward, and the way back to the first."""
    mixed = torch.autocast("cpu", torch.bfloat16)
    model._original_forward = model.forward
    if hasattr(model.forward, "__func__"):
        model.forward = types.MethodType(mixed(model.forward.__func__), model)
    else:
        model.forward = mixed(model.forward)
    return model


def unprepared(model: nn.Module) -> None:
    forward, original = model.forward, model.__dict__.pop("_original_forward")
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
        if forward == original:
            break
    model.forward = types.MethodType(forward, model)


@pytest.mark.parametrize("way", ["optimized", "installed"])
def test_another_forward_around_the_program(way: str) -> None:
    model = made(Toy, torch.float32)
    theirs = prepared(copy.deepcopy(model))
    if way == "optimized":
        mine = program = rmtcompile.optimize(model)
    else:
        mine, program = model, rmtcompile.install(model)
    x = features(4, dtype=torch.float32)
    plain, expected = mine(x), theirs(x)
    assert program.captures == 1 and not torch.equal(plain, expected)
    prepared(mine)
    got = mine(x)
    got.sum().backward()
    assert_same(expected, got, 1e-2)
    assert program.captures == 2  # the call inside of autocast
    assert way == "installed" or "_original_forward" not in vars(model)
    unprepared(mine)
    assert_same(plain, mine(x))
    if way == "installed":
        prepared(mine)
        rmtcompile.uninstall(mine)  # also from under what others have wrapped around it
        assert_same(expected, mine(x))
        assert program.captures == 2


class Fusable(nn.Module):
    """Layers of linears that read one input."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.values = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        memories, out = [torch.zeros_like(x[:, 0])] * 3, []
        for h in x.split(SEGMENT, 1):
            for l in range(3):
                k, v = self.keys[l](h), self.values[l](h)
                h = h + torch.tanh(k) * v + memories[l][:, None]
                memories[l] = memories[l] + h.mean(1)
            out.append(h)
        return torch.cat(out, 1)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_forward_that_is_wrapped_in_autocast_is_captured(backend: str) -> None:
    model = prepared(made(Fusable, torch.float32))
    x = features(4, dtype=torch.float32)
    fast = rmtcompile.optimize(model, backend=backend)
    assert_same(model(x), fast(x), 2e-2)
    assert fast.schedule.width == 3


def test_data_parallel_around_an_optimized_module() -> None:
    torch.multiprocessing.spawn(_rank, (_port(),), nprocs=2)


def _port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _rank(rank: int, port: int) -> None:
    import torch.distributed as dist

    where = {"init_method": f"tcp://127.0.0.1:{port}", "timeout": timedelta(minutes=2)}
    dist.init_process_group("gloo", rank=rank, world_size=2, **where)
    theirs = DistributedDataParallel(made(Toy))
    mine = DistributedDataParallel(rmtcompile.optimize(made(Toy)))
    installed = made(Toy)
    program = rmtcompile.install(installed)
    ours = (mine, DistributedDataParallel(installed))
    for step in range(3):
        x = features(3 + step + rank) * (rank + 1)  # each its own, of its own number of segments
        for model in (theirs, *ours):
            model(x).square().mean().backward()
            torch.optim.SGD(model.parameters(), lr=0.1).step()
            model.zero_grad()
    for model in ours:
        for a, b in zip(theirs.parameters(), model.parameters(), strict=True):
            assert_same(a.detach(), b.detach(), 1e-9)
    assert mine.module.captures == program.captures == 1
    assert list(mine.state_dict()) == list(theirs.state_dict())
    theirs, mine = (
        DistributedDataParallel(model, find_unused_parameters=True)
        for model in (made(Heads), rmtcompile.optimize(made(Heads)))
    )
    for model in (theirs, mine):
        model(features(3), head=0).square().mean().backward()
    for a, b in zip(theirs.parameters(), mine.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            assert_same(a.grad, b.grad, 1e-9)
    leave_quietly()


class Heads(Toy):
    """A toy with two heads, one of which a call leaves without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 2) for _ in range(2))

    def forward(self, x: Tensor, head: int = 0) -> Tensor:
        return self.heads[head](super().forward(x))


def test_gradients_are_scaled_and_clipped() -> None:
    """`GradScaler`, `clip_grad_norm_` and an optimizer, with a step left out because of an infinity."""
    theirs, inner = made(Toy), made(Toy)
    mine = rmtcompile.optimize(inner)
    seen: list[list[Any]] = []
    for model in (theirs, mine):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        said = []
        for step in range(4):
            loss = model(features(3 + step)).square().mean() * (torch.inf if step == 1 else 1.0)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            said += [float(norm) if norm.isfinite() else -1.0, scaler.get_scale()]
        seen.append(said)
    assert seen[0] == pytest.approx(seen[1], rel=1e-9)
    assert seen[0][3] < seen[0][1], "the infinity was noticed"
    for a, b in zip(theirs.parameters(), inner.parameters(), strict=True):
        assert_same(a.detach(), b.detach(), 1e-9)


@pytest.mark.parametrize("way", ["before", "after", "around"])
def test_sharded_parameters_are_refused(way: str) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = made(Toy)
    fast = rmtcompile.optimize(model)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        if way == "around":
            with pytest.raises(UnsupportedError, match="fully_shard") as caught:
                fully_shard(fast, mesh=mesh)
        else:
            if way == "before":
                fast = rmtcompile.optimize(model)
            for layer in model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            with pytest.raises(CaptureError, match="sharded over several processes") as caught:
                fast(features(3))
            assert caught.value.evidence[0] == "layers.0.mix.weight: torch.distributed.tensor.DTensor"
    finally:
        dist.destroy_process_group()
    assert "DistributedDataParallel(rmtcompile.optimize(model))" in caught.value.remedy


def test_data_parallel_inside_of_optimize_is_refused() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fast = rmtcompile.optimize(DistributedDataParallel(made(Toy)))
        with pytest.raises(CaptureError) as caught:
            fast(features(3))
    finally:
        dist.destroy_process_group()
    assert "DistributedDataParallel(rmtcompile.optimize(model))" in caught.value.remedy
    with pytest.raises(UnsupportedError, match="DataParallel copies modules"):
        rmtcompile.optimize(made(Toy))._replicate_for_data_parallel()


# --- compiled and exported ----------------------------------------------------------------------------------


@torch.no_grad()
def test_compiled_before() -> None:
    model = made(Toy)
    fast = rmtcompile.optimize(torch.compile(model, backend="eager"))
    assert fast.model is model and list(fast.state_dict()) == list(model.state_dict())
    model.compile(backend="eager")
    assert_same(Toy.forward(model, features(4)), fast(features(4)))


@torch.no_grad()
@pytest.mark.parametrize("way", ["the module", "around it"])
def test_compiled_after(way: str) -> None:
    """`torch.compile` around it lets the program run as it is, at the first call too."""
    outer = Outer()
    expected = outer.head(outer.fast.model(features(4)))
    if way == "around it":
        assert_same(expected, torch.compile(outer, backend="eager")(features(4)))
    else:
        assert_same(outer.fast.model(features(4)), torch.compile(outer.fast, backend="eager")(features(4)))
    assert outer.fast.captures == 1
    with pytest.raises(UnsupportedError, match="compiled already"):
        outer.fast.compile()
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="a program of rmtcompile runs as it is"):
        torch.compile(outer, backend="eager", fullgraph=True)(features(4))


@torch.no_grad()
def test_exported() -> None:
    fast = rmtcompile.optimize(made(Toy))
    with pytest.raises(UnsupportedError, match="cannot be exported") as caught:
        torch.export.export(fast, (features(3),))
    assert "fast.model" in caught.value.remedy
    torch.export.export(fast.model, (features(3),))


# --- nothing in silence -------------------------------------------------------------------------------------


class Generates(Toy):
    def generate(self, x: Tensor) -> Tensor:
        return self(x)[:, -1:]


@torch.no_grad()
def test_generate_runs_a_program_in_the_calls_that_the_model_makes_of_itself() -> None:
    model = made(Generates)
    fast = rmtcompile.optimize(model)
    expected = model.generate(features(3))
    for _ in range(2):
        assert_same(expected, fast.generate(features(3)))
    assert fast._within.captures == 1 and "forward" not in vars(model)
    model.forward = model.forward  # as others wrap it
    assert_same(expected, fast.generate(features(3)))
    assert "forward" in vars(model)
    with pytest.raises(TypeError, match="positional argument"):
        fast.generate()
    del model.forward
    program = rmtcompile.install(model)
    assert_same(expected, model.generate(features(3)))
    assert_same(expected, fast.generate(features(3)))
    assert program.captures == 1 and model.forward is program


class Speaking:
    """A callable that is no module."""

    def __init__(self) -> None:
        self.inner = made(Toy)

    def __call__(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def generate(self, x: Tensor) -> Tensor:
        return self(x)[:, -1:]


@torch.no_grad()
def test_generate_of_no_module_says_once_that_it_runs_without_the_program() -> None:
    fast = rmtcompile.optimize(Speaking())
    with pytest.warns(FallbackWarning, match=r"rmtcompile.install\(model\)"):
        expected = fast.generate(features(3))
    assert_same(expected, fast.generate(features(3)))
    assert fast.captures == 0


class SavedElsewhere(Toy):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return super().forward(x)


def test_what_has_no_effect_is_said() -> None:
    model = made(SavedElsewhere)
    fast = rmtcompile.optimize(model)
    with torch.no_grad():
        fast(features(3))
    with pytest.warns(IgnoredWarning, match=r"save_on_cpu, at .*test_module.py:\d+") as caught:
        assert_same(model(features(4)), fast(features(4)))
    assert len(caught) == 1 and caught[0].filename == __file__
    fast(features(4, batch=3))


@torch.no_grad()
def test_a_wrong_shape_is_said_without_the_traces_of_fake_tensors() -> None:
    import traceback

    with pytest.raises(CaptureError) as caught:
        rmtcompile.optimize(made(Toy))(torch.zeros(2, 6, WIDTH + 1).double())
    text = "".join(traceback.format_exception(caught.value))
    assert "_subclasses" not in text and len(text.splitlines()) < 80 and "toys.py" in str(caught.value)


def test_a_backend_that_there_is_not_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="backend must be"):
        rmtcompile.optimize(made(Toy), backend="foo")
