"""Whether the student's belief about the task is calibrated: its confidence against how often it is right."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from analysis.beliefs import final_episodes
from analysis.dataset import Dataset
from analysis.style import COLUMN_INCHES, GUIDE, METHOD_COLOURS
from cpd.evaluation.intervals import wilson

#: Limits of the bins of confidence. Most episodes are in the last one.
EDGES = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
#: Fewest episodes below the last limit with which there is something to see.
MIN_DOUBTFUL = 10


def draw(data: Dataset, method: str) -> Figure | None:
    """Draw the share of right beliefs by confidence, with the number of episodes in each bin.

    Return None unless the method's students are in doubt about the task in at least `MIN_DOUBTFUL` episodes.
    """
    rows = final_episodes(data, method)
    confidence = np.array([row.confidence for row in rows], float)
    right = np.array([row.believed == row.task for row in rows], bool)
    if (confidence < EDGES[-1]).sum() < MIN_DOUBTFUL:
        return None
    bins = np.digitize(confidence, EDGES)
    counts = np.array([(bins == index).sum() for index in np.unique(bins)])
    means = np.array([confidence[bins == index].mean() for index in np.unique(bins)])
    hits = np.array([right[bins == index].sum() for index in np.unique(bins)])
    shares, (low, high) = hits / counts, wilson(hits, counts)
    figure = Figure(figsize=(0.75 * COLUMN_INCHES, 0.75 * COLUMN_INCHES))
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=GUIDE, linewidth=0.8, linestyle=(0, (4, 2)), zorder=1)
    axes.errorbar(
        means, shares, yerr=[shares - low, high - shares], fmt="o", markersize=3.5, linewidth=0.8, capsize=2,
        color=METHOD_COLOURS[0], clip_on=False,
    )  # fmt: skip
    for x, y, count in zip(means, shares, counts, strict=True):
        # Below the diagonal, where intervals of a calibrated belief leave room.
        label = axes.annotate(f"{count:,}", (x, y), (4, -7), textcoords="offset points", fontsize=5.5)
        label.set(color="#555555", in_layout=False)
    axes.set(xlim=(0, 1.1), ylim=(0, 1.02), xlabel="probability of the most likely task", ylabel="share right")
    axes.set_xticks(np.linspace(0, 1, 6))
    return figure


def caption(data: Dataset, method: str) -> str:
    """Say what the figure shows, without the conditions."""
    seeds = len({row.seed for row in final_episodes(data, method)})
    pooled = f", {seeds} seeds together" if seeds > 1 else ""
    return (
        f"Calibration of the belief of {method} at the end of the stream of {data.name}{pooled}: how often the "
        "most likely task is the right one, by its probability after an episode's first observation. Points are "
        "means over bins, with 95 % Wilson intervals and the number of episodes; dashed: a calibrated belief."
    )
