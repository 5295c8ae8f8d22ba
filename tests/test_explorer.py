"""rmtcompile/viewer/explorer.py: graphs in the format that Google's Model Explorer reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from reported import SEGMENT, WIDTH, Own
from viewed import HOSTILE, armt, whole_view

import rmtcompile
from rmtcompile.report import save_view
from rmtcompile.viewer import to_explorer

# The fields of a graph and of a node that there have to be, with their types; the other ones may be left out.
NODE = {"id": str, "label": str, "namespace": str, "attrs": list, "incomingEdges": list}
EDGE = {"sourceNodeId", "sourceNodeOutputId", "targetNodeInputId"}


def checked(text: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Graphs by name, nodes by name, of a text that Model Explorer can read."""
    collection = json.loads(text)
    assert set(collection) == {"label", "graphs"}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for graph in collection["graphs"]:
        assert set(graph) == {"id", "nodes"} and graph["id"] not in found
        nodes = {node["id"]: node for node in graph["nodes"]}
        assert len(nodes) == len(graph["nodes"])
        for node in nodes.values():
            assert set(node) - {"subgraphIds"} == set(NODE)
            assert all(isinstance(node[name], kind) for name, kind in NODE.items())
            assert not node["namespace"].endswith("/") and "//" not in node["namespace"]
            for one in node["attrs"]:
                assert set(one) == {"key", "value"} and isinstance(one["value"], str)
            for edge in node["incomingEdges"]:
                assert set(edge) == EDGE and edge["sourceNodeId"] in nodes
                assert all(isinstance(value, str) for value in edge.values())
        found[graph["id"]] = nodes
    for graph in collection["graphs"]:
        for node in graph["nodes"]:
            assert set(node.get("subgraphIds", ())) <= found.keys()
    return found


def test_a_view_becomes_graphs() -> None:
    text = to_explorer(whole_view())
    graphs = checked(text)
    assert json.loads(text)["label"] == HOSTILE
    assert list(graphs) == ["cells", "cell of layer, first", "cell of layer, later", "prologue", "forward"]
    cells = graphs["cells"]
    assert len(cells) == 24
    cell = cells["(2, 1)"]
    assert [edge["sourceNodeId"] for edge in cell["incomingEdges"]] == ["(2, 0)", "(1, 1)"]
    assert (cell["namespace"], cell["subgraphIds"]) == ("layer 1", ["cell of layer, later"])
    assert {"key": "reads of (1, 1)", "value": "W_mem"} in cell["attrs"]
    later = graphs["cell of layer, later"]
    assert later["linear"]["namespace"] == "layer/later/self_attn/q_proj"
    assert [edge["sourceNodeId"] for edge in later["mul_3"]["incomingEdges"]] == ["linear"]
    assert later["q"]["namespace"] == "layer/later/weights"
    assert {"key": "target", "value": "aten.baddbmm.default"} in graphs["forward"]["baddbmm"]["attrs"]
    assert graphs["forward"]["output 0"]["incomingEdges"][0]["sourceNodeId"] == "baddbmm"


def test_a_schedule_alone_has_the_graph_of_cells(tmp_path: Path) -> None:
    graphs = checked(armt(3, 4).save(tmp_path / "s.explorer.json").read_text())
    assert list(graphs) == ["cells"] and len(graphs["cells"]) == 12


def test_a_program_has_its_cells_and_its_functions(tmp_path: Path) -> None:
    fast = rmtcompile.optimize(Own())
    fast(torch.randn(1, 4 * SEGMENT, WIDTH))
    graphs = checked(fast.view(tmp_path / "s.explorer.json").read_text())
    later = graphs["cell of layers, later"]
    (linear,) = [node for node in later.values() if node["label"] == "linear"]
    assert linear["namespace"] == "layers/later/up"
    sources = [later[edge["sourceNodeId"]]["namespace"] for edge in linear["incomingEdges"]]
    assert sorted(sources) == ["layers/later", "layers/later/weights", "layers/later/weights"]
    outputs = [node for node in later.values() if node["namespace"].endswith("outputs")]
    assert len(outputs) == 2 and all(node["incomingEdges"] for node in outputs)
    lifted = graphs["cell_layers_later"]
    (product,) = [node for node in lifted.values() if node["label"] == "baddbmm"]
    assert product["namespace"] == "cell_layers_later/up"
    assert {"key": "type", "value": f"f32[n,{SEGMENT},{WIDTH}]"} in product["attrs"]
    with pytest.raises(ValueError, match="there is no cell"):
        save_view(fast, tmp_path / "s.explorer.json", expand=[(9, 9)])
    save_view(fast, tmp_path / "s.explorer.json", expand=[(1, 2)])
    opened = checked((tmp_path / "s.explorer.json").read_text())
    assert opened["cell of segment 1, layer 2"]["linear"]["namespace"] == "layer 2/segment 1/up"
    assert opened["cells"]["(1, 2)"]["subgraphIds"] == ["cell of segment 1, layer 2"]
