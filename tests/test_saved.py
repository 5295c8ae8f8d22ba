"""A saved program runs in another process, without a capture, or what differs is said."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from saving import CASES, COMPILED, Case, ran
from torch import Tensor, nn
from toys import SEGMENT, Layer, Toy, assert_same, features, made

import rmtcompile
from rmtcompile.errors import IgnoredWarning, RMTCompileError, UnsupportedError

HERE = Path(__file__).parent
MIXTURE = {
    "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 1, "num_key_value_heads": 1, "num_local_experts": 2,
}  # fmt: skip


def exchanged(cases: dict[str, Case], folder: Path) -> dict[str, tuple[Any, Any]]:
    """By case: what the model itself gives here, and what its saved program gives in another process."""
    expected = {}
    transformers.MixtralModel(transformers.MixtralConfig(**MIXTURE))  # a library notes what classes there are
    for name, case in cases.items():
        model = case.build()
        fast = rmtcompile.optimize(model, **case.options)
        ran(case, model, fast)
        fast.save(folder / name)
        fresh = case.build()
        expected[name] = ran(case, fresh, fresh)
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    cache = str(folder / "inductor")  # none of what was compiled here
    environment = {**os.environ, "PYTHONPATH": paths, "TORCHINDUCTOR_CACHE_DIR": cache}
    warnings = ["-W", "error::UserWarning", "-W", "ignore:TensorFloat32"]  # which a GPU could use
    command = [sys.executable, *warnings, str(HERE / "saving.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: (expected[name], torch.load(folder / f"{name}.pt")) for name in cases}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    return exchanged(CASES, tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize("name", CASES)
def test_another_process_gives_what_the_model_gives(name: str, loaded: dict[str, tuple[Any, Any]]) -> None:
    assert_exchanged(CASES[name], *loaded[name])
    assert not loaded[name][1]["heavy"], "the first call imports what takes seconds, and is not needed"


def assert_exchanged(case: Case, expected: Any, got: Any) -> None:
    assert got["captures"] == 0
    for part in ("results", "left", "grads"):
        assert_same(expected[part], got[part], case.tolerance)
    assert "loaded from a folder" in got["explained"]
    assert "def forward(run)" in got["code"]


@pytest.mark.slow
def test_compiled_cells_are_not_compiled_again(tmp_path: Path) -> None:
    case = COMPILED["compiled"]
    (pair,) = exchanged({"compiled": case}, tmp_path).values()
    assert_exchanged(case, *pair)
    assert pair[1]["missed"] == pair[1]["traced"] == 0


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
def test_on_a_gpu(tmp_path: Path) -> None:
    case = COMPILED["cuda"]
    (pair,) = exchanged({"cuda": case}, tmp_path).values()
    assert_exchanged(case, *pair)
    assert pair[1]["missed"] == pair[1]["traced"] == 0


# ---- what differs ------------------------------------------------------------------------------------------

X = features(3)


@torch.no_grad()
def saved(model: Any, folder: Path, *inputs: Any, **options: Any) -> Any:
    """An optimized model that has run, and whose programs are saved."""
    fast = rmtcompile.optimize(model, **options)
    for x in inputs or (X,):
        fast(x)
    fast.save(folder)
    return fast


@torch.no_grad()
def refused(model: Any, folder: Path, said: str, x: Any = X, **options: Any) -> None:
    """No saved program is used; it is said why, and the result is the model's."""
    fast = rmtcompile.load(folder, model, **options)
    with pytest.warns(IgnoredWarning, match=said):
        result = fast(x)
    assert fast.captures
    assert_same(model(x), result)


@torch.no_grad()
def used(model: Any, folder: Path, *inputs: Any, **options: Any) -> Any:
    """Saved programs serve these calls."""
    fast = rmtcompile.load(folder, model, **options)
    for x in inputs or (X,):
        assert_same(model(x), fast(x))
    assert not fast.captures
    return fast


class Flagged(Toy):
    """Reads a flag, an object and a number out of a tensor."""

    def __init__(self) -> None:
        super().__init__(n_layers=2)
        self.flag = True
        self.options = types.SimpleNamespace(scale=2.0, names=["a", "b"])
        self.register_buffer("step", torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x) * self.options.scale
        if self.flag and "a" in self.options.names:
            x = x + 1
        return x * self.step.item()


