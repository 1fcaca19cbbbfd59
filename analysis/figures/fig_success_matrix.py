"""The success matrix: every task after every stage, with the teachers below it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from analysis.dataset import Dataset, mean_matrix, mean_rate, short
from analysis.style import COLUMN_INCHES, PAGE_INCHES
from cpd.evaluation.intervals import Floats
from cpd.evaluation.measures import Bools

COLOURS = "Blues"


def draw(data: Dataset, method: str) -> Figure:
    """Draw rows for before training, after every stage and the teachers, and a column per distinct task.

    Numbers are per cent, averaged over seeds; outlined cells are a task's own stage; hatched cells were not
    measured.
    """
    rates = mean_matrix(data.of_method(method))
    num_rows, num_tasks = rates.shape
    wide = num_tasks > 14
    row_inches = 0.125 if num_rows > 30 else 0.165 if num_rows > 8 else 0.2
    label_size = 5.5 if num_rows > 30 else 6.5 if num_rows > 8 else 7.0
    text_size = 3.6 if wide else 6.0 if num_tasks > 6 else 7.0
    longest = max(len(short(task)) for task in data.tasks)
    # Names above few, wide columns stay horizontal.
    rotation = 0 if num_tasks <= 3 else 90
    header_inches = 0.16 if rotation == 0 else 0.0075 * label_size * longest
    height = row_inches * (num_rows + 1.4) + header_inches + 0.22
    figure = Figure(figsize=(PAGE_INCHES if wide else COLUMN_INCHES, height))
    matrix, teacher = figure.subplots(2, 1, height_ratios=[num_rows, 1])

    admitted = np.any([student.admitted for student in data.of_method(method)], axis=0)
    heat(matrix, rates, text_size)
    for stage, task in enumerate(data.stream):
        column = data.tasks.index(task)
        if admitted[column]:
            corner = (column - 0.5, stage + 0.5)
            matrix.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="black", linewidth=0.7, zorder=3))
    matrix.set_yticks(range(num_rows), _row_names(data, admitted), fontsize=label_size)
    matrix.set_xticks(
        range(num_tasks), [short(task) for task in data.tasks], rotation=rotation, fontsize=label_size
    )
    matrix.tick_params(axis="both", length=0, pad=2, top=True, labeltop=True, bottom=False, labelbottom=False)

    heat(teacher, np.array([[mean_rate(data.teachers_of(task)) for task in data.tasks]]), text_size)
    teacher.set_yticks([0], [f"teacher ({data.labels['teacher_recipe']})"], fontsize=label_size)
    teacher.set_xticks([])
    teacher.set_xlabel(f"{data.measure} on {data.goals} goals (%)", fontsize=label_size)
    matrix.set_ylabel("after stage", fontsize=label_size)
    teacher.tick_params(axis="both", length=0, pad=2)
    if wide:
        bar = figure.colorbar(matrix.images[0], ax=matrix, fraction=0.03, pad=0.012, aspect=45)
        bar.set_label(f"{data.measure} (%)", fontsize=label_size)
        bar.ax.tick_params(labelsize=label_size, length=2)
        bar.outline.set_visible(False)
        # The teachers' row must stay as wide as the matrix above it.
        figure.colorbar(teacher.images[0], ax=teacher, fraction=0.03, pad=0.012).ax.set_visible(False)
    return figure


def _row_names(data: Dataset, admitted: Bools) -> Sequence[str]:
    """Return the number and task of every stage; one without an admitted teacher was skipped."""
    names = ["before training"]
    for stage, task in enumerate(data.stream, start=1):
        skipped = "" if admitted[data.tasks.index(task)] else " (skipped)"
        names.append(f"{stage}  {short(task)}{skipped}")
    return names


def heat(axes: Axes, rates: Floats, text_size: float) -> None:
    """Draw success rates as colours and, in per cent, as numbers; NaN is hatched."""
    axes.set_facecolor("#eeeeee")
    axes.patch.set_hatch("//////")
    axes.patch.set_edgecolor("#c4c4c4")
    percent = 100 * np.ma.masked_invalid(rates)
    axes.imshow(percent, cmap=COLOURS, vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    for (row, column), value in np.ndenumerate(rates):
        if not np.isnan(value):
            colour = "white" if value > 0.6 else "black"
            number = axes.text(column, row, f"{100 * value:.0f}", size=text_size, color=colour)
            number.set(ha="center", va="center", in_layout=False)  # thousands of numbers would slow the layout
    axes.set_xticks(np.arange(rates.shape[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(rates.shape[0] + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)


def caption(data: Dataset, method: str) -> str:
    """Say what the figure shows, without the conditions."""
    count = len(data.of_method(method))
    averaged = f", mean of {count} seeds" if count > 1 else ""
    return (
        f"Success matrix of {method} on {data.name}{averaged}: {data.rate} in per cent on every task (columns) "
        "before training and after every stage (rows); outlined: a stage's own task; hatched: not measured; "
        "below: the teachers."
    )
