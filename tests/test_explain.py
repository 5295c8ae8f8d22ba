"""rmtcompile/report: explanations, dumps, views and profiles of compiled programs."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pickle
import re
import warnings
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from reported import SEGMENT, WIDTH, ByValue, Classic, Mixed, Own, Whole
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from zoo.others import ZOO

import rmtcompile
from rmtcompile.report import Profile, view_model
from rmtcompile.report.kinds import kind_of
from rmtcompile.report.names import pattern, ranges
from rmtcompile.report.rates import ATTENTION_FLOPS
from rmtcompile.runtime.costs import Costs
from rmtcompile.viewer import PassView
from rmtcompile.viewer.view_model import to_dict

X = torch.randn(1, 5 * SEGMENT, WIDTH)


@pytest.fixture(scope="module")
def fast() -> rmtcompile.Optimized:
    torch.manual_seed(0)
    optimized = rmtcompile.optimize(Own())
    optimized(X)
    return optimized


@pytest.fixture(scope="module")
def found(fast: rmtcompile.Optimized) -> rmtcompile.Explanation:
    return fast.explain()


# -- explain


def test_what_was_found(found: rmtcompile.Explanation) -> None:
    assert found.refusal is None
    assert found.layers == ("layers.0", "layers.1", "layers.2")
    assert (found.segments, found.axes[0].length, found.axes[0].dim, found.axes[0].input) == (
        5,
        SEGMENT,
        1,
        "x",
    )
    assert found.inputs == (f"x: f32[1,{5 * SEGMENT},{WIDTH}]",)
    assert [(v.name, v.segments) for v in found.variants] == [("first", (0,)), ("later", (1, 2, 3, 4))]
    assert {o.offset: o.skew for o in found.offsets} == {(0, 1): 0, (1, 0): 1}
    assert [(c.name, c.shape, c.nbytes) for c in found.carries] == [("memory", (1, 1, WIDTH), 4 * WIDTH)]
    assert dict(found.hoisted)["rsqrt"] == 1
    assert found.merged > 0
    assert found.schedule is not None and found.schedule.n_levels == 7
    assert found.plan == "diagonal"
    assert "15 cells in 7 levels" in found.why


def test_carries_say_where_they_are_made(found: rmtcompile.Explanation) -> None:
    (carry,) = found.carries
    assert re.search(r"reported\.py:\d+$", carry.source)
    assert found.schedule is not None
    assert found.schedule.reads == (((0, 1), (1, 2)), ((1, 0), (0, 1, 2)))


def test_witnesses_name_the_users_lines(found: rmtcompile.Explanation) -> None:
    for offset in found.offsets:
        assert re.search(r"reported\.py:\d+", offset.consumer), offset
    assert {o.consumer.partition(" ")[0] for o in found.offsets} == {"cell"}


def test_text_says_it_all(found: rmtcompile.Explanation) -> None:
    text = str(found)
    for piece in (
        "model      Own",
        f"reads x: f32[1,{5 * SEGMENT},{WIDTH}]",
        "layers     3: layers.{0..2}",
        f"segments   5 of {SEGMENT} elements along dimension 1 of x",
        "captured with 2 and 3 segments; serves any number from 1 on",
        "first: segment 0, ",
        "later: segments 1..4, ",
        "(1,0)  previous segment, same layer; needs a skew of 1",
        f"memory: f32[1,1,{WIDTH}], offset (1,0), 32 bytes a cell, 96 over all layers",
        " run once for all segments: ",
        "15 cells in 7 levels and 7 grouped calls: mean width 2.14, widest 3",
        "critical path 7 levels, reached",
        "plan       diagonal",
        "at most 2.14 x as fast",
        " merged with equal ones, 0 dropped because nothing reads them",
    ):
        assert piece in text, piece
    assert max(map(len, text.splitlines())) <= 108


def test_json_holds_the_same(found: rmtcompile.Explanation) -> None:
    data = json.loads(found.to_json())
    assert data["refusal"] is None
    assert data["parallelism"] == {
        "cells": 15,
        "levels": 7,
        "level_rule": "s + l",
        "alpha": 1,
        "width": 3,
        "mean_width": 15 / 7,
        "critical_path": 7,
        "optimal": True,
        "grouped_calls": 7,
    }
    assert [o["offset"] for o in data["offsets"]] == [[0, 1], [1, 0]]
    assert data["seconds"] == pytest.approx(sum(s["seconds"] for s in data["stages"]))
    assert any("->" in s["difference"] for s in data["stages"])


def test_html_is_one_page_without_script(found: rmtcompile.Explanation) -> None:
    page = found.to_html()
    parser = HTMLParser()
    parser.feed(page)
    assert (
        page.count("<svg") == 1
        and "<script" not in page
        and "http" not in page.replace("www.w3.org", "")[:200]
    )
    assert "offsets</th>" in found._repr_html_()


def test_no_arguments_and_no_call_is_an_error() -> None:
    with pytest.raises(rmtcompile.RMTCompileError, match="call the optimized model once"):
        rmtcompile.explain(Own())


def test_explaining_runs_nothing_and_leaves_the_model_as_it_was() -> None:
    model = Own()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = rmtcompile.explain(model, X)
    assert found.plan == "diagonal"
    assert all(layer.memory is None for layer in model.layers)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_blocked_model_is_explained_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = rmtcompile.explain(Classic(), X)
    assert found.plan == "sequential"
    blocked = next(offset for offset in found.offsets if offset.blocks)
    assert blocked.offset == (1, -2)
    assert blocked.skew == 3
    assert "offset (1,-2): the top layer 2 of a segment feeds layer 0 of the next one" in str(found).replace(
        "\n             ", " "
    )
    assert "which blocks every overlap" in str(found)
    (carry,) = found.carries
    assert (carry.offset, carry.shape, carry.through) == (
        (1, -2),
        (1, 1, WIDTH),
        "the epilogue and the prologue",
    )
    assert f"mean: f32[1,1,{WIDTH}], offset (1,-2), 32 bytes a cell, 32 over layer 2, through the epi" in str(
        found
    )
    assert "reported.py" in found.why
    assert found.schedule is not None and found.schedule.width == 1


@pytest.mark.parametrize(
    ("model", "error", "evidence", "remedy"),
    [
        (ByValue(), "CaptureError", "if (pieces[0] > 0).all():", "decide it from shapes"),
        (Whole(), "PartitionError", f"(1, {5 * SEGMENT}, {WIDTH})", "segment_size="),
    ],
)
def test_refusals_are_explained_not_raised(model: Any, error: str, evidence: str, remedy: str) -> None:
    found = rmtcompile.explain(model, X)
    assert found.refusal is not None
    assert found.refusal.error == error
    text = str(found)
    assert text.startswith(f"model      {type(model).__name__}\n")
    assert re.search(rf"^refused    {error} \(in [^)]+\): ", text, re.MULTILINE)
    assert evidence in " ".join(found.refusal.evidence)
    assert remedy in found.refusal.remedy
    assert "\nhelp       " in text
    data = json.loads(found.to_json())
    assert data["refusal"]["evidence"] == list(found.refusal.evidence)
    assert data["parallelism"] is None
    assert "refused</th>" in found.to_html()


class Plans(Costs):
    """Costs that favour the sequential plan."""

    plan = "sequential"  # type: ignore[assignment]

    def seconds(self, segments: int) -> dict[str, float]:
        return {"diagonal": 0.002 * segments, "sequential": 0.001 * segments}


def test_plans_that_were_measured_are_explained(
    fast: rmtcompile.Optimized, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fast._last is not None
    executor = fast._last[0].executor
    monkeypatch.setattr(executor, "compile_seconds", 12.5)
    monkeypatch.setattr(executor, "costs", Plans(1.0, 3.0, 2, 2, 1))
    workspaces = lambda segments: {"with": 0.0061 * segments, "without": 0.006 * segments}  # noqa: E731
    monkeypatch.setattr(executor.replays, "workspace_seconds", workspaces)
    found = fast.explain()
    assert (found.plan, found.why) == ("sequential", "measured: sequential 5 ms, diagonal 10 ms")
    assert [(row.plan, row.seconds) for row in found.speedups] == [("sequential", 0.005), ("diagonal", 0.01)]
    text = str(found)
    assert "sequential  15 steps, measured 5 ms" in text
    assert "12.50 s  cell functions, by eager" in text
    flat = " ".join(text.split())
    assert "as a CUDA graph 30.5 ms with cuBLAS's workspace, 30 ms without cuBLAS's workspace;" in flat
    assert json.loads(found.to_json())["compile_seconds"] == 12.5


def test_the_plan_that_was_not_asked_for_is_predicted_too() -> None:
    found = rmtcompile.optimize(Own(), plan="sequential").prepare(X).explain()
    assert (found.plan, found.why) == ("sequential", "asked for with plan='sequential'")
    assert [(row.plan, row.steps) for row in found.speedups] == [("sequential", 15), ("diagonal", 7)]


def test_kinds_of_layers_are_counted_apart() -> None:
    found = rmtcompile.explain(Mixed(), X)
    assert [(kind.layers, len(kind.operations)) for kind in found.kinds] == [((0, 2), 2), ((1,), 2)]
    counts = [dict(kind.operations)["later"] for kind in found.kinds]
    assert counts[0] > counts[1]
    assert re.search(
        r"kinds      \w+: layers 0, 2, \d+ \(first\), \d+ \(later\) operations a cell", str(found)
    )
    assert {carry.writers(3) for carry in found.carries} == {(0, 2)}
    assert found.schedule is not None
    assert found.schedule.producers((1, 1)) == ((1, 0),)


# -- dump


@pytest.fixture(scope="module")
def dumped(fast: rmtcompile.Optimized, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("dump")
    (folder / "99_old.txt").write_text("from an earlier dump")
    return fast.dump(folder)


def test_files_are_numbered_in_pipeline_order(dumped: list[Path]) -> None:
    names = [path.name for path in dumped]
    assert [name[:3] for name in names] == [f"{i:02d}_" for i in range(len(names))]
    stages = [name[3:] for name in names]
    assert stages[0] == "capture.txt"
    assert stages[1] == "functionalise.txt"
    assert stages[-12:] == [
        "partition.txt", "reroll.txt", "dependence.txt", "wavefront.txt", "route.txt",
        "causal.txt", "cast_weights.txt", "grouped_query.txt", "fuse_linears.txt", "in_place.txt",
        "lift.txt", "emit.py",
    ]  # fmt: skip
    assert sorted(path.name for path in dumped[0].parent.iterdir()) == names


def text_of(dumped: list[Path], name: str) -> str:
    return next(path for path in dumped if path.name[3:] == name).read_text()


def test_the_texts_say_what_each_stage_found(dumped: list[Path]) -> None:
    captured = text_of(dumped, "capture.txt")
    assert "-- layers.1.up" in captured
    assert re.search(r"^linear\w* = linear\(.*# f32\[1,4,8\]  .*reported\.py:\d+$", captured, re.MULTILINE)
    assert " = layers.0.up.weight  " in captured
    assert "cell (1, 2): " in text_of(dumped, "partition.txt")
    rules = text_of(dumped, "reroll.txt")
    assert "memory: f32[1,1,8] <- cell (s - 1, l)" in rules
    assert "4 * s, 4 * s + 4" in rules or "split" in rules
    assert "(1,0)  previous segment, same layer" in text_of(dumped, "dependence.txt")
    program = text_of(dumped, "wavefront.txt")
    assert program.startswith("program Own(x: f32[1,20,8]) -> f32[1,20,8]")
    assert "# 3 layers x 5 segments, 15 cells" in program
    assert re.search(
        r"^cell layers \(.*memory: f32\[1,1,8\]; W: 2 params\) +# \d+ ops$", program, re.MULTILINE
    )
    assert re.search(r"^grid  memory\(s,l\) <- \w+\(s-1,l\)  offset \(1,0\)$", program, re.MULTILINE)
    assert "weight layers.{0..2}.up.weight" in text_of(dumped, "route.txt")
    assert "bmm" in text_of(dumped, "lift.txt")


def test_the_last_file_runs(fast: rmtcompile.Optimized, dumped: list[Path]) -> None:
    spec = importlib.util.spec_from_file_location("emitted", dumped[-1])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert fast._last is not None
    entry, count = fast._last
    names = entry.compiled.namespace
    original, names["forward"] = names["forward"], module.forward
    try:
        with torch.no_grad():
            result = entry.executor.run(count, [X])[0]
            torch.testing.assert_close(result, fast.model(X))
    finally:
        names["forward"] = original


def test_an_edited_dump_runs(tmp_path: Path) -> None:
    fast = rmtcompile.optimize(Own())
    with torch.no_grad():
        before = fast(X)
        path = fast.dump(tmp_path)[-1]
        text = path.read_text()
        path.write_text(re.sub(r"(\n    return )(\(?\w+)", r"\1\2", text) + "\nEDITED = True\n")
        fast.use(path)
        assert torch.equal(fast(X), before)
        assert fast.code.endswith("EDITED = True\n")
        path.write_text(
            text.replace("def level(run, t):", "def level(run, t):\n    raise RuntimeError('here')", 1)
        )
        fast.use(path)
        with pytest.raises(RuntimeError, match="here") as caught:
            fast(X)
        assert str(path) in {
            entry.path.__fspath__() for entry in caught.traceback if hasattr(entry.path, "__fspath__")
        }
        path.write_text("def other(): pass\n")
        with pytest.raises(rmtcompile.RMTCompileError, match=r"defines no forward\(run\)"):
            fast.use(path)


def test_dump_needs_a_call(tmp_path: Path) -> None:
    with pytest.raises(rmtcompile.RMTCompileError, match="call the optimized model once"):
        rmtcompile.optimize(Own()).dump(tmp_path)


# -- view


def test_the_view_has_cells_passes_and_code(fast: rmtcompile.Optimized) -> None:
    view = view_model(fast)
    assert view.title == "Own"
    assert [(cell.kind, cell.variant) for cell in view.cells] == [("layers", "first"), ("layers", "later")]
    first, later = view.cells
    assert len(later.ops) > len(first.ops)
    assert [p.name for p in later.params] == ["up.weight", "up.bias"]
    assert "up" in {op.module for op in later.ops}
    linear = next(op for op in later.ops if op.op == "linear")
    assert linear.type == f"f32[1,{SEGMENT},{WIDTH}]"
    assert re.search(r"reported\.py:\d+$", linear.source)
    assert {"up.weight", "up.bias"} <= set(linear.inputs)
    notes = {value.name: value.note for value in later.live_ins}
    assert notes["memory"].startswith("cell (s - 1, l)")
    assert notes["x"] == "cell (s, l - 1); in layer 0 prologue(s)"
    assert later.carries == ("memory",)
    assert any("cell (s + 1, l)" in value.note for value in later.live_outs)
    names = [op.name for op in later.ops]
    assert len(names) == len(set(names))
    assert all(name in {*names, *notes, "up.weight", "up.bias"} for op in later.ops for name in op.inputs)


def test_passes_start_from_nothing_and_shrink(fast: rmtcompile.Optimized) -> None:
    passes = view_model(fast).passes
    captured = next(p for p in reversed(passes) if p.name.startswith("capture"))
    assert not any("<" in name for p in passes for name in p.after)
    reroll = next(p for p in passes if p.name.startswith("reroll"))
    assert not captured.before
    assert sum(reroll.after.values()) < sum(reroll.before.values()) <= sum(captured.after.values())
    assert all(p.after for p in passes[1:])


def test_passes_have_texts_and_all_of_them_after_a_capture(fast: rmtcompile.Optimized) -> None:
    def known(passes: Iterable[PassView]) -> list[str]:
        return [one.name.partition(",")[0] for one in passes if one.text]

    kept = view_model(fast).passes
    assert known(kept)[0] == "partition" and known(kept)[-1] == "lift"
    again = view_model(fast, capture=True).passes
    assert known(again)[0] == "capture" and len(known(again)) == len(again) - 1
    assert [one.text for one in again][-3:] == [one.text for one in kept][-3:]


def test_a_view_is_written_and_holds_the_phases(fast: rmtcompile.Optimized, tmp_path: Path) -> None:
    data = to_dict(view_model(fast))
    assert set(data["codePhases"]) == {"ramp_up", "steady", "ramp_down"}
    for phase, (line, _) in data["codePhases"].items():
        assert f"run.{phase}" in data["code"].splitlines()[line - 1]
    page = fast.view(tmp_path / "v.html")
    assert "layers.0" not in page.read_text()[:100] and page.stat().st_size > 20_000
    assert fast.view(tmp_path / "v.svg").read_text().startswith("<svg")
    with pytest.raises(ValueError, match="cannot tell the format"):
        fast.view(tmp_path / "v.xyz")


def test_the_view_has_what_runs_around_the_grid_and_the_witnesses(fast: rmtcompile.Optimized) -> None:
    view = view_model(fast)
    around = {cell.kind: cell for cell in view.around}
    assert "rsqrt" in {op.op for op in around["init"].ops}
    assert "mul" in {op.op for op in around["prologue"].ops}
    assert [(w.offset, "reported.py" in w.reader) for w in view.witnesses] == [((0, 1), True), ((1, 0), True)]
    assert dict(view.explanation)["plan"][0].startswith("diagonal: ")
    for cell in view.cells:
        assert cell.functions and all(f"def {name}(" in view.code for name in cell.functions)


def test_cells_of_the_schedule_open_to_their_operations(fast: rmtcompile.Optimized) -> None:
    assert fast.schedule.operations is not None
    first, later = fast.schedule.operations((0, 1)), fast.schedule.operations((2, 1))
    assert len(first) < len(later) == len(view_model(fast).cells[1].ops)
    assert "cluster_c_2_1" in fast.schedule.to_dot([(2, 1)])


def test_a_path_that_was_written_shows_the_page_in_a_notebook(
    fast: rmtcompile.Optimized, tmp_path: Path
) -> None:
    path = fast.view(tmp_path / "v.html")
    plain = Path(path)
    assert isinstance(path, Path) and path == plain and hash(path) == hash(plain)
    assert repr(path) == repr(tmp_path / "v.html") and str(path) == str(tmp_path / "v.html")
    shown = path._repr_html_()  # type: ignore[attr-defined]
    page = HTMLAttributes(shown)
    assert page["sandbox"] == "allow-scripts" and page["srcdoc"] == plain.read_text()
    assert pickle.loads(pickle.dumps(path)) == plain
    assert path.parent._repr_html_() is None  # type: ignore[attr-defined]
    picture = fast.view(tmp_path / "v.svg")
    assert picture._repr_html_().startswith("<svg")  # type: ignore[attr-defined]


class HTMLAttributes(HTMLParser):
    """The attributes of the one tag in a text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: dict[str, str | None] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del tag
        self.found |= dict(attrs)

    def __getitem__(self, name: str) -> str | None:
        return self.found[name]


