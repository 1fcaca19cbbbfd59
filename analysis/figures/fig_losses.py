"""Losses over the stream: on the current task, and on what is replayed of earlier ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from analysis.dataset import Dataset, short
from analysis.figures.small_multiples import MOST_LINES, behind, set_narrow_stages, small_multiples
from analysis.figures.stream_axis import header_inches, name_stages, set_stages
from analysis.style import ACCENT, COLUMN_INCHES, PAGE_INCHES, method_colour, method_line

LABELS = {"current": "loss, current task", "replay": "loss, replay"}


def draw(data: Dataset) -> Figure | None:
    """Draw losses over stages: a panel per term of the loss, a line per method. Return None without records."""
    methods = _methods(data)
    if not methods:
        return None
    if len(methods) > MOST_LINES:
        return _panels(data, methods)
    terms = [term for term in LABELS if any(getattr(row, term) is not None for row in data.tables.losses)]
    num_stages = len(data.stream)
    wide = num_stages > 6
    legend_columns = 6 if wide else 3
    legend = 0.14 * -(-len(methods) // legend_columns) if len(methods) > 1 else 0.0
    height = 1.15 * len(terms) + 0.35 + header_inches(data.stream) + legend
    figure = Figure(figsize=(PAGE_INCHES if wide else COLUMN_INCHES, height))
    panels = figure.subplots(len(terms), 1, sharex=True, squeeze=False)[:, 0]
    for axes, term in zip(panels, terms, strict=True):
        for method in methods:
            _lines(axes, data, method, term, method, method_line(data.method_names.index(method)))
        set_stages(axes, num_stages)
        axes.set_ylabel(LABELS[term], fontsize=7)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if _decades(axes) > 2 else (1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(axis="y")
    panels[-1].set_xlabel("stages done")
    name_stages(panels[0], [short(task) for task in data.stream])
    if len(methods) > 1:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=legend_columns)
    return figure


def _methods(data: Dataset) -> list[str]:
    """Return the methods with records, in the data's order."""
    recorded = {row.method for row in data.tables.losses}
    return [method for method in data.method_names if method in recorded]


def _panels(data: Dataset, methods: list[str]) -> Figure:
    """Draw a panel per method with both terms, and behind them the first method's loss on the current task."""

    def both(axes: Axes, method: str) -> None:
        for term, colour in (("current", method_colour(0)), ("replay", ACCENT)):
            _lines(axes, data, method, term, LABELS[term].removeprefix("loss, "), {"color": colour})

    figure, panels = small_multiples(
        methods,
        both,
        lambda axes: _lines(axes, data, methods[0], "current", methods[0], {"color": "#b5b5b5"}),
        ("stages done", "loss"),
    )
    panels[0].set_yscale("log")
    set_narrow_stages(panels[0], len(data.stream))
    panels[0].yaxis.set_major_locator(LogLocator())
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].yaxis.set_minor_locator(NullLocator())
    return figure


def _decades(axes: Axes) -> float:
    """Return how many powers of ten the y axis spans."""
    low, high = axes.get_ylim()
    return float(np.log10(high / low))


def _lines(axes: Axes, data: Dataset, method: str, term: str, name: str, style: Mapping[str, Any]) -> None:
    """Draw one line per stage, since losses jump between stages."""
    values: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in data.tables.losses:
        value = getattr(row, term)
        if row.method == method and value is not None and value > 0:
            values[row.stage][row.step].append(value)
    label: str | None = name
    for stage, points in sorted(values.items()):
        steps = sorted(points)
        xs = [stage + step / data.distill[method]["steps_per_stage"] for step in steps]
        means = [float(np.mean(points[step])) for step in steps]
        axes.plot(xs, means, linewidth=0.8, label=label, **style)
        label = None


def caption(data: Dataset) -> str:
    """Say what the figure shows, without the conditions."""
    seeds = " Means over seeds." if len(data.students) > len(data.method_names) else ""
    return (
        f"Distillation losses over the stream of {data.name} (log scale): divergence from the current task's "
        "teacher, and on what is replayed of earlier tasks (nothing in the first stage, or without a memory), as "
        f"each method's recipe defines it.{behind(_methods(data))}{seeds}"
    )
