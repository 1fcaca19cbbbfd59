"""Learning curves of the teachers, one panel per task."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.dataset import Dataset, TeacherCurve, short
from analysis.style import COLUMN_INCHES, GUIDE, PAGE_INCHES, method_colour


def draw(data: Dataset) -> Figure | None:
    """Draw success on validation goals and in training episodes over environment steps; None without records."""
    tasks = [task for task in data.tasks if any(curve.task == task for curve in data.teacher_curves)]
    if not tasks:
        return None
    num_columns = min(len(tasks), 5 if len(tasks) <= 20 else 6)
    num_rows = math.ceil(len(tasks) / num_columns)
    width = COLUMN_INCHES if len(tasks) <= 3 else PAGE_INCHES
    panel = 1.05 if num_rows <= 4 else 0.88
    figure = Figure(figsize=(width, num_rows * panel + 0.45))
    grid = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False)
    largest = max(curve.env_steps[-1] for curve in data.teacher_curves)
    scale, unit = (1e6, "million") if largest >= 1e6 else (1e3, "thousand")
    title_size = 7.0 if num_columns <= 5 else 6.0
    for axes, task in zip(grid.flat, tasks, strict=False):
        curves = [curve for curve in data.teacher_curves if curve.task == task]
        _panel(axes, curves, data.gate, scale)
        rejected = any(curve.state == "rejected" for curve in curves)
        axes.set_title(short(task) + (" (rejected)" if rejected else ""), fontsize=title_size)
    grid.flat[0].set_xlim(0, 1.03 * largest / scale)
    for axes in grid.flat[len(tasks) :]:
        axes.set_visible(False)
    # Panels above an empty place carry the axis of their column.
    for column in range(num_columns):
        last = (len(tasks) - 1 - column) // num_columns
        grid[last, column].tick_params(labelbottom=True)
    figure.supxlabel(f"environment steps ({unit})", fontsize=8)
    figure.supylabel(data.rate, fontsize=8)
    handles, names = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=3)
    return figure


def _panel(axes: Axes, curves: list[TeacherCurve], gate: float, scale: float) -> None:
    axes.axhline(gate, color=GUIDE, linewidth=0.7, linestyle=":", label="gate", zorder=1)
    colour = method_colour(0)
    for curve in curves:
        first = curve is curves[0]
        if not np.isnan(curve.training).all():
            steps = np.array(curve.env_steps) / scale
            label = "training episodes" if first else None
            axes.plot(steps, curve.training, color=colour, alpha=0.35, linewidth=0.8, label=label)
        steps = np.array(curve.validation_steps) / scale
        style = {"marker": "o", "markersize": 1.8, "linewidth": 0.9, "zorder": 3}
        label = "validation goals" if first else None
        axes.plot(steps, curve.validation, color=colour, label=label, **style)  # type: ignore[arg-type]
    axes.set_ylim(-0.05, 1.05)
    axes.set_yticks([0, 0.5, 1])
    axes.tick_params(labelsize=6.5)
    axes.grid(axis="y")


def caption(data: Dataset) -> str:
    """Say what the figure shows, without the conditions."""
    return (
        f"Learning of the teachers of {data.name}: {data.measure} on validation goals and in the training "
        f"episodes; dotted: the gate of {data.gate:g} that admits a teacher to distillation. One line per seed; "
        "training ends once a teacher is good enough."
    )
