"""Learning curves of published teachers at column width: small multiples, from the warm start on."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.load import short
from analysis.style import ACCENT, COLUMN_INCHES, GUIDE, method_colour
from analysis.teachers import PublishedTeacher, PublishedTeachers

NUM_COLUMNS = 4


def draw(published: PublishedTeachers) -> Figure:
    """A panel per task: success on validation goals and of training episodes over environment steps of RL."""
    tasks = list(dict.fromkeys(teacher.task for teacher in published.teachers))
    num_columns = min(NUM_COLUMNS, len(tasks))
    num_rows = math.ceil(len(tasks) / num_columns)
    figure = Figure(figsize=(COLUMN_INCHES, 0.75 * num_rows + 0.5))
    grid = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False)
    largest = max(teacher.env_steps for teacher in published.teachers)
    scale, unit = (1e6, "million") if largest >= 1e6 else (1e3, "thousand")
    for axes, task in zip(grid.flat, tasks, strict=False):
        for teacher in published.teachers:
            if teacher.task == task:
                _curve(axes, teacher, scale)
        axes.axhline(published.gate, color=GUIDE, linewidth=0.6, linestyle=":", zorder=1)
        axes.set_title(short(task), fontsize=6.2, pad=2)
        axes.tick_params(labelsize=6, length=1.8, pad=1.5)
        axes.grid(axis="y")
    grid.flat[0].set_xlim(-0.03 * largest / scale, 1.06 * largest / scale)
    grid.flat[0].set_ylim(-0.06, 1.1)
    grid.flat[0].set_yticks([0, 0.5, 1], ["0", ".5", "1"])
    for axes in grid.flat[len(tasks) :]:
        axes.set_visible(False)
    for column in range(num_columns):
        last = (len(tasks) - 1 - column) // num_columns
        grid[last, column].tick_params(labelbottom=True)
    figure.supxlabel(f"environment steps of RL ({unit})", fontsize=7)
    figure.supylabel("success rate", fontsize=7)
    handles, names = grid.flat[0].get_legend_handles_labels()
    by_name = dict(zip(names, handles, strict=True))  # several seeds repeat them
    figure.legend(by_name.values(), by_name.keys(), loc="outside upper center", ncols=3, fontsize=6.5)
    return figure


def _curve(axes: Axes, teacher: PublishedTeacher, scale: float) -> None:
    curve, colour = teacher.curve, method_colour(0)
    if not np.isnan(curve.training).all():
        steps = np.array(curve.env_steps) / scale
        axes.plot(steps, curve.training, color=colour, alpha=0.3, linewidth=0.6, label="training episodes")
    steps = np.array((0.0, *curve.validation_steps) if teacher.before else curve.validation_steps) / scale
    rates = (teacher.before.rate, *curve.validation) if teacher.before else curve.validation
    axes.plot(steps, rates, color=colour, marker="o", markersize=1.5, linewidth=0.8, label="validation goals")
    rate = teacher.held_out
    errors = [[rate.rate - rate.low], [rate.high - rate.rate]]
    axes.errorbar(
        teacher.env_steps / scale,
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
        "final policy on held-out goals with its Wilson 95 % interval. Dotted: the gate. Training ends once "
        f"validation is passed often enough. Horizon {labels['horizon']}; Meta-World {labels['metaworld']}, "
        f"MuJoCo {labels['mujoco']}, reward {labels['reward_version']}."
    )
