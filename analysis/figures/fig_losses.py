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
from analysis.figures.fig_stream import label_style
from analysis.figures.small_multiples import MOST_LINES, behind, set_stages, small_multiples
from analysis.style import ACCENT, COLUMN_INCHES, PAGE_INCHES, method_colour, method_line

PARTS = {"current": "loss, current task", "replay": "loss, replay"}


def draw(data: Dataset) -> Figure | None:
    """X: stages done; one panel per part of the loss, one line per method; None without records."""
    methods = _methods(data)
    if not methods:
        return None
    if len(methods) > MOST_LINES:
        return _panels(data, methods)
    parts = [part for part in PARTS if any(getattr(row, part) is not None for row in data.tables.losses)]
    num_stages = len(data.stream)
    wide = num_stages > 6
    size, rotation = label_style(num_stages)
    header = 0.0072 * size * max(len(short(task)) for task in data.stream) * np.sin(np.radians(rotation))
    legend_columns = 6 if wide else 3
    legend = 0.14 * -(-len(methods) // legend_columns) if len(methods) > 1 else 0.0
    figure = Figure(figsize=(PAGE_INCHES if wide else COLUMN_INCHES, 1.15 * len(parts) + 0.35 + header + legend))
    panels = figure.subplots(len(parts), 1, sharex=True, squeeze=False)[:, 0]
    for axes, part in zip(panels, parts, strict=True):
        for method in methods:
            _lines(axes, data, method, part, method, method_line(data.method_names.index(method)))
        for stage in range(1, num_stages):
            axes.axvline(stage, color="#d4d4d4", linewidth=0.5, zorder=0)
        axes.set_ylabel(PARTS[part], fontsize=7)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if _decades(axes) > 2 else (1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(axis="y")
    panels[-1].set(xlim=(0, num_stages), xlabel="stages done")
    panels[-1].set_xticks(range(0, num_stages + 1, 1 if num_stages <= 20 else 5))
    top = panels[0].secondary_xaxis("top")
    names = [short(task) for task in data.stream]
    if rotation:
        top.set_xticks(
            np.arange(num_stages) + 0.5, names, rotation=rotation, fontsize=size, ha="left", rotation_mode="anchor"
        )
    else:
        top.set_xticks(np.arange(num_stages) + 0.5, names, fontsize=size)
    top.tick_params(length=0, pad=1)
    top.spines["top"].set_visible(False)
    if len(methods) > 1:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=legend_columns)
    return figure


def _methods(data: Dataset) -> list[str]:
    """Those with records, in the data's order."""
    recorded = {row.method for row in data.tables.losses}
    return [method for method in data.method_names if method in recorded]


def _panels(data: Dataset, methods: list[str]) -> Figure:
    """Both parts of every method's loss, with the first's on the current task behind them."""

    def both(axes: Axes, method: str) -> None:
        for part, colour in (("current", method_colour(0)), ("replay", ACCENT)):
            _lines(axes, data, method, part, PARTS[part].removeprefix("loss, "), {"color": colour})

    figure, panels = small_multiples(
        methods,
        both,
        lambda axes: _lines(axes, data, methods[0], "current", methods[0], {"color": "#b5b5b5"}),
        ("stages done", "loss"),
    )
    panels[0].set_yscale("log")
    set_stages(panels[0], len(data.stream))
    panels[0].yaxis.set_major_locator(LogLocator())
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].yaxis.set_minor_locator(NullLocator())
    return figure


def _decades(axes: Axes) -> float:
    """How many powers of ten the axis spans."""
    low, high = axes.get_ylim()
    return float(np.log10(high / low))


def _lines(axes: Axes, data: Dataset, method: str, part: str, name: str, style: Mapping[str, Any]) -> None:
    """One line per stage, since losses jump between them."""
    values: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in data.tables.losses:
        value = getattr(row, part)
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
    """What the figure shows, without the conditions."""
    seeds = " Means over seeds." if len(data.students) > len(data.method_names) else ""
    return (
        f"Distillation losses over the stream of {data.name} (log scale): divergence from the current task's "
        "teacher, and on what is replayed of earlier tasks (nothing in the first stage, or without a memory), as "
        f"each method's recipe defines it.{behind(_methods(data))}{seeds}"
    )
