"""rmtcompile/schedule: what it says, what it refuses, and exports read back by their own tools."""

from __future__ import annotations

import builtins
import dataclasses
import json
import pickle
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmtcompile.errors import InternalError
from rmtcompile.passes.grid.wavefront import wavefront
from rmtcompile.schedule import Carry, Schedule
from rmtcompile.schedule.serial import SCHEMA, to_dict

W_MEM = Carry("W_mem", (1, 0), (8, 64, 64), "torch.float32", 131072)


class Op(NamedTuple):
    name: str
    op: str
    inputs: tuple[str, ...] = ()


@pytest.fixture
def armt() -> Schedule:
    return wavefront(
        {(0, 1), (1, 0)}, 3, 4, carries=[W_MEM], segment_variants=("first", "later", "later", "later")
    )


some_schedules = st.builds(
    wavefront,
    st.sampled_from([{(0, 1), (1, 0)}, {(0, 1), (1, 1)}, {(0, 1), (1, -1)}, {(0, 1), (2, 0)}, set()]),
    st.integers(1, 9),
    st.integers(1, 9),
)

# -- what it says


def test_text_form(armt: Schedule) -> None:
    assert str(armt).splitlines() == [
        "schedule  6 levels, width 3, 12 cells in 6 grouped calls      "
        "# 3 layers x 4 segments, level = s + l",
        "  offsets   (0,1) (1,0)     mean width 2.00, as short as the dependences allow",
        "  phases    ramp-up levels 0..1, steady levels 2..3, ramp-down levels 4..5",
        "  widths    1, 2, 3 x 2, 2, 1",
        "  windows   layers 0, 0..1, 0..2 x 2, 1..2, 2",
        "  carries   W_mem: f32[8,64,64] offset (1,0), 131,072 bytes a cell, 393,216 bytes over 3 layers",
        "  variants  first x 1, later x 3 (segments in order)",
        "  0 [(0,0)]   1 [(0,1) (1,0)]   2 [(0,2) (1,1) (2,0)]   3 [(1,2) (2,1) (3,0)]   "
        "4 [(2,2) (3,1)]   5 [(3,2)]",
        "",
        "  layer 2 | 2 3 4 5",
        "  layer 1 | 1 2 3 4",
        "  layer 0 | 0 1 2 3",
        "  segment | 0 1 2 3",
    ]


def test_big_text_is_elided_with_exact_counts() -> None:
    text = str(wavefront({(0, 1), (1, 0)}, 32, 128))
    assert "... 150 levels ..." in text
    assert "... 16 layers ..." in text
    assert "(... is 108 segments)" in text
    assert max(map(len, text.splitlines())) < 140
    assert len(text.splitlines()) < 40
    assert "\n  widths    1, 2, 3, 4, 5, 6, 7, 8, ..., 4, 3, 2, 1\n" in text


def test_windows_of_a_skewed_schedule_name_their_step() -> None:
    text = str(wavefront({(0, 1), (1, -2)}, 5, 3))
    assert "windows   layers 0, 1, 2, 0..3 by 3, 1..4 by 3, 2, " in text


def test_a_short_schedule_has_no_steady_state() -> None:
    phases = wavefront({(0, 1), (1, 0)}, 8, 3).phases
    assert not phases.steady
    assert (phases.ramp_up, phases.ramp_down) == (range(3), range(3, 10))


@given(some_schedules)
def test_phases_partition_the_levels_and_steady_ones_repeat(schedule: Schedule) -> None:
    up, steady, down = schedule.phases
    assert [*up, *steady, *down] == list(range(schedule.n_levels))
    for t in steady:
        if t + schedule.period in steady:
            assert schedule.windows[t] == schedule.windows[t + schedule.period]
    if schedule.alpha and steady:
        full = {schedule.windows[t] for t in steady}
        assert all(schedule.windows[t] not in full for t in up)
        assert all(schedule.windows[t] not in full for t in down)


@given(some_schedules)
def test_windows_name_the_layers_alive(schedule: Schedule) -> None:
    for window, cells in zip(schedule.windows, schedule.levels, strict=True):
        assert sorted({layer for _, layer in cells}) == list(window.layers)


@given(some_schedules)
def test_producers_and_consumers_are_inverse(schedule: Schedule) -> None:
    for cells in schedule.levels:
        for cell in cells:
            assert all(cell in schedule.consumers(before) for before in schedule.producers(cell))


def test_layers_that_do_not_read_wait_for_nothing() -> None:
    whole = wavefront({(0, 1), (1, -2)}, 5, 3)
    schedule = dataclasses.replace(whole, reads=(((1, -2), (1,)),))
    assert whole.producers((1, 0)) == ((0, 2),)
    assert schedule.producers((1, 0)) == ()
    assert schedule.producers((1, 1)) == ((1, 0), (0, 3))
    assert schedule.consumers((0, 3)) == ((0, 4), (1, 1))
    assert schedule.consumers((0, 2)) == ((0, 3),)
    graph = schedule.to_networkx()
    assert [edge for edge in graph.edges if edge[0][0] != edge[1][0]] == [((0, 3), (1, 1)), ((1, 3), (2, 1))]
    assert schedule.to_dot().count(" -> ") == graph.number_of_edges()
    assert Schedule.from_json(schedule.to_json()) == schedule


