"""What the command line says of mistakes: of the user's own code, of configs, and of files to write."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rmtcompile.cli import target
from rmtcompile.cli.commands import main

TESTS = Path(__file__).parent
TOYS = str(TESTS / "reported.py")


@pytest.mark.parametrize("command", ["explain", "bench", "view", "demo"])
def test_a_function_that_fails_is_the_users(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([command, f"{TOYS}:failing"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"rmtcompile {command}: {TOYS}:failing raised RuntimeError: the weights are not here"
    assert lines[1].startswith(f"  {TOYS}:") and lines[1].endswith(", in failing")
    assert lines[2:] == ['    raise RuntimeError("the weights are not here")']


def test_the_users_own_line_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "mine_of_the_test.py"
    file.write_text(
        "import torch\ndef deep():\n    return torch.zeros(2) @ torch.zeros(3)\nbuild = lambda: deep()\n"
    )
    assert main(["explain", f"{file}:build"]) == 1
    err = capsys.readouterr().err
    assert f"  {file}:3, in deep\n    return torch.zeros(2) @ torch.zeros(3)\n" in err
    assert "site-packages" not in err and "cli" not in err.replace("rmtcompile explain", "")
    file.write_text("import torch\ntorch.nn.Linear('3')\n")
    assert main(["explain", f"{file}:build", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["error"] == "BuilderError"
    assert f"rmtcompile explain: {file} raised TypeError: " in err and f"  {file}:2, in <module>\n" in err
    file.write_text("def build(:\n")
    assert main(["explain", f"{file}:build"]) == 1
    assert f"raised SyntaxError: invalid syntax\n  {file}:1\n    def build(:" in capsys.readouterr().err


def test_a_class_that_needs_arguments(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "class_of_the_test.py"
    file.write_text("class Build:\n    def __init__(self, width, depth):\n        pass\n")
    assert main(["explain", f"{file}:Build"]) == 2
    assert "needs arguments, width, depth, and is called without" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert"}, "is the config of an encoder (bert)"),
        ({"model_type": "t5"}, "is the config of an encoder with a decoder (t5)"),
        ({"model_type": "vit"}, "is the config of no causal language model (vit)"),
    ],
)
def test_a_config_of_no_decoder(
    config: dict[str, str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    assert main(["explain", str(file)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]


def test_a_bert_that_is_a_decoder(tmp_path: Path) -> None:
    import transformers

    config = transformers.AutoConfig.for_model("bert", is_decoder=True)
    target._check_decoder("config.json", config)


@pytest.mark.parametrize(
    "argv",
    [
        ["view", "-o", "/proc/x/v.html"],
        ["view", "-o", "/proc/v.html"],
        ["dump", "-o", "/proc/x"],
        ["demo", "--out", "/proc/x"],
        ["explain", "--cache", "/proc/x"],
        ["bench", "--out", "/proc/x/a.json"],
        ["bench", "--plots", "/proc/x"],
        ["bench", f"{TOYS}:own", "--out", "/proc/x/a.json"],
    ],
)
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that cannot be written")
def test_files_are_tried_before_anything_runs(
    argv: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("it has begun")

    monkeypatch.setattr(target, "target_of", never)
    assert main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and f"cannot write {argv[-1]}: " in lines[0]


def test_folders_are_made_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "folder" / "run.json"
    assert main(["bench", f"{TOYS}:whole", "--out", str(out)]) == 1
    assert out.parent.is_dir() and not out.exists()
    kept = tmp_path / "kept.json"
    kept.write_text("as it was")
    assert main(["bench", f"{TOYS}:whole", "--out", str(kept)]) == 1
    assert kept.read_text() == "as it was"


def test_json_is_printed_and_files_go_to_out(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["bench", "--json", "run.json"], ["bench", f"{TOYS}:own", "--json", "run.json"]):
        assert main(argv) == 2
        err = capsys.readouterr().err
        assert (
            "unrecognized arguments: run.json (--json prints, and takes no file: --out FILE names one)" in err
        )
    assert main(["bench", f"{TOYS}:own", "--rounds", "1", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["ms"]["rmtcompile"]) == 1
    main(["bench", "--preset", "tiny", "--budget", "0", "--json"])
    assert json.loads(capsys.readouterr().out)["failed"]


def test_types_are_written_long_or_short(capsys: pytest.CaptureFixture[str]) -> None:
    from rmtcompile.bench.flags import parser as of_bench
    from rmtcompile.cli.bench_own import parser as of_own

    for short, long in (("f64", "float64"), ("f32", "float32"), ("bf16", "bfloat16"), ("f16", "float16")):
        for parser in (of_bench(), of_own()):
            assert {parser.parse_args(["--dtype", text]).dtype for text in (short, long)} == {long}
    assert main(["bench", "--dtype", "f8"]) == 2
    assert "invalid choice: 'f8' (choose from" in capsys.readouterr().err


@pytest.mark.slow
def test_mistakes_print_no_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rmtcompile", "explain", f"{TOYS}:failing"],
        capture_output=True,
        text=True,
        check=False,
        cwd=TESTS.parent,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 3 and "Traceback" not in done.stderr
