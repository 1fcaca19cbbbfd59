"""How much of the student is protected, over the stream."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from matplotlib.figure import Figure

from analysis.load import Dataset
from analysis.style import COLUMN_INCHES, method_line


def draw(data: Dataset) -> Figure | None:
    """X: stages done; y: share of the parameters that are masked, per method; None if no method masks."""
    values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in data.stages:
        if row.masked_share is not None:
            values[row.method][row.stage + 1].append(row.masked_share)
    if not values:
        return None
    figure = Figure(figsize=(COLUMN_INCHES, 1.6 + 0.14 * -(-len(values) // 3)))
    axes = figure.subplots()
    for method, stages in values.items():
        xs = sorted(stages)
        style = method_line(data.method_names.index(method) if method in data.method_names else 0)
        means = [float(np.mean(stages[x])) for x in xs]
        axes.plot(xs, means, marker="o", markersize=2.5, label=method, clip_on=False, **style)
        for x in xs if any(len(found) > 1 for found in stages.values()) else ():
            axes.plot([x] * len(stages[x]), stages[x], ".", markersize=2, color=style["color"], clip_on=False)
    num_stages = len(data.stream)
    axes.set(xlim=(0, num_stages), ylim=(0, 1), xlabel="stages done", ylabel="masked parameters (share)")
    axes.set_xticks(range(0, num_stages + 1, 1 if num_stages <= 20 else 5))
    axes.grid(axis="y")
    figure.legend(loc="outside lower center", ncols=3, fontsize=6.5)
    return figure


def caption(data: Dataset) -> str:
    """What the figure shows, without the conditions."""
    dots = " Small dots: single seeds." if len(data.students) > len(data.method_names) else ""
    return (
        f"Parameter masking over the stream of {data.name}: share of the student's parameters that later stages "
        f"may not change, or only a little, after every stage.{dots}"
    )
