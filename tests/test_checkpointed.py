"""A checkpoint around an optimized model: a first call does more than later ones, which it must not see."""

from __future__ import annotations

import copy

import torch
from torch.utils.checkpoint import checkpoint
from toys import Toy, assert_same, features, made

import rmtcompile


def test_a_first_call_within_a_checkpoint() -> None:
    model = made(lambda: Toy(3))
    twin = copy.deepcopy(model)
    fast = rmtcompile.optimize(twin)
    for segments in (5, 5, 2):
        for call, mine in ((model, model), (fast, twin)):
            mine.zero_grad()
            checkpoint(call, features(segments), use_reentrant=False).square().sum().backward()
        theirs, ours = ([p.grad for p in m.parameters()] for m in (model, twin))
        assert_same(theirs, ours, 1e-9)


def test_what_is_kept_goes_as_the_caller_wants() -> None:
    """Hooks that are no checkpoint's see what the program keeps."""
    fast = rmtcompile.optimize(made(lambda: Toy(3)))
    fast(features(4))
    seen: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(x) or x, lambda x: x):
        fast(features(4)).sum().backward()
    assert seen
