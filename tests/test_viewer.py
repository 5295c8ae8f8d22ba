"""rmtcompile/viewer: the page's data, and the page itself in headless Chromium.

Run as a script it takes the pictures of the documentation:

    python tests/test_viewer.py viewer.html docs/img/viewer [tab ...]
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from viewed import HOSTILE, Page, Viewer, armt, start_browser, whole_view

from rmtcompile.passes.grid.wavefront import wavefront
from rmtcompile.schedule import Carry
from rmtcompile.viewer import ProfileView, ViewModel, render

# -- the file


def test_the_file_is_whole_and_asks_for_nothing() -> None:
    text = render(whole_view())
    page = Page(text)
    assert "\0" not in text
    assert [tag for tag, _ in page.tags].count("script") == 2
    for tag, attributes in page.tags:
        for name in ("src", "href", "action"):
            target = attributes.get(name) or ""
            assert target.startswith(("#", "data:")) or not target, (tag, target)
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert "default-src 'none'" in text


def test_the_data_survives_hostile_names() -> None:
    page = Page(render(whole_view()))
    data = json.loads(page.scripts[0])
    assert data["title"] == HOSTILE
    assert data["schedule"]["levels"] == 9
    assert data["cells"][1]["ops"][1][:3] == ["mul_3", "mul", "bf16[1,16,32]"]


def test_a_bare_schedule_is_enough() -> None:
    data = json.loads(Page(render(ViewModel("x", armt(2, 2)))).scripts[0])
    assert data["profile"] is None
    assert data["cells"] == []


def test_rendering_is_deterministic() -> None:
    assert render(whole_view()) == render(whole_view())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"code_phases": {"steady": (4, 99)}}, "lines from 1 to 6"),
        ({"code_phases": {"warm-up": (1, 2)}}, "expected one of ramp_up, steady, ramp_down"),
        ({"profile": ProfileView((1.0,))}, "profile.level_us has 1 values for 9 levels"),
    ],
)
def test_views_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(whole_view(), **change)


# -- the page in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    driver = start_browser(tmp_path_factory.mktemp("chromium"), "--window-size=1366,768")
    yield driver
    driver.quit()


@pytest.fixture
def viewer(browser: Any, tmp_path: Path) -> Iterator[Viewer]:
    path = tmp_path / "viewer.html"
    path.write_text(render(whole_view()), encoding="utf-8")
    page = Viewer(browser)
    page.open(path)
    yield page
    assert page.errors() == []


def test_no_id_is_used_twice(viewer: Viewer) -> None:
    ids = viewer.js("return [...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))


def test_it_opens_on_a_full_level(viewer: Viewer) -> None:
    assert viewer.level == 3
    assert "4 cells run together" in viewer.text("#now")
    lead = viewer.text("#lead")
    assert "9 steps instead of 24" in lead
    assert "a cell hands on W_mem to the same layer of the next segment" in lead
    assert "A call takes 120 µs, 35 % of it in the steady state" in lead
    assert "of the time in operations most goes to bmm (90 %)" in lead
    assert viewer.text("#title") == HOSTILE


def test_slider_and_buttons_walk_the_levels(viewer: Viewer) -> None:
    viewer.js("const s = document.getElementById('slider'); s.value = 5; s.dispatchEvent(new Event('input'))")
    assert viewer.level == 5
    viewer.find("#next").click()
    assert viewer.level == 6
    assert "ramp-down" in viewer.text("#now")
    viewer.find("#first").click()
    viewer.find("#back").click()
    assert viewer.level == 0
    assert viewer.find("#slider").get_attribute("aria-valuetext") == "level 0 of 8, ramp-up, 1 cell"


def test_play_walks_to_the_last_level_and_stops(viewer: Viewer) -> None:
    viewer.js("document.getElementById('speed').value = 4")
    viewer.find("#play").click()
    assert viewer.find("#play").get_attribute("aria-label") == "Pause"
    deadline = time.monotonic() + 15
    while viewer.level < 8 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    assert viewer.level == 8
    assert viewer.find("#play").get_attribute("aria-pressed") == "false"


def test_a_click_opens_the_cell(viewer: Viewer) -> None:
    viewer.to_cell(2, 3, 4, click=True)
    assert viewer.text("#cell-h") == "Cell (2,3): segment 2, layer 3"
    assert viewer.level == 5
    viewer.js("document.querySelectorAll('#cell details').forEach((d) => { d.open = true })")
    panel = viewer.text("#cell")
    for piece in (
        "(2,2)",
        "(1,3)",
        "armt.py:240",
        "self_attn.q_proj",
        "f32[8,64,64]",
        "2 operations",
        "Reads (live-ins)",
    ):
        assert piece in panel, piece
    viewer.to_cell(0, 0, 4, click=True)
    assert "nothing: it can start at once" in viewer.text("#cell")
    assert "1 operation" in viewer.text("#cell")


def test_links_lead_to_the_other_cell(viewer: Viewer) -> None:
    viewer.to_cell(2, 2, 4, click=True)
    viewer.find('#cell [data-cell="2,1"]').click()
    assert viewer.text("#cell-h") == "Cell (2,1): segment 2, layer 1"


def test_hover_says_what_depends_on_what(viewer: Viewer) -> None:
    viewer.to_cell(3, 1, 4)
    tip = viewer.text("#tip")
    assert "segment 3, layer 1 · level 4" in tip
    assert "waits for (3,0), (2,1) by W_mem" in tip
    assert "feeds (3,2), (4,1) by W_mem" in tip
    assert viewer.text("#cell-h") != "Cell (3,1): segment 3, layer 1"


def test_the_filter_narrows_the_operations(viewer: Viewer) -> None:
    viewer.to_cell(2, 2, 4, click=True)
    viewer.find("#opfilter").send_keys("mlp")
    assert viewer.text("#count-ops") == "1 of 2 operations"


def test_keys(viewer: Viewer) -> None:
    viewer.js("document.getElementById('grid').focus()")
    before = viewer.text("#cell-h")
    assert before == "Cell (2,1): segment 2, layer 1"
    viewer.keys("\ue014", "\ue013")  # right, up
    assert viewer.text("#cell-h") == "Cell (3,2): segment 3, layer 2"
    assert "Waits for (3,1) (2,2)" in viewer.js("return document.getElementById('say').textContent")
    assert viewer.level == 5
    viewer.keys(",")
    assert viewer.level == 4
    viewer.keys("\ue010")
    assert viewer.level == 8
    viewer.keys("\ue011", ".")
    assert viewer.level == 1
    viewer.keys(" ")
    assert viewer.find("#play").get_attribute("aria-pressed") == "true"
    viewer.keys(" ")
    assert viewer.find("#play").get_attribute("aria-pressed") == "false"


def test_tab_reaches_every_control_with_a_visible_ring(viewer: Viewer) -> None:
    seen = []
    for _ in range(30):
        viewer.keys("\ue004")
        found = viewer.js(
            "const e = document.activeElement, s = getComputedStyle(e);"
            "return [e.id, s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 1];"
        )
        seen.append(found[0])
        assert found[1] or found[0] == "", found
    assert {"grid", "first", "back", "play", "next", "slider", "speed", "opfilter", "tab-deps"} <= set(seen)


def test_every_tab_shows_its_part(viewer: Viewer) -> None:
    pieces = {
        "deps": ["offset (1,0)", "same layer, previous segment", "W_mem", "512 KiB"],
        "time": [
            "Where the time goes",
            "ramp-up, 3 levels",
            "outside of levels",
            "bmm",
            "on a test",
            "All levels as a table",
        ],
        "passes": ["24 → 6", "0 → 2", "200 ms"],
        "code": ["for level in range(3):", "steady state, line 4"],
        "why": ["chosen by hand\nfor a test"],
    }
    for name, expected in pieces.items():
        viewer.find(f"#tab-{name}").click()
        panel = viewer.text(f"#panel-{name}")
        for piece in expected:
            assert piece in panel, (name, piece)
    assert len(viewer.driver.find_elements("css selector", ".line.ramp_up")) == 2
    viewer.js("document.getElementById('tab-why').focus()")
    viewer.keys("\ue014")
    assert viewer.find("#tab-deps").get_attribute("aria-selected") == "true"
    assert viewer.driver.find_elements("css selector", "#dag .node")


def test_the_cell_leads_to_its_code(viewer: Viewer) -> None:
    viewer.to_cell(2, 2, 4, click=True)
    viewer.js("document.querySelector('#cell [data-function=forward]').click()")
    assert viewer.find("#tab-code").get_attribute("aria-selected") == "true"
    assert viewer.js("return document.activeElement.className") == "code"


def test_what_runs_around_the_grid_is_there(viewer: Viewer) -> None:
    viewer.js("document.querySelectorAll('#panel-deps details').forEach((d) => { d.open = true })")
    panel = viewer.text("#panel-deps")
    proof = "model/armt.py:9\nreads model/armt.py:7"
    for piece in ("prologue: before layer 0", "embed.py:3", proof, "armt.py:247"):
        assert piece in panel, piece


def test_levels_as_a_table(viewer: Viewer) -> None:
    viewer.find("#tab-time").click()
    viewer.js("document.querySelector('#panel-time details').open = true")
    rows = viewer.text("#panel-time table").splitlines()
    assert rows[0].split() == ["level", "phase", "cells", "calls", "time", "a", "cell"]
    assert rows[4] == "3 steady state 4 1 14 µs 3.5 µs"


def test_only_edges_that_there_are_are_shown(browser: Any, tmp_path: Path) -> None:
    plain = wavefront({(0, 1), (1, -2)}, 4, 3, carries=[Carry("top", (1, -2), (4,), "float32", 16, (3,))])
    kinds = ("plain", "reads", "plain", "writes")
    schedule = dataclasses.replace(plain, reads=(((1, -2), (1,)),), layer_kinds=kinds)
    page = Viewer(browser)
    page.open(schedule.save(tmp_path / "s.html"))
    assert "layer 3 hands on top to layer 1 of the next segment" in page.text("#lead")
    page.to_cell(1, 0, 4, click=True)
    assert "nothing: it can start at once" in page.text("#cell")
    assert "kind A plain" in page.text("#cell")
    assert "in 2 grouped calls" in page.text("#now")
    page.to_cell(1, 1, 4, click=True)
    assert "(0,3)\ntop" in page.text("#cell")
    assert "Layer 1 waits for layer 3 of the previous segment." in page.text("#panel-deps")
    assert page.errors() == []


def test_blocks_of_segments_are_walked(browser: Any, tmp_path: Path) -> None:
    schedule = wavefront({(0, 1), (1, 1)}, 3, 10, alpha=0, block=4)
    page = Viewer(browser)
    page.open(schedule.save(tmp_path / "s.html"))
    assert "at most 4 segments run together" in page.text("#banner")
    page.to_cell(9, 1, 3, click=True)
    assert page.level == schedule.level_of((9, 1)) == 7
    assert "2 cells run together: layer 1 on segments 8–9" in page.text("#now")
    assert page.errors() == []


def test_32_layers_by_128_segments_load_and_play_without_lag(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "big.html"
    path.write_text(render(whole_view(32, 128)), encoding="utf-8")
    page = Viewer(browser)
    start = time.perf_counter()
    page.open(path)
    assert time.perf_counter() - start < 2
    frame = page.js(
        "const s = document.getElementById('slider'), start = performance.now();"
        "for (let i = 0; i < 40; i += 1) { s.value = 2 * i; s.dispatchEvent(new Event('input')); }"
        "return (performance.now() - start) / 40;"
    )
    assert frame < 60, f"{frame:.1f} ms a level"
    assert page.level == 78
    assert page.js("return document.documentElement.scrollWidth <= window.innerWidth")
    assert page.errors() == []


@pytest.mark.parametrize(
    ("offsets", "block"),
    [
        ({(0, 1), (1, -3)}, 0),
        ({(0, 1), (1, 1)}, 0),
        ({(0, 1), (1, 1)}, 2),
        ({(0, 1), (1, -1)}, 0),
        ({(0, 1), (2, 0)}, 0),
    ],
)
def test_other_schedules_are_drawn_too(
    browser: Any, tmp_path: Path, offsets: set[tuple[int, int]], block: int
) -> None:
    schedule = wavefront(offsets, 4, 5, block=block)
    path = schedule.save(tmp_path / "s.html")
    page = Viewer(browser)
    page.open(path)
    for segment, layer in ((0, 0), (4, 3), (2, 1)):
        page.to_cell(segment, layer, 4, click=True)
        assert page.level == schedule.level_of((segment, layer))
        together = schedule.widths[page.level]
        assert ("1 cell runs" if together == 1 else f"{together} cells run together") in page.text("#now")
    assert page.find("#banner").is_displayed() == (schedule.width == 1 or not schedule.is_optimal)
    assert page.errors() == []


def take_pictures(page: Path, stem: str, tabs: list[str]) -> None:
    """`<stem>-light.png` and `<stem>-dark.png` of a viewer file, or `<stem>-<tab>-light.png` for each tab."""
    import tempfile

    for theme in ("light", "dark"):
        with tempfile.TemporaryDirectory() as profile:
            driver = start_browser(Path(profile), "--window-size=1366,900")
            driver.execute_cdp_cmd(
                "Emulation.setEmulatedMedia",
                {"features": [{"name": "prefers-color-scheme", "value": theme}]},
            )
            view = Viewer(driver)
            view.open(page)
            for tab in tabs or [""]:
                if tab:
                    view.js("document.getElementById(arguments[0]).click()", f"tab-{tab}")
                    view.js("document.querySelector('.tabs').scrollIntoView({behavior: 'instant'})")
                time.sleep(0.3)
                name = f"{stem}-{tab}-{theme}.png" if tab else f"{stem}-{theme}.png"
                view.find(".tabs").screenshot(name) if tab else driver.save_screenshot(name)
            driver.quit()


if __name__ == "__main__":
    take_pictures(Path(sys.argv[1]).resolve(), sys.argv[2], sys.argv[3:])
