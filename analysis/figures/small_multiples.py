"""A panel per method, for more methods than lines that one panel can hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.style import METHOD_COLOURS, PAGE_INCHES

#: Lines beyond the last colour could only be told apart by dashes, and most would lie on top of each other.
MOST_LINES = len(METHOD_COLOURS)
NUM_COLUMNS = 5


def small_multiples(
    methods: Sequence[str],
    line: Callable[[Axes, str], None],
    reference: Callable[[Axes], None],
    labels: tuple[str, str],
) -> tuple[Figure, list[Axes]]:
    """Panels at page width with common axes, in the methods' order.

    Args:
        methods: one panel each, with its name as the title.
        line: draws a method into its panel.
        reference: draws what all panels have behind the method, with a label for the legend.
        labels: of the x axis and the y axis.

    Returns:
        The figure, and the panels, for what else they hold; limits and ticks set on one hold for all.
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
    for axes in grid.flat[len(methods) :]:
        axes.set_visible(False)
    for axes in panels[-num_columns:]:  # the lowest of every column
        axes.tick_params(labelbottom=True)
    figure.supxlabel(labels[0], fontsize=7)
    figure.supylabel(labels[1], fontsize=7)
    by_name = {
        name: handle for axes in panels for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(by_name.values(), by_name.keys(), loc="outside upper center", ncols=4, fontsize=6.5)
    return figure, panels


def set_stages(axes: Axes, num_stages: int) -> None:
    """Let the x axis of narrow panels run over the stages of a stream."""
    axes.set_xlim(0, num_stages)
    axes.set_xticks(range(0, num_stages + 1, 5 if num_stages <= 25 else 10))


def set_rates(axes: Axes) -> None:
    """Let the y axis of low panels tell rates."""
    axes.set_yticks([0, 0.5, 1], ["0", ".5", "1"])


def behind(methods: Sequence[str]) -> str:
    """The caption's sentence on the method that stands behind all others, where each has a panel."""
    return f" Grey: {methods[0]}." if len(methods) > MOST_LINES else ""
