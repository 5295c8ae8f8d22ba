"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from rmtcompile.bench import bands, documents, serving, training
    from rmtcompile.bench.session import Settings
    from rmtcompile.bench.shapes import Case

OPPONENTS = ("full", "sequential", "graphed", "diagonal")
SMALL = {"segment": [32], "memory": 4, "d_mem": 8, "tokens": [128, 256], "dtype": "f32"}
LARGE = {
    "segment": [1024],
    "memory": 128,
    "d_mem": 64,
    "tokens": [4096, 8192, 32768, 131072],
    "dtype": "bf16",
}
SHAPE_FLAGS = ("hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "vocab")

_EXAMPLES = """\
examples
  rmtcompile bench --preset tiny                            small shapes, anywhere, in about a minute
  rmtcompile bench --tokens 4096 131072 --json run.json     the 1B shape, on a GPU
  rmtcompile bench --segment 128 256 512 --opponents graphed diagonal
  rmtcompile bench --layers 32 --hidden 4096 --errors --profile --plots plots
  rmtcompile bench --train --tokens 4096 32768              training steps, forward and backward
  rmtcompile bench --devices 1 2 4 --tokens 32768 131072 524288      bands of layers on several GPUs
  rmtcompile bench --documents 60 --json run.json           60 inputs of random lengths, one at a time
  rmtcompile bench --map 64 --tokens 4096                   a queue of 64 documents, in several ways
  rmtcompile bench --generate 200 --tokens 4096 32768       200 tokens after a text

a model of your own is named first, and has flags of its own: rmtcompile bench mymodel:build --help

exit status
  0  every piece worked      1  one failed, the rest was measured      2  the command line makes no sense
"""


def run(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 if every piece worked, 1 if one failed, 2 for a bad command line."""
    args = parser().parse_args(argv)
    try:
        import torch

        from rmtcompile.bench import bands, documents, plots, report, serving, training
        from rmtcompile.bench.session import Session
    except ImportError as error:
        print(f"the benchmark needs {error.name}: pip install 'rmtcompile[models]'", file=sys.stderr)
        return 2
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        print(f"error: there is no device {name!r} here ({str(error).splitlines()[0]})", file=sys.stderr)
        return 2
    if args.preset is None:
        args.preset = "1b" if device.type == "cuda" else "tiny"
        print(f"preset {args.preset}, since the device is {name}; --preset chooses another", file=sys.stderr)

    def save(record: dict[str, Any]) -> None:
        if args.json:
            report.save(record, args.json)

    given = tuple(sys.argv[1:] if argv is None else argv)
    session: documents.Session | serving.Session | training.Session | bands.Session | Session
    try:
        if args.documents is not None:
            session = documents.Session(documents_of(args, given), device, save)
        elif args.map or args.generate:
            session = serving.Session(serving_of(args, given), device, save)
        elif args.devices:
            session = bands.Session(bands_of(args, given), device, save)
        elif args.train:
            session = training.Session(training_of(args, given), device, save)
        else:
            session = Session(dataclasses.replace(settings_of(args), flags=given), device, save)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        session.run()
    except KeyboardInterrupt:
        session.failed.append("interrupted")
        session.record["failed"] = session.failed
        save(session.record)
    if args.documents is not None:
        report.show(session.record, documents.tables(session.record))
        return 1 if session.failed else 0
    if args.map or args.generate:
        report.show(session.record, serving.tables(session.record))
        return 1 if session.failed else 0
    if args.devices:
        report.show(session.record, bands.tables(session.record))
        return 1 if session.failed else 0
    if args.train:
        report.show(session.record, training.tables(session.record))
        return 1 if session.failed else 0
    report.show(session.record)
    if args.plots:
        try:
            plots.draw(session.record, args.plots)
        except ImportError:
            print("plots need matplotlib: pip install 'rmtcompile[viz]'", file=sys.stderr)
            return 1
    return 1 if session.failed else 0


def parser() -> argparse.ArgumentParser:
    """All flags."""
    top = argparse.ArgumentParser(
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
    model.add_argument("--dtype", choices=("bf16", "f16", "f32", "f64"))
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
    steps.add_argument("--train", action="store_true", help="time training steps")
    steps.add_argument(
        "--recompute",
        nargs="+",
        type=_recompute,
        default=["none", "level"],
        metavar="HOW",
        help="programs: none, level or a number of levels (default: none level)",
    )
    steps.add_argument(
        "--own", action=argparse.BooleanOptionalAction, default=True, help="steps of the model itself, too"
    )
    several = top.add_argument_group(
        "several devices", "the program in bands of layers, beside the same program on one device"
    )
    several.add_argument(
        "--devices", type=int, nargs="+", metavar="P", help="numbers of devices, such as 1 2 4"
    )
    out = top.add_argument_group("output")
    out.add_argument("--json", type=Path, metavar="FILE", help="everything, written after each piece")
    out.add_argument("--plots", type=Path, metavar="DIR", help="pictures")
    return top


def settings_of(args: argparse.Namespace) -> Settings:
    """What the flags ask for.

    Raises:
        ValueError: they do not fit together.
    """
    from rmtcompile.bench.session import Settings

    chosen, cases = _cases_of(args)
    for case in cases:
        for tokens in chosen["tokens"]:
            if tokens < 1 or tokens % case.segment:
                raise ValueError(f"{tokens} tokens are not a whole number of segments of {case.segment}")
    if args.rounds < 1:
        raise ValueError(f"rounds must be at least 1, not {args.rounds}")
    longest = max(chosen["segment"])
    return Settings(
        cases=cases,
        tokens=tuple(sorted(chosen["tokens"])),
        opponents=tuple(args.opponents),
        options=options_of(args.option),
        variants=dict(variant_of(text) for text in args.variant),
        handwritten=args.handwritten,
        rounds=args.rounds,
        error_tokens=4 * longest if args.errors < 0 else args.errors,
        accumulation=max(chosen["tokens"]) if args.accumulation < 0 else args.accumulation,
        profile=args.profile,
        wavefronts=args.wavefronts,
        budget=args.budget,
    )


def documents_of(args: argparse.Namespace, flags: tuple[str, ...]) -> documents.Settings:
    """What the flags ask for, where they ask for documents.

    Raises:
        ValueError: they do not fit together.
    """
    from rmtcompile.bench.documents import WARM, Settings

    _, cases = _cases_of(args)
    if len(cases) != 1:
        raise ValueError("documents have segments of one length, not of several")
    if args.documents <= WARM:
        raise ValueError(f"documents must be more than {WARM}, which do not count; not {args.documents}")
    if args.max_segments < 1:
        raise ValueError(f"max-segments must be at least 1, not {args.max_segments}")
    options = options_of(args.option)
    return Settings(cases[0], args.documents, args.max_segments, options, args.budget, flags)


def serving_of(args: argparse.Namespace, flags: tuple[str, ...]) -> serving.Settings:
    """What the flags ask for, where they ask for a queue or for generation.

    Raises:
        ValueError: they do not fit together.
    """
    from rmtcompile.bench.serving import Settings

    chosen, cases = _cases_of(args)
    if len(cases) != 1:
        raise ValueError("documents and texts have segments of one length, not of several")
    if args.map < 0 or args.generate < 0 or args.padded < 1 or args.rounds < 1:
        raise ValueError("numbers of documents, tokens and rounds are not negative")
    tokens = chosen["tokens"] if args.generate else args.tokens or ()
    counts = args.map, tuple(tokens), args.generate, args.max_segments, args.padded
    options = options_of(args.option)
    return Settings(cases[0], *counts, args.own, args.rounds, options, args.budget, flags)


def training_of(args: argparse.Namespace, flags: tuple[str, ...]) -> training.Settings:
    """What the flags ask for, where they ask for training steps.

    Raises:
        ValueError: they do not fit together.
    """
    from rmtcompile.bench.training import Settings

    base = settings_of(args)
    if len(base.cases) != 1:
        raise ValueError("training steps have segments of one length, not of several")
    return Settings(
        base.cases[0], base.tokens, args.recompute, args.own, args.rounds, base.options, args.budget, flags
    )


def bands_of(args: argparse.Namespace, flags: tuple[str, ...]) -> bands.Settings:
    """What the flags ask for, where they ask for several devices.

    Raises:
        ValueError: they do not fit together.
    """
    from rmtcompile.bench.bands import Settings

    base = settings_of(args)
    if len(base.cases) != 1:
        raise ValueError("bands are timed with segments of one length, not of several")
    if min(args.devices) < 1:
        raise ValueError(f"devices must be at least 1, not {min(args.devices)}")
    counts = sorted(set(args.devices))
    return Settings(base.cases[0], base.tokens, counts, args.rounds, base.options, args.budget, flags)


def _recompute(text: str) -> str | int:
    if text not in ("auto", "none", "level") and not (text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError("has to be none, level, auto or a positive number of levels")
    return int(text) if text.isdigit() else text


def _cases_of(args: argparse.Namespace) -> tuple[dict[str, Any], tuple[Case, ...]]:
    """What was chosen for the preset, and the models: one for each length of a segment."""
    from rmtcompile.bench.shapes import DTYPES, SHAPES, Case

    preset = args.preset or "1b"
    defaults = SMALL if preset == "tiny" else LARGE
    given = {name: value for name in defaults if (value := getattr(args, name)) is not None}
    chosen: dict[str, Any] = {**defaults, **given}
    changed = {name: value for name in SHAPE_FLAGS if (value := getattr(args, name)) is not None}
    shape = dataclasses.replace(SHAPES[preset], **changed)
    dtype: torch.dtype = DTYPES[chosen["dtype"]]
    cases = tuple(
        Case(shape, segment, chosen["memory"], chosen["d_mem"], args.batch, dtype, args.head, args.seed)
        for segment in chosen["segment"]
    )
    return chosen, cases


def options_of(texts: Sequence[str]) -> dict[str, Any]:
    """["cuda_graphs=False", "plan=sequential"] -> keyword arguments; what is no Python value is text.

    Raises:
        ValueError: there is no "=".
    """
    found: dict[str, Any] = {}
    for text in texts:
        key, sign, value = text.partition("=")
        if not sign:
            raise ValueError(f"{text!r} has to be KEY=VALUE")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found


def variant_of(text: str) -> tuple[str, dict[str, Any]]:
    """ "plain:cuda_graphs=False,plan=auto" -> its name and its options.

    Raises:
        ValueError: it has no name.
    """
    name, sign, options = text.partition(":")
    if not sign or not name:
        raise ValueError(f"{text!r} has to be NAME:KEY=VALUE,...")
    return name, options_of(options.split(","))
