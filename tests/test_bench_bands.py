"""bench/bands.py and bench/ranks.py: bands of layers, timed and modelled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rmtcompile.bench import bands, main
from rmtcompile.bench.cli import bands_of, parser
from rmtcompile.bench.shapes import SHAPES


def test_bands_take_as_long_as_the_widest_of_them() -> None:
    assert bands.modelled_share(7, [4]) == 1
    assert bands.modelled_share(1, [2, 2]) == 1  # one cell at a time
    assert bands.modelled_share(3, [1, 1]) == 5 / 6  # cells of the bands: 1 0, 1 0, 1 1, 0 1, 0 1
    row = {"model": "tiny", "segment": 8, "low": 0.1, "high": 0.3, "gib": [1.0], "tokens": 56}
    two = {**row, "devices": 2, "layers": [2, 2], "seconds": 0.15}
    rows = [{**two, "ranks": True}, {**two, "difference": 1e-3}]
    rows += [{**row, "devices": 1, "layers": [4], "seconds": 0.2}, {**two, "model": "other"}]
    *_, table = bands.tables({"environment": {"command": []}, "bands": rows})
    share = bands.modelled_share(7, [2, 2])
    assert [cells[2] for cells in table.rows] == ["2", "1", "2", "2 processes"]
    assert [cells[5] for cells in table.rows] == ["", "1.00x", "1.33x", "1.33x"]
    assert table.rows[2][6] == f"{200 * share:.1f}"
    compute, fill, rest = (float(text.rstrip("%")) for text in table.rows[2][7].split(", "))
    assert compute == 67 and compute + fill + rest == pytest.approx(100, abs=1)


def test_bands_without_a_preset_are_the_whole_table_on_cuda() -> None:
    args = parser().parse_args(["--devices", "1", "2"])
    args.preset, args.has_table = "1b", True
    found = bands_of(args, ())
    assert [(m.name, tuple(m.tokens), m.case.shape) for m in found.models] == [
        (name, lengths, SHAPES[name]) for name, lengths in bands.TABLE
    ]
    args = parser().parse_args(["--devices", "2", "--preset", "tiny", "--tokens", "64"])
    args.has_table = False
    assert [(m.name, m.tokens) for m in bands_of(args, ()).models] == [("tiny", (64,))]


def test_processes_are_timed_beside_bands(tmp_path: Path) -> None:
    flags = ["--devices", "1", "2", "--ranks", "--preset", "tiny", "--tokens", "64", "--rounds", "1"]
    assert main([*flags, "--device", "cpu", "--out", str(tmp_path / "run.json")]) == 0
    rows = json.loads((tmp_path / "run.json").read_text())["bands"]
    assert [(row["devices"], row.get("ranks", False)) for row in rows] == [(1, False), (2, False), (2, True)]
    assert rows[2]["layers"] == [2, 2] and rows[2]["seconds"] > 0


def test_ranks_are_of_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--ranks"]) == 2
    assert "--ranks times the bands of --devices" in capsys.readouterr().err