def test_reprs_are_one_line(found: rmtcompile.Explanation) -> None:
    assert repr(found) == "<Explanation Own, 3 layers, 7 levels, plan diagonal>"
    assert len(str(found).splitlines()) > 20
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused = rmtcompile.explain(ByValue(), X)
    assert repr(refused).startswith("<Explanation ByValue, ") and "refused: " in repr(refused)


# -- profile


@pytest.fixture(scope="module")
def measured() -> tuple[rmtcompile.Optimized, Profile]:
    torch.manual_seed(0)
    optimized = rmtcompile.optimize(Own())
    with torch.no_grad():
        return optimized, optimized.profile(X)


def test_every_level_is_timed(measured: tuple[rmtcompile.Optimized, Profile]) -> None:
    optimized, profile = measured
    assert len(profile.level_us) == optimized.schedule.n_levels == 7
    assert all(us > 0 for us in profile.level_us)
    assert profile.total_us > 0 and profile.sequential_us > 0
    assert profile.kind_us["matrix products"] > 0
    assert profile.flops[0] > 0 and profile.flops[3] == pytest.approx(3 * profile.flops[0], rel=0.2)
    assert all(0 <= share <= 1 for share in profile.utilisation)
    assert len(profile.level_kinds) == 7
    for us, kinds in zip(profile.level_us, profile.level_kinds):
        assert kinds["matrix products"] > 0 and sum(kinds.values()) <= us * 1.001


