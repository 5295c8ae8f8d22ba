"""Run by tests/test_ranks.py in several processes: `python ranks.py DEVICE RANK COUNT FILE CASES`. Says as
JSON what each case has found. On cuda each rank has a device of its own, and they talk over NCCL."""

from __future__ import annotations

import copy
import json
import shutil
import sys
import tempfile
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import rank_documents
import rank_faults
import torch
import torch.distributed as dist
import toys
from rank_models import (
    DEVICES,
    count_replays,
    features,
    gradients,
    kind,
    made,
    of_zoo,
    optimized,
    recording,
    refused,
)
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint
from toys import Toy, Uneven, assert_same, leave_quietly

import rmtcompile
from rmtcompile import IgnoredWarning, RunState


def same(rank: int, group: Any) -> Any:
    lengths_of = {"skip_connections": (4, 1, 7), "hybrid": (5,)}
    if dist.get_world_size() <= 3:  # it has so many layers
        lengths_of["growing_cache"] = (4, 1, 6)
    for name, lengths in lengths_of.items():
        model, _ = of_zoo(name, 1)
        fast = optimized(copy.deepcopy(model), group)
        for segments in lengths:
            _, x = of_zoo(name, segments)
            assert_same(model(x), fast(x))
    return "same"


def mesh(rank: int, group: Any) -> Any:
    devices = init_device_mesh(kind(), (dist.get_world_size(),), mesh_dim_names=("bands",))
    model = made(lambda: Toy(4))
    fast = optimized(copy.deepcopy(model), devices["bands"])
    for x in (features(4), features(6)[:, :-2]):
        assert_same(model(x), fast(x))
    return str(fast._last[0].executor.cut)


def balanced(rank: int, group: Any) -> Any:
    """Layers are divided by what they cost: how, and by which costs."""
    model = made(lambda: Uneven([8] * 6 + [32768] * 2))
    fast = optimized(copy.deepcopy(model), group)
    for segments in (4, 7):
        x = features(segments, d=16)
        assert_same(model(x), fast(x))
    division = fast._last[0].executor.cut.division
    return [[len(own) for own in division.layers], division.costs.layers]


def recorded(rank: int, group: Any) -> Any:
    """Levels that are recorded once serve any length, and see written weights."""
    names = ["infini_attention", "rolled_memories", "compressed_older", "hybrid", "skip_connections"]
    for name in (*names, "skewed"):
        model, x = of_zoo(name, 4)
        twin = copy.deepcopy(model)
        fast = optimized(twin, group)
        fast(x)
        if fast._last[0].executor.cut.goes_down and DEVICES[-1] != "cpu":
            assert "values go down" in fast._last[0].executor.recorded
            continue
        executor = recording(fast, x)
        replayed = count_replays(executor)
        for segments in (4, 9, 1, 6, 4):
            _, x = of_zoo(name, segments)
            assert_same(copy.deepcopy(model)(x), fast(x))
        assert len(replayed) >= 3, (name, replayed)
        for p in (*model.parameters(), *twin.parameters()):
            p.mul_(0.9)
        assert_same(model(x), fast(x))
    return "same"