def change_flag(model: Any) -> None:
    model.flag = False


def change_scale(model: Any) -> None:
    model.options.scale = 3.0


def change_names(model: Any) -> None:
    model.options.names[0] = "c"


def change_step(model: Any) -> None:
    model.step.fill_(4.0)


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "flag": (change_flag, "Flagged.flag was bool True and is bool False"),
    "object": (change_scale, r"scale.* was float 2.0 and is float 3.0"),
    "list": (change_names, r"names.* was str 'a' and is str 'c'"),
    "number out of a tensor": (change_step, "reads numbers from step, which holds others now"),
}


@pytest.fixture(scope="module")
def flagged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flagged")
    saved(made(Flagged), folder)
    return folder


@pytest.mark.parametrize("name", CHANGES)
def test_what_the_forward_reads_is_compared(name: str, flagged: Path) -> None:
    change, said = CHANGES[name]
    model = made(Flagged)
    change(model)
    refused(model, flagged, said)


def test_other_weights_are_the_models_own(flagged: Path) -> None:
    used(made(Flagged, seed=1), flagged)


def test_later_changes_are_seen(flagged: Path) -> None:
    fast = used(made(Flagged), flagged)
    fast.model.flag = False
    with torch.no_grad(), pytest.warns(IgnoredWarning, match="flag was bool True"):
        result = fast(X)
    assert_same(fast.model(X), result)
    assert fast.captures == 1


def test_longer_inputs_are_followed_and_compared(flagged: Path) -> None:
    used(made(Flagged), flagged, features(12), features(2), features(1))


@torch.no_grad()
def test_texts_in_parts(flagged: Path) -> None:
    model = made(Flagged)
    fast = rmtcompile.load(flagged, model)
    x = features(4)
    first, state = fast.run(x[:, : 2 * SEGMENT])
    second, _ = fast.run(x[:, 2 * SEGMENT :], state=state)
    assert_same(model(x), torch.cat([first, second], 1))
    assert not fast.captures


def test_functions_and_installed_programs(tmp_path: Path) -> None:
    def scaled(by: float) -> Any:
        model = made(Toy)
        return model, lambda x: model(x) * by

    saved(scaled(2.0)[1], tmp_path / "function")
    used(scaled(2.0)[1], tmp_path / "function")
    refused(scaled(3.0)[1], tmp_path / "function", "by was float 2.0 and is float 3.0")
    for captures in (1, 0):
        model = made(Toy)
        program = rmtcompile.install(model, cache=tmp_path / "installed")
        with torch.no_grad():
            assert_same(made(Toy)(X), model(X))
        assert program.captures == captures


TABLE, START = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64), torch.tensor(2.0)


class Tables(Toy):
    """Reads tensors of a global and of its own code, and a number out of one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * TABLE * START.item() + torch.tensor([0.5], dtype=x.dtype)


def test_tensors_that_no_module_holds(tmp_path: Path) -> None:
    saved(made(Tables), tmp_path)
    used(made(Tables), tmp_path)
    for tensor in (TABLE, START):
        with torch.no_grad():
            tensor.add_(1)
        refused(made(Tables), tmp_path, "TABLE was tensor|START")
        tensor.sub_(1)


class Late(Toy):
    """Does something else from the tenth segment on."""

    def forward(self, x: Tensor) -> Tensor:
        parts = [part * 2 if s > 9 else part for s, part in enumerate(x.split(SEGMENT, 1))]
        return super().forward(torch.cat(parts, 1))


def test_a_rule_that_changes_late_is_read_again(tmp_path: Path) -> None:
    saved(made(Late), tmp_path)
    model = made(Late)
    fast = rmtcompile.load(tmp_path, model)
    for segments in (12, 14):
        x = features(segments)
        with torch.no_grad():
            assert torch.allclose(fast(x), model(x), rtol=0, atol=1e-12)
    assert fast.captures


def test_other_types_shapes_and_structure(flagged: Path) -> None:
    refused(made(Flagged, torch.float32), flagged, "was float64.* and is float32", X.float())
    deeper = made(Flagged)
    deeper.layers.append(Layer().double())
    refused(deeper, flagged, "layers.2 is new")


def test_options_are_compared(flagged: Path) -> None:
    refused(made(Flagged), flagged, "plan was 'auto' and is 'sequential'", plan="sequential")


MODULE = """
import torch
from torch import nn
import {helper}