def test_the_table_and_the_data(measured: tuple[rmtcompile.Optimized, Profile]) -> None:
    _, profile = measured
    text = str(profile)
    assert re.match(r"profile   [\d.]+ ms a call, the model as it is [\d.]+ ms: [\d.]+ x as fast\n", text)
    assert len(re.findall(r"^ +\d+  (?:ramp-up|steady|ramp-down) ", text, re.MULTILINE)) == 7
    data = json.loads(profile.to_json())
    assert data["widths"] == [1, 2, 3, 3, 3, 2, 1]
    assert data["speedup"] == pytest.approx(profile.sequential_us / profile.total_us)
    assert len(json.loads(profile.to_chrome_trace())["traceEvents"]) > 15


def test_a_notebook_shows_a_profile(measured: tuple[rmtcompile.Optimized, Profile]) -> None:
    _, profile = measured
    gain = rf"{profile.speedup:.2f} x as fast as the model as it is"
    assert re.fullmatch(rf"<Profile [\d.]+ ms a call, {gain}, 7 levels, CPU .*>", repr(profile))
    html = profile._repr_html_()
    assert html.count("<tr>") > 7 and f"{profile.total_us / 1e3:.2f} ms" in html and "matrix products" in html
    assert "levels not timed" in repr(dataclasses.replace(profile, level_us=()))
    assert "<details>" not in dataclasses.replace(profile, level_us=())._repr_html_()


