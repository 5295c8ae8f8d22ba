"""The benchmark: its opponents give the right results, its figures are what they are said to be."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rmtcompile.bench import kernels, main, measure, numerics, report, session
from rmtcompile.bench.cli import options_of, parser, settings_of, variant_of
from rmtcompile.bench.graphed import SequentialGraphed, joined
from rmtcompile.bench.opponents import Full, Handwritten, Skipped, result_of
from rmtcompile.bench.shapes import SHAPES, Case
from rmtcompile.models import ARMT, build
from rmtcompile.report import profiling

CPU = torch.device("cpu")
TINY = Case(SHAPES["tiny"], segment=16, memory=4, d_mem=8, batch=2, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def settings(*flags: str) -> session.Settings:
    return settings_of(parser().parse_args(["--preset", "tiny", *flags]))


# ---- what a model costs ----


def products_alone(case: Case) -> int:
    """What torch counts without attention: the ARMT's matrix products."""
    model, ids = case.build(CPU), case.ids(3 * case.segment, CPU)
    with FlopCounterMode(display=False) as counter:
        model(ids)
    found = counter.get_flop_counts()["Global"]
    return sum(count for op, count in found.items() if "attention" not in str(op))


@pytest.mark.parametrize("head", [False, True])
def test_flops_are_those_that_torch_counts(head: bool) -> None:
    case = Case(SHAPES["tiny"], segment=16, memory=4, d_mem=8, batch=2, dtype=torch.float32, head=head)
    rows, cells = case.segment + case.memory, 3 * case.batch * case.shape.layers
    expected = case.armt_flops(3 * case.segment) - cells * case.attention_flops(rows)
    # What the sequential forward does beyond: the small products q z and k z, and the head of memory tokens.
    expected += cells * 2 / 3 * 2 * 6 * case.d_mem * (rows + case.memory)
    if head:
        expected += 2 * case.batch * 3 * case.memory * case.shape.hidden * case.shape.vocab
    # transformers 4 makes the rotary angles by a small product of its own, which is not counted
    exact = int(transformers.__version__.split(".")[0]) >= 5
    assert products_alone(case) == pytest.approx(expected, rel=1e-12 if exact else 1e-4)


def test_parameters_and_bytes_of_a_layer() -> None:
    layer = TINY.build(CPU).memory_cell.layers[0]
    assert TINY.layer_parameters() == sum(p.numel() for p in layer.parameters())
    assert TINY.cell_bytes() > 8 * TINY.layer_parameters()


def test_full_attention_costs_more_with_length_than_armt() -> None:
    case = Case(SHAPES["1b"], segment=1024, memory=128, d_mem=64, batch=1, dtype=torch.bfloat16)
    assert case.full_flops(131072) / case.full_flops(4096) > 64
    assert case.armt_flops(131072) / case.armt_flops(4096) == pytest.approx(32, rel=0.01)


# ---- opponents ----


@pytest.mark.parametrize(
    "changed",
    [{}, {"n_heads": 2}, {"correction": False}, {"head": True}],
    ids=["plain", "heads", "no correction", "language head"],
)
@pytest.mark.parametrize("segments", [1, 3])
def test_hand_assembled_is_the_sequential_forward(changed: dict[str, Any], segments: int) -> None:
    options = {"segment_size": 16, "num_mem_tokens": 4, "d_mem": 8, "head": False, **changed}
    model = build(TINY.shape.config(), dtype=torch.float64, **options).eval().requires_grad_(False)
    for layer in model.memory_cell.layers:
        nn.init.normal_(layer.W_mv.weight, std=0.5)
    runner = SequentialGraphed(model, batch=2)
    runner.prepare()
    ids = TINY.ids(segments * 16, CPU)
    for _ in range(2):  # the second run must not see the state of the first
        assert numerics.relative_error(runner(ids), result_of(model(ids))) < 1e-12


def test_hand_assembled_compiles_once_a_variant() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    model = TINY.build(CPU)
    runner = SequentialGraphed(model, batch=2, backend=counter)
    runner.prepare()
    ids = TINY.ids(48, CPU)
    assert numerics.relative_error(runner(ids), result_of(model(ids))) < 1e-12
    assert counter.frame_count == 3  # first segment, later segments, final norm


