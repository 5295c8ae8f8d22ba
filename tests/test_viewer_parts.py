"""rmtcompile/viewer: links into the page, the filter, texts of passes, the timeline and the plots."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from viewed import Viewer, armt, start_browser, whole_view, with_operations

from rmtcompile.passes.grid.wavefront import wavefront
from rmtcompile.schedule import Carry, Schedule
from rmtcompile.schedule.memory import alive_bytes, growth
from rmtcompile.viewer import PassView, ViewModel, render
from rmtcompile.viewer.view_model import to_dict


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


def fragment(page: Viewer) -> str:
    """The fragment of the address, when the page has written it."""
    time.sleep(0.3)
    return str(page.js("return decodeURIComponent(location.hash)"))


def follow(page: Viewer, link: str) -> None:
    """Open the same file at a fragment."""
    address = page.js("return location.href").partition("#")[0]
    page.driver.get("about:blank")
    page.driver.get(address + link)
    assert page.js("return document.body.dataset.ready") == "1"


# -- links


def test_the_address_says_what_is_shown(viewer: Viewer) -> None:
    assert fragment(viewer) == ""
    viewer.find("#tab-passes").click()
    viewer.to_cell(2, 3, 4, click=True)
    assert fragment(viewer) == "#tab=passes&level=5&cell=2,3"
    viewer.find("#opfilter").send_keys("mlp & more")
    viewer.find("#back").click()
    assert fragment(viewer) == "#tab=passes&level=4&cell=2,3&filter=mlp & more"
    assert "filter=mlp%20%26%20more" in viewer.js("return location.href")


def test_an_address_opens_what_it_says(viewer: Viewer) -> None:
    follow(viewer, "#tab=code&level=7&cell=2,3&filter=mlp")
    assert viewer.find("#tab-code").get_attribute("aria-selected") == "true"
    assert viewer.level == 7
    assert viewer.text("#cell-h") == "Cell (2,3): segment 2, layer 3"
    assert viewer.text("#count-ops") == "1 of 2 operations"
    follow(viewer, "#cell=0,1")
    assert (viewer.level, viewer.text("#cell-h")) == (1, "Cell (0,1): segment 0, layer 1")
    follow(viewer, "#level=8")
    assert (viewer.level, viewer.text("#cell-h")) == (8, "Cell (5,3): segment 5, layer 3")
    viewer.js("location.hash = '#level=2&tab=time'")
    time.sleep(0.1)
    assert viewer.level == 2
    assert viewer.find("#tab-time").get_attribute("aria-selected") == "true"


def test_what_an_address_has_wrong_is_passed_over(viewer: Viewer) -> None:
    follow(viewer, "#tab=nothing&level=99&cell=7,x&pass=-1&from=1e1&other=%")
    assert viewer.level == 3
    assert viewer.find("#tab-deps").get_attribute("aria-selected") == "true"
    assert viewer.text("#cell-h") == "Cell (2,1): segment 2, layer 1"


# -- the panel of a cell


@pytest.mark.parametrize("text", ["baddbmm", "aten.split.Tensor", "armt.py:231"])
def test_the_filter_finds_generated_operations(viewer: Viewer, text: str) -> None:
    viewer.to_cell(2, 2, 4, click=True)
    viewer.find("#opfilter").send_keys(text)
    assert viewer.text("#count-ops-forward") == "1 of 2 operations"
    rows = viewer.driver.find_elements("css selector", "#ops-forward tr[data-op]")
    assert [row.is_displayed() for row in rows] == [text != "baddbmm", text == "baddbmm"]
    viewer.find("#opfilter").clear()
    viewer.js("document.getElementById('opfilter').dispatchEvent(new Event('input'))")
    assert viewer.js("return document.getElementById('count-ops-forward').textContent") == "2 operations"


def test_the_filter_stays_from_cell_to_cell(viewer: Viewer) -> None:
    viewer.to_cell(2, 2, 4, click=True)
    viewer.find("#opfilter").send_keys("linear")
    viewer.to_cell(0, 2, 4, click=True)
    assert viewer.find("#opfilter").get_attribute("value") == "linear"
    assert viewer.text("#count-ops") == "1 of 1 operation"


def test_the_panel_is_as_high_as_what_it_holds_or_the_window(browser: Any, tmp_path: Path) -> None:
    page = Viewer(browser)
    for n_ops in (2, 200):
        view = with_operations(n_ops)
        path = tmp_path / f"{n_ops}.html"
        path.write_text(render(view), encoding="utf-8")
        page.open(path)
        high, whole, window, first = page.js(
            "const d = document.querySelector('.detail');"
            "return [d.offsetHeight, d.scrollHeight + 2, innerHeight,"
            " document.querySelector('#ops tr').getBoundingClientRect().top - d.getBoundingClientRect().top];"
        )
        assert high == min(whole, window - 16)
        assert first < 400
    assert page.errors() == []


def test_nothing_scrolls_sideways_in_a_narrow_window(viewer: Viewer) -> None:
    size = viewer.driver.get_window_size()
    viewer.driver.set_window_size(500, 900)
    try:
        assert viewer.js("return innerWidth") <= 500
        for tab in ("deps", "time", "memory", "passes", "code", "why"):
            viewer.js("document.getElementById(arguments[0]).click()", f"tab-{tab}")
            for css in ("html", ".detail", f"#panel-{tab}"):
                wide = "const e = document.querySelector(arguments[0]); return [e.scrollWidth, e.clientWidth]"
                until = time.monotonic() + 10  # the page is laid out anew in its own time
                while (sizes := viewer.js(wide, css))[0] > sizes[1] and time.monotonic() < until:
                    time.sleep(0.05)
                assert sizes[0] <= sizes[1], (tab, css)
    finally:
        viewer.driver.set_window_size(size["width"], size["height"])


# -- texts of passes


def shown_lines(page: Viewer) -> list[str]:
    return str(page.text("#pass-text")).splitlines()


def test_a_pass_opens_its_text_and_what_it_changed(viewer: Viewer) -> None:
    viewer.find("#tab-passes").click()
    assert "Choose a pass" in viewer.text("#pass-note")
    viewer.js("document.querySelector('[data-pass=\"1\"]').click()")
    assert viewer.text("#pass-note") == "3 lines."
    viewer.js("document.querySelector('[data-pass=\"2\"]').click()")
    assert viewer.text("#pass-note") == "2 lines added, 1 removed, 2 equal."
    signs = viewer.js("return [...document.querySelectorAll('#pass-text .line i')].map((i) => i.textContent)")
    assert "".join(signs) == "-+ + "
    assert viewer.text("#pass-text .add").endswith("a = bmm(x)")
    assert "<b>" in viewer.text("#pass-text")
    assert fragment(viewer).endswith("&pass=2&from=1")


def test_two_passes_are_chosen(viewer: Viewer) -> None:
    follow(viewer, "#tab=passes&pass=1&from=2")
    assert viewer.text("#pass-note") == "1 line added, 2 removed, 2 equal."
    viewer.js(
        "const s = document.getElementById('pass-from'); s.value = '1'; s.dispatchEvent(new Event('change'))"
    )
    assert viewer.text("#pass-note") == "The texts are equal."
    assert viewer.text("#pass-text") == "3 equal lines"
    viewer.js("document.getElementById('pass-all').click()")
    assert len(viewer.driver.find_elements("css selector", "#pass-text .line")) == 3
    assert viewer.js("return document.querySelector('[data-pass=\"0\"]')") is None


def differences(page: Viewer, a: list[str], b: list[str]) -> list[list[str]]:
    """What `diff.js` says of two lists of lines."""
    script = files("rmtcompile.viewer").joinpath("diff.js").read_text(encoding="utf-8")
    found: list[list[str]] = page.js(f"{script}\nreturn diffLines(arguments[0], arguments[1]);", a, b)
    return found


def test_differences_give_both_texts_and_are_short(viewer: Viewer) -> None:
    random.seed(0)
    for letters in ("ab", "abcd", "abcdefghijkl"):
        for _ in range(20):
            a, b = ([random.choice(letters) for _ in range(random.randrange(14))] for _ in range(2))
            found = differences(viewer, a, b)
            assert [line for sign, line in found if sign != "+"] == a
            assert [line for sign, line in found if sign != "-"] == b
    found = differences(viewer, list("abcbdab"), list("bdcaba"))
    assert sum(sign == " " for sign, _ in found) == 4
    lines = [f"line {i}" for i in range(6000)]
    found = differences(viewer, lines, [*lines[:3000], "new", *lines[3001:]])
    assert [sign for sign, _ in found if sign != " "] == ["-", "+"]


def test_long_texts_are_cut() -> None:
    line = "x" * 99 + "\n"
    one = PassView("a", {}, {}, text=line * 4000)
    data = to_dict(ViewModel("t", armt(2, 2), passes=(one, PassView("b", {}, {}), one)))
    assert [p["text"] for p in data["passes"]] == [0, None, 0]
    assert data["texts"][0].count("\n") == 3000
    assert data["texts"][0].endswith("cut here; fast.dump(folder) writes all 4,001 lines")


# -- the timeline


def span(page: Viewer) -> tuple[float, float]:
    """The microseconds that the timeline shows."""
    start, end = page.js("const d = document.getElementById('timeline').dataset; return [+d.from, +d.to]")
    return start, end


def at_timeline(page: Viewer, share: float) -> Any:
    """Actions with the pointer at a share of the timeline's width."""
    from selenium.webdriver import ActionChains

    x, y = page.js(
        "const t = document.getElementById('timeline'); t.scrollIntoView({behavior: 'instant'});"
        "const r = t.getBoundingClientRect(); return [r.left + arguments[0] * r.width, r.top + 60]",
        share,
    )
    actions = ActionChains(page.driver, duration=0)
    actions.w3c_actions.pointer_action.move_to_location(int(x), int(y))
    return actions


