"""The flags of the benchmark, and help that teaches."""

from __future__ import annotations

import argparse
from pathlib import Path

from rmtcompile.commandline import Parser, add_dtype, add_json

OPPONENTS = ("full", "sequential", "graphed", "diagonal")
SMALL = {"segment": [32], "memory": 4, "d_mem": 8, "tokens": [128, 256], "dtype": "float32"}
LARGE = {
    "segment": [1024],
    "memory": 128,
    "d_mem": 64,
    "tokens": [4096, 8192, 32768, 131072],
    "dtype": "bfloat16",
}
RECOMPUTE = ("none", "level")
SHAPE_FLAGS = ("hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "vocab")

_EXAMPLES = """\
examples
  rmtcompile bench --preset tiny                            small shapes, anywhere, in about a minute
  rmtcompile bench --tokens 4096 131072 --out run.json      the 1B shape, on a GPU
  rmtcompile bench --segment 128 256 512 --opponents graphed diagonal
  rmtcompile bench --layers 32 --hidden 4096 --errors --profile --plots plots
  rmtcompile bench --train --tokens 4096 32768              training steps, forward and backward
  rmtcompile bench --train table --out run.json             training steps of several shapes, one table
  rmtcompile bench --devices 1 2 4 --ranks                  bands of layers on several GPUs, two shapes
  rmtcompile bench --documents 60 --out run.json            60 inputs of random lengths, one at a time
  rmtcompile bench --map 64 --tokens 4096                   a queue of 64 documents, in several ways
  rmtcompile bench --generate 200 --tokens 4096 32768       200 tokens after a text

a model of your own is named first, and has flags of its own: rmtcompile bench mymodel:build --help

exit status
  0  every piece worked      1  one failed, the rest was measured      2  the command line makes no sense
"""


def parser() -> Parser:
    """All flags."""
    top = Parser(
        prog="rmtcompile bench",
        description="Time the optimized model beside full attention and sequential runs, in turn.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = top.add_argument_group("model (random weights)")
    model.add_argument(
        "--preset",
        choices=("tiny", "160m", "1b", "3b", "8b"),
        help="default: 1b on a GPU, tiny on a CPU",
    )
    for name in SHAPE_FLAGS:
        model.add_argument(f"--{name.replace('_', '-')}", type=int, help="instead of the preset's")
    model.add_argument(
        "--segment", type=int, nargs="+", help="tokens in a segment, several for several models"
    )
    model.add_argument("--memory", type=int, help="memory tokens of a segment")
    model.add_argument("--d-mem", type=int, help="size of memory keys before the feature map")
    model.add_argument("--head", action=argparse.BooleanOptionalAction, default=False, help="language head")
    add_dtype(model)
    model.add_argument("--seed", type=int, default=0, help="of the weights, and of the documents' lengths")
    inputs = top.add_argument_group("inputs")
    inputs.add_argument("--tokens", type=int, nargs="+", help="lengths, multiples of the segments")
    inputs.add_argument("--batch", type=int, default=1)
    inputs.add_argument("--device", help="cuda if there is one, else cpu")
    who = top.add_argument_group("opponents")
    who.add_argument(
        "--opponents", nargs="+", choices=OPPONENTS, default=list(OPPONENTS), help="default: all"
    )
    who.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="for optimize(), e.g. cuda_graphs=False",
    )
    who.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="NAME:KEY=VALUE,...",
        help="one more optimized form beside the others, of a copy of the model",
    )
    who.add_argument("--handwritten", type=Path, metavar="PATH", help="script with Runner(segment, memory)")
    what = top.add_argument_group("what is measured")
    what.add_argument("--rounds", type=int, default=5, help="turns of every opponent at every length")
    what.add_argument(
        "--errors", type=int, nargs="?", const=-1, default=0, metavar="TOKENS",
        help="errors against float64 (4 segments, or so many tokens)",
    )  # fmt: skip
    what.add_argument(
        "--accumulation", type=int, nargs="?", const=-1, default=0, metavar="TOKENS",
        help="errors per segment against float32 (up to the longest length, or so many tokens)",
    )  # fmt: skip
    what.add_argument("--profile", action="store_true", help="kernels of one steady step")
    what.add_argument("--wavefronts", action="store_true", help="time of a wavefront by its width")
    what.add_argument(
        "--budget", type=float, default=float("inf"), help="begin nothing after so many seconds"
    )
    many = top.add_argument_group(
        "documents of random lengths",
        "Instead of all else: what the first call of a length costs, in one process. Of the flags above, "
        "those of the model, --batch, --device, --option and --budget apply.",
    )
    many.add_argument(
        "--documents", type=int, metavar="N", help="N inputs, one at a time: whole segments and a random rest"
    )
    many.add_argument(
        "--max-segments", type=int, default=40, metavar="N", help="whole segments at most; default: 40"
    )
    served = top.add_argument_group(
        "documents in a queue, and generation",
        "Documents of the lengths of --tokens in turn, or of random ones up to --max-segments; continuations "
        "of texts of all --tokens. --no-own leaves out the model itself.",
    )
    served.add_argument("--map", type=int, default=0, metavar="N", help="a queue of N documents")
    served.add_argument("--generate", type=int, default=0, metavar="N", help="N tokens after each text")
    served.add_argument("--padded", type=int, default=8, metavar="N", help="documents of a padded batch")
    steps = top.add_argument_group(
        "training steps",
        "forward and backward of --tokens, beside the model as it is and with compiled layers; the opponents "
        "above are left out",
    )
    steps.add_argument(
        "--train",
        nargs="?",
        const="tokens",
        choices=("tokens", "table"),
        help="time training steps; table: those of several shapes and lengths, in one run (on a GPU)",
    )
    steps.add_argument(
        "--recompute",
        nargs="+",
        type=_recompute,
        metavar="HOW",
        help="programs: none, level, auto or a number of levels (default: none level)",
    )
    steps.add_argument(
        "--own", action=argparse.BooleanOptionalAction, default=True, help="steps of the model itself, too"
    )
    several = top.add_argument_group(
        "several devices",
        "the program in bands of layers, beside the same program on one device; on CUDA without --preset and "
        "--tokens: the shapes 1b and 8b, each at its own lengths",
    )
    several.add_argument(
        "--devices", type=int, nargs="+", metavar="P", help="numbers of devices, such as 1 2 4"
    )
    several.add_argument(
        "--ranks", action="store_true", help="then bands in a process each, too, started by torchrun"
    )
    out = top.add_argument_group("output")
    add_json(out)
    out.add_argument(
        "-o", "--out", type=Path, metavar="FILE", help="everything as JSON, written after each piece"
    )
    out.add_argument("--plots", type=Path, metavar="DIR", help="pictures")
    return top


def _recompute(text: str) -> str | int:
    if text not in ("auto", "none", "level") and not (text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError("has to be none, level, auto or a positive number of levels")
    return int(text) if text.isdigit() else text
