"""Several devices: the layers cut into bands, each on a device of its own, the hidden states handed on.

With two or more CUDA devices each band has one; elsewhere all bands share the CPU and show how it is done.
Add `8b` for the shape of an 8B model, on CUDA.

    python examples/06_several_devices.py [bands] [8b]
"""

from __future__ import annotations

import sys
import time

import torch
import transformers

import rmtcompile
from rmtcompile.models import build


def make_model(device: str, large: bool) -> tuple[torch.nn.Module, int]:
    """An ARMT without language head, and its segment length."""
    torch.manual_seed(0)
    cuda = device == "cuda"
    width, heads, layers, ffn = (4096, 32, 32, 14336) if large else (1024, 16, 16, 4096)
    if not cuda:
        width, heads, layers, ffn = 64, 4, 4, 128
    segment = 1024 if cuda else 16
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 4, max_position_embeddings=2 * segment,
    )  # fmt: skip
    dtype = torch.bfloat16 if cuda else torch.float64
    with torch.device(device):
        model = build(
            config, segment_size=segment, num_mem_tokens=segment // 8, d_mem=64 if cuda else 8,
            head=False, dtype=dtype,
        )  # fmt: skip
        for layer in model.memory_cell.layers:
            torch.nn.init.normal_(layer.W_mv.weight, std=0.02)
    return model.eval(), segment


def main(*args: str) -> None:
    count = next((int(arg) for arg in args if arg.isdigit()), 2)
    cuda = torch.cuda.device_count() >= count
    device = "cuda" if cuda else "cpu"
    model, segment = make_model(device, "8b" in args)
    devices = [f"cuda:{i}" if cuda else "cpu" for i in range(count)]
    fast = rmtcompile.optimize(model, devices=devices)
    ids = torch.randint(0, 256, (1, 16 * segment), device=device)
    with torch.no_grad():
        for _ in range(3):  # captured, compiled and recorded, replayed
            out = fast(ids).last_hidden_state
        expected = model(ids).last_hidden_state
        times = [timed(run, ids, count if cuda else 0) for run in (model, fast)]
    print("\n".join(fast.explain().bands))
    print(f"the model itself {times[0] * 1e3:.1f} ms, in {count} bands {times[1] * 1e3:.1f} ms")
    # Of the first two segments: with random weights each segment makes differences of rounding larger.
    few, theirs = (x[:, : 2 * segment].float() for x in (out, expected))
    print(f"difference {float((few - theirs).norm() / theirs.norm()):.1e}")
    print(f"results on {out.device}, where the model's own are")


def timed(run: torch.nn.Module, ids: torch.Tensor, cards: int) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run(ids)
    for card in range(cards):
        torch.cuda.synchronize(card)
    return time.perf_counter() - start


if __name__ == "__main__":
    main(*sys.argv[1:])