def test_the_timeline_zooms_and_pans(viewer: Viewer) -> None:
    viewer.find("#tab-time").click()
    whole = 9 * 10 + 24
    assert span(viewer) == (0, whole)
    viewer.js("document.querySelector('[data-zoom=\"0.5\"]').click()")
    assert span(viewer) == (whole / 4, 3 * whole / 4)
    viewer.js(
        "const t = document.getElementById('timeline'), r = t.getBoundingClientRect();"
        "t.dispatchEvent(new WheelEvent('wheel', {deltaY: -400, clientX: r.left, cancelable: true}))"
    )
    assert span(viewer) == pytest.approx((whole / 4, whole / 2))
    actions = at_timeline(viewer, 0.5).click_and_hold()
    actions.w3c_actions.pointer_action.move_by(0, 0)
    actions.perform()
    at_timeline(viewer, 0.25).release().perform()
    start, end = span(viewer)
    assert start == pytest.approx(whole / 4 + whole / 16, rel=0.02) and end - start == pytest.approx(
        whole / 4
    )
    assert viewer.level == 3
    viewer.js("document.querySelector('[data-zoom=\"0\"]').click()")
    assert span(viewer) == (0, whole)
    viewer.js("document.getElementById('timeline').focus()")
    viewer.keys("+", "\ue014", "\ue014", "\ue014", "\ue014")
    assert span(viewer) == pytest.approx((whole / 2, whole))


