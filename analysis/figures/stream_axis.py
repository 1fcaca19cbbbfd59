"""The axis over the stages of a stream, with the tasks' names above it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from analysis.dataset import short


def label_style(num_stages: int) -> tuple[float, float]:
    """Return the size and rotation at which the names of neighbouring stages do not touch."""
    if num_stages <= 3:
        return 7.0, 0
    return (7.0, 35) if num_stages <= 12 else (6.0, 45) if num_stages <= 25 else (5.2, 60)


def header_inches(stream: Sequence[str]) -> float:
    """Return the height that the tasks' names take above the axes."""
    size, rotation = label_style(len(stream))
    longest = max(len(short(task)) for task in stream)
    return float(0.0072 * size * longest * np.sin(np.radians(rotation)))


def set_stages(axes: Axes, num_stages: int) -> None:
    """Set the limits and ticks of the x axis, and draw a line between neighbouring stages."""
    axes.set_xlim(0, num_stages)
    axes.set_xticks(range(0, num_stages + 1, 1 if num_stages <= 20 else 5))
    for stage in range(1, num_stages):
        axes.axvline(stage, color="#d4d4d4", linewidth=0.5, zorder=0)


def name_stages(axes: Axes, names: Sequence[str]) -> None:
    """Write a name above every stage."""
    size, rotation = label_style(len(names))
    slanted: dict[str, Any] = {"rotation": rotation, "ha": "left", "rotation_mode": "anchor"} if rotation else {}
    top = axes.secondary_xaxis("top")
    top.set_xticks(np.arange(len(names)) + 0.5, names, fontsize=size, **slanted)
    top.tick_params(length=0, pad=1)
    top.spines["top"].set_visible(False)
