"""Success at the end of the stream, method by method and task by task."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from analysis.dataset import Dataset, mean_rate, short
from analysis.figures.fig_success_matrix import heat
from analysis.style import COLUMN_INCHES, PAGE_INCHES


def draw(data: Dataset) -> Figure:
    """Draw a row for the teachers and each method and a column per task: per cent, means over seeds."""
    names = [f"teacher ({data.labels['teacher_recipe']})", *data.method_names]
    rates = np.full((len(names), len(data.tasks)), np.nan)
    for column, task in enumerate(data.tasks):
        finals = [[s.measures.tasks[column].final for s in data.of_method(m)] for m in data.method_names]
        rates[:, column] = [mean_rate(data.teachers_of(task)), *map(mean_rate, finals)]
    wide = len(data.tasks) > 12
    size = 5.5 if len(data.tasks) > 25 else 6.5
    header = 0.0075 * size * max(len(short(task)) for task in data.tasks)
    figure = Figure(figsize=(PAGE_INCHES if wide else COLUMN_INCHES, 0.165 * len(names) + header + 0.2))
    axes = figure.subplots()
    heat(axes, rates, 3.6 if len(data.tasks) > 25 else 6.0)
    axes.axhline(0.5, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=6.5)
    axes.set_xticks(range(len(data.tasks)), [short(task) for task in data.tasks], rotation=90, fontsize=size)
    axes.tick_params(axis="both", length=0, pad=2, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.set_xlabel(f"{data.measure} on {data.goals} goals (%)", fontsize=6.5)
    return figure


def caption(data: Dataset) -> str:
    """Say what the figure shows, without the conditions."""
    averaged = ", means over seeds" if len(data.students) > len(data.method_names) else ""
    return (
        f"{data.measure.capitalize()} in per cent on every task at the end of the stream of "
        f"{data.name}{averaged}: the teachers, and the students of every method; hatched: not measured."
    )
