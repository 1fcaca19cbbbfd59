"""Methods by size: average performance against the number of parameters at the end of the stream."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from analysis.dataset import Dataset
from analysis.style import COLUMN_INCHES, GUIDE, method_colour
from cpd.evaluation.summary import MethodMeasures

#: With smaller ratios of the largest to the smallest size, there is nothing to see.
LEAST_RATIO = 1.5
#: Of more methods, only the coloured ones are named.
MOST_NAMED = 12


def _measured(data: Dataset) -> list[tuple[int, float, MethodMeasures]]:
    """Number of parameters, average performance and method, of the methods that have both."""
    return [
        (method.parameters, method.average_performance["mean"].estimate, method)
        for method in data.methods
        if method.parameters and "mean" in method.average_performance
    ]


def _best(data: Dataset) -> list[MethodMeasures]:
    """The methods that no other method with as few parameters surpasses, by size."""
    best: list[MethodMeasures] = []
    highest = float("-inf")
    for _, success, method in sorted(_measured(data), key=lambda entry: (entry[0], -entry[1])):
        if success > highest:
            best.append(method)
            highest = success
    return best


def draw(data: Dataset) -> Figure | None:
    """Draw a point per method, with the range over seeds; None unless sizes differ by `LEAST_RATIO`."""
    points = _measured(data)
    sizes = [parameters for parameters, *_ in points]
    if not sizes or max(sizes) < LEAST_RATIO * min(sizes):
        return None
    best = _best(data)
    figure = Figure(figsize=(COLUMN_INCHES, 2.2))
    axes = figure.subplots()
    for parameters, success, method in points:
        first, is_best = method is data.methods[0], method in best
        colour = method_colour(1 if first else 0) if first or is_best else GUIDE
        per_seed = [100 * value for value in method.average_performance["mean"].per_seed]
        axes.plot([parameters / 1e6] * 2, [min(per_seed), max(per_seed)], color=colour, linewidth=0.8)
        size = 3.6 if first or is_best else 2.4
        axes.plot(parameters / 1e6, 100 * success, "o", color=colour, markersize=size)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 5, 7)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("parameters at the end of the stream (million)")
    axes.set_ylabel("average performance (%)")
    axes.margins(x=0.08, y=0.06)
    axes.grid(axis="y")
    named = points if len(points) <= MOST_NAMED else [p for p in points if p[2] in best or p[2] is data.methods[0]]
    _name(axes, [(parameters / 1e6, 100 * success, method.method) for parameters, success, method in named])
    return figure


def _name(axes: Axes, points: list[tuple[float, float, str]]) -> None:
    """Name the points: beside them where there is room, else on the right, with a line to each."""
    to_axes = axes.transData + axes.transAxes.inverted()
    places = [to_axes.transform(point[:2]) for point in points]
    crowded = []
    for index, (point, (x, y)) in enumerate(zip(points, places, strict=True)):
        others = [*places[:index], *places[index + 1 :]]
        # A name takes up to .3 of the axes' width and .08 of their height.
        if x > 0.7 or any(0 <= other_x - x < 0.3 and abs(other_y - y) < 0.08 for other_x, other_y in others):
            crowded.append(point)
        else:
            axes.annotate(point[2], point[:2], xytext=(4, 0), textcoords="offset points", va="center", fontsize=6)
    bottom, top = axes.get_ylim()
    gap = (top - bottom) * 0.085
    heights: list[float] = []
    for _, success, _ in (crowded := sorted(crowded, key=lambda point: (-point[1], -point[0]))):
        heights.append(min(success, heights[-1] - gap) if heights else min(success, top))
    # Names that would fall below the axes push those above them up.
    floor = bottom
    for index in range(len(heights) - 1, -1, -1):
        heights[index] = max(heights[index], floor)
        floor = heights[index] + gap
    line = {"arrowstyle": "-", "color": GUIDE, "linewidth": 0.4, "shrinkA": 1, "shrinkB": 2, "relpos": (0, 0.5)}
    for (parameters, success, name), height in zip(crowded, heights, strict=True):
        axes.annotate(
            name,
            (parameters, success),
            xytext=(1.06, height),
            textcoords=("axes fraction", "data"),
            va="center",
            fontsize=6,
            arrowprops=line,
        )


def caption(data: Dataset) -> str:
    """Say what the figure shows, without the conditions."""
    return (
        f"Average performance at the end of the stream on {data.name} against the number of parameters. Points: "
        "means over seeds; vertical lines: all seeds. Coloured: the first method, and those that no method of "
        "that size or less surpasses."
    )
