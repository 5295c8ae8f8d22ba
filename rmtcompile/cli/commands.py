"""The command line: `rmtcompile demo | explain | view | dump | bench | doctor`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rmtcompile.cli.options import Command, build_parser
from rmtcompile.commandline import USAGE, BuilderError, UsageError, check_file, check_folder, telling

if TYPE_CHECKING:
    from rmtcompile.cli.target import Target
    from rmtcompile.optimized import Optimized

OK, REFUSED = 0, 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["bench"]:
        return _bench(arguments[1:])
    parser = build_parser(COMMANDS)
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else USAGE
    if options.command is None:
        parser.print_help()
        return USAGE
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    run: Command = options.run
    try:
        return _guarded(lambda: run(options), options.command, options.json)
    except OSError as error:
        out, where = str(getattr(options, "out", None) or ""), str(error.filename)
        if not out or not (where.startswith(out) or out.startswith(where)):
            raise
        message = f"cannot write {error.filename}: {error.strerror}"
        print(f"rmtcompile {options.command}: {message}", file=sys.stderr)
        return USAGE


def _guarded(run: Callable[[], int], command: str, as_json: bool = False) -> int:
    """Run a command; errors that a user can cause become a message and an exit status."""
    from rmtcompile.errors import RMTCompileError

    try:
        return run()
    except UsageError as error:
        print(f"rmtcompile {command}: {error}", file=sys.stderr)
        return USAGE
    except BrokenPipeError:  # the reader (head, less) has gone
        sys.stderr.close()
        return OK
    except (BuilderError, RMTCompileError) as error:
        if as_json:
            print(json.dumps({"error": type(error).__name__, "message": str(error)}))
        is_users = isinstance(error, BuilderError)
        print(f"rmtcompile {command}" if is_users else type(error).__name__, error, sep=": ", file=sys.stderr)
        return REFUSED


# -- commands


def _target(options: argparse.Namespace) -> Target:
    import torch

    from rmtcompile.cli.target import Sizes, target_of

    dtype = getattr(torch, options.dtype) if options.dtype else None
    return target_of(options.model, Sizes.of(options), options.device, dtype)


def _optimized(options: argparse.Namespace, target: Target) -> Optimized:
    from rmtcompile.api import optimize

    def progress(line: str) -> None:
        print(f"  {line}", file=sys.stderr)

    # What view and dump show needs graphs, which are not saved.
    cache: Any = getattr(options, "cache", False)
    return optimize(
        target.model,
        plan=options.plan,
        segment_size=options.segment_size,
        layers=options.layers_at,
        cache=cache,
        progress=False if options.quiet or options.json else progress,
    )


def _demo(options: argparse.Namespace) -> int:
    say = _quiet if options.json else _say
    check_folder(options.out)
    with telling(say, "importing torch, and making the model"):
        from rmtcompile.cli.demo import run_demo
        from rmtcompile.cli.target import Sizes

        own = options.model is not None or options.dtype is not None
        target = _target(options) if own else None
    result = run_demo(
        Sizes.of(options),
        target=target,
        text=options.text,
        out=options.out,
        repeats=options.repeats,
        device=options.device or "cpu",
        say=say,
    )
    if options.json:
        print(json.dumps(dataclasses.asdict(result), indent=2))
    return OK


def _say(line: str) -> None:
    print(line, flush=True)


def _quiet(line: str) -> None:
    del line


def _explain(options: argparse.Namespace) -> int:
    from rmtcompile import explain

    if options.cache:
        check_folder(options.cache)
    target = _target(options)
    found = explain(_optimized(options, target), *target.args, **target.kwargs)
    print(found.to_json(indent=2) if options.json else found.to_html() if options.html else found)
    return REFUSED if found.refusal else OK


def _view(options: argparse.Namespace) -> int:
    from rmtcompile.report import save_view
    from rmtcompile.schedule.files import check_name

    check_file(options.out)
    try:
        check_name(options.out, opens_cells=bool(options.open))
    except ValueError as error:
        raise UsageError(str(error)) from error
    target = _target(options)
    fast = _optimized(options, target)
    fast.prepare(*target.args, **target.kwargs)
    if options.profile:
        fast.profile(*target.args, **target.kwargs)
    try:
        path = save_view(fast, options.out, title=target.name, expand=options.open, capture=options.texts)
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from error
    _report(options, {"file": str(path)}, f"wrote {path}")
    return OK


def _dump(options: argparse.Namespace) -> int:
    from rmtcompile.report import dump

    check_folder(options.out)
    target = _target(options)
    fast = _optimized(options, target)
    fast.prepare(*target.args, **target.kwargs)
    paths = [str(path) for path in dump(fast, options.out)]
    _report(options, {"files": paths}, "\n".join(f"wrote {path}" for path in paths))
    return OK


def _doctor(options: argparse.Namespace) -> int:
    from rmtcompile.cli import doctor

    found = list(doctor.examine())
    as_json = [dataclasses.asdict(one) for one in found]
    print(json.dumps(as_json, indent=2) if options.json else doctor.text(found))
    return REFUSED if any(one.state == doctor.BAD for one in found) else OK


def _report(options: argparse.Namespace, data: object, text: str) -> None:
    print(json.dumps(data, indent=2) if options.json else text)


def _bench(arguments: list[str]) -> int:
    """The benchmark has flags of its own; with a MODEL first it times that."""
    try:
        if arguments and not arguments[0].startswith("-"):
            from rmtcompile.cli import bench_own

            return _guarded(lambda: bench_own.run(arguments), "bench", "--json" in arguments)
        from rmtcompile import bench

        return int(bench.main(arguments) or OK)
    except ImportError as error:
        print(f"rmtcompile bench: not in this installation ({error})", file=sys.stderr)
        return REFUSED
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else USAGE


COMMANDS: dict[str, Command] = {
    "demo": _demo, "explain": _explain, "view": _view, "dump": _dump, "doctor": _doctor,
}  # fmt: skip
