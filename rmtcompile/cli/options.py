"""What the command line may say: commands, options, and help that teaches."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from rmtcompile.commandline import Parser, add_dtype, add_json, positive

Command = Callable[[argparse.Namespace], int]

_MAIN = """\
Run recurrent-memory transformers a diagonal at a time, and see what the compiler found.

start here
  rmtcompile demo                                  a small ARMT reads a text in both orders
  rmtcompile explain mymodel:build                 what is parallel in a model of yours, and why
  rmtcompile view mymodel:build -o schedule.html   the same to look at, in a browser
  rmtcompile doctor                                what this machine has, and what is missing

a model is named as a function that makes it, or as a config
  package.module:function    or    file.py:function
      takes no argument and returns (model, args), (model, args, kwargs), or a model alone, which then
      reads random token ids
  config.json
      of a decoder of Hugging Face: an ARMT around it, with random weights; --segment, --memory and
      --d-mem say how much it remembers
  nothing
      a small ARMT; --layers, --hidden, --segment and --segments choose its size

exit status
  0  done      1  the model was refused, or something failed      2  the command line makes no sense
"""

_DEMO = """\
Build a small ARMT with random weights, read the bytes of a text as tokens, capture, and compare the
model with its diagonal form: largest difference, both times.  Writes the schedule as a picture, the
viewer and the generated code.  A model of yours is called with its own arguments instead of a text.

examples
  rmtcompile demo
  rmtcompile demo mymodel:build
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
  rmtcompile explain config.json --segment 1024 --memory 128 --d-mem 64
  rmtcompile explain examples/04_why_classic_rmt_cannot.py:classic
  rmtcompile explain mymodel:build --json | jq .offsets
  rmtcompile explain mymodel:build --cache programs    compile ahead, for optimize(model, cache="programs")
  rmtcompile explain mymodel:build --html > why.html
"""

_VIEW = """\
Write the viewer: one HTML file with the grid of cells, the dependences, each cell's operations with their
source lines, the passes and the generated code.  Other suffixes give the schedule alone:
.svg .png .dot .json .trace.json .txt; .explorer.json has the operations, too, for Model Explorer

examples
  rmtcompile view mymodel:build -o schedule.html
  rmtcompile view --layers 8 --segments 32 --profile
  rmtcompile view mymodel:build -o schedule.svg
  rmtcompile view -o schedule.trace.json --profile    measured times, for ui.perfetto.dev
  rmtcompile view -o cells.dot --open 1,0 --open 1,1  two cells opened to their operations, for dot -Tsvg
  rmtcompile view -o cells.explorer.json              the dataflow inside of cells, for Model Explorer
"""

_DUMP = """\
Write one numbered file for each stage of the compiler: the captured graph, the regions, the dependences,
the rules, the lifted cells, and last the module that runs, which can be imported; fast.use(path)
runs it, edited or not.

examples
  rmtcompile dump mymodel:build -o passes
  rmtcompile dump --layers 2 --hidden 32 --segment 16 && less rmtcompile-dump/*dependence*
"""


_DOCTOR = """\
Report versions, devices, compilers and caches, compile a small model as it would be compiled here, and say
what of the machine is used, what is missing and what helps.  Exit status 1 where something does not work.

examples
  rmtcompile doctor
  rmtcompile doctor --json > report.json           to go with a report of what went wrong
"""


def build_parser(commands_of: Mapping[str, Command]) -> argparse.ArgumentParser:
    """The parser, `bench` included for its help only.

    Args:
        commands_of: what runs each command, by name.
    """
    parser = Parser(
        prog="rmtcompile", description=_MAIN, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"rmtcompile {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="command", title="commands")
    demo = _command(commands, "demo", "a small ARMT reads a text in both orders", _DEMO, commands_of["demo"])
    add_target(demo)
    demo.add_argument("--text", metavar="FILE", help="the text to read (default: the one that is shipped)")
    demo.add_argument(
        "-o", "--out", default="demo-output", metavar="FOLDER", help="where to write (default: %(default)s)"
    )
    demo.add_argument(
        "--repeats", type=positive, default=5, metavar="N", help="timed runs, median (default: 5)"
    )
    add_sizes(demo, segments=16)
    explain = _command(
        commands,
        "explain",
        "what was found in a model, and why it runs as it does",
        _EXPLAIN,
        commands_of["explain"],
    )
    _add_model(explain)
    explain.add_argument("--html", action="store_true", help="print a page instead of text")
    explain.add_argument(
        "--cache",
        metavar="FOLDER",
        help="look for a saved program there, and save one that is compiled (default: $RMTCOMPILE_CACHE)",
    )
    view = _command(
        commands, "view", "write the viewer, or the schedule as a picture", _VIEW, commands_of["view"]
    )
    _add_model(view)
    view.add_argument("-o", "--out", default="schedule.html", metavar="FILE", help="default: %(default)s")
    view.add_argument("--profile", action="store_true", help="run the model and show the time of each level")
    view.add_argument(
        "--texts", action="store_true", help="capture once more, to show the texts of the first passes, too"
    )
    view.add_argument(
        "--open", type=_cell, action="append", default=[], metavar="S,L",
        help="open a cell in a .dot or .explorer.json file",
    )
    dump = _command(
        commands, "dump", "write one file for each stage of the compiler", _DUMP, commands_of["dump"]
    )
    _add_model(dump)
    dump.add_argument("-o", "--out", default="rmtcompile-dump", metavar="FOLDER", help="default: %(default)s")
    _command(commands, "doctor", "what this machine has, and what is missing", _DOCTOR, commands_of["doctor"])
    commands.add_parser(
        "bench", help="time each way of running a model (rmtcompile bench --help)", add_help=False
    )
    return parser


def _version() -> str:
    from rmtcompile import __version__

    return __version__


def _command(commands: Any, name: str, summary: str, text: str, run: Command) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_json(parser)
    parser.set_defaults(run=run)
    return parser


def add_sizes(parser: argparse.ArgumentParser, segments: int = 8) -> None:
    """Sizes of the small ARMT, and of the memory around a config's decoder."""
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
            f"--{name}", type=positive, default=default, metavar="N", help=f"{text} (default: {default})"
        )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the random weights (default: 0)")
    parser.add_argument("--device", default=None, help="cpu, cuda, ... (default: where the model is)")


def _cell(text: str) -> tuple[int, int]:
    """`1,0` as (segment, layer)."""
    try:
        segment, layer = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError("has to be segment,layer") from None
    return segment, layer


def add_target(parser: argparse.ArgumentParser) -> None:
    """MODEL and its dtype."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="package.module:function, file.py:function or config.json; default: a small ARMT",
    )
    add_dtype(parser)


def _add_model(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    parser.add_argument(
        "--plan", choices=("auto", "diagonal", "sequential"), default="auto", help="default: auto"
    )
    parser.add_argument(
        "--segment-size", type=positive, metavar="N", help="override what is found from the graph"
    )
    parser.add_argument(
        "--layers-at", metavar="PATH", help="override: path of the layers, such as model.layers"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    add_sizes(parser)
