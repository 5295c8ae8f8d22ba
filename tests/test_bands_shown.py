"""Bands in schedules, drawings, traces, the viewer and profiles."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_ranks import ranks
from toys import Toy, assert_same, features, made
from viewed import Page, Viewer, start_browser
from zoo.others import ZOO

import rmtcompile
from rmtcompile.passes.bands import even
from rmtcompile.passes.grid.wavefront import wavefront
from rmtcompile.report import Profile
from rmtcompile.report.clocks import DeviceClock, offsets
from rmtcompile.report.view import view_model
from rmtcompile.schedule import BandTimes, Schedule, Span
from rmtcompile.schedule.bands import planned
from rmtcompile.schedule.serial import SCHEMA
from rmtcompile.viewer import ProfileView, ViewModel, render
from rmtcompile.viewer.view_model import to_dict


def cut_evenly(schedule: Schedule, count: int) -> Schedule:
    return dataclasses.replace(schedule, bands=even(schedule.n_layers, min(count, schedule.n_layers)))


def armt(n_layers: int = 4, n_segments: int = 6, bands: int = 2) -> Schedule:
    return cut_evenly(wavefront({(0, 1), (1, 0)}, n_layers, n_segments), bands)


some = st.builds(
    cut_evenly,
    st.builds(
        wavefront,
        st.sampled_from([{(0, 1), (1, 0)}, {(0, 1), (1, -1)}, {(0, 1), (2, 0)}]),
        st.integers(2, 9),
        st.integers(1, 9),
    ),
    st.integers(1, 4),
)

# -- schedules


@given(some)
def test_json_keeps_bands(schedule: Schedule) -> None:
    again = Schedule.from_json(schedule.to_json())
    assert again == schedule and again.bands == schedule.bands
    assert [again.band_of(layer) for band in again.bands for layer in band] == [
        p for p, band in enumerate(again.bands) for _ in band
    ]


def test_bands_follow_the_schema_and_are_of_old_files_none() -> None:
    data = json.loads(armt().to_json())
    assert data["bands"] == [[0, 2], [2, 4]]
    jsonschema = pytest.importorskip("jsonschema", reason="the schema is checked with jsonschema")
    jsonschema.validate(data, SCHEMA)
    del data["bands"]
    assert Schedule.from_json(json.dumps(data)).bands == ()


@pytest.mark.parametrize("bands", [(range(2),), (range(3), range(2, 4)), (range(4), range(4, 4))])
def test_bands_that_are_no_cut_are_refused(bands: tuple[range, ...]) -> None:
    with pytest.raises(ValueError, match=r"bands hold the layers 0\.\.3 in order"):
        dataclasses.replace(armt(), bands=bands)


def test_layers_that_run_one_after_the_other_have_no_bands() -> None:
    with pytest.raises(ValueError, match="bands need alpha above 0"):
        cut_evenly(wavefront({(0, 1), (1, 1)}, 4, 5, alpha=0), 2)


def test_bands_are_printed_with_their_borders() -> None:
    lines = str(armt()).splitlines()
    assert "  bands     0: layers 0..1, 1: layers 2..3, each a level behind the one before" in lines
    at = lines.index("  ------- + -----------  band 0 below")
    assert lines[at - 1].startswith("  layer 2 |") and lines[at + 1].startswith("  layer 1 |")
    assert repr(armt()).endswith(", 2 bands>") and "bands" not in repr(wavefront({(0, 1)}, 4, 6))
    big = str(armt(32, 128, 16))
    assert "9 borders of bands" in big and max(map(len, big.splitlines())) < 140


def test_where_values_go_down_no_band_is_behind() -> None:
    """By the layers that really read: a border that nothing crosses downwards holds nobody back."""
    down = cut_evenly(wavefront({(0, 1), (1, -1)}, 4, 6), 2)
    assert down.lag == 0 and "all on the same level" in str(down)
    assert dataclasses.replace(down, reads=(((1, -1), (0, 2)),)).lag == 1
    assert armt().lag == 1 and armt(bands=1).lag == 0


@given(some)
def test_planned_levels_wait_for_those_they_read(schedule: Schedule) -> None:
    times = [10.0 + level for level in range(schedule.n_levels)]
    bands = planned(schedule, times)
    spans = [{span.level: span for span in band.spans} for band in bands]
    for p, band in enumerate(bands):
        assert [span.level for span in band.spans] == list(schedule.band_grid(p).levels)
        assert all(b.end - b.begin == pytest.approx(times[b.level]) for b in band.spans)
        assert band.busy_us + band.waiting_us + band.ramps_us == pytest.approx(band.total_us)
    for cells in schedule.levels:
        for cell in cells:
            q, t = schedule.band_of(cell[1]), schedule.level_of(cell)
            for before in schedule.producers(cell):
                made_by = spans[schedule.band_of(before[1])][schedule.level_of(before)]
                assert made_by.end <= spans[q][t].begin + 1e-9


def test_pictures_show_the_borders(tmp_path: Path) -> None:
    schedule = armt(6, 5, 3)
    root, name = ElementTree.fromstring(schedule.to_svg()), "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f"{name}line")) == 2
    assert [f"band {p}" for p in range(3)] == [
        text.text for text in root.findall(f"{name}text") if str(text.text).startswith("band ")
    ]
    assert "band 1" not in wavefront({(0, 1)}, 6, 5).to_svg() and "0: layers 0..1" in schedule._repr_html_()
    assert schedule.to_networkx().nodes[0, 3]["band"] == 1
    pytest.importorskip("matplotlib", reason="png needs matplotlib")
    assert schedule.save(tmp_path / "s.png").stat().st_size > 0


# -- traces


def processes(trace: str) -> dict[int, str]:
    """The name of each process, checked: slices of a track do not overlap, and all belong to a named one."""
    events = json.loads(trace)["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert {e["pid"] for e in events} == set(names)
    ends: dict[tuple[int, int], float] = defaultdict(float)
    for event in sorted((e for e in events if e["ph"] == "X"), key=lambda e: e["ts"]):
        track = event["pid"], event["tid"]
        assert event["ts"] >= ends[track] - 2e-3 and event["dur"] >= 0
        ends[track] = event["ts"] + event["dur"]
    return names


def cells_of(trace: str) -> list[tuple[int, int, int, int]]:
    """Process, segment, layer and level of each cell."""
    events = json.loads(trace)["traceEvents"]
    facts = [(e["pid"], e["args"]) for e in events if e.get("cat") == "cell"]
    return sorted((pid, args["segment"], args["layer"], args["level"]) for pid, args in facts)


@given(some)
def test_a_trace_has_a_process_a_band_with_its_cells(schedule: Schedule) -> None:
    trace = schedule.to_chrome_trace()
    assert len(processes(trace)) == len(schedule.bands)
    assert cells_of(trace) == sorted(
        (1 + schedule.band_of(layer), s, layer, level)
        for level, cells in enumerate(schedule.levels)
        for s, layer in cells
    )


def test_a_planned_trace_shows_the_lag(tmp_path: Path) -> None:
    path = armt().save(tmp_path / "s.trace.json")
    assert processes(path.read_text()) == {1: "band 0, layers 0..1", 2: "band 1, layers 2..3"}
    levels = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("cat") == "level"]
    behind = [e["args"]["behind_us"] for e in levels if "behind_us" in e["args"]]
    assert behind == [100.0] * 5
    assert max(e["ts"] + e["dur"] for e in levels) == 1000  # 9 levels and a lag of one
    with pytest.raises(ValueError, match="times of each band: expected 2, got 1"):
        armt().to_chrome_trace(bands=[BandTimes("", (Span(0, 0.0, 1.0),), 1.0)])


# -- profiles


@pytest.fixture(scope="module")
def measured() -> tuple[Any, Profile]:
    fast = rmtcompile.optimize(made(lambda: Toy(4)), devices=["cpu", "cpu"])
    with torch.no_grad():
        return fast, fast.profile(features(6))


def check_bands(schedule: Schedule, bands: list[dict[str, Any]]) -> None:
    """Every level of each band exactly once, one after the other, and the sums of their times."""
    assert len(bands) == len(schedule.bands)
    assert min(band["spans"][0][1] for band in bands) == 0
    assert max(band["spans"][-1][2] for band in bands) == pytest.approx(bands[0]["total_us"])
    for p, band in enumerate(bands):
        levels, begins, ends = zip(*band["spans"], strict=True)
        assert list(levels) == list(schedule.band_grid(p).levels)
        assert all(a < b for a, b in zip(begins, ends, strict=True))
        assert all(a <= b for a, b in zip(ends, begins[1:], strict=False))
        assert 0 < band["busy_us"] <= band["total_us"]
        assert band["busy_us"] + band["idle_us"] == pytest.approx(band["total_us"])
        assert band["waiting_us"] >= 0 and band["ramps_us"] >= 0


def test_every_level_of_each_band_is_measured(measured: tuple[Any, Profile]) -> None:
    fast, found = measured
    assert found.schedule == fast.schedule and fast.schedule.bands == (range(2), range(2, 4))
    data = json.loads(found.to_json())
    check_bands(found.schedule, data["bands"])
    assert [band["place"] for band in data["bands"]] == ["cpu", "cpu"]
    assert found.total_us > 0 and found.sequential_us > 0 and found.exact_us == 0  # one clock
    assert found.launched_us >= found.bands[0].total_us
    busy = sum(band["busy_us"] for band in data["bands"])
    assert sum(found.level_us) == pytest.approx(busy)  # levels of bands that share a device add up
    assert len(found.flops) == 9 and found.flops[3] == 4 * found.flops[0]


def test_levels_of_bands_that_share_a_processor_take_turns(measured: tuple[Any, Profile]) -> None:
    _, found = measured
    spans = sorted(span[1:] for band in found.bands for span in band.spans)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
    assert "bands share cpu: their levels come one after the other" in str(found)


def test_a_profile_has_a_line_a_band(measured: tuple[Any, Profile]) -> None:
    _, found = measured
    lines = re.findall(r"^ +(\d) +cpu +(\S+) +[\d.]+ +[\d.]+%", str(found), re.MULTILINE)
    assert lines == [("0", "0..1"), ("1", "2..3")]
    assert "2 bands on cpu" in repr(found) and "waits ms" in found._repr_html_()
    assert "was not run" in str(dataclasses.replace(found, sequential_us=0.0))


def test_a_measured_trace_has_a_process_a_band(measured: tuple[Any, Profile], tmp_path: Path) -> None:
    fast, found = measured
    trace = fast.view(tmp_path / "s.trace.json").read_text()
    assert trace == found.to_chrome_trace() and json.loads(trace)["otherData"]["times"] == "measured"
    assert processes(trace) == {1: "band 0, layers 0..1, cpu", 2: "band 1, layers 2..3, cpu"}
    assert cells_of(trace) == cells_of(fast.schedule.to_chrome_trace())
    levels = [e for e in json.loads(trace)["traceEvents"] if e.get("cat") == "level"]
    for process, band in enumerate(found.bands, 1):
        got = [(e["name"], e["ts"], e["dur"]) for e in levels if e["pid"] == process]
        assert got == [(f"level {t}", round(a, 3), round(b - a, 3)) for t, a, b in band.spans]


def test_the_viewer_has_the_bands(measured: tuple[Any, Profile], tmp_path: Path) -> None:
    fast, found = measured
    data = json.loads(Page(fast.view(tmp_path / "s.html").read_text()).scripts[0])
    assert data["schedule"]["bands"] == [[0, 2], [2, 4]] and data["schedule"]["lag"] == 1
    shown = data["profile"]["bands"]
    assert [[span[0] for span in band["spans"]] for band in shown] == [list(range(7)), list(range(2, 9))]
    scale = found.total_us / (sum(found.level_us) + found.outside_us)
    assert shown[1]["busyUs"] == pytest.approx(found.bands[1].busy_us * scale, abs=0.01)
    view = view_model(fast)
    assert view.profile is not None
    assert sum(view.profile.level_us) + view.profile.outside_us == pytest.approx(found.total_us)
    assert f"measured {found.speedup:.2f} x" in str(fast.explain())
    with pytest.raises(ValueError, match="times of 1 bands for 2"):
        ViewModel("x", armt(), profile=ProfileView((1.0,) * 9, bands=found.bands[:1]))


@pytest.mark.parametrize("recompute", ["none", "level"])
def test_backward_is_measured_too(recompute: str) -> None:
    """By level, the bands of a level together."""
    fast = rmtcompile.optimize(made(lambda: Toy(4)), devices=["cpu"] * 3, recompute=recompute)
    found = fast.profile(features(5))
    assert len(found.backward_us) == fast.schedule.n_levels and min(found.backward_us) > 0
    assert sum(found.backward_us) <= 1.01 * found.backward_total_us
    assert processes(found.to_chrome_trace())[4] == "backward of all bands"
    assert all(parameter.grad is None for parameter in fast.parameters())


@torch.no_grad()
def test_profiling_leaves_nothing_behind() -> None:
    """With a skew, some levels of a narrow band are empty; they are levels all the same."""
    entry = ZOO["skewed"]
    model = entry.build()
    twin = copy.deepcopy(model)
    (x,) = entry.inputs(2, 5)
    fast = rmtcompile.optimize(twin, devices=["cpu"] * 3)
    found = fast.profile(x)
    check_bands(found.schedule, json.loads(found.to_json())["bands"])
    assert len(processes(found.to_chrome_trace())) == 3 and found.schedule.lag == 0
    assert_same(model.state_dict(), twin.state_dict())
    assert_same(model(x), fast(x))


# -- ranks


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_every_rank_gets_the_whole_profile(tmp_path: Path) -> None:
    one, other = (said["profiled"] for said in ranks(2, "profiled", tmp_path))
    profiles = [json.loads(said[0]) for said in (one, other)]
    assert one[1:3] == other[1:3] and profiles[0]["bands"] == profiles[1]["bands"]
    schedule = Schedule.from_json(one[2])
    assert schedule.bands == (range(2), range(2, 4))
    check_bands(schedule, profiles[0]["bands"])
    assert [band["place"] for band in profiles[0]["bands"]] == ["rank 0", "rank 1"]
    assert processes(one[1]) == {1: "band 0, layers 0..1, rank 0", 2: "band 1, layers 2..3, rank 1"}
    assert len(cells_of(one[1])) == schedule.n_cells
    for key in ("total_us", "sequential_us", "kind_us", "flops", "level_us", "exact_us"):
        assert profiles[0][key] == profiles[1][key]
    assert profiles[0]["flops"][3] == 4 * profiles[0]["flops"][0] and profiles[0]["exact_us"] > 0
    low, high = ({t: (a, b) for t, a, b in band["spans"]} for band in profiles[0]["bands"])
    for level, (begin, _) in high.items():  # what it reads was sent before, by the common clock
        assert begin + profiles[0]["exact_us"] >= low.get(level - 1, (0, 0))[1]
    assert "2 bands one a rank" in one[3] and "clocks of two bands may be" in one[3]


def test_clocks_of_processes_bound_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clocks, 500 apart: each look of the second one is as of the first one's collective."""
    ticks = iter(range(0, 1000, 10))
    monkeypatch.setattr("rmtcompile.report.clocks.now", lambda: float(next(ticks)))

    def gathered(mine: Any) -> list[Any]:
        return [mine, [(a + 503, b + 501) for a, b in mine]] if mine is not None else []

    assert offsets(gathered) == [(0.0, 0.0), (502.0, pytest.approx(9.0))]


