"""cuBLAS's workspace, while a run is recorded.

On Hopper cuBLAS lets the blocks of a product take their tiles from a counter in its workspace. A memset
clears it before each product, and the kernels around it wait: 3 to 5 us a product. Without one, tiles are
dealt out beforehand, and nothing else is different for most products; small ones that would be split along
their inner dimension lose that. Which is faster is measured by who records.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_CONFIG = "CUBLAS_WORKSPACE_CONFIG"


def can_choose() -> bool:
    """Whether the workspace may be taken away: on cuBLAS, where the user has not configured it."""
    return torch.version.cuda is not None and _CONFIG not in os.environ


@contextmanager
def own_workspaces() -> Iterator[None]:
    """What is recorded here uses workspaces that are allocated here and shared with nothing else."""
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


@contextmanager
def no_workspaces() -> Iterator[None]:
    """Products that are launched here have no workspace."""
    with own_workspaces(), _size_zero(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*CUBLASLT workspace.*")
        yield


@contextmanager
def _size_zero() -> Iterator[None]:
    size = getattr(torch.backends.cuda, "cublas_workspace_size", None)
    if size is not None:
        before = size()
        size(0)
        try:
            yield
        finally:
            size(before)
        return
    os.environ[_CONFIG] = ":0:0"  # read at each product before torch 2.13
    try:
        yield
    finally:
        del os.environ[_CONFIG]


__all__ = ["can_choose", "no_workspaces", "own_workspaces"]
