"""Performance profiles: how many runs of a method reach how much success."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.dataset import Dataset
from analysis.figures.small_multiples import MOST_LINES, set_rates, small_multiples
from analysis.style import COLUMN_INCHES, TEACHER_COLOUR, method_colour, method_line
from cpd.evaluation.intervals import performance_profile
from cpd.evaluation.summary import finals

THRESHOLDS = np.linspace(0.0, 1.0, 101)
SUCCESS = "success rate at the end of the stream, at least"
SHARE = "share of tasks and seeds"


def draw(data: Dataset) -> Figure | None:
    """X: success; y: share of the runs (seed and task) that exceed it; None if no stream is finished."""
    methods = [m.method for m in data.methods if m.seeds]
    if not methods:
        return None
    if len(methods) > MOST_LINES:
        return _panels(data, methods)
    figure = Figure(figsize=(COLUMN_INCHES, 1.75 + 0.14 * -(-(len(methods) + 1) // 3)))
    axes = figure.subplots()
    _teachers(axes, data)
    for method in methods:
        _method(axes, data, method, method, method_line(data.method_names.index(method)))
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel=SUCCESS, ylabel=SHARE)
    axes.grid()
    figure.legend(loc="outside lower center", ncols=3, fontsize=6.5)
    return figure


def _panels(data: Dataset, methods: list[str]) -> Figure:
    """Every method, with the teachers behind it."""
    figure, panels = small_multiples(
        methods,
        lambda axes, method: _method(axes, data, method, "each method", {"color": method_colour(0)}),
        lambda axes: _teachers(axes, data),
        (SUCCESS, SHARE),
    )
    panels[0].set(xlim=(0, 1), ylim=(0, 1.04))
    panels[0].set_xticks([0, 0.5, 1], ["0", ".5", "1"])
    set_rates(panels[0])
    return figure


def _teachers(axes: Axes, data: Dataset) -> None:
    rates = np.array([data.teacher_scores])
    if rates.size:
        label = f"teacher ({data.labels['teacher_recipe']})"
        _steps(axes, rates, color=TEACHER_COLOUR, linewidth=1.6, label=label)


def _method(axes: Axes, data: Dataset, method: str, label: str, style: dict[str, Any]) -> None:
    scores = np.array([finals(s) for s in data.of_method(method) if s.measures.final_stage is not None])
    _steps(axes, scores, linewidth=0.9, label=label, **style)


def _steps(axes: Axes, scores: npt.NDArray[np.float64], **style: Any) -> None:
    """At least, not more than: a run that always succeeds is counted up to 1."""
    profile = performance_profile(scores, THRESHOLDS - 1e-9)
    axes.step(THRESHOLDS, profile, where="pre", clip_on=False, **style)


def caption(data: Dataset) -> str:
    """What the figure shows, without the conditions."""
    return (
        f"Performance profiles on {data.name} (Agarwal et al. 2021): share of the tasks, over all seeds, on which "
        "a method's success at the end of the stream is at least the value on the x axis; tasks without an "
        "admitted teacher count as 0. Higher is better; where a line falls, runs fail."
    )