def test_a_processor_has_no_clock_of_its_own() -> None:
    clock = DeviceClock(torch.device("cpu"))
    before, after = clock.mark(), clock.mark()
    assert clock.exact_us == 0 and clock.at(before) <= clock.at(after)


@pytest.mark.gpu
@torch.no_grad()
def test_levels_of_cards_are_measured() -> None:
    """By events, each on the device of its band, which on a machine of one card is the same."""
    cards = ["cuda:0", f"cuda:{min(2, torch.cuda.device_count()) - 1}"]
    model = made(lambda: Toy(4)).to("cuda:0")
    fast = rmtcompile.optimize(model, devices=cards, backend="eager")
    found = fast.profile(features(9).to("cuda:0"))
    check_bands(found.schedule, json.loads(found.to_json())["bands"])
    assert [band.place for band in found.bands] == cards
    assert (found.exact_us > 0) == (cards[0] != cards[1]) and found.exact_us < 2000


# -- the page


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    driver = start_browser(tmp_path_factory.mktemp("chromium"), "--window-size=1366,768")
    yield driver
    driver.quit()


def test_the_page_shows_bands(browser: Any, measured: tuple[Any, Profile], tmp_path: Path) -> None:
    fast, _ = measured
    page = Viewer(browser)
    page.open(fast.view(tmp_path / "s.html"))
    assert "The layers run in 2 bands, each a level behind the one before." in page.text("#lead")
    page.to_cell(2, 3, 4, click=True)
    assert "band 1" in page.text("#cell")
    page.js("document.getElementById('tab-time').click()")
    table = page.text("#bands")
    assert "band 0, layers 0–1" in table and "band 1, layers 2–3" in table
    assert "Bands share cpu" in page.text("#panel-time")
    timeline = page.find("#timeline")
    page.js("arguments[0].scrollIntoView({behavior: 'instant', block: 'center'})", timeline)
    from selenium.webdriver import ActionChains

    actions = ActionChains(browser).move_to_element_with_offset(
        timeline, timeline.size["width"] // 2 - 2, 10 - timeline.size["height"] // 2
    )
    actions.perform()  # the end of the upper row
    assert "level 8 of band 1: " in page.text("#tip") and "on cpu" in page.text("#tip")
    actions.click().perform()
    assert page.level == 8
    assert page.errors() == []


def test_a_schedule_with_bands_is_drawn_without_times(browser: Any, tmp_path: Path) -> None:
    page = Viewer(browser)
    page.open(armt(8, 5, 3).save(tmp_path / "s.html"))
    assert "3 bands" in page.text("#lead")
    page.find("#tab-time").click()
    assert page.errors() == []
    assert to_dict(ViewModel("x", armt()))["schedule"]["bands"] == [[0, 2], [2, 4]]
    assert render(ViewModel("x", armt())) == render(ViewModel("x", armt()))