def test_view_and_explanation_show_the_measurement(
    measured: tuple[rmtcompile.Optimized, Profile], tmp_path: Path
) -> None:
    optimized, profile = measured
    view = view_model(optimized)
    trace = json.loads(optimized.view(tmp_path / "t.trace.json").read_text())
    assert trace["otherData"]["times"] == "measured"
    assert view.profile is not None
    assert sum(view.profile.level_us) + view.profile.outside_us == pytest.approx(profile.total_us)
    assert [one.keys() for one in view.profile.level_kinds] == [one.keys() for one in profile.level_kinds]
    assert [(one.offset, one.nbytes) for one in view.values] == [((0, 1), 4 * SEGMENT * WIDTH)]
    assert profile.outside_us > 0 and "outside of levels" in str(profile)
    assert "CPU" in view.device
    assert f"measured {profile.speedup:.2f} x" in str(optimized.explain())
    with torch.no_grad():
        optimized(X[:, : 2 * SEGMENT])  # another length: the profile is of another schedule
    assert view_model(optimized).profile is None


def test_levels_that_could_not_be_timed_apart(measured: tuple[rmtcompile.Optimized, Profile]) -> None:
    profile = dataclasses.replace(measured[1], level_us=())
    assert profile.view() is None and profile.utilisation == ()
    assert "levels have no times of their own" in str(profile)
    assert json.loads(profile.to_chrome_trace())["otherData"]["times"].startswith("planned")


