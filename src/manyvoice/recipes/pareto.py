"""Error rate against cost, drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from manyvoice.errors import UsageError

# share of the largest model's MACs, error rate, its interval
Point = tuple[float, float, Sequence[float] | None]


def draw(lines: Mapping[str, Sequence[Point]], path: Path, *, label: str = "WER, %") -> None:
    """A PNG with a line for each name, error bars where there are intervals.

    Raises: UsageError where matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise UsageError("plots need matplotlib: pip install matplotlib") from error
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
    figure.savefig(path, dpi=120)
    plt.close(figure)