def own_weights(rank: int, group: Any) -> Any:
    """A rank stacks the weights of its own layers, and leaves all others where they are: in a mapped file."""
    count = dist.get_world_size()
    model = toys.made(lambda: Toy(4))
    with tempfile.TemporaryDirectory() as folder:
        save_file(model.state_dict(), f"{folder}/weights.safetensors")
        with torch.device("meta"):
            mapped = Toy(4).double().eval()
        mapped.load_state_dict(load_file(f"{folder}/weights.safetensors"), assign=True)
        before = {name: p.data_ptr() for name, p in mapped.named_parameters()}
        fast = optimized(mapped, group)
        for segments in (5, 7):
            assert_same(model(toys.features(segments)), fast(toys.features(segments)))
        moved = [name for name, p in mapped.named_parameters() if p.data_ptr() != before[name]]
    own = range(4 * rank // count, 4 * (rank + 1) // count)
    assert moved and {int(name.split(".")[1]) for name in moved} == set(own), moved
    assert {stack.tensor.shape[0] for stack in fast._last[0].executor.stacks._in_order} == {len(own)}
    return "same"


def from_host(rank: int, group: Any) -> Any:
    """The model in the host's memory, over NCCL: results are there, too, and each card has its layers."""
    model = toys.made(lambda: Toy(4))
    fast = optimized(copy.deepcopy(model), group)
    for segments in (5, 9, 9, 5):
        x = toys.features(segments)
        assert_same(model(x), fast(x))
    executor = fast._last[0].executor
    assert executor.device == torch.device(DEVICES[-1]) and executor.home.type == "cpu"
    assert executor.replays._bands, executor.recorded
    _, state = fast.run(x[:, :8])
    assert_same(model(x)[:, 8:], fast.run(x[:, 8:], state=state)[0])
    assert all(value.device.type == "cpu" for value in state.gathered().values.values())
    held = [x for layer in fast.layers for x in layer.parameters()]
    assert all(x.device.type == "cpu" for x in held)
    return "same"


@torch.enable_grad()
def training(rank: int, group: Any) -> Any:
    """Forward and gradients of weights and arguments, with levels recomputed and without."""
    cases = [("skewed", 5, "none"), ("compressed_older", 4, "level")]
    cases += [("growing_cache", 4, "none")] if dist.get_world_size() <= 3 else []
    for name, segments, recompute in cases:
        model, x = of_zoo(name, segments)
        other = copy.deepcopy(model)
        fast = optimized(other, group, recompute=recompute)
        assert_same(gradients(model, model, x), gradients(fast, other, x), 1e-9)
    return "same"


@torch.enable_grad()
def steps(rank: int, group: Any) -> Any:
    """Some steps of an optimizer: all ranks keep the same weights, those of the model."""
    model = made(lambda: Toy(4))
    other = copy.deepcopy(model)
    fast = optimized(other, group)
    for call, mine in ((model, model), (fast, other)):
        optimizer = torch.optim.AdamW(mine.parameters(), lr=1e-2)
        for n in (3, 5, 1):
            optimizer.zero_grad()
            call(features(n)).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(mine.parameters(), 0.1)
            optimizer.step()
    assert_same(model.state_dict(), other.state_dict(), 1e-9)
    return "same"


@torch.enable_grad()
def retained(rank: int, group: Any) -> Any:
    """A second backward gives the same gradients once more where the graph was retained."""
    model = made(lambda: Toy(4))
    loss = optimized(model, group)(features(4)).square().mean()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    loss.backward()
    assert_same([2 * grad for grad in once], [p.grad for p in model.parameters() if p.grad is not None])
    return refused(loss.backward, RuntimeError)


def parts(rank: int, group: Any) -> Any:
    """A text in parts, cut anywhere; with gradients through its state, too."""
    model, x = of_zoo("skewed", 6)
    other = copy.deepcopy(model)
    fast, n = optimized(other, group), x.shape[1]
    for gradient in (False, True):
        with torch.set_grad_enabled(gradient):
            expected, state = model(x), None
            for lo, hi in ((0, n // 3), (n // 3, n // 2), (n // 2, n)):
                lo -= 0 if state is None else state.pending_tokens
                y, state = fast.run(x[:, lo:hi], state=state)
                assert_same(expected[:, lo:hi], y)
            if gradient:
                last = (expected[:, -1].sum(), model), (y[:, -1].sum(), other)
                theirs, mine = (
                    torch.autograd.grad(loss, list(m.parameters()), allow_unused=True) for loss, m in last
                )
                assert_same(theirs, mine, 1e-9)
    return "same"


def sharded(rank: int, group: Any) -> Any:
    """Each rank keeps the part of a state that its layers read; gathered, split, joined, with gradients."""
    for name, segments in (("skewed", 6), ("compressed_older", 6), ("skip_connections", 6), ("hybrid", 6)):
        model, x = of_zoo(name, segments)
        fast, alone = optimized(copy.deepcopy(model), group), rmtcompile.optimize(model, backend="eager")
        n = x.shape[1]
        lo, hi = n // 3, 2 * n // 3
        _, own = fast.run(x[:, :lo])
        _, whole = alone.run(x[:, :lo])
        layers = fast._last[0].executor.state_layers
        assert own.values.keys() <= whole.values.keys()
        assert own.is_whole is (name == "skewed") is (own.values.keys() == whole.values.keys())
        assert own.is_whole or f"part of rank {rank} of" in repr(own)
        assert_same(dict(whole.values), dict(own.gathered().values))
        cells = {c.name: c.layer for c in fast._last[0].compiled.emitted.carried.cells}
        if name in ("compressed_older", "hybrid"):
            assert all(cells.get(key[0], layers.start) in layers for key in own.values), own.values.keys()
        y, _ = alone.run(x[:, lo:hi], state=whole)
        rows = RunState.join([part.clone() for part in own.split(1)])
        for state in (own, own.gathered(), own.detach(), rows):
            z, after = fast.run(x[:, lo:hi], state=state)
            assert_same(y, z)
            last, _ = fast.run(x[:, hi:], state=after)
            assert_same(model(x)[:, -1], last[:, -1])
        with torch.enable_grad():
            z, after = fast.run(x[:, lo:hi], state=own)
            assert_same(y, z)
            assert after.is_whole and (z.requires_grad or name == "hybrid")
    same, (_, other) = own.gathered(), fast.run(x[:, :lo])
    return [
        refused(lambda: own.save("nowhere")),
        refused(lambda: alone.run(x[:, lo:], state=own)),
        refused((own if rank else other).gathered),
        refused(lambda: fast.run(x[:, lo:], state=own if rank else other)),
        refused(lambda: fast.run(x[:, lo:], state=own if rank else same)),
        refused(lambda: RunState.join([own, same])),
    ]


def saved(rank: int, group: Any) -> Any:
    """Each rank saves its part of a program, and all load theirs, or none does."""
    folder = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder, 0, group)
    model = made(lambda: Uneven([8, 8, 4096, 8]))
    fast = optimized(model, group)
    for segments in (4, 6):
        fast(features(segments, d=16))
    fast.save(folder[0])
    dist.barrier(group)
    divisions = [fast._last[0].executor.cut.division]
    captures = []
    for is_lost in (False, True):
        if is_lost and rank == 1:
            for path in Path(folder[0]).glob("*/fingerprint.json"):
                if "rank 1 of" in path.read_text():
                    shutil.rmtree(path.parent)
        dist.barrier(group)
        again = rmtcompile.load(folder[0], copy.deepcopy(model), devices=group, backend="eager")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IgnoredWarning)
            for segments in (7, 4):
                x = features(segments, d=16)
                assert_same(model(x), again(x))
        captures.append(again.captures)
        divisions.append(again._last[0].executor.cut.division)
    notes = list(again._programs.shelf.notes)
    again.save(folder[0])
    dist.barrier(group)
    if rank == 0:  # knows more than the others from here on
        again._programs.entries[0].lengths.checked_to = 99
        again._programs.shelf._written.clear()
        again.save(folder[0])
    dist.barrier(group)
    uneven = rmtcompile.load(folder[0], copy.deepcopy(model), devices=group, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IgnoredWarning)
        assert_same(model(x), uneven(x))
    captures.append(uneven.captures)
    dist.barrier(group)
    if rank == 0:
        shutil.rmtree(folder[0])
    assert divisions[0] == divisions[1]
    return [captures, notes, list(uneven._programs.shelf.notes)]


class Added(Toy):
    """All layers add two parameters, whose gradients are one tensor."""

    def __init__(self) -> None:
        super().__init__(4)
        self.one, self.other = (torch.nn.Parameter(torch.full((4,), v)) for v in (0.1, 0.2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = self.one + self.other
        return super().forward(x * both)


class Mixed(Uneven):
    """Layers read the sum of two parameters, in each band."""

    def __init__(self) -> None:
        super().__init__([8, 8, 8])
        self.one, self.other = (torch.nn.Parameter(torch.full((16,), v)) for v in (0.1, 0.2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states, out = [x.new_zeros(x.shape[0], x.shape[2]) for _ in self.layers], []
        for h in x.split(4, 1):
            for i, layer in enumerate(self.layers):
                h, states[i] = layer(h * (self.one + self.other), states[i])
            out.append(torch.tanh(h))
        return torch.cat(out, 1)


@torch.enable_grad()
def added(rank: int, group: Any) -> Any:
    for build, x in ((Added, features(4)), (Mixed, features(4, d=16))):
        model = made(build)
        other = copy.deepcopy(model)
        assert_same(gradients(model, model, x), gradients(optimized(other, group), other, x), 1e-9)
    return "same"


@torch.enable_grad()
def hooked(rank: int, group: Any) -> Any:
    """Hooks of parameters and arguments are called once, with the sums of all ranks."""
    found = []
    for is_fast in (False, True):
        model = made(lambda: Toy(4))
        call = optimized(model, group) if is_fast else model
        calls: list[int] = []
        for p in model.parameters():
            p.register_hook(lambda grad, calls=calls: calls.append(1) or 2 * grad)
        x = features(4).requires_grad_()
        x.register_hook(lambda grad: 3 * grad)
        for _ in range(2):
            call(x).square().sum().backward()
        found.append([len(calls), x.grad, *(p.grad for p in model.parameters())])
    assert_same(*found, 1e-9)
    return "same"


class Ending(Toy):
    """What comes behind the layers has a state, so that rules need some segments."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total, outs = torch.zeros_like(x[:, :1]), []
        states = [torch.zeros_like(x[:, :1]) for _ in self.layers]
        for h in x.split(4, 1):
            for i, layer in enumerate(self.layers):
                h = h + layer.mix(h + states[i])
                states[i] = states[i] + h.mean(1, keepdim=True)
            outs.append(h + total)
            total = total + h.sum(1, keepdim=True)
        return torch.cat(outs, 1)


@torch.enable_grad()
def ending(rank: int, group: Any) -> Any:
    """A program that stops on one rank where its rules do not hold: all of them make another one."""
    model = made(lambda: Ending(4))
    other = copy.deepcopy(model)
    fast = optimized(other, group)
    for segments in (5, 3, 2, 1, 6):
        x = features(segments)
        assert_same(gradients(model, model, x), gradients(fast, other, x), 1e-9)
    return "same"


class Kinds(Toy):
    """Gives its result in several types."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        y = super().forward(x)
        kinds = (torch.int16, torch.uint8, torch.bool, torch.float32)
        conjugated = torch.complex(y, 2 * y).conj()
        return [y, *((10 * y).to(kind) for kind in kinds), conjugated, conjugated.imag, y.transpose(1, 2)]


def kinds_of_results(rank: int, group: Any) -> Any:
    model = made(lambda: Kinds(4))
    fast = optimized(copy.deepcopy(model), group)
    for segments in (4, 6):
        theirs, ours = (
            [torch.view_as_real(y.resolve_conj()) if y.is_complex() else y for y in call(features(segments))]
            for call in (model, fast)
        )
        assert_same(theirs, ours)
    return "same"


@torch.enable_grad()
def checkpointed(rank: int, group: Any) -> Any:
    """A checkpoint around the program does not reach into it, and ranks do not wait for each other."""
    model = made(lambda: Toy(4))
    other = copy.deepcopy(model)
    fast = optimized(other, group)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            ours = gradients(lambda x: checkpoint(fast, x, use_reentrant=False), other, features(4))
            assert_same(gradients(model, model, features(4)), ours, 1e-9)
    assert any(issubclass(one.category, IgnoredWarning) for one in caught)
    return "same"


@torch.enable_grad()
def replicas(rank: int, group: Any) -> Any:
    """Data parallel around bands: two replicas of half of the bands each, and half of the batch."""
    count = dist.get_world_size()
    both = init_device_mesh(kind(), (2, count // 2), mesh_dim_names=("data", "bands"))
    model = made(lambda: Toy(4))
    other = copy.deepcopy(model)
    fast = optimized(other, both["bands"])
    parallel = torch.nn.parallel.DistributedDataParallel(fast, process_group=both["data"].get_group())
    for n in (3, 5):
        x = features(n, batch=4)
        for m in (model, other):
            m.zero_grad()
        model(x).square().mean().backward()
        half = both["data"].get_local_rank()
        parallel(x[2 * half : 2 * half + 2]).square().mean().backward()
        theirs, mine = ([p.grad for p in m.parameters() if p.grad is not None] for m in (model, other))
        assert_same(theirs, mine, 1e-9)
    return "same"


@torch.enable_grad()
def profiled(rank: int, group: Any) -> Any:
    """What each rank is told of all of them, with gradients and without."""
    fast, x = optimized(made(lambda: Toy(4)), group), features(5)
    with torch.no_grad():
        found = fast.profile(x)
    assert fast.last_profile is found and fast.profile(x).backward_total_us > 0
    assert all(parameter.grad is None for parameter in fast.parameters())
    told = found.to_json(), found.to_chrome_trace(), found.schedule.to_json(), str(found)
    with torch.no_grad():
        assert_same(fast.model(x), fast(x))
    return list(told)


CASES = {
    f.__name__: f
    for f in (
        same, mesh, balanced, recorded, own_weights, from_host, training, steps, retained, parts, replicas,
        profiled, sharded, saved, added, hooked, ending, kinds_of_results, checkpointed, *rank_documents.ALL,
        *rank_faults.ALL,
    )
}  # fmt: skip


def main(device: str, rank: int, count: int, file: str, cases: str) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        DEVICES.append(f"cuda:{rank}")
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", init_method=f"file://{file}", rank=rank, world_size=count,
        timeout=timedelta(seconds=200), device_id=torch.device(DEVICES[-1]) if device == "cuda" else None,
    )  # fmt: skip
    with torch.no_grad():
        print(json.dumps({case: CASES[case](rank, dist.group.WORLD) for case in cases.split()}))
    leave_quietly(destroys=cases != "leaving")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
