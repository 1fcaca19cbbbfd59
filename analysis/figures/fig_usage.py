"""Which experts act on which task, layer by layer."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from analysis.dataset import Dataset, short
from analysis.style import COLUMN_INCHES, PAGE_INCHES
from cpd.evaluation.intervals import Floats


def draw(data: Dataset, method: str) -> Figure | None:
    """Draw a panel per layer with a row per task and a column per expert, for the method's first seed.

    Return None without records of usage, or if there is only one expert.
    """
    shares = _shares(data, method)
    if shares is None or shares.shape[2] == 1:
        return None
    num_layers, num_tasks, num_experts = shares.shape
    wide = num_layers * num_experts > 24
    label_size = 5.5 if num_tasks > 20 else 6.5
    row_inches = 0.11 if num_tasks > 20 else 0.14
    figure = Figure(figsize=(PAGE_INCHES if wide else COLUMN_INCHES, max(1.3, row_inches * num_tasks + 0.62)))
    cell_inches = (figure.get_figwidth() - 1.3) / (num_layers * num_experts)
    panels = figure.subplots(1, num_layers, sharey=True, squeeze=False)[0]
    for layer, axes in enumerate(panels):
        # Drawn as a mesh: hundreds of minor ticks, for lines between cells, would take seconds.
        mesh = axes.pcolormesh(
            np.ma.masked_invalid(shares[layer]), cmap="Blues", vmin=0, vmax=1, edgecolors="white", linewidth=0.4
        )
        axes.set_title(f"layer {layer + 1}", fontsize=7)
        axes.set_xlabel("expert", fontsize=7)
        every = next(step for step in (1, 2, 5, 10, 20, 50, 100) if step * cell_inches > 0.13 or step == 100)
        places = list(range(every - 1, num_experts, every))
        axes.set_xticks(
            [place + 0.5 for place in places], [str(place + 1) for place in places], fontsize=label_size
        )
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    panels[0].invert_yaxis()  # shared by all
    panels[0].set_yticks(np.arange(num_tasks) + 0.5, [short(task) for task in data.tasks], fontsize=label_size)
    bar = figure.colorbar(mesh, ax=panels, fraction=0.04, pad=0.015, aspect=25)
    bar.set_label("share of choices", fontsize=7)
    bar.ax.tick_params(labelsize=6, length=2)
    bar.outline.set_visible(False)
    return figure


def _shares(data: Dataset, method: str) -> Floats | None:
    """Return the shares of the first recorded seed, (layers, tasks, experts)."""
    rows = [row for row in data.tables.usage if row.method == method]
    if not rows:
        return None
    rows = [row for row in rows if row.seed == rows[0].seed]
    last = max(row.stage for row in rows)
    rows = [row for row in rows if row.stage == last]
    size = 1 + max(row.layer for row in rows), len(data.tasks), 1 + max(row.expert for row in rows)
    counts = np.zeros(size)
    for row in rows:
        counts[row.layer, data.tasks.index(row.task), row.expert] = row.chosen
    with np.errstate(invalid="ignore"):
        shares: Floats = counts / counts.sum(axis=2, keepdims=True)
    return shares


def caption(data: Dataset, method: str) -> str:
    """Say what the figure shows, without the conditions."""
    seeds = list(dict.fromkeys(row.seed for row in data.tables.usage if row.method == method))
    which = f" of seed {seeds[0]}" if len(seeds) > 1 else ""
    return (
        f"Experts of {method} at the end of the stream of {data.name}{which}: share of the router's top-k choices "
        "that fall on each expert (columns, in the order of their birth) while the student acts in "
        "episodes of each task (rows), every step of the episode counted."
    )
