"""Performance profiles: how many runs of a method reach how much success."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from analysis.load import Dataset
from analysis.style import COLUMN_INCHES, TEACHER_COLOUR, method_line
from cpd.metrics import performance_profile
from cpd.summary import finals

THRESHOLDS = np.linspace(0.0, 1.0, 101)


def draw(data: Dataset) -> Figure | None:
    """X: success; y: share of the runs (seed and task) that exceed it; None if no stream is finished."""
    methods = [m.method for m in data.methods if m.seeds]
    if not methods:
        return None
    figure = Figure(figsize=(COLUMN_INCHES, 1.75 + 0.14 * -(-(len(methods) + 1) // 3)))
    axes = figure.subplots()
    rates = np.array([data.teacher_scores])
    if rates.size:
        profile = performance_profile(rates, THRESHOLDS - 1e-9)
        label = f"teacher ({data.labels['teacher_recipe']})"
        axes.step(
            THRESHOLDS, profile, where="pre", color=TEACHER_COLOUR, linewidth=1.6, label=label, clip_on=False
        )
    for method in methods:
        scores = np.array([finals(s) for s in data.of_method(method) if s.measures.final_stage is not None])
        # At least, not more than: a run that always succeeds is counted up to 1.
        profile = performance_profile(scores, THRESHOLDS - 1e-9)
        style = method_line(data.method_names.index(method))
        axes.step(THRESHOLDS, profile, where="pre", linewidth=0.9, label=method, clip_on=False, **style)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="success rate at the end of the stream, at least")
    axes.set_ylabel("share of tasks and seeds")
    axes.grid()
    figure.legend(loc="outside lower center", ncols=3, fontsize=6.5)
    return figure


def caption(data: Dataset) -> str:
    """What the figure shows, without the conditions."""
    return (
        f"Performance profiles on {data.name} (Agarwal et al. 2021): share of the tasks, over all seeds, on which "
        "a method's success at the end of the stream is at least the value on the x axis; tasks without an "
        "admitted teacher count as 0. Higher is better; where a line falls, runs fail."
    )