def test_hand_assembled_notices_moved_weights() -> None:
    model = TINY.build(CPU)
    runner = SequentialGraphed(model, batch=2)
    runner.prepare()
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.01
    runner.prepare()
    ids = TINY.ids(32, CPU)
    assert numerics.relative_error(runner(ids), result_of(model(ids))) < 1e-12


def test_joined_copies_only_what_is_apart() -> None:
    whole = torch.randn(6, 4)
    beside = [whole[:2], whole[2:3], whole[3:]]
    assert joined(beside).data_ptr() == whole.data_ptr() and torch.equal(joined(beside), whole)
    apart = [whole[:2], whole[3:]]
    assert torch.equal(joined(apart), torch.cat(apart))
    turned = [whole[3:], whole[:3]]
    assert torch.equal(joined(turned), torch.cat(turned))


def test_full_attention_is_the_decoder_without_memory() -> None:
    from transformers import AutoModel

    model, ids = TINY.build(CPU), TINY.ids(48, CPU)
    plain = AutoModel.from_config(TINY.shape.config(), attn_implementation="sdpa").double().eval()
    state = model.memory_cell.model.state_dict()
    plain.load_state_dict({k.replace(".layer.", "."): v for k, v in state.items() if ".W_m" not in k})
    model(ids)  # leaves a memory behind
    assert numerics.relative_error(Full(TINY, model)(ids), plain(ids).last_hidden_state) < 1e-12
    assert all(layer.writes for layer in model.memory_cell.layers)


def test_full_attention_is_left_out_where_it_takes_too_long() -> None:
    ids = torch.zeros(1, Full.longest_on_cpu + 16, dtype=torch.long)
    with pytest.raises(Skipped, match="tokens on a CPU"):
        Full(TINY, TINY.build(CPU)).prepare(ids)


