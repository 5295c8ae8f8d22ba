"""The command line: `rmtcompile demo | explain | view | dump | bench`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from rmtcompile.api import Optimized
    from rmtcompile.target import Sizes, Target

OK, REFUSED, USAGE = 0, 1, 2

_MAIN = """\
Run recurrent-memory transformers a diagonal at a time, and see what the compiler found.

start here
  rmtcompile demo                                  a small ARMT reads a text in both orders
  rmtcompile explain mymodel:build                 what is parallel in a model of yours, and why
  rmtcompile view mymodel:build -o schedule.html   the same to look at, in a browser

a model is named as a function that makes it
  package.module:function    or    file.py:function
  The function takes no argument and returns (model, args), (model, args, kwargs), or a model alone,
  which then reads random token ids.  Without a name the command takes a small ARMT; --layers, --hidden,
  --segment and --segments choose its size.

exit status
  0  done      1  the model was refused, or something failed      2  the command line makes no sense
"""

_DEMO = """\
Build a small ARMT with random weights, read the bytes of a text as tokens, capture, and compare the
model with its diagonal form: largest difference, both times.  Writes the schedule as a picture, the
viewer and the generated code.

examples
  rmtcompile demo
  rmtcompile demo --text book.txt --segments 32 --out book-demo
  rmtcompile demo --layers 8 --hidden 256 --device cuda
"""

_EXPLAIN = """\
Capture a model and say what was found: layers, segments, dependence offsets with their witnesses in the
model's own source, carries, parallelism, the plan and why.  A model that is refused is explained too
(exit status 1).

examples
  rmtcompile explain                               a small ARMT
  rmtcompile explain mymodel:build
  rmtcompile explain examples/04_why_classic_rmt_cannot.py:classic
  rmtcompile explain mymodel:build --json | jq .offsets
  rmtcompile explain mymodel:build --html > why.html
"""

_VIEW = """\
Write the viewer: one HTML file with the grid of cells, the dependences, each cell's operations with their
source lines, the passes and the generated code.  Other suffixes give the schedule alone:
.svg .png .dot .json .trace.json .txt

examples
  rmtcompile view mymodel:build -o schedule.html
  rmtcompile view --layers 8 --segments 32 --profile
  rmtcompile view mymodel:build -o schedule.svg
"""

_DUMP = """\
Write one numbered file for each stage of the compiler: the captured graph, the regions, the dependences,
the rules, the lifted cells, and last the module that runs, which can be imported.

