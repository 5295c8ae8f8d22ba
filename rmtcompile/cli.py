"""The command line: `rmtcompile demo | explain | view | dump | bench`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rmtcompile.cli_options import USAGE, Command, build_parser

if TYPE_CHECKING:
    import torch

    from rmtcompile.api import Optimized
    from rmtcompile.target import Sizes, Target

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
    from rmtcompile.errors import RMTCompileError
    from rmtcompile.target import UsageError

    run: Command = options.run
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


# -- commands


def _sizes(options: argparse.Namespace) -> Sizes:
    from rmtcompile.target import Sizes

    names = {field.name for field in dataclasses.fields(Sizes)}
    return Sizes(**{name: value for name, value in vars(options).items() if name in names})


def _target(options: argparse.Namespace) -> Target:
    from rmtcompile.target import armt_target, config_target, load_target

    _check_device(options.device)
    dtype = _dtype(options.dtype)
    sizes = _sizes(options)
    if options.model is None:
        import torch

        return armt_target(sizes, options.device or "cpu", dtype or torch.float32)
    if options.model.endswith(".json"):
        return config_target(options.model, sizes, options.device or "cpu", dtype)
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

    target = _target(options) if options.model is not None or options.dtype is not None else None
    _check_device(options.device)
    result = run_demo(
        _sizes(options),
        target=target,
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
        path = save_view(fast, options.out, title=target.name, expand=options.open)
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


COMMANDS: dict[str, Command] = {"demo": _demo, "explain": _explain, "view": _view, "dump": _dump}


if __name__ == "__main__":
    sys.exit(main())
