"""Success over the stream: the current task within every stage, and averages over tasks after it."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.dataset import Dataset, short
from analysis.figures.small_multiples import MOST_LINES, behind, set_rates, set_stages, small_multiples
from analysis.style import (
    ACCENT,
    COLUMN_INCHES,
    PAGE_INCHES,
    SECOND_ACCENT,
    TEACHER_COLOUR,
    method_colour,
    method_line,
)
from cpd.evaluation.student_measures import StudentResults, rate_before

Line = dict[float, list[float]]
"""Position in the stream, in stages, to the values of all seeds there."""


def draw(data: Dataset) -> Figure:
    """X: stages done. One method: its current task and averages; several: their average performance."""
    if len(data.method_names) > MOST_LINES:
        return _panels(data)
    num_stages = len(data.stream)
    size, rotation = label_style(num_stages)
    longest = max(len(short(task)) for task in data.stream)
    header_inches = 0.0072 * size * longest * np.sin(np.radians(rotation))
    width = PAGE_INCHES if num_stages > 6 else COLUMN_INCHES
    methods = list(data.method_names)
    columns = (3 if width == COLUMN_INCHES else 6) if len(methods) > 4 else min(4, max(3, len(methods)))
    legend_inches = 0.14 * (-(-len(methods) // columns) - 1)
    figure = Figure(figsize=(width, 1.85 + header_inches + legend_inches))
    axes = figure.subplots()
    marker = 3.2 if num_stages <= 25 else 2.0
    for index, method in enumerate(methods):
        students = data.of_method(method)
        if len(methods) == 1:
            _current_task(axes, data, students)
            _average(
                axes,
                students,
                "average_seen_by_stage",
                {"color": SECOND_ACCENT},
                "s",
                marker,
                "mean of tasks so far",
            )
            _average(axes, students, "average_by_stage", {"color": ACCENT}, "o", marker, "mean of all tasks")
        else:
            _average(axes, students, "average_by_stage", method_line(index), "o", marker, method)
    for stage in range(1, num_stages):
        axes.axvline(stage, color="#d4d4d4", linewidth=0.5, zorder=0)
    axes.set_xticks(range(0, num_stages + 1, 1 if num_stages <= 20 else 5))
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    # The legend of a single method tells which tasks each of its curves is of.
    success = "success rate" if len(methods) == 1 else "success, mean of all tasks"
    axes.set(xlim=(0, num_stages), ylim=(-0.03, 1.03), xlabel="stages done", ylabel=success)
    axes.grid(axis="y")
    top = axes.secondary_xaxis("top")
    style: dict[str, Any] = {"rotation": rotation, "fontsize": size}
    if rotation:
        style |= {"ha": "left", "rotation_mode": "anchor"}
    top.set_xticks(np.arange(num_stages) + 0.5, _stage_names(data, " " if rotation else "\n"), **style)
    top.tick_params(length=0, pad=1)
    top.spines["top"].set_visible(False)
    figure.legend(loc="outside lower center", ncols=columns)
    return figure


def _panels(data: Dataset) -> Figure:
    """Every method's average performance, with that of the first behind it."""
    first, *_ = data.method_names

    def average(axes: Axes, method: str, style: dict[str, Any], label: str) -> None:
        _average(axes, data.of_method(method), "average_by_stage", style, "o", 1.6, label)

    figure, panels = small_multiples(
        data.method_names,
        lambda axes, method: average(axes, method, {"color": method_colour(0), "linewidth": 0.9}, "each method"),
        lambda axes: average(axes, first, {"color": TEACHER_COLOUR, "linewidth": 1.4}, first),
        ("stages done", "success, mean of all tasks"),
    )
    panels[0].set_ylim(-0.06, 1.06)
    set_stages(panels[0], len(data.stream))
    set_rates(panels[0])
    return figure


def label_style(num_stages: int) -> tuple[float, float]:
    """Size and rotation of the tasks' names above a stream at which neighbours do not touch."""
    if num_stages <= 3:
        return 7.0, 0
    return (7.0, 35) if num_stages <= 12 else (6.0, 45) if num_stages <= 25 else (5.2, 60)


def _stage_names(data: Dataset, gap: str) -> list[str]:
    admitted = np.any([student.admitted for student in data.students], axis=0)
    skipped = [not admitted[data.tasks.index(task)] for task in data.stream]
    return [short(task) + f"{gap}(skipped)" * skip for task, skip in zip(data.stream, skipped, strict=True)]


def _current_task(axes: Axes, data: Dataset, students: list[StudentResults]) -> None:
    """A stage's own task from before the stage to its end, the mean over the seeds that distilled it."""
    labelled = False
    for stage, task in enumerate(data.stream):
        column = data.tasks.index(task)
        line: Line = defaultdict(list)
        for student in (s for s in students if s.admitted[column]):
            key = (student.method, student.seed, stage, task)
            points = [r for r in data.tables.curves if (r.method, r.seed, r.stage, r.task) == key]
            distill = data.distill[student.method]
            start = rate_before(student.matrix, stage, single_task=distill["protocol"] == "single_task")
            if points and points[0].step > 0 and start is not None:
                line[stage].append(start)
            for row in points:
                line[stage + row.step / distill["steps_per_stage"]].append(row.successes / row.episodes)
        if line:
            label = None if labelled else "current task"
            width = 1.0 if len(data.stream) <= 25 else 0.6
            _plot(axes, line, color=method_colour(0), linewidth=width, label=label)
            labelled = True


def _average(
    axes: Axes,
    students: list[StudentResults],
    measure: str,
    style: dict[str, Any],
    marker: str,
    size: float,
    label: str,
) -> None:
    """One of the averages by stage: the mean over seeds, and every seed as a small dot where there are several."""
    line: Line = defaultdict(list)
    for student in students:
        for stage, value in enumerate(getattr(student.measures, measure)):
            if value is not None:
                line[stage].append(value)
    _plot(axes, line, **style, marker=marker, markersize=size, label=label)
    if len(students) > 1:
        every = [(x, value) for x, values in line.items() for value in values]
        xs, ys = [x for x, _ in every], [y for _, y in every]
        axes.plot(xs, ys, ".", color=style["color"], markersize=2, alpha=0.6, clip_on=False)


def _plot(axes: Axes, line: Line, **style: Any) -> None:
    xs = sorted(line)
    axes.plot(xs, [float(np.mean(line[x])) for x in xs], clip_on=False, **style)


def caption(data: Dataset) -> str:
    """What the figure shows, without the conditions."""
    dots = " Small dots: single seeds." if len(data.students) > len(data.methods) else ""
    if len(data.methods) > 1:
        return (
            f"Average performance of {', '.join(m.method for m in data.methods)} over the stream of {data.name}, "
            f"over all tasks, those to come included.{behind(data.method_names)}{dots}"
        )
    length = data.distill[data.methods[0].method]["steps_per_stage"]
    current = f"the current task within every stage ({length} steps each), and " if data.tables.curves else ""
    return (
        f"Success over the stream of {data.name}: {current}after every stage the means over all tasks, those to "
        "come included (average performance), and over the tasks so far; tasks without an admitted teacher count "
        f"as 0.{dots}"
    )
