"""passes/emit: plain Python that says what runs, whatever the number of segments and layers."""

from __future__ import annotations

import ast
import copy
import linecache
import traceback
from typing import Any

import pytest
import torch
from test_lane_allocation import program
from test_reroll import FirstDiffers, Kept, Positions
from torch import nn
from toys import AttributeState, Toy, assert_same, features, made

import rmtcompile
from rmtcompile.passes.emit import emit, literal, target_name


@torch.no_grad()
def source(build: Any, segments: int = 4) -> str:
    return rmtcompile.optimize(made(build)).prepare(features(segments)).code


@pytest.mark.parametrize("build", [Kept, FirstDiffers, Positions, Toy])
def test_it_is_python(build: Any) -> None:
    emitted = emit(program(build), "A title.")
    tree = ast.parse(emitted.source)
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert {"init", "enter", "fill", "level", "leave", "forward", "step"} <= functions
    assert all(ast.get_docstring(node) for node in tree.body if isinstance(node, ast.FunctionDef))
    assert {cell.name for cell in emitted.cells} <= functions
    assert ast.get_docstring(tree).startswith("A title.")


def test_phases_are_where_they_say() -> None:
    emitted = emit(program(Kept))
    lines = emitted.source.splitlines()
    assert list(emitted.phases) == ["ramp_up", "steady", "ramp_down"]
    for name, (first, last) in emitted.phases.items():
        assert f"run.{name}" in lines[first - 1] and "run.level(t, step)" in lines[last - 1]


def test_the_header_states_the_schedule() -> None:
    head = source(lambda: Toy(3, up=-1))[:400]
    assert "3 layers; dependence offsets (segment, layer): (0, 1), (1, -1)" in head
    assert "level of cell (s, l): 2 * s + l" in head


def test_nodes_keep_their_source() -> None:
    code = source(Kept)
    (tanh,) = [line for line in code.splitlines() if "aten.tanh(" in line]
    assert "f64[n,2,3,4]" in tanh and "test_reroll.py:" in tanh


@pytest.mark.parametrize("build", [Kept, FirstDiffers])
def test_size_does_not_grow(build: Any) -> None:
    """The same text for any number of segments."""
    assert len({source(build, segments) for segments in (2, 3, 9)}) == 1


def test_size_does_not_grow_with_layers() -> None:
    small, large = (source(lambda n=n: Toy(n)) for n in (3, 9))
    assert abs(len(small.splitlines()) - len(large.splitlines())) <= 6


def test_deterministic() -> None:
    assert source(FirstDiffers) == source(FirstDiffers)


@torch.no_grad()
def test_what_is_shown_is_what_runs() -> None:
    model, x = made(Toy), features(4)
    fast = rmtcompile.optimize(copy.deepcopy(model))
    fast(x)
    name = fast.compiled.namespace["forward"].__code__.co_filename
    assert "".join(linecache.getlines(name)) == fast.code
    assert_same(model(x), fast(x))


@torch.no_grad()
def test_tracebacks_show_the_line() -> None:
    fast = rmtcompile.optimize(made(Toy))
    fast(features(3))
    forward = fast.compiled.namespace["forward"]
    try:
        forward(None)
    except AttributeError as error:
        text = "".join(traceback.format_exception(error))
    assert "setup(run)" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1, "1"),
        (True, "True"),
        (0.5, "0.5"),
        (float("inf"), 'float("inf")'),
        (float("-inf"), 'float("-inf")'),
        (float("nan"), 'float("nan")'),
        ([1, (2,)], "[1, (2,)]"),
        ({"a": None}, "{'a': None}"),
        (torch.float64, "torch.float64"),
        (torch.device("cpu"), 'torch.device("cpu")'),
        (slice(1, None), "slice(1, None, None)"),
        ("mean", "'mean'"),
    ],
)
def test_literals(value: Any, text: str) -> None:
    assert literal(value, repr) == text
    again = eval(text, {"torch": torch})
    assert again == value or value != value


def test_names_of_operations() -> None:
    assert target_name(torch.ops.aten.linear.default) == "aten.linear"
    assert target_name(torch.ops.aten.add.Tensor) == "aten.add.Tensor"
    assert target_name(torch.ops.prims.sin.default) == "torch.ops.prims.sin"


class Regions(nn.Module):
    """Autocast and no-grad regions inside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        memory = [x.new_zeros(x.shape[0], 4) for _ in self.layers]
        out = []
        for h in x.split(3, 1):
            for l, layer in enumerate(self.layers):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    y = layer(h)
                h = h + y.float() + memory[l][:, None]
                with torch.no_grad():
                    memory[l] = h.mean(1).sin()
            out.append(h)
        return torch.cat(out, 1)


@torch.no_grad()
def test_contexts_are_kept() -> None:
    model = made(Regions, torch.float32)
    fast = rmtcompile.optimize(copy.deepcopy(model))
    for segments in (3, 1, 5):
        x = features(segments, dtype=torch.float32)
        assert_same(model(x), fast(x), 2e-3)
    assert "with torch." not in fast.code, "no gradients are recorded, and conversions are written out"
    with torch.enable_grad():
        fast(features(3, dtype=torch.float32))
    assert "with torch.no_grad():" in fast.code


def test_no_gradient_flows_through_a_no_grad_region() -> None:
    model = made(Regions, torch.float32)
    twin = copy.deepcopy(model)
    fast = rmtcompile.optimize(twin)
    x = features(4, dtype=torch.float32)
    model(x).square().sum().backward()
    fast(x).square().sum().backward()
    assert_same([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()], 2e-2)
    assert isinstance(made(AttributeState), nn.Module)
