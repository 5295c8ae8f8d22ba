"""Run by tests/test_ranks.py in several processes: `python ranks.py DEVICE RANK COUNT FILE CASES`. Says as
JSON what each case has found. On cuda each rank has a device of its own, and they talk over NCCL."""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import toys
from safetensors.torch import load_file, save_file
from test_blocks import Player
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._pytree import tree_leaves
from toys import Toy, Uneven, assert_same, leave_quietly
from zoo.others import ZOO

import rmtcompile

DEVICES = ["cpu"]  # of this rank


def features(segments: int, **options: Any) -> torch.Tensor:
    return toys.features(segments, **options).to(DEVICES[-1])


def made(build: Any, **options: Any) -> torch.nn.Module:
    return toys.made(build, **options).to(DEVICES[-1])


def of_zoo(name: str, segments: int) -> tuple[torch.nn.Module, torch.Tensor]:
    entry = ZOO[name]
    (x,) = entry.inputs(2, segments)
    return entry.build().to(DEVICES[-1]), x.to(DEVICES[-1])


def _kind() -> str:
    return torch.device(DEVICES[-1]).type


def optimized(model: torch.nn.Module, group: Any, **options: Any) -> Any:
    return rmtcompile.optimize(model, devices=group, backend="eager", **options)


class Failing(Toy):
    """Its embedding does not know all numbers."""

    def __init__(self) -> None:
        super().__init__(4)
        self.table = torch.nn.Embedding(5, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(self.table(ids))


def same(rank: int, group: Any) -> Any:
    for name, lengths in (("skip_connections", (4, 1, 7)), ("hybrid", (5,))):
        model, _ = of_zoo(name, 1)
        fast = optimized(copy.deepcopy(model), group)
        for segments in lengths:
            _, x = of_zoo(name, segments)
            assert_same(model(x), fast(x))
    return "same"


def mesh(rank: int, group: Any) -> Any:
    devices = init_device_mesh(_kind(), (dist.get_world_size(),), mesh_dim_names=("bands",))
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


def other_programs(rank: int, group: Any) -> Any:
    """Costs are measured on one rank only."""
    model = made(lambda: Uneven([8, 8, 4096]) if rank == 1 else Toy(3, d=16))
    return refused(lambda: optimized(model, group)(features(4, d=16)))


def other_weights(rank: int, group: Any) -> Any:
    model = made(lambda: Toy(4), seed=rank)
    return refused(lambda: optimized(model, group)(features(4)))


def other_lengths(rank: int, group: Any) -> Any:
    fast = optimized(made(lambda: Toy(4)), group)
    fast(features(4))
    return refused(lambda: fast(features(4 + rank)))


def recording(fast: Any, x: torch.Tensor) -> Any:
    """The executor of a program that has run; its levels are recorded, by hand where there are no graphs."""
    fast(x)
    executor = fast._last[0].executor
    if DEVICES[-1] == "cpu":
        executor._use_graphs, executor._engine = True, None
        executor.replays.device_for = lambda _: Player()
        fast(x)
    assert executor.replays._bands, str(executor.replays)
    return executor


def recorded(rank: int, group: Any) -> Any:
    """Levels that are recorded once serve any length, and see written weights."""
    names = ("infini_attention", "rolled_memories", "compressed_older", "hybrid", "skip_connections", "skewed")
    for name in names:
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


def count_replays(executor: Any) -> list[int]:
    """Grows by the number of segments of each replayed run."""
    seen: list[int] = []
    levels = executor.replays.levels

    def noting(segments: int, *rest: Any) -> Any:
        seen.append(segments)
        return levels(segments, *rest)

    executor.replays.levels = noting
    return seen


def recorded_elsewhere(rank: int, group: Any) -> Any:
    """One rank cannot record: all launch."""
    model = made(lambda: Toy(4))
    fast = optimized(copy.deepcopy(model), group)
    executor = recording(fast, features(5))
    if rank == 0:
        executor.replays.forget()
        executor.replays._obstacle = "out of order"
    seen = count_replays(executor)
    for segments in (5, 7):
        assert_same(model(features(segments)), fast(features(segments)))
    return [seen, executor.recorded]


def recorded_failing(rank: int, group: Any) -> Any:
    """A rank cannot go on with its recordings: all run again; a rank raises: all say so."""
    model = made(lambda: Toy(4))
    fast = optimized(copy.deepcopy(model), group)
    executor = recording(fast, features(5))
    band = executor.replays._bands[rank]
    play = band.play
    if rank == 1:
        band.play = lambda block, *rest: None if block.levels.start == 3 else play(block, *rest)
    assert_same(model(features(6)), fast(features(6)))
    if rank == 1:
        band.play = broken
    return refused(lambda: fast(features(6)))


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
    held = [x for layer in fast.layers for x in layer.parameters()]
    assert all(x.device.type == "cpu" for x in held)
    return "same"


def failing(rank: int, group: Any) -> Any:
    fast = optimized(made(Failing), group)
    ids = torch.zeros(1, 12, dtype=torch.long, device=DEVICES[-1])
    fast(ids)
    executor = fast._last[0].executor
    executor._use_graphs = False  # recordings do not call what is broken here
    if rank == 1:
        executor.members[1].functions["CELLS"]["layers"] = broken
    return refused(lambda: fast(ids))


def broken(*_: Any) -> Any:
    raise ZeroDivisionError("of no use")


@torch.enable_grad()
def training(rank: int, group: Any) -> Any:
    """Forward and gradients of weights and arguments, with levels recomputed and without."""
    for name, segments, recompute in (("skewed", 5, "none"), ("compressed_older", 4, "level")):
        model, x = of_zoo(name, segments)
        other = copy.deepcopy(model)
        fast = optimized(other, group, recompute=recompute)
        assert_same(gradients(model, model, x), gradients(fast, other, x), 1e-9)
    return "same"


def gradients(call: Any, model: torch.nn.Module, x: torch.Tensor) -> Any:
    """What a call gives, and the gradients of a loss of it."""
    x = x.clone().requires_grad_() if x.is_floating_point() else x
    model.zero_grad()
    result = call(x)
    floats = [y for y in tree_leaves(result) if isinstance(y, torch.Tensor) and y.is_floating_point()]
    weighed = [(y * torch.linspace(0, 1, y.shape[-1]).to(y)).mean() for y in floats]
    torch.stack(weighed).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return result, found, x.grad


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


def without_gradients_on_one(rank: int, group: Any) -> Any:
    fast = optimized(made(lambda: Toy(4)), group)
    with torch.set_grad_enabled(rank == 0):
        return refused(lambda: fast(features(4)))


@torch.enable_grad()
def replicas(rank: int, group: Any) -> Any:
    """Data parallel around bands: two replicas of half of the bands each, and half of the batch."""
    count = dist.get_world_size()
    both = init_device_mesh(_kind(), (2, count // 2), mesh_dim_names=("data", "bands"))
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
def undoable(rank: int, group: Any) -> Any:
    """Gradients of a weight that is computed; a transform."""
    model = made(lambda: Toy(4))
    fast = optimized(model, group)
    fast(features(4))
    layer = next(iter(model.layers))
    weight = layer.mix.weight
    del layer.mix._parameters["weight"]
    layer.mix.weight = weight * 2
    return [
        refused(lambda: fast(features(4))),
        refused(lambda: torch.func.jvp(fast, (features(4),), (features(4),))),
    ]


def refused(call: Any, kind: type[Exception] = rmtcompile.RMTCompileError) -> Any:
    try:
        call()
    except kind as error:
        return [type(error).__name__, str(error)]
    return "ran"


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


def leaving(rank: int, group: Any) -> Any:
    fast = optimized(made(lambda: Toy(4)), group)
    fast(features(4))
    if rank == 0:
        os._exit(0)  # without a word to anybody
    return refused(lambda: fast(features(5)))


CASES = {
    f.__name__: f
    for f in (
        same, recorded, recorded_elsewhere, recorded_failing, own_weights, from_host,
        mesh, other_weights, other_lengths, failing, training, steps, retained, parts, balanced,
        other_programs, without_gradients_on_one, undoable, replicas, profiled, leaving,
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
    if cases != "leaving":
        leave_quietly()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
