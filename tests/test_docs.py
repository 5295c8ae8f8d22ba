"""The pages of docs/: their Python runs, the site has them all, the reference has all public names."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import safetensors.torch
import torch
import transformers
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

import rmtcompile
import rmtcompile.models
from rmtcompile.models import build

DOCS = Path(__file__).parent.parent / "docs"
PYTHON = re.compile(r"^ *```python\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
PAGES = {str(path.relative_to(DOCS)): path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md")}


def armt() -> nn.Module:
    """A small ARMT whose memories say something."""
    torch.manual_seed(0)
    size = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**size, num_hidden_layers=2, num_key_value_heads=2)
    model = build(config, segment_size=8, num_mem_tokens=2, d_mem=4).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("W_mv.weight"):
            nn.init.normal_(parameter, std=0.1)
    return model


class Outer(nn.Module):
    """What an optimized module can be a part of."""


class Streamer:
    """What `generate` gives its tokens to."""

    def put(self, value: torch.Tensor) -> None:
        """Take tokens."""

    def end(self) -> None:
        """There are no more."""


def given() -> dict[str, Any]:
    """The names that code in the pages finds: a model, one that was optimized, and inputs."""
    model, ids = armt(), torch.randint(0, 32, (1, 24))
    AcceleratorState._reset_state(reset_partial_state=True)  # others in this process have made one
    return {
        "rmtcompile": rmtcompile, "torch": torch, "model": model, "fast": rmtcompile.optimize(armt()),
        "inner": armt(), "outer": Outer(), "accelerator": Accelerator(cpu=True), "streamer": Streamer(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01), "ids": ids, "input_ids": ids,
        "labels": ids, "documents": [ids, ids[:, :16], ids[0]], "make_model": armt,
        "accelerate": accelerate, "safetensors": safetensors,
    }  # fmt: skip


def blocks(page: str) -> list[str]:
    """The Python of a page, a block each, also those in lists; with devices that there are."""
    found = [textwrap.dedent(text) for text in PYTHON.findall(PAGES[page])]
    return [text.replace('["cuda:0", "cuda:1"]', '["cpu", "cpu"]') for text in found]


@pytest.fixture
def one_rank(tmp_path: Path) -> Any:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def run(page: str) -> dict[str, Any]:
    names = given()
    if page == "parts.md":
        names["ids"] = torch.randint(0, 32, (1, 90))
    if page == "devices.md":
        safetensors.torch.save_file(armt().state_dict(), "model.safetensors")
    if page == "saved.md":
        names["fast"](names["ids"])
    for number, text in enumerate(blocks(page)):
        exec(compile(text, f"docs/{page}, block {number + 1}", "exec"), names)
    return names


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", sorted(page for page in PAGES if PYTHON.search(PAGES[page])))
def test_code_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_rank: None) -> None:
    monkeypatch.chdir(tmp_path)
    names = run(page)
    expected = CHECKS.get(page)
    if expected is not None:
        expected(names)


def _parts(names: dict[str, Any]) -> None:
    """The state has read all that there is of the text."""
    whole = names["fast"].model(names["ids"][:, :90]).logits
    assert names["state"].segments * 8 + names["state"].pending_tokens == 90
    torch.testing.assert_close(names["out"].logits[:, -1], whole[:, -1], rtol=1e-4, atol=1e-5)


def _documents(names: dict[str, Any]) -> None:
    for document, result in zip(names["documents"], names["results"], strict=True):
        expected = names["fast"].model(document if document.dim() == 2 else document[None]).logits
        torch.testing.assert_close(result.logits, expected, rtol=1e-4, atol=1e-5)


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {"parts.md": _parts, "documents.md": _documents}


def test_the_site_has_every_page_and_no_other() -> None:
    settings = yaml.safe_load((DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8"))

    def pages(entries: list[Any]) -> list[str]:
        values = [next(iter(entry.values())) for entry in entries]
        return [page for value in values for page in (pages(value) if isinstance(value, list) else [value])]

    listed = pages(settings["nav"])
    assert sorted(listed) == sorted(PAGES)


def test_links_between_pages_exist() -> None:
    """Also where the site is not built; anchors are checked by `make docs`."""
    for page, text in PAGES.items():
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        links = re.findall(r"\]\((?!https?:)([^)#\s]+)[^)\s]*\)", prose)
        assert [link for link in links if not (DOCS / page).parent.joinpath(link).exists()] == [], page


def test_every_public_name_is_in_the_reference() -> None:
    """By what it is: several modules give one thing. Names of types alone (`Cell`) are explained where they
    are used."""
    named = re.findall(r"^::: ([\w.]+)$", "\n".join(PAGES.values()), flags=re.MULTILINE)
    found = [reached(name) for name in named]
    assert [name for name, value in zip(named, found, strict=True) if not value.__doc__] == []
    assert rmtcompile.errors in found
    found += vars(rmtcompile.errors).values()
    for package in (rmtcompile, rmtcompile.models, rmtcompile.schedule):
        values = {name: getattr(package, name) for name in package.__all__}
        values = {
            name: value
            for name, value in values.items()
            if inspect.isroutine(value) or inspect.isclass(value)
        }
        assert len(values) > 6
        assert [name for name, value in values.items() if not any(value is one for one in found)] == []


def reached(name: str) -> Any:
    found: Any = rmtcompile
    for part in name.split(".")[1:]:
        found = getattr(found, part)
    return found


def test_every_file_is_named_in_the_architecture() -> None:
    """Modules by their file's name; what only gathers a folder's names is meant by the folder."""
    root, text = DOCS.parent, PAGES["architecture.md"]
    files = [path for folder in ("rmtcompile", "passes") for path in (root / folder).rglob("*.py")]
    names = {path.name for path in files} - {"__init__.py", "__main__.py"}
    assert sorted(name for name in names if name not in text) == []


def test_the_page_of_mechanisms_names_files_and_all_that_is_measured() -> None:
    page = PAGES["mechanisms.md"]
    named = {name for name in re.findall(r"`([\w/]+(?:\.py|/))`", page) if name != "tests/fuzzing/found"}
    folders = [path for room in ("passes", "rmtcompile", "tests") for path in (DOCS.parent / room).rglob("*")]
    found = [path.relative_to(DOCS.parent).as_posix() for path in folders if "__pycache__" not in path.parts]
    assert len(named) > 15
    ends = [name for name in named if not any(f"/{path}".endswith("/" + name.strip("/")) for path in found)]
    assert ends == []
    script = (DOCS.parent / "benchmarks" / "mechanisms.py").read_text(encoding="utf-8")
    measured = re.findall(r'^    "([^"]+)": \[', script, re.MULTILINE)
    assert len(measured) == 10
    assert [name for name in measured if f"| {name}" not in page] == []