def test_profiling_leaves_nothing_behind(measured: tuple[rmtcompile.Optimized, Profile]) -> None:
    optimized, _ = measured
    model = optimized.model
    with torch.no_grad():
        expected = model(X)
        memory = model.layers[0].memory
        optimized.profile(torch.randn_like(X))
        assert model.layers[0].memory is memory
        torch.testing.assert_close(optimized(X), expected)


def test_attention_counts_where_keys_have_fewer_heads() -> None:
    query, key = torch.randn(2, 4, 16, 8), torch.randn(2, 2, 16, 8)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as counter:
        nn.functional.scaled_dot_product_attention(query, key, key, enable_gqa=True)
    assert counter.get_total_flops() == 2 * (2 * 2 * 4 * 16 * 16 * 8)  # two products of B, H, T, T, D


@torch.no_grad()
def test_profiling_leaves_buffers_as_they_were() -> None:
    model = ZOO["buffer_copy"].build()
    optimized, ids = rmtcompile.optimize(model), torch.arange(12)[None] % 7
    optimized(ids)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimized.profile(ids.flip(1))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::bmm", "matrix products"),
        ("aten::addmm", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::mean", "norms and reductions"),
        ("aten::native_layer_norm", "norms and reductions"),
        ("aten::copy_", "data movement"),
        ("aten::t", "data movement"),
        ("aten::mul", "pointwise"),
        ("aten::tanh", "pointwise"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTT", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
        ("gated_product_kernel", "matrix products"),
        ("triton_poi_fused_silu_mul_3", "pointwise"),
    ],
)
def test_kinds_of_operations(name: str, kind: str) -> None:
    assert kind_of(name) == kind


# -- words


def test_ranges_and_patterns() -> None:
    assert ranges([3, 0, 1, 5]) == "0..1, 3, 5"
    assert pattern(["a.0.b", "a.1.b", "a.2.b"]) == "a.{0..2}.b"
    assert pattern(["a.0", "b.1"]) == "a.0, b.1"
    assert pattern(["only.0"]) == "only.0"
