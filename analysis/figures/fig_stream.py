"""Success over the stream: the current task within every stage, and averages over tasks after it."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.dataset import Dataset, short
from analysis.figures.small_multiples import finish_panels
from analysis.style import (
    ACCENT,
    COLUMN_INCHES,
    METHOD_COLOURS,
    PAGE_INCHES,
    SECOND_ACCENT,
    TEACHER_COLOUR,
    method_colour,
    method_line,
)
from cpd.evaluation.student_measures import StudentResults, rate_before

Line = dict[float, list[float]]
"""Position in the stream, in stages, to the values of all seeds there."""
#: More lines than colours would differ only in their dashes, and most would lie on top of each other.
MOST_LINES = len(METHOD_COLOURS)
NUM_COLUMNS = 5


def draw(data: Dataset) -> Figure:
    """Draw success over stages: one method's current task and averages, or several methods' averages."""
    if len(data.method_names) > MOST_LINES:
        return _panels(data)
    num_stages = len(data.stream)
    width = PAGE_INCHES if num_stages > 6 else COLUMN_INCHES
    methods = list(data.method_names)
    columns = (3 if width == COLUMN_INCHES else 6) if len(methods) > 4 else min(4, max(3, len(methods)))
    legend_inches = 0.14 * (-(-len(methods) // columns) - 1)
    size, rotation = _label_style(num_stages)
    longest = max(len(short(task)) for task in data.stream)
    header_inches = float(0.0072 * size * longest * np.sin(np.radians(rotation)))
    figure = Figure(figsize=(width, 1.85 + header_inches + legend_inches))
    axes = figure.subplots()
    marker = 3.2 if num_stages <= 25 else 2.0
    for index, method in enumerate(methods):
        students = data.of_method(method)
        if len(methods) == 1:
            seen = {"color": SECOND_ACCENT, "marker": "s", "markersize": marker, "label": "mean of tasks so far"}
            every = {"color": ACCENT, "marker": "o", "markersize": marker, "label": "mean of all tasks"}
            _current_task(axes, data, students)
            _average(axes, students, "average_seen_by_stage", seen)
            _average(axes, students, "average_by_stage", every)
        else:
            style = {**method_line(index), "marker": "o", "markersize": marker, "label": method}
            _average(axes, students, "average_by_stage", style)
    axes.set_xlim(0, num_stages)
    axes.set_xticks(range(0, num_stages + 1, 1 if num_stages <= 20 else 5))
    for stage in range(1, num_stages):
        axes.axvline(stage, color="#d4d4d4", linewidth=0.5, zorder=0)
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    # With one method, the legend says which tasks each curve is of.
    success = data.rate if len(methods) == 1 else f"{data.measure}, mean of all tasks"
    axes.set(ylim=(-0.03, 1.03), xlabel="stages done", ylabel=success)
    axes.grid(axis="y")
    slanted: dict[str, Any] = {"rotation": rotation, "ha": "left", "rotation_mode": "anchor"} if rotation else {}
    top = axes.secondary_xaxis("top")
    names = _stage_names(data, " " if rotation else "\n")
    top.set_xticks(np.arange(num_stages) + 0.5, names, fontsize=size, **slanted)
    top.tick_params(length=0, pad=1)
    top.spines["top"].set_visible(False)
    figure.legend(loc="outside lower center", ncols=columns)
    return figure


def _panels(data: Dataset) -> Figure:
    """Draw a panel per method with its average performance, and behind it that of the first method."""
    methods, num_stages = data.method_names, len(data.stream)
    num_columns = min(NUM_COLUMNS, len(methods))
    num_rows = -(-len(methods) // num_columns)
    figure = Figure(figsize=(PAGE_INCHES, 0.88 * num_rows + 0.5))
    grid = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False)
    panels: list[Axes] = list(grid.flat[: len(methods)])
    marks: dict[str, Any] = {"marker": "o", "markersize": 1.6}
    behind = {**marks, "color": TEACHER_COLOUR, "linewidth": 1.4, "label": methods[0]}
    front = {**marks, "color": method_colour(0), "linewidth": 0.9, "label": "each method"}
    for axes, method in zip(panels, methods, strict=True):
        _average(axes, data.of_method(methods[0]), "average_by_stage", behind)
        _average(axes, data.of_method(method), "average_by_stage", front)
        axes.set_title(method, fontsize=6.5, pad=2.5)
        axes.tick_params(labelsize=6, length=1.8, pad=1.5)
        axes.grid()
    for axes in panels[-num_columns:]:  # the lowest of every column
        axes.tick_params(labelbottom=True)
    labels = ("stages done", f"{data.measure}, mean of all tasks")
    finish_panels(figure, grid, len(methods), labels, num_legend_columns=4)
    # All panels share these limits and ticks.
    panels[0].set_ylim(-0.06, 1.06)
    panels[0].set_yticks([0, 0.5, 1], ["0", ".5", "1"])
    panels[0].set_xlim(0, num_stages)
    panels[0].set_xticks(range(0, num_stages + 1, 5 if num_stages <= 25 else 10))
    return figure


def _label_style(num_stages: int) -> tuple[float, float]:
    """Return the size and rotation at which the names of neighbouring stages do not touch."""
    if num_stages <= 3:
        return 7.0, 0
    return (7.0, 35) if num_stages <= 12 else (6.0, 45) if num_stages <= 25 else (5.2, 60)


def _stage_names(data: Dataset, gap: str) -> list[str]:
    admitted = np.any([student.admitted for student in data.students], axis=0)
    skipped = [not admitted[data.tasks.index(task)] for task in data.stream]
    return [short(task) + f"{gap}(skipped)" * skip for task, skip in zip(data.stream, skipped, strict=True)]


def _current_task(axes: Axes, data: Dataset, students: list[StudentResults]) -> None:
    """Draw success on each stage's task within the stage, the mean over the seeds that distilled it."""
    labelled = False
    for stage, task in enumerate(data.stream):
        column = data.tasks.index(task)
        line: Line = defaultdict(list)
        for student in (s for s in students if s.admitted[column]):
            key = (student.method, student.seed, stage, task)
            points = [r for r in data.tables.curves if (r.method, r.seed, r.stage, r.task) == key]
            distill = data.distill[student.method]
            is_alone = distill["protocol"] in ("single_task", "isolated")
            start = rate_before(student.matrix, stage, single_task=is_alone)
            if points and points[0].step > 0 and start is not None:
                line[stage].append(start)
            for row in points:
                line[stage + row.step / distill["steps_per_stage"]].append(row.total / row.episodes)
        if line:
            label = None if labelled else "current task"
            width = 1.0 if len(data.stream) <= 25 else 0.6
            _plot(axes, line, color=method_colour(0), linewidth=width, label=label)
            labelled = True


