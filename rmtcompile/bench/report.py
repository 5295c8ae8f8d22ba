"""The record of a run as tables for a terminal and as JSON."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

AGAINST = ("sequential", "full", "graphed", "handwritten")
"""Opponents that the optimized model is compared with, as in the table of goals."""


@dataclass(frozen=True)
class Table:
    """Rows of text under a title; the first column is aligned left, the others right."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        text = [
            "  ".join(_pad(cell, w, i) for i, (cell, w) in enumerate(zip(line, widths))) for line in lines
        ]
        text.insert(1, "  ".join("-" * w for w in widths))
        return "\n".join([self.title, *(line.rstrip() for line in text)])


def _pad(cell: str, width: int, column: int) -> str:
    return cell.rjust(width) if column else cell.ljust(width)


def show(record: dict[str, Any], found: Iterable[Table] | None = None) -> None:
    """Print all tables, or those that are given; with `rich` where it is there and stdout is a terminal."""
    for table in tables(record) if found is None else found:
        print()
        if not (sys.stdout.isatty() and _show_rich(table)):
            print(table)
    for failure in record.get("failed", ()):
        print(f"\nfailed: {failure}")


def _show_rich(table: Table) -> bool:
    try:
        from rich.console import Console
        from rich.table import Table as RichTable
    except ImportError:
        return False
    rich = RichTable(title=table.title, title_justify="left")
    for i, name in enumerate(table.header):
        rich.add_column(name, justify="right" if i else "left", no_wrap=i == 0)
    for row in table.rows:
        rich.add_row(*row)
    Console().print(rich)
    return True


