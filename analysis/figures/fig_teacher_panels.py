"""Learning curves of published teachers at column width: small multiples, from the warm start on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from analysis.dataset import short
from analysis.published_teachers import PublishedTeacher, PublishedTeachers
from analysis.style import ACCENT, COLUMN_INCHES, GUIDE, method_colour

NUM_COLUMNS = 4


def draw(published: PublishedTeachers) -> Figure:
    """A panel per task: success on validation goals and of training episodes over environment steps of RL."""
    tasks = list(dict.fromkeys(teacher.task for teacher in published.teachers))
    num_columns = min(NUM_COLUMNS, len(tasks))
    num_rows = math.ceil(len(tasks) / num_columns)
    figure = Figure(figsize=(COLUMN_INCHES, 0.78 * num_rows + 0.5))
    grid = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False)
    for axes, task in zip(grid.flat, tasks, strict=False):
        own = [teacher for teacher in published.teachers if teacher.task == task]
        for teacher in own:
            _curve(axes, teacher)
        axes.axhline(published.gate, color=GUIDE, linewidth=0.6, linestyle=":", zorder=1)
        set_axes(axes, task, max(teacher.env_steps for teacher in own))
    finish(figure, grid, len(tasks), "success rate", num_legend_columns=3)
    return figure


def set_axes(axes: Axes, task: str, longest: int) -> None:
    """Title and axes of a task's panel, whose longest curve has so many steps."""
    # Budgets differ by an order of magnitude: every panel has an axis of its own.
    axes.set_xlim(-0.04 * longest, 1.08 * longest)
    axes.xaxis.set_major_locator(MaxNLocator(2, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(_steps))
    axes.set_title(short(task), fontsize=6.2, pad=2)
    axes.tick_params(labelsize=6, length=1.8, pad=1.5)
    axes.grid(axis="y")


def finish(figure: Figure, grid: npt.NDArray[Any], num_panels: int, rate: str, *, num_legend_columns: int) -> None:
    """What the panels have in common: the axis of the success `rate`, labels, and a legend."""
    grid.flat[0].set_ylim(-0.06, 1.1)
    grid.flat[0].set_yticks([0, 0.5, 1], ["0", ".5", "1"])
    for axes in grid.flat[num_panels:]:
        axes.set_visible(False)
    figure.supxlabel("environment steps of RL", fontsize=7)
    figure.supylabel(rate, fontsize=7)
    by_name: dict[str, Any] = {}  # panels and seeds repeat them
    for axes in grid.flat[:num_panels]:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            by_name.setdefault(name, handle)
    columns = min(num_legend_columns, len(by_name))
    figure.legend(by_name.values(), by_name.keys(), loc="outside upper center", ncols=columns, fontsize=6.5)


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
    axes.errorbar(
        teacher.selected_env_steps,
        rate.rate,
        yerr=errors,
        color=ACCENT,
        marker="D",
        markersize=2.2,
        elinewidth=0.7,
        linestyle="",
        label="held-out goals",
        zorder=4,
    )


def caption(published: PublishedTeachers) -> str:
    """What the figure shows, with its conditions."""
    labels = published.labels
    start = "; at 0 the capped warm start" if any(t.before for t in published.teachers) else ""
    return (
        f"Learning of the teachers of {published.name} (recipe {labels['teacher_recipe']}): success on validation "
        f"goals with deterministic actions{start}, of the training episodes with exploration noise, and of the "
        "policy that was kept on held-out goals with its Wilson 95 % interval. Dotted: the gate. Training ends "
        f"once validation is passed often enough; axes differ by task. Horizon {labels['horizon']}; "
        f"Meta-World {labels['metaworld']}, MuJoCo {labels['mujoco']}, reward {labels['reward_version']}."
    )