def test_grouped_calls_split_by_kind_of_layer() -> None:
    schedule = wavefront({(0, 1), (1, 0)}, 4, 8, layer_kinds=("local", "full", "local", "full"))
    assert schedule.n_calls == 2 * schedule.n_levels - 2


def test_a_carry_counts_only_layers_that_are_read() -> None:
    down = Carry("m", (1, -1), (4,), "float32", 16)
    assert down.writers(4) == (1, 2, 3)
    assert down.total_bytes(4) == 48
    assert dataclasses.replace(down, producer_layers=(2,)).total_bytes(4) == 16
    assert down.type == "f32[4]"


@pytest.mark.parametrize(
    "change", [{"n_layers": 0}, {"alpha": 9}, {"alpha": -1}, {"segment_variants": ("first",)}]
)
def test_senseless_arguments_are_refused(armt: Schedule, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"cell|alpha|segment_variants"):
        dataclasses.replace(armt, levels=(), **change)


# -- what it proves


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (lambda levels: levels[:-1], "never runs"),
        (lambda levels: (*levels, ((3, 2),)), "runs twice, on levels 5 and 6"),
        (lambda levels: (*levels, ((4, 0),)), "outside the grid"),
        (lambda levels: levels[::-1], "reads cell"),
        (lambda levels: ((0, 0), (0, 1)) and (levels[0] + levels[1], *levels[2:]), "reads cell"),
        (lambda levels: (levels[0], levels[1][:1], levels[1][1:], *levels[2:]), "but level = s [+] l is"),
    ],
)
def test_the_verifier_rejects_broken_schedules(armt: Schedule, levels: Any, message: str) -> None:
    broken = dataclasses.replace(armt, levels=levels(armt.levels))
    with pytest.raises(InternalError, match=message):
        broken.verify()


# -- exports


@given(some_schedules)
def test_json_round_trip(schedule: Schedule) -> None:
    assert Schedule.from_json(schedule.to_json()) == schedule


def test_json_keeps_everything_and_follows_its_schema(armt: Schedule) -> None:
    assert Schedule.from_json(armt.to_json(indent=2)) == armt
    jsonschema = pytest.importorskip("jsonschema", reason="the schema is checked with jsonschema")
    jsonschema.validate(json.loads(armt.to_json()), SCHEMA)


