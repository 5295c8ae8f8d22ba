"""Long text: one capture serves every length, memory does not grow with it, and time grows in proportion.

On a CUDA device the cell functions are compiled by Inductor; elsewhere the same code runs on smaller sizes.

    python examples/05_long_text_on_a_gpu.py [file]
"""

from __future__ import annotations

import sys
import time
from importlib.resources import files
from pathlib import Path

import torch
import transformers

import rmtcompile
from rmtcompile.models import build


def make_model(device: str) -> tuple[torch.nn.Module, int]:
    """An ARMT without language head, and its segment length."""
    torch.manual_seed(0)
    large = device == "cuda"
    width, segment = (1024, 1024) if large else (64, 32)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=16 if large else 4,
        num_attention_heads=16 if large else 4,
        num_key_value_heads=4 if large else 2,
        max_position_embeddings=2 * segment,
    )
    dtype = torch.bfloat16 if large else torch.float32
    memory, d_mem = segment // 8, 64 if large else 8
    model = build(config, segment_size=segment, num_mem_tokens=memory, d_mem=d_mem, head=False, dtype=dtype)
    return model.to(device).eval(), segment


def main(path: str | None = None) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU (no CUDA device: smaller sizes)"
    print(f"device: {name}")
    model, segment = make_model(device)
    fast = rmtcompile.optimize(model)
    shipped = files("rmtcompile.data").joinpath("constitution.txt")
    data = Path(path).read_bytes() if path else shipped.read_bytes()

    print("  tokens  segments  levels  sequential ms  diagonal ms  us a token")
    for segments in (2, 8, 32, 128):
        length = segments * segment
        text = (data * (length // len(data) + 1))[:length]
        tokens = torch.tensor(list(text), device=device)[None]
        with torch.no_grad():
            fast(tokens)  # the first call captures; the first calls of a length may compile
            sequential, expected = timed(model, tokens)
            diagonal, out = timed(fast, tokens)
        error = (out.last_hidden_state.float() - expected.last_hidden_state.float()).norm()
        assert error / expected.last_hidden_state.float().norm() < (0.05 if device == "cuda" else 1e-4)
        print(
            f"{length:>8,} {segments:>9} {fast.schedule.n_levels:>7} {sequential:>14.1f} "
            f"{diagonal:>12.1f} {1e3 * diagonal / length:>11.1f}"
        )
    print(f"captures: {fast.captures}")
    carried = sum(carry.total_bytes(fast.schedule.n_layers) for carry in fast.schedule.carries)
    print(f"carried from segment to segment, at any length: {carried:,} bytes")


def timed(run: torch.nn.Module, tokens: torch.Tensor) -> tuple[float, transformers.utils.ModelOutput]:
    """Milliseconds of one call, and its result."""
    if tokens.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    out = run(tokens)
    if tokens.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3, out


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
