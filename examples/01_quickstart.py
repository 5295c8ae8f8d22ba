"""Quickstart: take a recurrent-memory model as it is, and run it a diagonal at a time.

python examples/01_quickstart.py
"""

from __future__ import annotations

import torch
import transformers

import rmtcompile
from rmtcompile.models import build


def make_model() -> torch.nn.Module:
    """A small ARMT: a Llama with random weights whose layers got an associative memory."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = build(config, segment_size=32, num_mem_tokens=4, d_mem=8).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("W_mv.weight"):  # zero in a fresh model: nothing would be remembered
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def main() -> None:
    model = make_model()
    tokens = torch.randint(0, 256, (1, 8 * 32))

    fast = rmtcompile.optimize(model)  # nothing about segments, layers or memory has to be told

    with torch.no_grad():
        out = fast(tokens)  # captured here, at the first call
        expected = model(tokens)
    print(f"same type: {type(out).__name__}")
    print(f"largest difference: {(out.logits - expected.logits).abs().max():.1e}")

    schedule = fast.schedule
    print(f"{schedule.n_cells} cells in {schedule.n_levels} levels, up to {schedule.width} at once")

    with torch.no_grad():
        for segments in (1, 2, 5, 20):
            fast(torch.randint(0, 256, (1, segments * 32)))
    print(f"other lengths need no new capture: {fast.captures} captured")

    print("\nthe generated code, from its last function on:")
    print(fast.code[fast.code.index("def forward(run):") :].partition("    return (")[0])


if __name__ == "__main__":
    main()
