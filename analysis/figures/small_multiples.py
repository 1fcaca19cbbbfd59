"""A panel per method, for more methods than lines that one panel can hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.style import METHOD_COLOURS, PAGE_INCHES

#: More lines than colours would differ only in their dashes, and most would lie on top of each other.
MOST_LINES = len(METHOD_COLOURS)
NUM_COLUMNS = 5


def small_multiples(
    methods: Sequence[str],
    line: Callable[[Axes, str], None],
    reference: Callable[[Axes], None],
    labels: tuple[str, str],
) -> tuple[Figure, list[Axes]]:
    """Draw one panel per method, with common axes, at page width.

    Args:
        methods: their names are the panels' titles.
        line: draws a method into its panel.
        reference: draws what all panels show behind the method, with a label for the legend.
        labels: of the x axis and the y axis.

    Returns:
        The figure and the panels. Limits and ticks set on one panel apply to all.
    """
    num_columns = min(NUM_COLUMNS, len(methods))
    num_rows = -(-len(methods) // num_columns)
    figure = Figure(figsize=(PAGE_INCHES, 0.88 * num_rows + 0.5))
    grid = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False)
    panels: list[Axes] = list(grid.flat[: len(methods)])
    for axes, method in zip(panels, methods, strict=True):
        reference(axes)
        line(axes, method)
        axes.set_title(method, fontsize=6.5, pad=2.5)
        axes.tick_params(labelsize=6, length=1.8, pad=1.5)
        axes.grid()
    for axes in panels[-num_columns:]:  # the lowest of every column
        axes.tick_params(labelbottom=True)
    finish_panels(figure, grid, len(methods), labels, num_legend_columns=4)
    return figure, panels


def finish_panels(
    figure: Figure,
    grid: npt.NDArray[Any],
    num_panels: int,
    labels: tuple[str, str],
    *,
    num_legend_columns: int,
) -> None:
    """Hide the empty places of `grid`, label the common axes, and add one legend for all panels."""
    for axes in grid.flat[num_panels:]:
        axes.set_visible(False)
    figure.supxlabel(labels[0], fontsize=7)
    figure.supylabel(labels[1], fontsize=7)
    by_name: dict[str, Any] = {}  # panels repeat names
    for axes in grid.flat[:num_panels]:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            by_name.setdefault(name, handle)
    columns = min(num_legend_columns, len(by_name))
    figure.legend(by_name.values(), by_name.keys(), loc="outside upper center", ncols=columns, fontsize=6.5)


def set_narrow_stages(axes: Axes, num_stages: int) -> None:
    """Set the limits and ticks of the x axis of a narrow panel."""
    axes.set_xlim(0, num_stages)
    axes.set_xticks(range(0, num_stages + 1, 5 if num_stages <= 25 else 10))


def behind(methods: Sequence[str]) -> str:
    """Return the caption's sentence on the method drawn behind the others, if each method has a panel."""
    return f" Grey: {methods[0]}." if len(methods) > MOST_LINES else ""
