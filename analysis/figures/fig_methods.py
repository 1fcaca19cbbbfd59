"""Methods side by side: average performance, recovery and forgetting, with every seed."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.dataset import Dataset
from analysis.paper_tables import percent
from analysis.style import COLUMN_INCHES, GUIDE, method_colour
from cpd.evaluation.intervals import FEW_SEEDS
from cpd.evaluation.summary import MethodMeasures, interval

MEASURES = {"average_performance": "average\nperformance", "recovery": "recovery", "forgetting": "forgetting"}


def draw(data: Dataset) -> Figure:
    """Draw a panel per measure and a row per method, with means as bars and single seeds as dots.

    The first method, with which the others are compared, has another colour.
    """
    methods = list(data.methods)
    figure = Figure(figsize=(COLUMN_INCHES, 0.17 * len(methods) + 0.62))
    panels = figure.subplots(1, len(MEASURES), sharey=True)
    figure.get_layout_engine().set(wspace=0.06)  # type: ignore[call-arg, union-attr]
    for axes, (measure, title) in zip(panels, MEASURES.items(), strict=True):
        _guide(axes, data, measure)
        for row, method in enumerate(methods):
            _method(axes, data, method, measure, row)
        axes.set_title(title, fontsize=7, linespacing=0.95)
        axes.set_xlim(_least(data) if measure == "forgetting" else 0.0, 1)
        axes.set_xticks([0, 0.5, 1], ["0", ".5", "1"])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
    panels[0].set_yticks(range(len(methods)), [method.method for method in methods], fontsize=6.5)
    panels[0].set_ylim(len(methods) - 0.45, -0.55)
    return figure


def _least(data: Dataset) -> float:
    """Return the lower limit of the axis of forgetting, below all drawn values."""
    methods = [method for method in data.methods if "mean" in method.forgetting]
    values = [value for method in methods for value in method.forgetting["mean"].per_seed]
    values += [low for method in methods if (low := _interval(data, method, "forgetting")[0]) is not None]
    return min(-0.05, 1.1 * min(values, default=0.0))


def _interval(data: Dataset, method: MethodMeasures, measure: str) -> tuple[float | None, float | None]:
    students = [student.measures for student in data.of_method(method.method)]
    return interval(getattr(method, measure)["mean"], students, measure)


def _guide(axes: Axes, data: Dataset, measure: str) -> None:
    """Draw a line at the value of a student as good as its teachers."""
    rates = data.teacher_scores
    values = {"average_performance": float(np.mean(rates)) if rates else None, "recovery": 1.0, "forgetting": 0.0}
    value = values[measure]
    if value is not None:
        axes.axvline(value, color=GUIDE, linewidth=0.8, linestyle=(0, (2, 1.5)), zorder=1, clip_on=False)


def _method(axes: Axes, data: Dataset, method: MethodMeasures, measure: str, row: int) -> None:
    mean = getattr(method, measure).get("mean")
    if mean is None:
        reason = "cannot forget" if method.recovery else "not finished"
        axes.text(0.02, row, reason, size=5.5, style="italic", va="center", color=GUIDE)
        return
    low, high = _interval(data, method, measure)
    colour = method_colour(1 if method is data.methods[0] else 0)
    axes.barh(row, mean.estimate, 0.72, color=colour, alpha=0.35, linewidth=0)
    # Inside a long bar, where the number covers no mark.
    inside = mean.estimate > 0.4
    place = {"x": 0.03, "ha": "left"} if inside else {"x": 0.92, "ha": "right"}
    number = percent(mean.estimate, 1).replace("-", "\N{MINUS SIGN}")
    axes.text(y=row, s=number, size=5.5, va="center", zorder=5, **place)  # type: ignore[arg-type]
    if low is not None and high is not None:
        axes.plot([low, high], [row, row], color="black", linewidth=0.8, zorder=3)
    axes.plot([mean.estimate] * 2, [row - 0.36, row + 0.36], color=colour, linewidth=1.4, zorder=3)
    if len(mean.per_seed) > 1:
        # Spread vertically, so that equal values stay visible.
        rows = row + 0.22 * np.linspace(-1, 1, len(mean.per_seed))
        axes.plot(mean.per_seed, rows, "o", markersize=1.7, color="black", clip_on=False, zorder=4)


def caption(data: Dataset) -> str:
    """Say what the figure shows, without the conditions."""
    counts = {len(method.seeds) for method in data.methods}
    drawn = "means; dots: single seeds" if max(counts) > 1 else "the only seed"
    marks = [f"Bars and numbers (per cent): {drawn}."]
    if max(counts) >= FEW_SEEDS:
        marks.append("Lines: bootstrap 95 % intervals over seeds.")
    if 1 in counts:
        marks.append("Lines of single seeds: 95 % intervals from episode counts.")
    if any(1 < count < FEW_SEEDS for count in counts):
        marks.append(f"Fewer than {FEW_SEEDS} seeds have no interval over seeds.")
    return (
        f"Methods on {data.name}: average performance at the end of the stream (dashed: the teachers' mean "
        "success), recovery of the teachers' success (dashed: all of it, as where students do better than "
        "a teacher) and forgetting (dashed: none; less is better). " + " ".join(marks)
    )
