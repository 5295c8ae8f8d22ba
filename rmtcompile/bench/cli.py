"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rmtcompile.bench.flags import LARGE, RECOMPUTE, SHAPE_FLAGS, SMALL, parser
from rmtcompile.commandline import UsageError, check_file, check_folder

if TYPE_CHECKING:
    import torch

    from rmtcompile.bench import bands, documents, serving, training
    from rmtcompile.bench.session import Settings
    from rmtcompile.bench.shapes import Case


def run(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 if every piece worked, 1 if one failed, 2 for a bad command line."""
    args = parser().parse_args(argv)
    try:
        if args.out:
            check_file(args.out)
        if args.plots:
            check_folder(args.plots)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
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
    if args.ranks and not args.devices:
        print("error: --ranks times the bands of --devices", file=sys.stderr)
        return 2
    if args.preset and args.train == "table":
        print("error: the table has presets of its own", file=sys.stderr)
        return 2
    args.has_table = args.preset is None and device.type == "cuda"
    if args.preset is None:
        args.preset = "1b" if device.type == "cuda" else "tiny"
        if args.train != "table" and not (args.devices and args.has_table and not args.tokens):
            note = f"preset {args.preset}, since the device is {name}; --preset chooses another"
            print(note, file=sys.stderr)

    def save(record: dict[str, Any]) -> None:
        if args.out:
            report.save(record, args.out)

    tables: dict[type, Callable[[Any], Iterable[report.Table]]] = {
        documents.Session: documents.tables,
        serving.Session: serving.tables,
        bands.Session: bands.tables,
        training.Session: training.tables,
    }
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
    if args.json:
        print(report.as_json(session.record))
    else:
        report.show(session.record, tables.get(type(session), report.tables)(session.record))
    if args.plots and isinstance(session, Session):
        try:
            plots.draw(session.record, args.plots)
        except ImportError:
            print("plots need matplotlib: pip install 'rmtcompile[viz]'", file=sys.stderr)
            return 1
    return 1 if session.failed else 0


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
    from rmtcompile.bench.training import LONGEST_EAGER, TABLE, Settings, Steps

    base = settings_of(args)
    if args.train == "table":
        if args.tokens or args.segment or args.recompute:
            raise ValueError("the table has lengths, segments and programs of its own")
        models = []
        for preset, segment, programs, own in TABLE:
            of_row = argparse.Namespace(**{**vars(args), "preset": preset, "segment": [segment]})
            models.append(Steps(preset, _cases_of(of_row)[1][0], programs, own if args.own else ()))
    elif len(base.cases) != 1:
        raise ValueError("training steps have segments of one length, not of several")
    else:
        case = base.cases[0]
        own = [n for n in base.tokens if args.own and n <= LONGEST_EAGER * case.segment]
        models = [Steps(args.preset, case, dict.fromkeys(args.recompute or RECOMPUTE, base.tokens), own)]
    return Settings(models, args.rounds, base.options, args.budget, flags)


def bands_of(args: argparse.Namespace, flags: tuple[str, ...]) -> bands.Settings:
    """What the flags ask for, where they ask for several devices.

    Raises:
        ValueError: they do not fit together.
    """
    from rmtcompile.bench.bands import TABLE, Model, Settings

    base = settings_of(args)
    if len(base.cases) != 1:
        raise ValueError("bands are timed with segments of one length, not of several")
    if min(args.devices) < 1:
        raise ValueError(f"devices must be at least 1, not {min(args.devices)}")
    models = [Model(args.preset, base.cases[0], base.tokens)]
    if args.has_table and not args.tokens:
        of = (argparse.Namespace(**{**vars(args), "preset": preset}) for preset, _ in TABLE)
        models = [Model(m.preset, _cases_of(m)[1][0], n) for m, (_, n) in zip(of, TABLE, strict=True)]
    counts = sorted(set(args.devices))
    return Settings(models, counts, args.rounds, base.options, args.budget, flags, args.ranks)


def _cases_of(args: argparse.Namespace) -> tuple[dict[str, Any], tuple[Case, ...]]:
    """What was chosen for the preset, and the models: one for each length of a segment."""
    import torch

    from rmtcompile.bench.shapes import SHAPES, Case

    preset = args.preset or "1b"
    defaults = SMALL if preset == "tiny" else LARGE
    given = {name: value for name in defaults if (value := getattr(args, name)) is not None}
    chosen: dict[str, Any] = {**defaults, **given}
    changed = {name: value for name in SHAPE_FLAGS if (value := getattr(args, name)) is not None}
    shape = dataclasses.replace(SHAPES[preset], **changed)
    dtype: torch.dtype = getattr(torch, chosen["dtype"])
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
