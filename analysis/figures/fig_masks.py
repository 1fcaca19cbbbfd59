"""How much of the student is protected in every stage of the stream."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.dataset import Dataset
from analysis.figures.small_multiples import MOST_LINES, behind, set_rates, set_stages, small_multiples
from analysis.style import COLUMN_INCHES, TEACHER_COLOUR, method_colour, method_line

Shares = dict[int, list[float]]
"""Stage, from 1 on, to the masked shares of all seeds."""


def draw(data: Dataset) -> Figure | None:
    """X: stage; y: share of the parameters that are masked in it, per method; None if no method masks."""
    values = _shares(data)
    if not values:
        return None
    if len(values) > MOST_LINES:
        return _panels(data, values)
    figure = Figure(figsize=(COLUMN_INCHES, 1.6 + 0.14 * -(-len(values) // 3)))
    axes = figure.subplots()
    for method, shares in values.items():
        style = method_line(data.method_names.index(method) if method in data.method_names else 0)
        _line(axes, shares, {**style, "markersize": 2.5}, method)
    num_stages = len(data.stream)
    axes.set(xlim=(0, num_stages), ylim=(0, 1), xlabel="stage", ylabel="masked parameters (share)")
    axes.set_xticks(range(0, num_stages + 1, 1 if num_stages <= 20 else 5))
    axes.grid(axis="y")
    figure.legend(loc="outside lower center", ncols=3, fontsize=6.5)
    return figure


def _shares(data: Dataset) -> dict[str, Shares]:
    """Of every method that masks."""
    values: dict[str, Shares] = defaultdict(lambda: defaultdict(list))
    for row in data.tables.stages:
        if row.masked_share is not None:
            values[row.method][row.stage + 1].append(row.masked_share)
    return values


def _panels(data: Dataset, values: dict[str, Shares]) -> Figure:
    """Every method that masks, with the first of them behind it."""
    first = next(iter(values))
    own: dict[str, Any] = {"color": method_colour(0), "linewidth": 0.9, "markersize": 1.6}
    grey = {**own, "color": TEACHER_COLOUR, "linewidth": 1.4}
    figure, panels = small_multiples(
        list(values),
        lambda axes, method: _line(axes, values[method], own, "each method"),
        lambda axes: _line(axes, values[first], grey, first),
        ("stage", "masked parameters (share)"),
    )
    panels[0].set_ylim(0, 1)
    set_stages(panels[0], len(data.stream))
    set_rates(panels[0])
    return figure


def _line(axes: Axes, shares: Shares, style: dict[str, Any], label: str) -> None:
    """The mean over seeds, and every seed as a small dot where there are several."""
    xs = sorted(shares)
    axes.plot(xs, [float(np.mean(shares[x])) for x in xs], marker="o", label=label, clip_on=False, **style)
    if any(len(found) > 1 for found in shares.values()):
        for x in xs:
            axes.plot([x] * len(shares[x]), shares[x], ".", markersize=2, color=style["color"], clip_on=False)


def caption(data: Dataset) -> str:
    """What the figure shows, without the conditions."""
    dots = " Small dots: single seeds." if len(data.students) > len(data.method_names) else ""
    return (
        f"Parameter masking over the stream of {data.name}: share of the student's parameters that a stage may "
        f"not change, or only a little. In the first nothing is masked.{behind(list(_shares(data)))}{dots}"
    )