def _average(axes: Axes, students: list[StudentResults], measure: str, style: dict[str, Any]) -> None:
    """Draw the mean over seeds of an average by stage, and every seed as a small dot if there are several."""
    line: Line = defaultdict(list)
    for student in students:
        for stage, value in enumerate(getattr(student.measures, measure)):
            if value is not None:
                line[stage].append(value)
    _plot(axes, line, **style)
    if len(students) > 1:
        xs = [x for x, values in line.items() for _ in values]
        ys = [value for values in line.values() for value in values]
        axes.plot(xs, ys, ".", color=style["color"], markersize=2, alpha=0.6, clip_on=False)


def _plot(axes: Axes, line: Line, **style: Any) -> None:
    xs = sorted(line)
    axes.plot(xs, [float(np.mean(line[x])) for x in xs], clip_on=False, **style)


def caption(data: Dataset) -> str:
    """Say what the figure shows, without the conditions."""
    dots = " Small dots: single seeds." if len(data.students) > len(data.methods) else ""
    if len(data.methods) > 1:
        grey = f" Grey: {data.method_names[0]}." if len(data.method_names) > MOST_LINES else ""
        return (
            f"Average performance of {', '.join(m.method for m in data.methods)} over the stream of {data.name}, "
            f"over all tasks, those to come included.{grey}{dots}"
        )
    length = data.distill[data.methods[0].method]["steps_per_stage"]
    current = f"the current task within every stage ({length} steps each), and " if data.tables.curves else ""
    return (
        f"{data.measure.capitalize()} over the stream of {data.name}: {current}after every stage the means "
        "over all tasks, those to come included (average performance), and over the tasks so far; "
        f"tasks without an admitted teacher count as 0.{dots}"
    )
