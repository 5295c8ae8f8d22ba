"""rmtcompile on the command line: what it prints, what it writes, how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import rmtcompile
from rmtcompile.cli import doctor
from rmtcompile.cli.commands import main

TESTS = Path(__file__).parent
TOYS = str(TESTS / "reported.py")
TINY = [
    "--layers",
    "2",
    "--hidden",
    "16",
    "--heads",
    "2",
    "--segment",
    "8",
    "--segments",
    "3",
    "--memory",
    "2",
]


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for piece in ("rmtcompile demo", "package.module:function", "exit status", "bench"):
        assert piece in out, piece
    for command in ("demo", "explain", "view", "dump", "doctor"):
        assert main([command, "--help"]) == 0
        out = capsys.readouterr().out
        assert "examples\n  rmtcompile " in out and "--json" in out
        assert command == "doctor" or ("--layers" in out and "config.json" in out)
        assert max(map(len, out.splitlines())) <= 110


def test_the_doctor_finds_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert found["torch"]["found"] == torch.__version__ and found["torch"]["state"] == "ok"
    assert "captured, compiled and compared" in found["a small model"]["found"]
    assert main(["doctor"]) == 0
    assert "all that is needed is there" in capsys.readouterr().out


def test_the_doctor_says_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    versions = {"torch": "2.9.1+cu126", "networkx": "3.2"}
    monkeypatch.setattr(doctor, "version_of", versions.get)
    monkeypatch.setattr(rmtcompile, "optimize", lambda model, cache: lambda x: model(x) + 1)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))
    monkeypatch.setenv("RMTCOMPILE_CACHE", "/proc/programs")
    monkeypatch.setattr("os.access", lambda path, mode: str(path) != "/proc")
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    for piece in (
        "2.9.1+cu126, older than 2.11", "pip install 'torch>=2.11'", "pip install 'rmtcompile[models]'",
        "differs by 1.0e+00", f"{tmp_path}/kernels, 0 MiB",
        "does not work: torch, numpy, programs, a small model", "/proc/programs cannot be written",
        "set RMTCOMPILE_CACHE",
    ):  # fmt: skip
        assert piece in out, piece


def test_the_doctor_knows_what_is_required() -> None:
    project = tomllib.loads((TESTS.parent / "pyproject.toml").read_text())["project"]
    extras = {"": project["dependencies"], **project["optional-dependencies"]}
    wanted = {f"{name}>={oldest}" for name, oldest, _ in doctor.PACKAGES}
    assert wanted == {one for extra in {extra for *_, extra in doctor.PACKAGES} for one in extras[extra]}


def test_help_of_the_benchmark_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    out = capsys.readouterr().out
    assert "examples\n  rmtcompile bench --preset tiny" in out and "--json" in out and "exit status" in out
    assert main(["bench", "mymodel:build", "--help"]) == 0
    out = capsys.readouterr().out
    assert "rmtcompile bench mymodel:build --rounds 20" in out and "config.json" in out


def test_bench_of_a_model_of_yours(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    record = tmp_path / "run.json"
    assert main(["bench", f"{TOYS}:own", "--rounds", "2", "--out", str(record)]) == 0
    out = capsys.readouterr().out
    assert "3 layers x 5 segments, 7 levels, up to 3 cells at once" in out
    assert " x as fast by the diagonal plan; first call " in out
    data = json.loads(record.read_text())
    assert {name: len(times) for name, times in data["ms"].items()} == {"as it is": 2, "rmtcompile": 2}
    assert data["difference"] < 1e-6
    assert main(["bench", f"{TOYS}:whole"]) == 1
    assert "PartitionError: the forward does not cut" in capsys.readouterr().err
    assert main(["bench", "nothing"]) == 2
    assert main(["bench", "--no-such-flag"]) == 2


def test_version_and_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("rmtcompile 0.")
    assert main([]) == 2
    assert "start here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["explode"], "invalid choice: 'explode'"),
        (["explain", "--layers", "0"], "has to be at least 1"),
        (["explain", "nothing"], "'nothing' names no function"),
        (["explain", "no_such_package:build"], "cannot import no_such_package"),
        (["explain", "no_such_file.py:build"], "there is no file no_such_file.py"),
        (["explain", f"{TOYS}:absent"], "has no 'absent'"),
        (["explain", f"{TOYS}:needs"], "needs an argument, size, and is called without arguments"),
        (["bench", f"{TOYS}:needs"], "needs an argument, size, and is called without arguments"),
        (["explain", f"{TOYS}:wrong"], "gives a int: return a model, (model, args)"),
        (["explain", "--device", "nowhere"], "there is no device 'nowhere'"),
        (["explain", "--hidden", "10", "--heads", "4"], "no model of these sizes"),
        (["demo", "--text", "no_such_text"], "cannot read no_such_text"),
        (["view", f"{TOYS}:own", "-o", "x.nothing", "--quiet"], "cannot tell the format"),
        (["view", f"{TOYS}:own", "-o", "x.dot", "--open", "9,9", "--quiet"], "there is no cell"),
        (["view", f"{TOYS}:own", "-o", "x.svg", "--open", "0,0", "--quiet"], "only .dot and .explorer"),
        (["view", "--open", "third"], "has to be segment,layer"),
        (["view", f"{TOYS}:own", "-o", f"{TOYS}/x.html", "--quiet"], f"cannot write {TOYS}: File exists"),
        (["dump", f"{TOYS}:own", "-o", str(TOYS), "--quiet"], f"cannot write {TOYS}: File exists"),
        (["explain", "no_such_config.json"], "cannot read no_such_config.json"),
        (["explain", f"{TESTS / 'reported.py'}.json"], "cannot read"),
        (["demo", f"{TOYS}:own", "--text", "x", "--json"], "--text is for the small ARMT"),
    ],
)
def test_what_makes_no_sense_ends_with_2(
    argv: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    assert message in capsys.readouterr().err


def test_explain_says_what_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{TOYS}:own"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("model      Own\n")
    assert "plan       diagonal" in out
    assert "  capture, 2 segments\n" in err


def test_explain_as_json_and_html(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{TOYS}:classic", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["plan"] == "sequential"
    assert err == ""
    assert main(["explain", f"{TOYS}:own", "--html", "--quiet"]) == 0
    assert capsys.readouterr().out.startswith("<!doctype html>")


def test_a_refused_model_ends_with_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["explain", f"{TOYS}:whole", "--quiet"]) == 1
    assert "refused    PartitionError" in capsys.readouterr().out
    assert main(["dump", f"{TOYS}:whole", "--quiet", "-o", str(tmp_path)]) == 1
    assert "PartitionError: the forward does not cut" in capsys.readouterr().err
    assert (
        main(["view", f"{TOYS}:classic", "--plan", "diagonal", "--json", "-o", str(tmp_path / "x.html")]) == 1
    )
    assert json.loads(capsys.readouterr().out)["error"] == "UnsupportedError"


def test_view_and_dump_write_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "v.html"
    assert main(["view", f"{TOYS}:own", "-o", str(page), "--profile", "--quiet"]) == 0
    assert capsys.readouterr().out == f"wrote {page}\n"
    assert '"levelUs":[' in page.read_text()
    assert main(["dump", f"{TOYS}:own", "-o", str(tmp_path / "dump"), "--json"]) == 0
    written = [Path(name) for name in json.loads(capsys.readouterr().out)["files"]]
    assert written[-1].name.endswith("_emit.py") and all(path.exists() for path in written)


def test_other_files_of_a_view(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = tmp_path / "s.trace.json"
    assert main(["view", f"{TOYS}:own", "-o", str(trace), "--profile", "--quiet"]) == 0
    assert json.loads(trace.read_text())["otherData"]["times"] == "measured"
    dot = tmp_path / "s.dot"
    assert main(["view", f"{TOYS}:own", "-o", str(dot), "--open", "1,0", "--open", "1,1", "--quiet"]) == 0
    assert dot.read_text().count("subgraph cluster_c_1_") == 2
    graphs = tmp_path / "s.explorer.json"
    assert main(["view", f"{TOYS}:own", "-o", str(graphs), "--open", "1,0", "--quiet"]) == 0
    names = [graph["id"] for graph in json.loads(graphs.read_text())["graphs"]]
    assert names[:2] == ["cells", "cell of segment 1, layer 0"]


def test_modules_of_the_working_folder_are_found(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mymodel_of_the_test.py").write_text((TESTS / "reported.py").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["explain", "mymodel_of_the_test:own", "--quiet"]) == 0
    assert "mymodel_of_the_test.py:" in capsys.readouterr().out


def test_the_small_armt_takes_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--json", *TINY, "--dtype", "float64"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert len(data["layers"]) == 2
    assert data["inputs"] == ["input_ids: i64[1,24]"]
    assert [c["name"] for c in data["carries"]] == ["normaliser", "association"]
    assert {c["dtype"] for c in data["carries"]} == {"torch.float64"}


def test_a_model_alone_reads_random_tokens(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "alone.py").write_text(
        "from rmtcompile.cli.target import Sizes, small_armt\n"
        "def build():\n    return small_armt(Sizes(2, 16, 2, 8, 3, 2, 4))\n"
    )
    argv = ["explain", f"{tmp_path / 'alone.py'}:build", "--json", "--segment", "8", "--segments", "4"]
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out)["segments"] == 4


def test_a_config_of_a_decoder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(
        '{"model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32,'
        ' "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2}'
    )
    argv = ["explain", str(config), "--json", "--segment", "8", "--segments", "3", "--memory", "2"]
    assert main(argv) == 0
    data = json.loads(capsys.readouterr().out)
    assert len(data["layers"]) == 3 and data["inputs"] == ["input_ids: i64[1,24]"]
    assert data["offsets"][1]["offset"] == [1, 0]
    config.write_text('{"layers": 3}')
    assert main(["explain", str(config)]) == 2
    assert "is no config of a decoder of Hugging Face" in capsys.readouterr().err


def test_demo_of_a_model_of_yours(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["demo", f"{TOYS}:own", "--out", str(tmp_path), "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    assert "2/5  input     its own arguments: f32[1,20,8]" in out
    assert "both rounding" in out
    assert (tmp_path / "viewer.html").exists()


def test_demo_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["demo", "--json", "--out", str(tmp_path), "--repeats", "1", *TINY]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["segments"] == 3 and data["difference"] < 1e-5
    assert len(data["files"]) == 3


def test_bench_gets_its_own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    import rmtcompile.bench

    seen: list[list[str]] = []
    monkeypatch.setattr(rmtcompile.bench, "main", lambda argv: seen.append(argv) or 3)
    assert main(["bench", "--quick", "x"]) == 3
    assert seen == [["--quick", "x"]]


@pytest.mark.slow
def test_it_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rmtcompile", "explain", "nothing"],
        capture_output=True,
        text=True,
        check=False,
        cwd=TESTS.parent,
    )
    assert done.returncode == 2
    assert "names no function" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device here")
def test_devices_that_there_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["demo"], ["explain"], ["bench", "--preset", "tiny"]):
        assert main([*command, "--device", "cuda"]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and "there is no device 'cuda' here" in lines[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="about CPUs")
def test_the_benchmark_is_small_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--budget", "0"]) == 1
    assert "preset tiny, since the device is cpu" in capsys.readouterr().err


def test_a_view_makes_its_folder(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder" / "schedule.html"
    assert main(["view", *TINY, "--quiet", "-o", str(out)]) == 0
    assert out.stat().st_size > 10_000
