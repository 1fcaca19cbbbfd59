"""Forward transfer, method by method and stage by stage."""

from __future__ import annotations

import re

import numpy as np
from matplotlib.figure import Figure

from analysis.dataset import Dataset, short
from analysis.style import COLUMN_INCHES, PAGE_INCHES


def draw(data: Dataset) -> Figure | None:
    """Draw methods by stages and their mean. Return None without students of single tasks to compare with."""
    transfers = {m.method: m.forward_transfer for m in data.methods if m.forward_transfer is not None}
    if not transfers:
        return None
    gains = np.array([[*transfer.by_stage, transfer.mean.estimate] for transfer in transfers.values()], float)
    num_rows, num_columns = gains.shape
    wide = num_columns > 12
    digits = 2 if num_columns <= 12 else 1
    size = 5.0 if num_columns > 25 else 6.0
    header = 0.0075 * 6.5 * max(len(short(task)) for task in data.stream)
    figure = Figure(figsize=(PAGE_INCHES if wide else COLUMN_INCHES, 0.17 * num_rows + header + 0.42))
    axes = figure.subplots()
    axes.set_facecolor("#eeeeee")
    axes.patch.set_hatch("//////")
    axes.patch.set_edgecolor("#c4c4c4")
    image = axes.imshow(
        np.ma.masked_invalid(gains), cmap="RdBu", vmin=-1, vmax=1, aspect="auto", interpolation="nearest"
    )
    for (row, column), value in np.ndenumerate(gains):
        if not np.isnan(value) and num_columns <= 25:
            colour = "white" if abs(value) > 0.6 else "black"
            number = axes.text(column, row, gain_text(value, digits), size=5.5, color=colour)
            number.set(ha="center", va="center", in_layout=False)
    axes.axvline(num_columns - 1.5, color="black", linewidth=0.8)
    axes.set_xticks(
        range(num_columns), [*(short(task) for task in data.stream), "mean"], rotation=90, fontsize=size
    )
    axes.set_yticks(range(num_rows), list(transfers), fontsize=6.5)
    axes.tick_params(axis="both", length=0, pad=2, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, orientation="horizontal", fraction=0.05, pad=0.03, aspect=35, shrink=0.8)
    bar.set_label("forward transfer", fontsize=6.5, labelpad=1)
    bar.set_ticks([-1, -0.5, 0, 0.5, 1])
    bar.ax.tick_params(labelsize=6, length=2, pad=1)
    bar.outline.set_visible(False)
    return figure


def gain_text(value: float, digits: int) -> str:
    """Format a gain without the zero before the point."""
    text = re.sub(r"^(-?)0\.", r"\1.", f"{round(value, digits) + 0.0:.{digits}f}")
    return text.replace("-", "\N{MINUS SIGN}")


def caption(data: Dataset) -> str:
    """Say what the figure shows, without the conditions."""
    left_out = dict.fromkeys(t for m in data.methods if m.forward_transfer for t in m.forward_transfer.left_out)
    named = f" ({', '.join(map(short, left_out))})" if left_out else ""
    return (
        f"Forward transfer on {data.name}: gain in the area under the learning curve of every stage's task over a "
        f"student that is distilled on this task alone (protocol single_task), as a share of what there is to "
        f"gain; mean over seeds, last column: mean over stages. Hatched: left out, since the single student "
        f"succeeds whenever it is looked at{named}, or not measured."
    )