SCALE = 2.0

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x):
        memory = [torch.zeros_like(x[:, :1]) for _ in self.layers]
        out = []
        for h in x.split(3, 1):
            for l, layer in enumerate(self.layers):
                h = {helper}.step(layer(h) + memory[l]) * SCALE
                memory[l] = h[:, -1:]
            out.append(h)
        return torch.cat(out, 1)
"""
HELPER = """
import torch
FACTOR = 0.5

def step(x):
    return torch.tanh(x) * FACTOR
"""


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("model", "+ memory[l]", "- memory[l]", "the code of model_.*forward is another"),
        ("helper", "torch.tanh", "torch.sigmoid", "the code of helper_.*step is another"),
        ("model", "SCALE = 2.0", "SCALE = 3.0", "SCALE was float 2.0 and is float 3.0"),
        ("helper", "FACTOR = 0.5", "FACTOR = 0.6", "FACTOR was float 0.5 and is float 0.6"),
        ("model", "import torch", "import torch  # a comment", ""),
    ],
)
def test_code_is_compared(
    file: str, old: str, new: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = abs(hash((file, old)))
    names = {"model": f"model_{number}", "helper": f"helper_{number}"}
    texts = {"model": MODULE.format(helper=names["helper"]), "helper": HELPER}
    monkeypatch.syspath_prepend(str(tmp_path))

    def model() -> nn.Module:
        for key, name in names.items():
            (tmp_path / f"{name}.py").write_text(texts[key])
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
        try:
            return made(importlib.import_module(names["model"]).Model)
        finally:
            sys.dont_write_bytecode = before

    saved(model(), tmp_path / "saved")
    texts[file] = texts[file].replace(old, new)
    if said:
        refused(model(), tmp_path / "saved", said)
    else:
        used(model(), tmp_path / "saved")


# ---- files -------------------------------------------------------------------------------------------------


def test_another_version_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(made(Toy), tmp_path)
    monkeypatch.setattr(torch, "__version__", "1.0")
    refused(made(Toy), tmp_path, "torch was .* and is 1.0")


@pytest.mark.parametrize("suffix", [".json", ".py", ".state.json"])
@pytest.mark.parametrize("harm", ["cut", "gone", "changed"])
def test_damaged_files_are_said(suffix: str, harm: str, tmp_path: Path) -> None:
    if (suffix, harm) == (".json", "gone"):
        pytest.skip("then there is no program")
    saved(made(Toy), tmp_path)
    (path,) = (
        path
        for path in tmp_path.rglob(f"*{suffix}")
        if path.name != "fingerprint.json" and path.name.count(".") == suffix.count(".")
    )
    content = path.read_bytes()
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if harm == "cut" else content.replace(b"1", b"2"))
    refused(made(Toy), tmp_path, "damaged|cannot be read")


def test_no_folder() -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        rmtcompile.load("/nowhere/at/all", made(Toy))


def test_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(RMTCompileError, match="nothing is compiled yet"):
        rmtcompile.optimize(made(Toy)).save(tmp_path)


@torch.no_grad()
def test_cache_saves_and_finds(tmp_path: Path) -> None:
    first = rmtcompile.optimize(made(Toy), cache=tmp_path)
    first(X)
    assert first.captures == 1
    again = rmtcompile.optimize(made(Toy), cache=tmp_path)
    assert_same(made(Toy)(X), again(X))
    assert again.captures == 0
    for x in (features(5), features(1), features(4, batch=3)):  # others are captured, and saved, too
        assert_same(made(Toy)(x), again(x))
    third = rmtcompile.optimize(made(Toy), cache=str(tmp_path))
    for x in (X, features(5), features(1), features(4, batch=3)):
        assert_same(made(Toy)(x), third(x))
    assert third.captures == 0


@torch.no_grad()
def test_documents_of_a_loaded_program(tmp_path: Path) -> None:
    """They run one after the other: what tells whether they may share a call is not saved."""
    texts = [features(3), features(3) + 1, features(3) - 1]
    rmtcompile.optimize(made(Toy), cache=tmp_path)(texts[0])
    again = rmtcompile.optimize(made(Toy), cache=tmp_path)
    stream = again.stream(texts)
    for text, result in zip(texts, stream, strict=True):
        assert_same(made(Toy)(text), result)
    assert again.captures == 0 and sum(stream.alone.values()) == 3
    assert next(iter(stream.alone)).startswith("its program was loaded")


@torch.no_grad()
def test_programs_in_bands_are_programs_of_their_own(tmp_path: Path) -> None:
    for devices in (None, ["cpu", "cpu"]):
        for captures in (1, 0):
            fast = rmtcompile.optimize(made(Toy), devices=devices, cache=tmp_path)
            assert_same(made(Toy)(X), fast(X))
            assert fast.captures == captures and bool(fast.explain().bands) == bool(devices)


@torch.no_grad()
def test_parts_of_texts_are_kept(tmp_path: Path) -> None:
    for captures in (1, 0):
        fast = rmtcompile.optimize(made(Toy), cache=tmp_path)
        out, state = fast.run(X[:, : 2 * SEGMENT])
        again, _ = fast.run(X[:, 2 * SEGMENT :], state=state)
        assert_same(made(Toy)(X), torch.cat([out, again], 1))
        assert fast.captures == captures


@pytest.mark.parametrize("is_gone", [True, False])
@torch.no_grad()
def test_a_program_without_its_report(is_gone: bool, tmp_path: Path) -> None:
    """It runs and is kept; reports say what they lack."""
    rmtcompile.optimize(made(Toy), cache=tmp_path)(X)
    for path in tmp_path.rglob("*.report.json"):
        path.unlink() if is_gone else path.write_text("")
    for fast in (rmtcompile.optimize(made(Toy), cache=tmp_path), rmtcompile.load(tmp_path, made(Toy))):
        assert_same(made(Toy)(X), fast(X))
        assert fast.captures == 0
        with pytest.raises(RMTCompileError, match="what reports need was not saved"):
            fast.explain()
        fast.save(tmp_path / "again")


@torch.no_grad()
def test_many_writers(tmp_path: Path) -> None:
    programs = [rmtcompile.optimize(made(Toy)) for _ in range(3)]
    for fast in programs:
        fast(X)
    failed: list[BaseException] = []

    def write(fast: Any) -> None:
        try:
            for _ in range(5):
                fast._programs.shelf._written.clear()
                fast.save(tmp_path)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(fast,)) for fast in programs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert not list(tmp_path.rglob("*.part"))
    used(made(Toy), tmp_path)


# ---- what cannot be saved ----------------------------------------------------------------------------------


class Sealed(Toy):
    """Reads an object of C code."""

    def __init__(self) -> None:
        super().__init__(n_layers=2)
        self.source = torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 if self.source is None else 2)


@torch.no_grad()
def test_what_has_no_name_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fast = rmtcompile.optimize(made(Sealed))
    fast(X)
    with pytest.raises(UnsupportedError, match=r"source: torch.*Generator"):
        fast.save(tmp_path)
    assert not list(tmp_path.rglob("*.json"))
    cached = rmtcompile.optimize(made(Sealed), cache=tmp_path)
    assert_same(made(Sealed)(X), cached(X))
    assert "a program is not saved" in caplog.text


def test_gradients_are_captures_of_their_own(tmp_path: Path) -> None:
    saved(made(Toy), tmp_path)
    fast = rmtcompile.load(tmp_path, made(Toy))
    fast(X).sum().backward()
    assert fast.captures == 1


@torch.no_grad()
def test_a_program_of_other_bands_is_not_used_without_a_word(tmp_path: Path) -> None:
    model = made(lambda: Toy(3))
    fast = rmtcompile.optimize(model, devices=["cpu", "cpu"])
    fast(features(3))
    fast.save(tmp_path)
    other = rmtcompile.load(tmp_path, model, devices=["cpu"] * 3)
    with pytest.warns(IgnoredWarning, match="devices was .* and is "):
        assert_same(model(features(4)), other(features(4)))
