"""Methods by size: average performance against the number of parameters at the end of the stream."""

from __future__ import annotations

from matplotlib.figure import Figure

from analysis.dataset import Dataset
from analysis.style import COLUMN_INCHES, GUIDE, method_colour
from cpd.evaluation.summary import MethodMeasures

#: With smaller ratios of the largest to the smallest size, there is nothing to see.
LEAST_RATIO = 1.5


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
        per_seed = method.average_performance["mean"].per_seed
        axes.plot([parameters] * 2, [min(per_seed), max(per_seed)], color=colour, linewidth=0.8)
        axes.plot(parameters, success, "o", color=colour, markersize=3.6 if first or is_best else 2.4)
    steps = sorted((parameters, success) for parameters, success, method in points if method in best)
    largest = max(parameters for parameters, *_ in points)
    axes.step(
        [parameters for parameters, _ in steps] + [largest],
        [success for _, success in steps] + [steps[-1][1]],
        where="post",
        color=method_colour(0),
        linewidth=0.6,
        linestyle=(0, (2, 1.5)),
        zorder=1,
    )
    for parameters, success, method in points:
        if method in best or method is data.methods[0]:
            right = parameters > 0.4 * largest
            axes.annotate(
                method.method,
                (parameters, success),
                xytext=(-3 if right else 3, -3),
                textcoords="offset points",
                ha="right" if right else "left",
                va="top",
                fontsize=6,
            )
    axes.set_xscale("log")
    axes.set_xlabel("parameters at the end of the stream")
    axes.set_ylabel("average performance")
    axes.margins(x=0.08, y=0.12)
    axes.grid(axis="y")
    return figure


def caption(data: Dataset) -> str:
    """Say what the figure shows, without the conditions."""
    return (
        f"Average performance at the end of the stream on {data.name} against the number of parameters. Points: "
        "means over seeds; lines: all seeds. Named: the first method, and those that no method of that size or "
        "less surpasses (dashed: their success)."
    )
