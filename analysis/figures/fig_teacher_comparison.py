"""Folders of published teachers side by side: how fast different settings learn the same tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.captions import versions
from analysis.figures.fig_teacher_panels import set_axes
from analysis.figures.small_multiples import finish_panels
from analysis.published_teachers import PublishedTeachers
from analysis.style import COLUMN_INCHES, LINE_STYLES, method_colour


def draw(groups: Mapping[str, PublishedTeachers]) -> Figure:
    """Draw success on validation goals over environment steps of RL, a panel per task and a colour per folder.

    The first folder, with which the others are compared, lies on top.

    Args:
        groups: published teachers of the same stream, by their name in the legend.
    """
    published_tasks = {t.task for published in groups.values() for t in published.teachers}
    tasks = [task for task in dict.fromkeys(next(iter(groups.values())).stream) if task in published_tasks]
    num_columns = min(3 if len(tasks) <= 6 else 4, len(tasks))
    num_rows = math.ceil(len(tasks) / num_columns)
    num_legend_rows = math.ceil(len(groups) / 2)
    figure = Figure(figsize=(COLUMN_INCHES, 0.95 * num_rows + 0.3 + 0.14 * num_legend_rows))
    grid = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False)
    for axes, task in zip(grid.flat, tasks, strict=False):
        _panel(axes, task, groups)
    labels = ("environment steps of RL", "success rate, validation goals")
    finish_panels(figure, grid, len(tasks), labels, num_legend_columns=2)
    return figure


def _panel(axes: Axes, task: str, groups: Mapping[str, PublishedTeachers]) -> None:
    longest = 0
    for index, (name, published) in enumerate(groups.items()):
        style: dict[str, Any] = {"color": method_colour(index), "zorder": 3 - index / len(groups)}
        for teacher in (teacher for teacher in published.teachers if teacher.task == task):
            steps, rates = teacher.validated
            axes.plot(
                steps, rates, label=name, linewidth=0.9, linestyle=LINE_STYLES[index % len(LINE_STYLES)], **style
            )
            longest = max(longest, teacher.env_steps)
            if not steps:
                continue
            end = "x" if teacher.state == "rejected" else "o"
            kept = (teacher.selected_env_steps, teacher.validation.rate)
            axes.plot(*kept, end, markersize=2.6, markeredgecolor="white", markeredgewidth=0.3, **style)
    set_axes(axes, task, longest)


def caption(groups: Mapping[str, PublishedTeachers]) -> str:
    """Say what the figure shows, with its conditions."""
    first = next(iter(groups.values()))
    teachers = [teacher for published in groups.values() for teacher in published.teachers]
    gates = "/".join(dict.fromkeys(f"{published.gate:g}" for published in groups.values()))
    recipes = ", ".join(f"{name}: {published.labels['teacher_recipe']}" for name, published in groups.items())
    horizons = "/".join(dict.fromkeys(published.labels["horizon"] for published in groups.values()))
    seeds = sorted({teacher.seed for teacher in teachers})
    return (
        f"How fast {', '.join(groups)} learn the same tasks (recipes: {recipes}): success on validation goals "
        "with deterministic actions. One line per seed, which begins where it was first validated. A dot "
        f"marks the policy that was kept, a cross one that fell short of the gate ({gates}). Axes differ by "
        f"task. Teacher seeds {', '.join(map(str, seeds))}. Horizon {horizons}; {versions(first.labels)}."
    )
