"""Pictures of a record: latency and memory by length, utilisation by wavefront, errors by segment."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(record: dict[str, Any], folder: Path) -> list[Path]:
    """Write one SVG for each kind of figure that the record holds.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for model in record["models"]:
        suffix = f"-segment{model['segment']}.svg"
        peak = max((c["flops_per_s"] for c in record["ceilings"]), default=float("nan"))
        if any("median" in row for row in model["rows"]):
            by_length(model, "median", "seconds", folder / f"latency{suffix}", written)
            by_length(
                model, "beyond_weights_bytes", "bytes beyond weights", folder / f"memory{suffix}", written
            )
        if "wavefronts" in model:
            utilisation(model, peak, folder / f"utilisation{suffix}", written)
        if "accumulation" in model:
            accumulation(model["accumulation"], folder / f"accumulation{suffix}", written)
    return written


def by_length(model: dict[str, Any], key: str, label: str, path: Path, written: list[Path]) -> None:
    """One line an opponent, both axes logarithmic."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in dict.fromkeys(row["opponent"] for row in model["rows"]):
        rows = [row for row in model["rows"] if row["opponent"] == name and row.get(key)]
        if rows:
            axes.plot([r["tokens"] for r in rows], [r[key] for r in rows], marker="o", label=name)
    if not axes.lines:
        plt.close(figure)
        return
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
    axes.legend()
    _write(figure, path, written)


def utilisation(model: dict[str, Any], peak: float, path: Path, written: list[Path]) -> None:
    """Share of the matrix-product ceiling by the number of cells on a wavefront."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    waves = model["wavefronts"]
    axes.bar([w["width"] for w in waves], [w["flops_per_s"] / peak for w in waves])
    axes.set(xlabel="cells on a wavefront", ylabel="of the matrix-product ceiling")
    _write(figure, path, written)


def accumulation(found: dict[str, Any], path: Path, written: list[Path]) -> None:
    """Relative error of logits along segments, one line a schedule."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, errors in found["logits_error"].items():
        axes.plot(range(1, len(errors) + 1), errors, label=name)
    axes.set(xlabel="segment", ylabel=f"relative error of logits against {found['reference']}", yscale="log")
    axes.legend()
    _write(figure, path, written)


def _write(figure: Any, path: Path, written: list[Path]) -> None:
    from matplotlib import pyplot as plt

    figure.savefig(path)
    plt.close(figure)
    written.append(path)
