"""Odd calls drawn at random: the right result or a refusal, never another error (`test_odd.met` is the rule).

More than the few of every run:

    RMTCOMPILE_EXAMPLES=500 python -m pytest tests/test_fuzz_odd.py --hypothesis-seed=1
"""

from __future__ import annotations

import os
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_odd import Call, Ids, call, met
from test_refusals import Walk
from torch import Tensor
from toys import WIDTH, made

EXAMPLES = int(os.environ.get("RMTCOMPILE_EXAMPLES", "8"))

LAYOUTS = {
    "plain": lambda x: x,
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() > 1 else x,
    "part": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]] if x.dim() else x,
    "expanded": lambda x: x[:1].expand(x.shape) if x.dim() and x.shape[0] else x,
    "with gradients": lambda x: x.requires_grad_() if x.is_floating_point() else x,
}
TYPES = (torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool)


@st.composite
def tensors(draw: st.DrawFn, last: int) -> Tensor:
    """Of the shape and type that the models want, mostly."""
    length = draw(st.sampled_from([9, 3, 6, 1, 2, 4, 8, 0]))
    shapes = [(2, length, last), (1, length, last), (length, last), (0, length, last), ()]
    shape = draw(st.sampled_from(shapes))
    dtype = draw(st.sampled_from([TYPES[0], *TYPES]))
    x = (torch.arange(float(torch.Size(shape).numel())).remainder(7) / 4).reshape(shape).to(dtype)
    layout: Any = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))]
    return layout(x)


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Of a model on features."""
    x = draw(tensors(WIDTH))
    more = draw(st.sampled_from([(), (None,), (1.0,), ("text",)]))
    named = draw(st.sampled_from([{}, {}, {}, {"unknown": 1}]))
    return call(x, *more[: draw(st.integers(0, 1))], **named)


@st.composite
def calls_with_tokens(draw: st.DrawFn) -> Call:
    """Of a model on tokens, with a mask and other arguments."""
    length = draw(st.sampled_from([9, 6, 3, 1, 4, 0]))
    shape = draw(st.sampled_from([(2, length), (1, length), (length,), (2, length, 2)]))
    dtype = draw(st.sampled_from([torch.int64, *TYPES[1:]]))
    ids = torch.arange(torch.Size(shape).numel()).remainder(2 + 30 * (dtype != torch.bool)).reshape(shape)
    masks = [None, None, torch.ones(shape), torch.ones(shape, dtype=torch.bool), 1, [1, 0]]
    mask = draw(st.sampled_from(masks))
    scale = draw(st.sampled_from([1.0, 2, torch.tensor(0.5), None, True]))
    return call(ids.to(dtype), mask, scale=scale)


@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(st.lists(calls(), min_size=1, max_size=2), st.booleans())
def test_calls_on_features(drawn: list[Call], gradients: bool) -> None:
    with torch.set_grad_enabled(gradients):
        met(lambda: made(Walk), drawn)


@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(st.lists(calls_with_tokens(), min_size=1, max_size=2))
def test_calls_on_tokens(drawn: list[Call]) -> None:
    with torch.no_grad():
        met(lambda: made(Ids), drawn)
