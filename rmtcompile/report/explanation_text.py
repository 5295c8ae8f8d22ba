"""An `Explanation` as text and as HTML: one list of sections, printed twice."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING

from rmtcompile.report.names import pattern, ranges
from rmtcompile.schedule.text import plural

if TYPE_CHECKING:
    from rmtcompile.report.explanation import Explanation, Kind, Offset, StageReport, Variant
    from rmtcompile.schedule import Carry

_WIDTH = 108
_SHOWN = 8

Section = tuple[str, list[str]]


def sections(found: Explanation) -> Iterator[Section]:
    """(title, lines) in the order in which they are shown."""
    yield "model", [found.model, *(f"reads {text}" for text in found.inputs)]
    if found.refusal is not None:
        stage = f" (in {found.refusal.stage})" if found.refusal.stage else ""
        yield "refused", [f"{found.refusal.error}{stage}: {found.refusal.what}"]
        if found.refusal.evidence:
            yield "evidence", list(found.refusal.evidence)
        if found.refusal.remedy:
            yield "help", [found.refusal.remedy]
        return
    yield "layers", [f"{len(found.layers)}: {pattern(found.layers)}"]
    yield "segments", list(_segments(found))
    yield "variants", [_variant(found, variant) for variant in found.variants]
    if len(found.kinds) > 1:
        yield "kinds", [_kind(kind) for kind in found.kinds]
    yield "offsets", [line for offset in found.offsets for line in _offset(offset)]
    yield "carries", list(_carries(found)) or ["nothing flows from segment to segment"]
    yield "hoisted", [_hoisted(found)]
    yield "shrunk", list(_shrunk(found))
    yield "optimised", [f"{name}: {text}" for name, text in found.optimised]
    if found.apart:
        yield "cell by cell", list(found.apart)
    yield "parallel", list(_parallel(found))
    if found.bands:
        yield "bands", list(found.bands)
    yield (
        "plan",
        [
            f"{found.plan}: {found.why}",
            *_speedups(found),
            f"cell functions run on {found.backend}",
            *_recorded(found),
            *_recomputed(found),
        ],
    )
    if found.loaded or found.unused:
        yield "saved", list(_saved(found))
    yield "compiled", [f"in {found.seconds:.1f} s", *map(_stage, found.stages), *_compiled(found)]


def _saved(found: Explanation) -> Iterator[str]:
    if found.loaded:
        yield "loaded from a folder; what is said of its operations was found when it was compiled"
    yield from (f"a saved program is not used: {why}" for why in found.unused)


def _segments(found: Explanation) -> Iterator[str]:
    for i, axis in enumerate(found.axes):
        text = f"{axis.length} elements along dimension {axis.dim} of {axis.input}"
        rest = f", the last one {axis.rest}" if axis.rest else ""
        yield f"{found.segments} of {text}{rest}" if i == 0 else f"with {text}"
    if found.parts > 1:
        yield (
            f"the model walks each in {found.parts} parts, which are the segments of the grid; texts that "
            "are read in parts, or in a queue with others, run on the model's own"
        )
    if found.only is not None:
        yield f"the program serves this number of segments only ({found.only})"
    else:
        lengths = " and ".join(map(str, found.proved_on))
        yield f"captured with {lengths} segments; serves any number from {found.shortest} on"
        yield from _seen(found)


def _seen(found: Explanation) -> Iterator[str]:
    """What is proved, what was checked, and what is extrapolated."""
    proved = found.proved_on[-1]
    yield f"proved for {proved} segments at most: each operation of these captures is as the rules say"
    if found.followed_to > proved:
        yield (
            f"followed to {found.followed_to} segments, without values: the same operations, integers, sizes "
            "and operands as the rules say"
        )
    if found.compared_to:
        yield f"compared with the model's values for {found.compared_to} segments"
    if found.unfollowed:
        yield f"not followed further: {found.unfollowed}"
    yield f"extrapolated beyond {found.followed_to}" + ", until such an input comes" * (not found.unfollowed)


def _variant(found: Explanation, variant: Variant) -> str:
    text = f"{variant.name}: segment{'s' * (len(variant.segments) > 1)} {ranges(variant.segments)}"
    one_kind = len(found.kinds) == 1
    return f"{text}, {plural(variant.operations, 'operation')} a cell" if one_kind else text


def _kind(kind: Kind) -> str:
    counts = dict.fromkeys(number for _, number in kind.operations)
    words = [f"{number} ({variant})" for variant, number in kind.operations]
    operations = f"{next(iter(counts))}" if len(counts) == 1 else ", ".join(words)
    weights = f", {plural(kind.weights, 'weight')}" if kind.weights else ""
    layers = f"layer{'s' * (len(kind.layers) > 1)} {ranges(kind.layers)}"
    return f"{kind.name}: {layers}, {operations} operations a cell{weights}"


def offset_words(offset: tuple[int, int]) -> str:
    """Where the producer stands, seen from the consumer."""
    ds, dl = offset
    segment = "same segment" if ds == 0 else "previous segment" if ds == 1 else f"{ds} segments before"
    layer = "same layer" if dl == 0 else f"{abs(dl)} layer{'s' if abs(dl) > 1 else ''} "
    return f"{segment}, {layer if dl == 0 else layer + ('below' if dl > 0 else 'above')}"


def _offset(offset: Offset) -> Iterator[str]:
    ds, dl = offset.offset
    asks = f"needs a skew of {offset.skew}" if ds else "orders the layers of a segment"
    blocks = ", which blocks every overlap" if offset.blocks else ""
    yield f"({ds},{dl})  {offset_words(offset.offset)}; {asks}{blocks}"
    yield f"       {offset.consumer}"
    yield f"       reads {offset.producer} {offset.reason}".rstrip()


def _carries(found: Explanation) -> Iterator[str]:
    for carry in found.carries:
        total = carry.total_bytes(len(found.layers))
        yield (
            f"{carry.name}: {carry.type}, offset ({carry.offset[0]},{carry.offset[1]}), "
            f"{carry.nbytes:,} bytes a cell, {total:,} over {_writers(carry, len(found.layers))}"
            + f", through {carry.through}" * bool(carry.through)
            + f"; made at {carry.source}" * bool(carry.source)
        )


def _writers(carry: Carry, n_layers: int) -> str:
    writers = carry.writers(n_layers)
    if len(writers) == n_layers:
        return "all layers"
    return f"layer{'s' * (len(writers) > 1)} {ranges(writers)}"


def _hoisted(found: Explanation) -> str:
    total = sum(number for _, number in found.hoisted)
    if not total:
        return "nothing is the same for all segments"
    names = [f"{name} x {number}" if number > 1 else name for name, number in found.hoisted]
    more = f", ... {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{plural(total, 'operation')} run once for all segments: {', '.join(names[:_SHOWN])}{more}"


def _shrunk(found: Explanation) -> Iterator[str]:
    captured, rules = found.operations
    longest = max(found.proved_on, default=0)
    merged, dropped = plural(found.merged, "operation"), f"{found.dropped:,}"
    yield f"{merged} merged with equal ones, {dropped} dropped because nothing reads them"
    yield f"{captured:,} operations captured over {longest} segments, {rules:,} in the rules for any number"


def _parallel(found: Explanation) -> Iterator[str]:
    schedule = found.schedule
    if schedule is None:
        return
    reached = "reached" if schedule.is_optimal else "not reached by one skew"
    if 0 < schedule.block < schedule.n_segments:
        reached = f"not reached: at most {schedule.block} segments run together, so that memory does not grow"
    yield f"level of cell (s, l) = {schedule.level_rule}: skew {schedule.alpha}"
    yield (
        f"{schedule.n_cells:,} cells in {schedule.n_levels:,} levels and {schedule.n_calls:,} grouped calls: "
        f"mean width {schedule.mean_width:.2f}, widest {schedule.width}"
    )
    yield f"critical path {schedule.critical_path:,} levels, {reached}"


def _speedups(found: Explanation) -> Iterator[str]:
    for row in found.speedups:
        text = f"{row.plan:<10}  {row.steps:,} steps"
        if row.plan != "sequential":
            text += f", at most {row.predicted:.2f} x as fast (if a level takes as long as a cell)"
        if row.seconds is not None:
            text += f", measured {1e3 * row.seconds:.3g} ms"
        if row.measured is not None:
            text += f", measured {row.measured:.2f} x as fast as the model's own forward"
        yield text


def _recomputed(found: Explanation) -> Iterator[str]:
    """What backward computes again."""
    asked = f": the forward uses checkpoints at {found.checkpoint}" if found.checkpoint else ""
    if found.recomputed == 1:
        yield f"backward computes each level again, and keeps what lies between levels{asked}"
    elif found.recomputed:
        yield (
            f"backward computes blocks of {found.recomputed} levels again, and in each of them its levels, "
            "and keeps what lies between blocks"
        )
    elif found.fitted:
        yield found.fitted
    elif found.checkpoint:
        yield f"backward keeps all values, as recompute='none' says, in spite of the checkpoints{asked}"


def _recorded(found: Explanation) -> Iterator[str]:
    if found.recorded:
        yield found.recorded
    times = [f"{1e3 * t:.4g} ms {kind} cuBLAS's workspace" for kind, t in found.workspace_seconds.items()]
    if times:
        yield f"as a CUDA graph {', '.join(times)}; the faster one is kept"


def _compiled(found: Explanation) -> Iterator[str]:
    if found.compile_seconds is not None:
        yield f"{found.compile_seconds:7.2f} s  cell functions, by {found.backend}"


def _stage(stage: StageReport) -> str:
    counts = f"{stage.before:,} -> {stage.after:,} operations" if stage.before != stage.after else ""
    return f"{stage.seconds:7.2f} s  {stage.name:<20} {counts}".rstrip()


def to_text(found: Explanation) -> str:
    """The text form, without a final newline."""
    lines: list[str] = []
    for title, entries in sections(found):
        for i, entry in enumerate(entries):
            indent = len(entry) - len(entry.lstrip())
            # `add: 2 -> 0` and `1.5 x` stay on one line.
            kept = entry.replace(": ", ":\0").replace(" -> ", "\0->\0").replace(" x ", "\0x ")
            lines += textwrap.wrap(
                kept if title in ("optimised", "hoisted") else entry,
                _WIDTH,
                initial_indent=f"{title if i == 0 else '':<11}",
                subsequent_indent=" " * (13 + indent),
                drop_whitespace=True,
                break_long_words=False,
                break_on_hyphens=False,
            ) or [title]
    return "\n".join(lines).replace("\0", " ")


def to_html_fragment(found: Explanation) -> str:
    """A table for a notebook cell: no script, no network."""
    left = "text-align:left;vertical-align:top;padding:2px 12px 2px 0"
    plain = "white-space:pre-wrap;font:12.5px/1.5 ui-monospace,monospace"
    rows = "".join(
        f'<tr><th style="{left}">{escape(title)}</th>'
        f'<td style="{left};{plain}">{escape(chr(10).join(entries))}</td></tr>'
        for title, entries in sections(found)
    )
    picture = found.schedule.to_svg() if found.schedule is not None else ""
    return f'<div style="overflow-x:auto;max-width:100%">{picture}<table><tbody>{rows}</tbody></table></div>'


def to_html(found: Explanation) -> str:
    """The table as a page."""
    title = f"rmtcompile explain: {found.model}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>"
        ":root{color-scheme:light dark}body{font:14px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem "
        "auto;padding:0 1rem}h1{font-size:1.3rem}"
        f"</style></head><body><h1>{escape(title)}</h1>{to_html_fragment(found)}</body></html>\n"
    )
