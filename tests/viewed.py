"""A view with something in every part of the page, and a headless Chromium that opens it."""

from __future__ import annotations

import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rmtcompile.passes.grid.wavefront import wavefront
from rmtcompile.schedule import Carry, Schedule
from rmtcompile.viewer import (
    CellView,
    FunctionView,
    OpView,
    PassView,
    ProfileView,
    ValueView,
    ViewModel,
    WitnessView,
)

CHROMIUM_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
HOSTILE = '</script><script>alert(1)</script><!-- {{style}} & "quotes" \\u003c'
CODE = """def forward(tokens):
    for level in range(3):  # ramp-up
        step(level)
    for level in range(3, 9):
        step(level)
    return finish("done")
"""


def armt(n_layers: int, n_segments: int) -> Schedule:
    return wavefront(
        {(0, 1), (1, 0)},
        n_layers,
        n_segments,
        carries=[Carry("W_mem", (1, 0), (8, 64, 64), "float32", 131072, source="model/armt.py:247")],
        segment_variants=("first",) + ("later",) * (n_segments - 1),
    )


def whole_view(n_layers: int = 4, n_segments: int = 6) -> ViewModel:
    """A view with something in every part of the page."""
    schedule = armt(n_layers, n_segments)
    x, memory = ValueView("x", (1, 16, 32), "bfloat16"), ValueView("W_mem", (8, 64, 64), "float32", "carried")
    ops = (
        OpView("linear", "linear", (1, 16, 32), "bfloat16", "model/armt.py:231", "self_attn.q_proj", ("x",)),
        OpView("mul_3", "mul", (1, 16, 32), "bfloat16", "model/armt.py:240", "mlp", ("linear",)),
    )
    cells = tuple(
        CellView(
            "layer",
            variant,
            ops[: 1 + i],
            (x, memory),
            (x,),
            ("W_mem",),
            (ValueView("q", (32, 32)),),
            ("forward",),
        )
        for i, variant in enumerate(("first", "later"))
    )
    return ViewModel(
        title=HOSTILE,
        schedule=schedule,
        cells=cells,
        values=(Carry("x", (0, 1), (1, 16, 32), "bfloat16", 1024),),
        generated=(
            FunctionView(
                "forward",
                (
                    OpView(
                        "split_1",
                        "split",
                        ("n", 16, 32),
                        "bfloat16",
                        "model/armt.py:231",
                        "",
                        ("v0",),
                        "aten.split.Tensor",
                    ),
                    OpView(
                        "baddbmm",
                        "baddbmm",
                        ("n", 16, 32),
                        "bfloat16",
                        "model/armt.py:240",
                        "mlp",
                        ("split_1",),
                        "aten.baddbmm.default",
                    ),
                ),
                (ValueView("v0", ("n", 16, 32), "bfloat16", "lane"),),
                ("baddbmm",),
            ),
        ),
        around=(CellView("prologue", "before layer 0", (OpView("e", "embedding", (), "", "embed.py:3"),)),),
        witnesses=(WitnessView((1, 0), "model/armt.py:9", "model/armt.py:7"),),
        passes=(
            PassView("capture", {}, {"mm": 24}),
            PassView("fuse", {"mm": 24}, {"mm": 6, "split": 2}, 0.2, text="a = mm(x)\n<b>\nreturn a"),
            PassView("lift, emit", {"mm": 6}, {"bmm": 6}, text="a = bmm(x)\n<b>\nc\nreturn a"),
        ),
        code=CODE,
        code_phases={"ramp_up": (2, 3), "steady": (4, 5)},
        profile=ProfileView(
            tuple(10.0 + w for w in schedule.widths),
            {"bmm": 80.0, "norms": 9.0},
            outside_us=6.0,
            level_kinds=tuple({"bmm": 6.0 + w, "norms": 2.0} for w in schedule.widths),
        ),
        device="a test",
        explanation=(("plan", ("chosen by hand", "for a test")),),
    )


def with_operations(number: int) -> ViewModel:
    """A view whose cells have so many operations, each a name for a line of its own."""
    names = [f"quite_a_long_name_of_an_operation_{i}" for i in range(number)]
    ops = tuple(
        OpView(
            name, "linear", (1, 16, 32), "bfloat16", f"models/some/modeling_file.py:{i}", f"module.{i // 9}"
        )
        for i, name in enumerate(names)
    )
    return ViewModel("long", armt(4, 6), tuple(CellView("layer", v, ops) for v in ("first", "later")))


class Page(HTMLParser):
    """Collects tags, attributes and the text of the data element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.scripts.append(data)


def start_browser(profile: Path, *flags: str) -> Any:
    """A headless Chromium driven by selenium, or a skip that says what is missing."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="the page is driven with selenium")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*CHROMIUM_FLAGS, f"--user-data-dir={profile}", *flags):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


class Viewer:
    """What the tests do on a page."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def js(self, script: str, *args: Any) -> Any:
        return self.driver.execute_script(script, *args)

    def open(self, path: Path) -> None:
        self.driver.get_log("browser")
        self.driver.get(path.as_uri())
        assert self.js("return document.body.dataset.ready") == "1"

    def find(self, css: str) -> Any:
        return self.driver.find_element("css selector", css)

    def text(self, css: str) -> str:
        return str(self.find(css).text)

    @property
    def level(self) -> int:
        return int(self.js("return document.body.dataset.level"))

    def to_cell(self, segment: int, layer: int, n_layers: int, *, click: bool = False) -> None:
        """Move the pointer over a cell."""
        from selenium.webdriver import ActionChains

        x, y = self.js(
            "const g = document.getElementById('grid'), d = g.dataset, r = g.getBoundingClientRect();"
            "return [r.left + +d.left + (arguments[0] + .5) * +d.w,"
            " r.top + +d.top + (arguments[2] - 1 - arguments[1] + .5) * +d.h];",
            segment,
            layer,
            n_layers,
        )
        actions = ActionChains(self.driver, duration=0)
        actions.w3c_actions.pointer_action.move_to_location(int(x), int(y))
        if click:
            actions.click()
        actions.perform()
        # Pointer moves are delivered with the next frame.
        self.driver.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 20))")

    def keys(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def errors(self) -> list[str]:
        return [e["message"] for e in self.driver.get_log("browser") if e["level"] in ("SEVERE", "WARNING")]
