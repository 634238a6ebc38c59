"""Error rate against cost, drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from manyvoice.errors import UsageError, WorkError

# share of the largest model's MACs, error rate, its interval
Point = tuple[float, float, Sequence[float] | None]


def check_plot(path: Path) -> None:
    """What can be known of a plot before anything is measured for it; makes the folder that it goes to.

    Raises: UsageError where matplotlib is not installed or draws no such format; WorkError where there is no folder.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise UsageError("plots need matplotlib: pip install matplotlib") from error
    formats = FigureCanvasBase.get_supported_filetypes()
    form = path.suffix.removeprefix(".").lower()
    if form and form not in formats:
        raise UsageError(f"plot {path}: no picture ends in .{form}; it must be one of {', '.join(sorted(formats))}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritten(path, error) from error


def _unwritten(path: Path, error: Exception) -> WorkError:
    return WorkError(f"plot {path}: cannot be written ({error}); choose another place")


def draw(lines: Mapping[str, Sequence[Point]], path: Path, *, label: str = "WER, %") -> None:
    """A picture with a line for each name, error bars where there are intervals.

    Raises: as `check_plot`; WorkError where the file cannot be written.
    """
    check_plot(path)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for name, points in lines.items():
        xs = [100 * p[0] for p in points]
        ys = [100 * p[1] for p in points]
        ends = [p[2] or (p[1], p[1]) for p in points]
        bars = [[y - 100 * low for y, (low, _) in zip(ys, ends, strict=True)],
                [100 * high - y for y, (_, high) in zip(ys, ends, strict=True)]]  # fmt: skip
        axes.errorbar(xs, ys, yerr=bars, marker="o", capsize=3, label=name)
    axes.set(xlabel="multiply-accumulates of the encoder's layers, % of the largest", ylabel=label)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, RuntimeError) as error:  # RuntimeError: pgf where there is no TeX
        raise _unwritten(path, error) from error
    finally:
        plt.close(figure)
