"""The figures as a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.figures import HANDLE, PUBLISH_ONE, PUBLISH_WINDOW, Figures
from benchmarks.plan import CELERY, DRAMATIQ, OURS, SHARES

Value = Callable[[Figures, str], float | None]


def _one_by_one(figures: Figures, program: str) -> float | None:
    if program in (CELERY, DRAMATIQ):
        return figures.median(PUBLISH_WINDOW, program)
    return figures.median(PUBLISH_ONE, program, "one by one")


def _window(figures: Figures, program: str) -> float | None:
    return None if program in (CELERY, DRAMATIQ) else figures.median(PUBLISH_WINDOW, program)


PANELS: dict[str, Value] = {
    "publish, one by one (events/s)": _one_by_one,
    "publish, window of 1,000 (events/s)": _window,
    "handle (events/s)": lambda figures, program: figures.median(HANDLE, program),
    "latency at 500/s, p99 (ms)": lambda figures, program: figures.median("latency p99", program, "latency"),
}


def draw(figures: Figures, file: Path) -> bool:
    """Draw it into *file*; False where there is nothing to draw, or nothing to draw with."""
    panels = {title: found for title, value in PANELS.items() if (found := _measured(figures, value))}
    if not panels:
        return False
    try:
        from matplotlib import use
        from matplotlib.figure import Figure
    except ImportError:
        return False
    use("Agg")
    picture = Figure(figsize=(10, 2.6 * ((len(panels) + 1) // 2)), layout="constrained")
    axes: Any = picture.subplots((len(panels) + 1) // 2, min(2, len(panels)), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, values) in zip(axes.flat, panels.items(), strict=False):
        colours = ["tab:orange" if program == OURS else "tab:gray" for program in values]
        bars = axis.barh(list(values), list(values.values()), color=colours)
        axis.bar_label(bars, [f" {value:,.0f}" if value >= 100 else f" {value:.1f}" for value in values.values()])
        axis.invert_yaxis()
        axis.margins(x=0.18)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(title, loc="left", fontsize=10)
    picture.savefig(file, dpi=120, metadata={"Software": None})
    return True


def _measured(figures: Figures, value: Value) -> dict[str, float]:
    return {program: found for program in SHARES if (found := value(figures, program)) is not None}