def save(record: dict[str, Any], path: Path) -> None:
    """Write the record as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_json(record) + "\n", encoding="utf-8")


def as_json(record: dict[str, Any]) -> str:
    """The record as JSON; numbers that JSON has no form for become null."""
    return json.dumps(_finite(record), indent=1)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def tables(record: dict[str, Any]) -> Iterator[Table]:
    """All tables of a record: details first, the comparison last."""
    peak = max((c["flops_per_s"] for c in record["ceilings"]), default=float("nan"))
    for model in record["models"]:
        for name, found in model.get("profiles", {}).items():
            yield _profile(name, found)
    for model in record["models"]:
        if "wavefronts" in model:
            yield _wavefronts(model, peak)
        if "accumulation" in model:
            yield _accumulation(model["accumulation"])
    yield environment_table(record["environment"], record["ceilings"])
    for model in record["models"]:
        yield _built(model)
        if model["rows"]:
            yield _details(model, peak)
    if any(model["rows"] for model in record["models"]):
        yield _latencies(record)
        ratios = _ratios(record)
        if ratios.rows:
            yield ratios


def environment_table(environment: dict[str, Any], ceilings: Sequence[dict[str, float]] = ()) -> Table:
    """Versions, date, device and command line."""
    rows = [(key, str(value)) for key, value in environment.items() if key != "command"]
    rows.append(("command", " ".join(environment["command"])))
    for when, ceiling in zip(("before", "after"), ceilings, strict=False):
        product, copy = ceiling["flops_per_s"] / 1e12, ceiling["bytes_per_s"] / 1e12
        rows.append((f"ceilings {when}", f"products {product:.4g} TFLOP/s, copy {copy:.4g} TB/s"))
    width = max(len(value) for _, value in rows)
    return Table("run", ("", ""), [(key, value.ljust(width)) for key, value in rows])


def _built(model: dict[str, Any]) -> Table:
    errors = model.get("errors", {}).get("relative_error", {})
    rows = [
        (
            name,
            _number(about.get("first_call_s"), "{:.1f}"),
            _gib(about.get("first_call_peak_bytes")),
            _gib(about.get("held_bytes")),
            _number(errors.get(name), "{:.3e}"),
            about.get("note") or about.get("attention") or _plan(about),
        )
        for name, about in model["opponents"].items()
    ]
    title = f"segments of {model['segment']}: first call (weights {_gib(model.get('weights_bytes'))} GiB)"
    if errors:
        title += f", error against float64 on {model['errors']['tokens']} tokens"
    return Table(title, ("opponent", "first call s", "peak GiB", "held GiB", "error", "note"), rows)


def _plan(about: dict[str, Any]) -> str:
    plan = about.get("schedule", {}).get("plan", "")
    return f"{plan} plan" if plan else ""


def _details(model: dict[str, Any], peak: float) -> Table:
    rows = []
    for row in model["rows"]:
        timed = "median" in row
        cells = row["tokens"] / model["segment"] * model["shape"]["layers"]
        rows.append(
            (
                f"{row['tokens']} {row['opponent']}",
                _number(row.get("median"), "{:.2f}", 1e3),
                f"+-{(row['high'] - row['low']) / 2 / row['median']:.1%}" if timed else "",
                _number(row.get("median"), "{:.1f}", 1e6 / cells) if row["opponent"] != "full" else "",
                f"{row['flops_per_s'] / peak:.1%}" if timed else "",
                _number(row.get("prepare_s"), "{:.1f}"),
                _gib(row.get("beyond_weights_bytes")),
                _number(row.get("difference_from_sequential"), "{:.1e}"),
                row.get("note", ""),
            )
        )
    header = (
        "tokens, opponent",
        "ms",
        "spread",
        "us a cell",
        "of ceiling",
        "prepare s",
        "GiB beyond weights",
        "difference",
        "note",
    )
    return Table(f"segments of {model['segment']}", header, rows)


def _latencies(record: dict[str, Any]) -> Table:
    names = list(dict.fromkeys(row["opponent"] for model in record["models"] for row in model["rows"]))
    rows = [
        (label, *(_number(by.get(name, {}).get("median"), "{:.2f}", 1e3) for name in names))
        for label, by in _by_length(record)
    ]
    return Table("milliseconds, median", ("segment x tokens", *names), rows)


def _ratios(record: dict[str, Any]) -> Table:
    rows = []
    for label, by in _by_length(record):
        fast = by.get("diagonal", {}).get("median")
        if fast:
            found = [by.get(name, {}).get("median") for name in AGAINST]
            rows.append((label, *(_number(other, "{:.2f}x", 1 / fast) for other in found)))
    return Table("diagonal is faster by", ("segment x tokens", *(f"than {name}" for name in AGAINST)), rows)


def _by_length(record: dict[str, Any]) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    for model in record["models"]:
        for tokens in dict.fromkeys(row["tokens"] for row in model["rows"]):
            by = {row["opponent"]: row for row in model["rows"] if row["tokens"] == tokens}
            yield f"{model['segment']} x {tokens}", by


def _profile(name: str, found: dict[str, Any]) -> Table:
    rows = [
        (row["kernel"][:70], row["kind"], f"{row['count']:.1f}", f"{row['us']:.1f}", f"{row['share']:.1%}")
        for row in found["kernels"][:16]
    ]
    kinds = ", ".join(f"{kind} {us:.0f}" for kind, us in sorted(found["kinds"].items(), key=lambda x: -x[1]))
    floors = ", ".join(f"{kind} {us:.0f}" for kind, us in found["floors_us"].items())
    title = (
        f"profile of {name}: one steady step, {found['step_us']:.0f} us by the clock, "
        f"{found['us']:.0f} us of kernels ({kinds}); floors: {floors}"
    )
    return Table(title, ("kernel", "kind", "count", "us", "share"), rows)


def _wavefronts(model: dict[str, Any], peak: float) -> Table:
    rows = [
        (
            str(w["width"]),
            f"{w['seconds'] * 1e3:.3f}",
            f"{w['seconds'] / w['width'] * 1e6:.1f}",
            f"{w['flops_per_s'] / peak:.1%}",
        )
        for w in model["wavefronts"]
    ]
    title = f"segments of {model['segment']}: wavefronts by width"
    return Table(title, ("cells", "ms", "us a cell", "of ceiling"), rows)


def _accumulation(found: dict[str, Any]) -> Table:
    names = list(found["logits_error"])
    segments = found["tokens"] // found["segment"]
    shown = sorted({1 << i for i in range(segments.bit_length()) if 1 << i <= segments} | {segments})
    rows = [
        (
            str(s),
            *(f"{found['logits_error'][name][s - 1]:.3e}" for name in names),
            *(f"{found['equal_greedy'][name][s - 1]:.4f}" for name in names),
        )
        for s in shown
    ]
    header = ("segment", *(f"{n}: error" for n in names), *(f"{n}: equal tokens" for n in names))
    return Table(f"logits against {found['reference']}, {found['tokens']} tokens", header, rows)


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    return "" if value is None else form.format(value * scale)


def _gib(value: float | None) -> str:
    return _number(value, "{:.2f}", 1 / 2**30)
