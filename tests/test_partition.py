"""passes/grid/partition/: layers are found, and every node has its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import SEGMENT, WIDTH, Layer, Toy, features, made

from rmtcompile.binding.captured import Call
from rmtcompile.errors import PartitionError
from rmtcompile.frontend.capture import capture
from rmtcompile.passes.flat.functionalise import functionalise
from rmtcompile.passes.flat.segments import Segments
from rmtcompile.passes.flat.value_numbering import number_values
from rmtcompile.passes.grid.partition import (
    CELL,
    EPILOGUE,
    INIT,
    PROLOGUE,
    Partition,
    Region,
    call_sizes,
    find_layers,
    partition,
    split_index,
)


@torch.no_grad()
def parts(build: Callable[[], nn.Module], segments: int = 3, layers: str | None = None) -> Partition:
    captured = capture(made(build), (features(segments),), {})
    module = number_values(functionalise(captured.module).module)
    module.graph.eliminate_dead_code()
    found = find_layers(captured.calls, call_sizes(module.graph, captured.calls), segments, layers)
    inputs = [str(node.target) for node in module.graph.nodes if node.op == "placeholder"]
    return partition(module.graph, found, Segments({inputs[0]: (1, SEGMENT)}, segments))


def placed(found: Partition, name: str) -> list[Region]:
    return [region for node, region in found.region.items() if name in node.name]


class Whole(nn.Module):
    """A table of positions, a linear before the layers, one after them."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        memory = [x.new_zeros(x.shape[0], WIDTH) for _ in self.layers]
        out = []
        for h in x.split(SEGMENT, 1):
            h = self.enter(h) + torch.arange(SEGMENT).cos()[:, None]
            for l, layer in enumerate(self.layers):
                h, memory[l] = layer(h, memory[l])
            out.append(self.leave(h).relu())
        return torch.cat(out, 1)


def test_every_node_has_a_place() -> None:
    found = parts(Whole)
    assert (found.n_segments, found.n_layers) == (3, 3)
    assert found.layers.paths == ("layers.0", "layers.1", "layers.2")
    assert placed(found, "tanh") == [Region(CELL, s, l) for s in range(3) for l in range(3)]
    assert placed(found, "relu") == [Region(EPILOGUE, s) for s in range(3)]
    assert placed(found, "cos") == placed(found, "arange") == [Region(INIT)]
    linears = [region for region in placed(found, "linear") if region.kind != CELL]
    assert linears == [region for s in range(3) for region in (Region(PROLOGUE, s), Region(EPILOGUE, s))]


def test_instances_hold_all_nodes_in_order() -> None:
    found = parts(Whole)
    instances = found.instances()
    assert sum(map(len, instances.values())) == len(found.region)
    order = {node: i for i, node in enumerate(found.region)}
    for nodes in instances.values():
        assert [order[node] for node in nodes] == sorted(order[node] for node in nodes)


def test_cells_of_one_segment_depend_upwards_only() -> None:
    found = parts(lambda: Toy(3, up=-1))
    for node, region in found.region.items():
        for operand in node.all_input_nodes:
            source = found.region.get(operand)
            if source is not None and source.kind == region.kind == CELL:
                assert source.segment <= region.segment
                assert source.segment < region.segment or source.layer <= region.layer


class Glue(nn.Module):
    """The loop itself updates the memories; layers are plain linears."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        memory = [x.new_zeros(x.shape[0], WIDTH) for _ in self.layers]
        out = []
        for h in x.split(SEGMENT, 1):
            for l, layer in enumerate(self.layers):
                h = torch.tanh(layer(h + memory[l].sigmoid()[:, None]))
                memory[l] = 0.9 * memory[l] + h.mean(1)
            out.append(h)
        return torch.cat(out, 1)


def test_glue_goes_to_its_layer() -> None:
    found = parts(Glue)
    for s in range(3):
        assert [Region(CELL, s, l) for l in range(3)] == [r for r in placed(found, "tanh") if r.segment == s]
    carried = [region for region in placed(found, "sigmoid") if region.kind == CELL]
    assert [region.layer for region in carried] == [
        0,
        1,
        2,
    ] * 2


class Pairs(nn.Module):
    """Attention and feed-forward in two lists: a layer is one of each."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleList(Layer() for _ in range(3))
        self.ffn = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        memory = [x.new_zeros(x.shape[0], WIDTH) for _ in self.attn]
        out = []
        for h in x.split(SEGMENT, 1):
            for l, (attn, ffn) in enumerate(zip(self.attn, self.ffn)):
                h, memory[l] = attn(h, memory[l])
                h = h + ffn(h).relu()
            out.append(h)
        return torch.cat(out, 1)


