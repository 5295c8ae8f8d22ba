"""Literals: tensors that the forward writes out in its code, `torch.tensor([1, 2])`, made anew at each call.

    get_attr literal0 -> lift_fresh     segment 0         get_attr constant_5f1e     segments 0 and 1
    get_attr literal1 -> lift_fresh     segment 1    ->

Tracing keeps each of them as a constant of its own, one a call of the line that makes it. Those with equal
contents become one, named by its contents, so that segments and captures agree on it. What the forward writes
into a literal is gone when the forward ends.
"""

from __future__ import annotations

import hashlib

import torch
from torch._subclasses.fake_tensor import FakeTensor

from rmtcompile.binding.captured import Capture, Leaf

_LIFTS = {torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default}


def literals(captured: Capture) -> frozenset[str]:
    """Names of the `get_attr` targets that are literals: constants that nothing reads but their making."""
    found: dict[str, bool] = {}
    for node in captured.graph.nodes:
        leaf = captured.leaves.get(node.target) if node.op == "get_attr" else None
        if leaf is not None and leaf.is_constant and not isinstance(leaf.tensor, FakeTensor):
            lifted = all(user.op == "call_function" and user.target in _LIFTS for user in node.users)
            found[node.target] = found.get(node.target, True) and lifted and bool(node.users)
    return frozenset(name for name, is_literal in found.items() if is_literal)


def merge_literals(captured: Capture, names: frozenset[str]) -> None:
    """Make literals of equal contents one leaf. Requires a functional graph; changes it in place.

    Args:
        names: what `literals` has found before the graph was functional.
    """
    first: dict[str, str] = {}
    target_of: dict[str, str] = {}
    for target in sorted(names & captured.leaves.keys()):
        leaf = captured.leaves.pop(target)
        name = _name(leaf.tensor)
        target_of[target] = first.setdefault(name, target)
        captured.leaves[first[name]] = Leaf(name, leaf.tensor)
    for node in captured.graph.nodes:
        if node.op == "get_attr" and node.target in target_of:
            node.target = target_of[node.target]
            # The first of equal ones may have left the module with a write that nobody reads.
            setattr(captured.module, node.target, captured.leaves[node.target].tensor)


def _name(tensor: torch.Tensor) -> str:
    """`constant_` and a digest of type, shape and contents."""
    content = tensor.detach().cpu().contiguous()
    kind = f"{tensor.dtype} {tuple(tensor.shape)} {tensor.device}"
    digest = hashlib.sha1(kind.encode(), usedforsecurity=False)
    digest.update(content.flatten().view(torch.uint8).numpy().tobytes())
    return f"constant_{digest.hexdigest()[:12]}"
