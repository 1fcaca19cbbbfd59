"""What all figures with a grid of small panels share."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
from matplotlib.figure import Figure


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
