"""What every test has: one thread, fixed seeds, no network, a compile cache of its own, and `golden`."""

from __future__ import annotations

import os
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

# Read by torch and transformers when they are imported; pytest-xdist's workers inherit them.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# One cache a run; name a folder yourself and later runs start some 20 seconds faster.
OWN_CACHE = None
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    OWN_CACHE = os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="rmtcompile-inductor-")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"
USES_TRANSFORMERS = re.compile(r"\b(transformers|rmtcompile\.models|zoo)\b")

torch.set_num_threads(1)

try:
    from hypothesis import settings
except ImportError:
    pass
else:
    settings.register_profile("rmtcompile", deadline=None, derandomize=True, print_blob=True)
    settings.load_profile("rmtcompile")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden from this run")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    texts = {path: path.read_text() for path in {item.path for item in items}}
    for item in items:
        if USES_TRANSFORMERS.search(texts[item.path]):
            item.add_marker("transformers")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


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


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)`: the text equals tests/golden/<name>.txt, which --update-golden rewrites."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        text = text.rstrip("\n") + "\n"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        elif not path.exists():
            pytest.fail(f"{path} does not exist: look at what you get, then run pytest with --update-golden")
        else:
            assert text == path.read_text(encoding="utf-8"), f"differs from {path} (see --update-golden)"

    return check
