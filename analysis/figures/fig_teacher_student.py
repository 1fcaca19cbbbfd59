"""Teachers against students, task by task."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.dataset import Dataset, Spread, short, spread
from analysis.style import COLUMN_INCHES, TEACHER_COLOUR, method_colour
from cpd.evaluation.intervals import FEW_SEEDS

OWN_STAGE = "after its own stage"


def draw(data: Dataset) -> Figure:
    """Horizontal bars, since tasks have long names: the teacher, then every method's final success.

    A diamond marks a student's success after the task's own stage, so that its distance from the end of the bar
    is what was forgotten.
    """
    methods = list(dict.fromkeys(student.method for student in data.students))
    num_tasks, num_bars = len(data.tasks), 1 + len(methods)
    bar_inches = 0.055 if num_tasks > 25 else 0.085
    figure = Figure(figsize=(COLUMN_INCHES, num_tasks * (num_bars * bar_inches + 0.05) + 0.7))
    axes = figure.subplots()
    thickness = 0.8 / num_bars
    first = [row - 0.4 + thickness / 2 for row in range(num_tasks)]
    teacher = f"teacher ({data.labels['teacher_recipe']})"
    for position, task in zip(first, data.tasks, strict=True):
        _bar(axes, position, thickness, spread(data.teachers_of(task)), TEACHER_COLOUR, teacher)
    for index, method in enumerate(methods):
        for row, start in enumerate(first):
            measures = [student.measures.tasks[row] for student in data.of_method(method)]
            position = start + (index + 1) * thickness
            _bar(axes, position, thickness, spread([m.final for m in measures]), method_colour(index), method)
            _diamond(axes, position, spread([m.own for m in measures]))
            if {m.teacher_state for m in measures} == {"rejected"}:
                axes.text(0.99, position, "teacher rejected", size=6, style="italic", ha="right", va="center")
    axes.set_yticks(range(num_tasks), [short(task) for task in data.tasks], fontsize=7 if num_tasks <= 25 else 6)
    axes.set(xlim=(0, 1), ylim=(num_tasks - 0.45, -0.55), xlabel="success rate at the end of the stream")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    _legend(figure, axes, [teacher, *methods, OWN_STAGE])
    return figure


def _bar(axes: Axes, position: float, thickness: float, value: Spread | None, colour: str, label: str) -> None:
    if value is None:
        return
    axes.barh(position, value.mean, 0.92 * thickness, color=colour, label=label)
    if value.low is not None and value.high is not None:
        error = [[value.mean - value.low], [value.high - value.mean]]
        axes.errorbar(value.mean, position, xerr=error, color="black", elinewidth=0.6, capsize=0, clip_on=False)
    if value.points:
        ys = [position] * len(value.points)
        axes.plot(value.points, ys, "o", markersize=1.6, color="black", clip_on=False, zorder=3)


def _diamond(axes: Axes, position: float, value: Spread | None) -> None:
    if value is not None:
        axes.plot(
            value.mean,
            position,
            "D",
            markersize=2.6,
            markerfacecolor="white",
            markeredgecolor="black",
            markeredgewidth=0.6,
            clip_on=False,
            zorder=4,
            label=OWN_STAGE,
        )


def _legend(figure: Figure, axes: Axes, order: list[str]) -> None:
    """One entry per kind of mark, in the order of the bars."""
    handles, names = axes.get_legend_handles_labels()
    found = dict(zip(names, handles, strict=True))
    shown = [name for name in order if name in found]
    figure.legend([found[name] for name in shown], shown, loc="outside upper center", ncols=3)


def caption(data: Dataset) -> str:
    """What the figure shows, without the conditions."""
    seeds = [len(data.of_method(method.method)) for method in data.methods]
    marks = []
    if not seeds or min(seeds) == 1:
        marks.append("Whiskers of single seeds: Wilson 95 % intervals from episode counts.")
    if any(1 < count < FEW_SEEDS for count in seeds):
        marks.append("Dots: single seeds; whiskers of single teachers: Wilson 95 % intervals.")
    if any(count >= FEW_SEEDS for count in seeds):
        marks.append("Whiskers of students: bootstrap 95 % intervals over seeds.")
    return (
        f"Teachers and students on {data.name} at the end of the stream; diamonds: the student after the task's "
        f"own stage. {' '.join(marks)}"
    )
