"""Learning curves of published teachers at column width: small multiples, from the warm start on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from analysis.captions import versions
from analysis.dataset import short
from analysis.figures.small_multiples import finish_panels
from analysis.published_teachers import PublishedTeacher, PublishedTeachers
from analysis.style import ACCENT, COLUMN_INCHES, GUIDE, method_colour

NUM_COLUMNS = 4


def draw(published: PublishedTeachers) -> Figure:
    """Draw success on validation goals and in training episodes over environment steps of RL, a panel per task."""
    tasks = list(dict.fromkeys(teacher.task for teacher in published.teachers))
    num_columns = min(NUM_COLUMNS, len(tasks))
    num_rows = math.ceil(len(tasks) / num_columns)
    figure = Figure(figsize=(COLUMN_INCHES, 0.78 * num_rows + 0.5))
    grid = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False)
    for axes, task in zip(grid.flat, tasks, strict=False):
        teachers = [teacher for teacher in published.teachers if teacher.task == task]
        for teacher in teachers:
            _curve(axes, teacher)
        axes.axhline(published.gate, color=GUIDE, linewidth=0.6, linestyle=":", zorder=1)
        set_axes(axes, task, max(teacher.env_steps for teacher in teachers))
    labels = ("environment steps of RL", "success rate")
    finish_panels(figure, grid, len(tasks), labels, num_legend_columns=3)
    return figure


def set_axes(axes: Axes, task: str, longest: int) -> None:
    """Set the title and axes of a task's panel whose longest curve has `longest` steps."""
    # Budgets differ by an order of magnitude, so every panel has its own x axis.
    axes.set_xlim(-0.04 * longest, 1.08 * longest)
    axes.xaxis.set_major_locator(MaxNLocator(2, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(_steps))
    axes.set_ylim(-0.06, 1.1)
    axes.set_yticks([0, 0.5, 1], ["0", ".5", "1"])
    axes.set_title(short(task), fontsize=6.2, pad=2)
    axes.tick_params(labelsize=6, length=1.8, pad=1.5)
    axes.grid(axis="y")


def _steps(count: float, position: int | None) -> str:
    return f"{count / 1e6:g}M" if count >= 1e6 else f"{count / 1e3:g}k" if count else "0"


def _curve(axes: Axes, teacher: PublishedTeacher) -> None:
    curve, colour = teacher.curve, method_colour(0)
    if not np.isnan(curve.training).all():
        steps = np.array(curve.env_steps)
        axes.plot(steps, curve.training, color=colour, alpha=0.3, linewidth=0.6, label="training episodes")
    axes.plot(
        *teacher.validated, color=colour, marker="o", markersize=1.5, linewidth=0.8, label="validation goals"
    )
    rate = teacher.held_out
    errors = [[rate.rate - rate.low], [rate.high - rate.rate]]
    style: dict[str, Any] = {"color": ACCENT, "marker": "D", "markersize": 2.2, "elinewidth": 0.7, "linestyle": ""}
    axes.errorbar(teacher.selected_env_steps, rate.rate, yerr=errors, label="held-out goals", zorder=4, **style)


def caption(published: PublishedTeachers) -> str:
    """Say what the figure shows, with its conditions."""
    labels = published.labels
    start = "; at 0 the capped warm start" if any(t.before_rl for t in published.teachers) else ""
    return (
        f"Learning of the teachers of {published.name} (recipe {labels['teacher_recipe']}): success on validation "
        f"goals with deterministic actions{start}, of the training episodes with exploration noise, and of the "
        "policy that was kept on held-out goals with its Wilson 95 % interval. Dotted: the gate. Training ends "
        f"once validation is passed often enough; axes differ by task. Horizon {labels['horizon']}; "
        f"{versions(labels)}."
    )