def test_hand_written_script_of_another_shape_is_left_out(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import torch\ntorch.set_grad_enabled(True)\nD = H = KV = HD = FF = L = D_MEM = 1\n")
    case = Case(SHAPES["tiny"], 16, 4, 8, batch=1, dtype=torch.bfloat16)
    with pytest.raises(Skipped, match="shape"):
        Handwritten(case, script)
    assert not torch.is_grad_enabled()
    with pytest.raises(Skipped, match="bf16"):
        Handwritten(TINY, script)


SCRIPT = """
import torch
D, H, KV, HD, FF, L, D_MEM = 64, 4, 2, 16, 128, 4, 8
calls = []

class Runner:
    def __init__(self, segment, n_mem):
        self.segment = segment
        self.p = {"w": torch.zeros(3, dtype=torch.bfloat16)}
        self.embed = self.memory = self.norm = torch.zeros(1, dtype=torch.bfloat16)

    def plan(self, n):
        return ((i, ("key", i)) for i in range(n))

    def graph(self, *key):
        calls.append(key)

    def diagonal(self, ids):
        return ids[:, None].float()
"""


def test_hand_written_script_takes_part(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    case = Case(SHAPES["tiny"], 16, 4, 8, batch=1, dtype=torch.bfloat16)
    opponent = Handwritten(case, script)
    ids = case.ids(32, CPU)
    opponent.prepare(ids)
    assert opponent.module.calls == [("key", 0), ("key", 1)]
    assert opponent(ids).shape == (1, 32, 1) and opponent.own_bytes == 2 * 6
    assert opponent.flops(32) == case.armt_flops(32)


# ---- how figures are taken ----


def test_spread() -> None:
    spread = measure.Spread.of([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (spread.median, spread.low, spread.high, spread.count) == (3.0, 2.0, 4.0, 5)
    assert spread.relative == pytest.approx(1 / 3)
    assert measure.Spread.of([2.0]).relative == 0


def test_opponents_take_turns() -> None:
    seen: list[str] = []
    functions = {name: (lambda name=name: seen.append(name)) for name in "ab"}
    times = measure.in_turn(functions, CPU, rounds=2, turn=1e-9)
    assert [len(taken) for taken in times.values()] == [2, 2]
    firsts = [name for i, name in enumerate(seen) if i == 0 or seen[i - 1] != name]
    assert firsts == ["a", "b", "a"]  # the second round begins with b


def test_relative_error() -> None:
    reference = torch.ones(1, 3000, 2)
    assert numerics.relative_error(reference * 1.01, reference) == pytest.approx(0.01, rel=1e-4)
    assert numerics.relative_error(reference, torch.zeros_like(reference)) == 1
    broken = reference.clone()
    broken[0, 2999, 1] = math.nan
    assert math.isnan(numerics.relative_error(broken, reference))


def test_steady_step_is_what_a_longer_run_does_more(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked:
        segments = 0

    def run(segments: int) -> None:
        Asked.segments = segments

    def profiled(function: Any, cuda: bool) -> dict[str, tuple[int, float]]:
        function()
        n = Asked.segments
        return {"gemm": (10 * n, 30.0 * n), "ramp": (7, 100.0), "triton_x": (2 * n, 10.0 * n + 5)}

    monkeypatch.setattr(kernels, "counted", profiled)
    found = kernels.steady_step(run, 6, 4, CPU)
    assert [(r["kernel"], r["kind"], r["count"], r["us"]) for r in found["kernels"]] == [
        ("gemm", "product", 10, 30.0),
        ("triton_x", "compiled", 2, 10.0),
    ]
    assert found["us"] == 40 and found["kinds"] == {"product": 30, "compiled": 10}


def test_profile_counts_operations() -> None:
    a = torch.randn(8, 8)
    found = kernels.counted(lambda: [a @ a for _ in range(3)], cuda=False)
    assert found["aten::mm"][0] == 3


def test_wavefront_times_are_medians_of_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = [1, 2, 3, 3, 3, 2, 1]

    class Fake:
        case = dataclasses.replace(TINY, shape=dataclasses.replace(TINY.shape, layers=3))
        fast = types.SimpleNamespace(schedule=types.SimpleNamespace(widths=widths))

    def level_us(fast: Any, args: Any, kwargs: Any) -> tuple[float, ...]:
        assert fast is Fake.fast and args[0].shape == (TINY.batch, 6 * TINY.segment) and not kwargs
        return (10.0, 16.0, 20.0, 90.0, 21.0, 18.0, 12.0)

    monkeypatch.setattr(profiling, "level_us", level_us)
    found = session.wavefront_seconds(Fake(), CPU)  # type: ignore[arg-type]
    assert [(w["width"], w["seconds"]) for w in found] == [
        (1, pytest.approx(11e-6)),
        (2, pytest.approx(17e-6)),
        (3, pytest.approx(21e-6)),
    ]
    assert found[2]["flops_per_s"] == pytest.approx(3 * TINY.batch * TINY.cell_flops() / 21e-6)


def test_error_against_float64_shows_a_broken_run() -> None:
    model, ids = TINY.build(CPU), TINY.ids(32, CPU)
    single = numerics.in_dtype(model, torch.float32)
    runs = {"right": lambda i: result_of(single(i)), "wrong": lambda i: result_of(single(i.flip(1)))}
    found = numerics.errors(single, runs, ids)["relative_error"]
    assert 0 < found["right"] < 1e-5
    assert found["wrong"] > 0.1


# ---- the command line ----


@pytest.mark.slow
def test_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    flags = ["--preset", "tiny", "--segment", "16", "--layers", "3", "--tokens", "32", "64", "--rounds", "1"]
    pieces = ["--errors", "--accumulation", "--profile", "--wavefronts", "--dtype", "f64"]
    assert main([*flags, *pieces, "--out", str(path)]) == 0
    record = json.loads(path.read_text())
    (model,) = record["models"]
    assert {(row["tokens"], row["opponent"]) for row in model["rows"]} == {
        (tokens, name) for tokens in (32, 64) for name in ("full", "sequential", "graphed", "diagonal")
    }
    for row in model["rows"]:
        assert row["median"] > 0 and row["flops_per_s"] > 0
        if row["opponent"] in ("graphed", "diagonal"):
            assert row["difference_from_sequential"] < 1e-10
    assert set(model["errors"]["relative_error"]) == {"sequential", "graphed", "diagonal"}
    assert model["accumulation"]["equal_greedy"]["diagonal"] == [1.0] * 4
    assert max(model["accumulation"]["logits_error"]["diagonal"]) < 1e-5
    assert set(model["profiles"]) == {"graphed", "diagonal"}
    assert [w["width"] for w in model["wavefronts"]] == [1, 2, 3]
    schedule = model["opponents"]["diagonal"]["schedule"]
    assert (schedule["plan"], schedule["width"]) == ("diagonal", 2)
    assert len(record["ceilings"]) == 2 and record["environment"]["torch"] == torch.__version__
    out, err = capsys.readouterr()
    assert re.search(r"^diagonal .* diagonal plan *$", out, re.MULTILINE)
    assert "diagonal is faster by" in out and "16 x 64" in out and "profile of diagonal" in out
    assert "diagonal: ready after" in err


def test_an_opponent_that_fails_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken(self: SequentialGraphed) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(SequentialGraphed, "prepare", broken)
    flags = ["--preset", "tiny", "--tokens", "32", "--rounds", "1", "--opponents", "graphed", "sequential"]
    path = tmp_path / "run.json"
    assert main([*flags, "--out", str(path)]) == 1
    out, _ = capsys.readouterr()
    assert "failed: graphed: RuntimeError: no such kernel" in out
    record = json.loads(path.read_text())
    assert [row["opponent"] for row in record["models"][0]["rows"]] == ["sequential"]


def test_budget_ends_a_run_early(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--preset", "tiny", "--tokens", "32", "--budget", "0"]) == 1
    assert "not begun, the time is up" in capsys.readouterr().out


def test_presets_and_flags() -> None:
    found = settings("--segment", "8", "16", "--hidden", "32", "--head", "--dtype", "bf16", "--errors")
    assert [case.segment for case in found.cases] == [8, 16]
    assert found.cases[0].shape.hidden == 32 and found.cases[0].head
    assert found.cases[0].dtype == torch.bfloat16 and found.error_tokens == 64
    large = settings_of(parser().parse_args([]))
    assert large.tokens == (4096, 8192, 32768, 131072) and large.cases[0].segment == 1024
    assert large.cases[0].shape == SHAPES["1b"]


def test_options_for_the_optimized_model() -> None:
    assert options_of(["cuda_graphs=False", "plan=auto"]) == {"cuda_graphs": False, "plan": "auto"}
    assert variant_of("plain:backend=eager,verify=True") == ("plain", {"backend": "eager", "verify": True})


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--tokens", "100"], "100 tokens are not a whole number of segments of 32"),
        (["--rounds", "0"], "rounds must be at least 1"),
        (["--option", "verify"], "'verify' has to be KEY=VALUE"),
        (["--variant", "verify=True"], "'verify=True' has to be NAME:KEY=VALUE"),
    ],
)
def test_flags_that_do_not_fit(flags: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--preset", "tiny", *flags]) == 2
    assert line in capsys.readouterr().err


def test_tables_of_a_run_that_measured_nothing() -> None:
    record = {"environment": {"command": []}, "ceilings": [], "models": [], "failed": []}
    assert [table.title for table in report.tables(record)] == ["run"]


def test_json_holds_no_nan(tmp_path: Path) -> None:
    report.save({"a": [math.nan, 1.0], "b": {"c": math.inf}}, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, 1.0], "b": {"c": None}}


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from rmtcompile.bench import plots

    row = {"opponent": "diagonal", "tokens": 32, "median": 0.1, "beyond_weights_bytes": 0}
    error = {"reference": "float32", "logits_error": {"diagonal": [1e-3, 2e-3]}}
    waves = [{"width": 1, "flops_per_s": 5.0}]
    model = {"segment": 16, "rows": [row], "accumulation": error, "wavefronts": waves}
    written = plots.draw({"models": [model], "ceilings": [{"flops_per_s": 10.0}]}, tmp_path)
    assert [p.name for p in written] == [
        "latency-segment16.svg",
        "utilisation-segment16.svg",
        "accumulation-segment16.svg",
    ]
    assert all(p.stat().st_size for p in written)


def test_random_weights_make_the_memory_speak() -> None:
    model: ARMT = TINY.build(CPU)
    ids = TINY.ids(32, CPU)
    other = torch.cat([ids[:, :16].flip(1), ids[:, 16:]], dim=1)
    assert not torch.equal(result_of(model(ids))[:, 16:], result_of(model(other))[:, 16:])