def test_two_lists_make_one_layer() -> None:
    assert parts(Pairs).layers.paths == tuple(f"attn.{l} + ffn.{l}" for l in range(3))


class LayerMajor(nn.Module):
    """For each layer, all segments."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        pieces = list(x.split(SEGMENT, 1))
        for layer in self.layers:
            m = x.new_zeros(x.shape[0], WIDTH)
            for s, h in enumerate(pieces):
                pieces[s], m = layer(h, m)
        return torch.cat(pieces, 1)


def test_the_other_order_of_loops() -> None:
    found = parts(LayerMajor)
    cells = set(placed(found, "tanh"))
    assert cells == {Region(CELL, s, l) for s in range(3) for l in range(2)}


class Shared(nn.Module):
    """One block, called three times a segment."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Layer()

    def forward(self, x: Tensor) -> Tensor:
        memory = [x.new_zeros(x.shape[0], WIDTH) for _ in range(3)]
        out = []
        for h in x.split(SEGMENT, 1):
            for l in range(3):
                h, memory[l] = self.block(h, memory[l])
            out.append(h)
        return torch.cat(out, 1)


def test_shared_block() -> None:
    assert parts(Shared).n_layers == 3


def test_override() -> None:
    assert parts(Pairs, layers="attn").layers.paths == ("attn.0", "attn.1", "attn.2")
    assert parts(Whole, layers=r"layers\.\d+").n_layers == 3
    with pytest.raises(PartitionError, match="no module that the forward calls has such a path"):
        parts(Whole, layers="blocks")


def calls(*paths: str) -> list[Call]:
    numbers: dict[str, int] = {}
    return [Call(i, path, numbers.setdefault(path, len(numbers)), None) for i, path in enumerate(paths)]


def find(*paths: str, segments: int = 2, **options: Any) -> Any:
    made_calls = calls(*paths)
    return find_layers(made_calls, {call.index: 10 for call in made_calls}, segments, **options)


def test_layers_are_numbered_as_they_are_called() -> None:
    found = find("embed", "h.1", "h.0", "head", "embed", "h.1", "h.0", "head")
    assert found.paths == ("h.1", "h.0")
    assert found.cell_of_call == {1: (0, 0), 2: (0, 1), 5: (1, 0), 6: (1, 1)}


def test_names_without_a_list() -> None:
    assert find("layer0", "layer1", "layer0", "layer1").paths == ("layer0", "layer1")


def test_uneven_calls_are_refused() -> None:
    with pytest.raises(PartitionError) as caught:
        find("h.0", "h.1", "h.0", "h.0", "h.1", "h.1", "h.1", "h.2", layers="h")
    assert "layers are not called equally often in each segment" in str(caught.value)
    assert "h.0: 3 calls for 2 segments" in str(caught.value)


def test_changing_order_is_refused() -> None:
    with pytest.raises(PartitionError, match="the order in which layers are called differs") as caught:
        find("h.0", "h.1", "h.2", "h.1", "h.0", "h.2")
    assert "segment 1: h.1, h.0, h.2" in str(caught.value)


@pytest.mark.parametrize(
    ("path", "expected"),
    [("blocks.3", ("blocks.", 3)), ("layer12", ("layer", 12)), ("a[4]", None), ("head", None), ("", None)],
)
def test_split_index(path: str, expected: tuple[str, int] | None) -> None:
    assert split_index(path) == (("a[", 4) if path == "a[4]" else expected)


def test_regions_print() -> None:
    assert [str(r) for r in (Region(INIT), Region(CELL, 1, 2), Region(PROLOGUE, 3))] == [
        "init",
        "cell (1, 2)",
        "prologue(3)",
    ]