def test_the_timeline_tells_kinds_and_picks_a_level(viewer: Viewer) -> None:
    viewer.find("#tab-time").click()
    at_timeline(viewer, 0.99).click().perform()
    assert viewer.level == 8
    at_timeline(viewer, 0.98).perform()
    time.sleep(0.1)
    assert viewer.text("#tip").splitlines() == [
        "level 8: 11 µs",
        "ramp-down, 1 cell",
        "bmm 7 µs, 64 %",
        "norms 2 µs, 18 %",
    ]
    assert "between operations" in viewer.text("#panel-time .whole .legend")


# -- memory


def test_memory_and_longer_texts_are_drawn(viewer: Viewer) -> None:
    viewer.find("#tab-memory").click()
    panel = viewer.text("#panel-memory")
    assert "12 segments of 4 layers take 15 levels instead of 48 steps" in panel
    # On level 3: four layers hand on, of which the last one has no reader in its segment, and three are read.
    assert viewer.text("#alive-now") == "level 3: 896 KiB carried, 6 KiB within segments"
    assert len(viewer.driver.find_elements("css selector", "#panel-memory svg.plot")) == 3
    viewer.js(
        "const p = document.getElementById('plot-alive'), r = p.getBoundingClientRect();"
        "p.dispatchEvent(new MouseEvent('click', {clientX: r.right - 8, bubbles: true}))"
    )
    assert viewer.level == 8


def test_a_schedule_without_carries_has_levels_by_length(browser: Any, tmp_path: Path) -> None:
    page = Viewer(browser)
    page.open(wavefront({(0, 1)}, 3, 4).save(tmp_path / "s.html"))
    page.find("#tab-memory").click()
    assert "knows no sizes" in page.text("#panel-memory")
    assert len(page.driver.find_elements("css selector", "#panel-memory svg.plot")) == 1
    assert page.errors() == []


@pytest.mark.parametrize("alpha", [0, 1, 3, 4])
def test_bytes_alive_are_counted_on_each_level(alpha: int) -> None:
    carries = [
        Carry("a", (1, 0), (), "float32", 5),
        Carry("a", (2, 1), (), "float32", 5),
        *([Carry("b", (1, -2), (), "float32", 7, (3,))] if alpha > 2 else []),
    ]
    schedule = Schedule(4, 7, alpha, frozenset({(1, 0)}), carries=tuple(carries))
    grid = schedule.grid
    expected = [0] * grid.n_levels
    for segment in range(7):
        for layer in range(4):
            for nbytes, offsets in (
                (5, [(1, 0), (2, 1)]),
                (7, [(1, -2)] if layer == 3 and alpha > 2 else []),
            ):
                readers = [(segment + ds, layer + dl) for ds, dl in offsets]
                inside = [grid.level_of(c) for c in readers if c[0] < 7 and 0 <= c[1] < 4]
                for t in range(grid.level_of((segment, layer)), max(inside, default=-1) + 1):
                    expected[t] += nbytes
    assert list(alive_bytes(grid, carries)) == expected


def test_levels_and_bytes_by_length_are_those_of_schedules() -> None:
    schedule = armt(4, 9)
    found = {one.n_segments: one for one in growth(schedule)}
    assert 9 in found and max(found) == 18
    for n, one in found.items():
        other = armt(4, n)
        assert one.n_levels == other.n_levels == n + 3
        assert one.carried == max(alive_bytes(other.grid, other.carries))
        assert one.values == 0
    long = growth(Schedule(100, 5000, 1, frozenset({(1, 0)})))
    assert long[-1].n_segments == 5000
