"""What every test has: one thread, fixed seeds, no network, and a compile cache of its own."""

from __future__ import annotations

import gc
import os
import random
import re
import shutil
import sys
import tempfile

# Read by torch and transformers when they are imported; pytest-xdist's workers inherit them.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")
os.environ.pop("RMTCOMPILE_CACHE", None)
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# One cache a run; name a folder yourself and later runs start some 20 seconds faster.
OWN_CACHE = None
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    OWN_CACHE = os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="rmtcompile-inductor-")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

USES_TRANSFORMERS = re.compile(r"\b(transformers|rmtcompile\.models|zoo\.(authors|hugging))\b")

torch.set_num_threads(1)

try:
    from hypothesis import settings
except ImportError:
    pass
else:
    settings.register_profile("rmtcompile", deadline=None, derandomize=True, print_blob=True)
    settings.load_profile("rmtcompile")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    texts = {path: path.read_text() for path in {item.path for item in items}}
    for item in items:
        if USES_TRANSFORMERS.search(texts[item.path]):
            item.add_marker("transformers")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """What was imported stays: collections of garbage need not go over it, nor come after every 700 objects
    of a capture."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_unconfigure() -> None:
    if OWN_CACHE is not None:
        shutil.rmtree(OWN_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    """The same random numbers in each test, and no compiled code left from the one before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:  # importing it takes seconds
        torch.compiler.reset()


@pytest.fixture(autouse=True)
def _checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are checked between passes (`rmtcompile/compiler/checks.py`)."""
    from rmtcompile.compiler.stages import Log

    monkeypatch.setattr(Log, "always_checks", True)