examples
  rmtcompile dump mymodel:build -o passes
  rmtcompile dump --layers 2 --hidden 32 --segment 16 && less rmtcompile-dump/*dependence*
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["bench"]:
        return _bench(arguments[1:])
    parser = build_parser()
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else USAGE
    if options.command is None:
        parser.print_help()
        return USAGE
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    from rmtcompile.errors import RMTCompileError
    from rmtcompile.target import UsageError

    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except UsageError as error:
        print(f"rmtcompile {options.command}: {error}", file=sys.stderr)
        return USAGE
    except RMTCompileError as error:
        if options.json:
            print(json.dumps({"error": type(error).__name__, "message": str(error)}))
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return REFUSED
    except BrokenPipeError:  # the reader (head, less) has gone
        sys.stderr.close()
        return OK


def build_parser() -> argparse.ArgumentParser:
    """The parser, `bench` included for its help only."""
    parser = _Parser(
        prog="rmtcompile", description=_MAIN, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"rmtcompile {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="command", title="commands")
    demo = _command(commands, "demo", "a small ARMT reads a text in both orders", _DEMO, _demo)
    demo.add_argument("--text", metavar="FILE", help="the text to read (default: the one that is shipped)")
    demo.add_argument(
        "--out", default="demo-output", metavar="FOLDER", help="where to write (default: %(default)s)"
    )
    demo.add_argument(
        "--repeats", type=_positive, default=5, metavar="N", help="timed runs, median (default: 5)"
    )
    _add_sizes(demo, segments=16)
    explain = _command(
        commands, "explain", "what was found in a model, and why it runs as it does", _EXPLAIN, _explain
    )
    _add_model(explain)
    explain.add_argument("--html", action="store_true", help="print a page instead of text")
    view = _command(commands, "view", "write the viewer, or the schedule as a picture", _VIEW, _view)
    _add_model(view)
    view.add_argument("-o", "--out", default="schedule.html", metavar="FILE", help="default: %(default)s")
    view.add_argument("--profile", action="store_true", help="run the model and show the time of each level")
    dump = _command(commands, "dump", "write one file for each stage of the compiler", _DUMP, _dump)
    _add_model(dump)
    dump.add_argument("-o", "--out", default="rmtcompile-dump", metavar="FOLDER", help="default: %(default)s")
    commands.add_parser(
        "bench", help="time each way of running a model (rmtcompile bench --help)", add_help=False
    )
    return parser


class _Parser(argparse.ArgumentParser):
    """Points to --help where a command line is wrong."""

    def error(self, message: str) -> Any:
        self.exit(USAGE, f"{self.prog}: {message}\n{self.prog} --help shows examples\n")


def _version() -> str:
    from rmtcompile import __version__

    return __version__


def _command(
    commands: Any, name: str, summary: str, text: str, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON for another program to read")
    parser.set_defaults(run=run)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("has to be at least 1")
    return value


def _add_sizes(parser: argparse.ArgumentParser, segments: int = 8) -> None:
    group = parser.add_argument_group("the small ARMT")
    for name, default, text in (
        ("layers", 4, "layers"),
        ("hidden", 128, "width of the hidden state"),
        ("heads", 4, "attention heads"),
        ("segment", 64, "tokens in a segment"),
        ("segments", segments, "segments of the input"),
        ("memory", 8, "memory tokens of a segment"),
        ("d-mem", 16, "size of memory keys"),
    ):
        group.add_argument(
            f"--{name}", type=_positive, default=default, metavar="N", help=f"{text} (default: {default})"
        )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the random weights (default: 0)")
    parser.add_argument("--device", default=None, help="cpu, cuda, ... (default: where the model is)")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="package.module:function; default: a small ARMT"
    )
    parser.add_argument(
        "--dtype", choices=("float64", "float32", "bfloat16", "float16"), help="of model and inputs"
    )
    parser.add_argument(
        "--plan", choices=("auto", "diagonal", "sequential"), default="auto", help="default: auto"
    )
    parser.add_argument(
        "--segment-size", type=_positive, metavar="N", help="override what is found from the graph"
    )
    parser.add_argument(
        "--layers-at", metavar="PATH", help="override: path of the layers, such as model.layers"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    _add_sizes(parser)


# -- commands


def _sizes(options: argparse.Namespace) -> Sizes:
    from rmtcompile.target import Sizes

    names = {field.name for field in dataclasses.fields(Sizes)}
    return Sizes(**{name: value for name, value in vars(options).items() if name in names})


def _target(options: argparse.Namespace) -> Target:
    from rmtcompile.target import armt_target, load_target

    _check_device(options.device)
    dtype = _dtype(options.dtype)
    sizes = _sizes(options)
    if options.model is None:
        import torch

        return armt_target(sizes, options.device or "cpu", dtype or torch.float32)
    return load_target(options.model, sizes.segment * sizes.segments, options.device, dtype)


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    return None if name is None else getattr(torch, name)


def _check_device(name: str | None) -> None:
    import torch

    from rmtcompile.target import UsageError

    try:
        torch.empty(0, device=name or "cpu")
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"there is no device {name!r} here ({str(error).splitlines()[0]})") from error


def _optimized(options: argparse.Namespace, target: Target) -> Optimized:
    from rmtcompile.api import optimize

    def progress(line: str) -> None:
        print(f"  {line}", file=sys.stderr)

    return optimize(
        target.model,
        plan=options.plan,
        segment_size=options.segment_size,
        layers=options.layers_at,
        progress=False if options.quiet or options.json else progress,
    )


def _demo(options: argparse.Namespace) -> int:
    from rmtcompile.demo import run_demo

    _check_device(options.device)
    result = run_demo(
        _sizes(options),
        text=options.text,
        out=options.out,
        repeats=options.repeats,
        device=options.device or "cpu",
        say=_quiet if options.json else _say,
    )
    if options.json:
        print(json.dumps(dataclasses.asdict(result), indent=2))
    return OK


def _say(line: str) -> None:
    print(line, flush=True)


def _quiet(line: str) -> None:
    del line


def _explain(options: argparse.Namespace) -> int:
    from rmtcompile.report import explain

    target = _target(options)
    found = explain(_optimized(options, target), *target.args, **target.kwargs)
    print(found.to_json(indent=2) if options.json else found.to_html() if options.html else found)
    return REFUSED if found.refusal else OK


def _view(options: argparse.Namespace) -> int:
    from rmtcompile.report import save_view
    from rmtcompile.target import UsageError

    target = _target(options)
    fast = _optimized(options, target)
    fast.prepare(*target.args, **target.kwargs)
    if options.profile:
        fast.profile(*target.args, **target.kwargs)
    try:
        path = save_view(fast, options.out, title=target.name)
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from error
    _report(options, {"file": str(path)}, f"wrote {path}")
    return OK


def _dump(options: argparse.Namespace) -> int:
    from rmtcompile.report import dump

    target = _target(options)
    fast = _optimized(options, target)
    fast.prepare(*target.args, **target.kwargs)
    paths = [str(path) for path in dump(fast, options.out)]
    _report(options, {"files": paths}, "\n".join(f"wrote {path}" for path in paths))
    return OK


def _report(options: argparse.Namespace, data: object, text: str) -> None:
    print(json.dumps(data, indent=2) if options.json else text)


def _bench(arguments: list[str]) -> int:
    try:
        from rmtcompile import bench  # type: ignore[attr-defined, unused-ignore]
    except ImportError as error:
        print(f"rmtcompile bench: not in this installation ({error})", file=sys.stderr)
        return REFUSED
    result: Any = bench.main(arguments)
    return int(result or OK)


if __name__ == "__main__":
    sys.exit(main())