def test_the_schema_lists_every_field(armt: Schedule) -> None:
    data = to_dict(armt)
    assert set(data) == set(SCHEMA["properties"])
    assert set(data["carries"][0]) == set(SCHEMA["properties"]["carries"]["items"]["properties"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "expected"),
        ({"format": "x"}, "expected"),
        ({"levels": [[[0, 0]]]}, "legal schedule"),
    ],
)
def test_foreign_json_is_refused(armt: Schedule, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule.from_json(json.dumps({**to_dict(armt), **change}))


def test_networkx_graph_names_carries_on_edges(armt: Schedule) -> None:
    graph = armt.to_networkx()
    assert graph.number_of_nodes() == 12
    assert graph.edges[(0, 0), (1, 0)] == {"offset": (1, 0), "carries": ("W_mem",)}
    assert graph.edges[(0, 0), (0, 1)] == {"offset": (0, 1), "carries": ()}
    assert graph.nodes[2, 1] == {"level": 3, "phase": "steady", "variant": "later", "kind": "layer"}


def _dot_json(text: str) -> dict[str, Any]:
    if shutil.which("dot") is None:
        pytest.skip("graphviz is not installed")
    result = subprocess.run(
        ["dot", "-Tjson"], input=text, capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stderr == ""
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


def test_dot_is_read_by_graphviz(armt: Schedule) -> None:
    parsed = _dot_json(armt.to_dot())
    nodes = [o for o in parsed["objects"] if o["name"].startswith("c_")]
    assert len(nodes) == 12
    assert len(parsed["edges"]) == armt.to_networkx().number_of_edges()


def test_dot_opens_cells_and_escapes_what_operations_are_called(armt: Schedule) -> None:
    odd = 'einsum("bhd,hde->bhe")\\n{x|y} <z>'
    operations = [Op("a", odd), Op("b\n", "mul", ("a", "elsewhere")), Op("c", "add", ("a", "b\n"))]
    parsed = _dot_json(armt.to_dot(expand={(1, 1): operations, (2, 1): operations}))
    clusters = [o for o in parsed["objects"] if o["name"].startswith("cluster_")]
    assert len(clusters) == 2
    labels = [o["label"] for o in parsed["objects"] if o["name"] == "c_1_1_0"]
    assert labels == ["a\\n" + odd.replace("\\", "\\\\").replace('"', '"')]
    assert len(parsed["edges"]) == armt.to_networkx().number_of_edges() + 6


def test_cells_of_a_program_open_by_name(armt: Schedule) -> None:
    asked: list[tuple[int, int]] = []

    def operations(cell: tuple[int, int]) -> list[Op]:
        asked.append(cell)
        return [Op("a", "linear"), Op("b", "mul", ("a",))]

    schedule = dataclasses.replace(armt, operations=operations)
    assert schedule == armt
    parsed = _dot_json(schedule.to_dot([(1, 1), (2, 0)]))
    assert asked == [(1, 1), (2, 0)]
    names = {o["name"] for o in parsed["objects"]}
    assert {"cluster_c_1_1", "cluster_c_2_0", "c_1_1_0", "c_2_0_1"} <= names
    assert "c_1_1" not in names
    assert len(parsed["edges"]) == armt.to_networkx().number_of_edges() + 2
    assert pickle.loads(pickle.dumps(schedule)).operations is None


@pytest.mark.parametrize(
    ("cells", "message"),
    [([(4, 0)], r"no cell \(segment, layer\) = \(4, 0\) in 4 segments x 3 layers"), ([(0, 0)], "no program")],
)
def test_cells_that_cannot_be_opened(armt: Schedule, cells: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        armt.to_dot(cells)


@given(some_schedules)
def test_svg_draws_each_cell_once(schedule: Schedule) -> None:
    root = ElementTree.fromstring(schedule.to_svg())
    name = "{http://www.w3.org/2000/svg}"
    paths = root.findall(f"{name}path")
    assert len(paths) == schedule.n_levels
    assert sum(path.get("d", "").count("M") for path in paths) == schedule.n_cells


def test_svg_of_a_big_grid_stays_small() -> None:
    assert len(wavefront({(0, 1), (1, 0)}, 64, 1024).to_svg()) < 2_000_000


@given(some_schedules)
def test_trace_events_are_well_formed(schedule: Schedule) -> None:
    times = [10.0 + t for t in range(schedule.n_levels)]
    trace = json.loads(schedule.to_chrome_trace(times))
    slices = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    levels = [e for e in slices if e["cat"] == "level"]
    assert [e["dur"] for e in levels] == times
    assert {e["ph"] for e in trace["traceEvents"]} == {"M", "C", "X"}
    assert all({"name", "ts", "pid", "tid"} <= set(e) for e in trace["traceEvents"])
    by_track: dict[int, float] = {}
    for event in sorted(slices, key=lambda e: e["ts"]):
        assert event["ts"] >= by_track.get(event["tid"], 0.0) - 1e-6, "slices of a track overlap"
        by_track[event["tid"]] = event["ts"] + event["dur"]


def test_trace_wants_one_time_a_level(armt: Schedule) -> None:
    with pytest.raises(ValueError, match="expected 6, got 2"):
        armt.to_chrome_trace([1.0, 2.0])
    assert "planned" in json.loads(armt.to_chrome_trace())["otherData"]["times"]


def test_notebook_form_is_a_picture_and_a_table(armt: Schedule) -> None:
    html = armt._repr_html_()
    assert "<svg" in html
    assert "W_mem" in html
    assert "<script" not in html


@pytest.mark.parametrize("suffix", [".svg", ".html", ".json", ".dot", ".trace.json", ".txt"])
def test_save_by_suffix(armt: Schedule, tmp_path: Path, suffix: str) -> None:
    path = armt.save(tmp_path / f"s{suffix}")
    text = path.read_text(encoding="utf-8")
    start = {
        ".svg": "<svg",
        ".html": "<!doctype html>",
        ".json": '{"format"',
        ".dot": "digraph",
        ".trace.json": '{"traceEvents"',
        ".txt": "schedule",
    }
    assert text.startswith(start[suffix])


def test_measured_times_are_saved(armt: Schedule, tmp_path: Path) -> None:
    times = [1.5, 2.5, 3.5, 4.5, 5.5, 6.5]
    trace = json.loads(armt.save(tmp_path / "s.trace.json", times=times).read_text())
    levels = [e["dur"] for e in trace["traceEvents"] if e.get("cat") == "level"]
    assert levels == times and trace["otherData"]["times"] == "measured"
    assert '"levelUs":[1.5,2.5,' in armt.save(tmp_path / "s.html", times=times).read_text()


def test_save_png(armt: Schedule, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="png needs matplotlib")
    path = armt.save(tmp_path / "s.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_save_png_without_matplotlib_says_what_helps(
    armt: Schedule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = builtins.__import__

    def no_matplotlib(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.raises(ImportError, match=r"pip install 'rmtcompile\[viz\]'"):
        armt.save(tmp_path / "s.png")


def test_save_refuses_unknown_suffixes(armt: Schedule, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot tell the format of 's.pdf'.*\.svg"):
        armt.save(tmp_path / "s.pdf")
