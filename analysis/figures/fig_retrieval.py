"""How often the student believes in the right task, over the episode."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from matplotlib.figure import Figure

from analysis.captions import look_alikes
from analysis.dataset import Dataset, short
from analysis.style import COLUMN_INCHES, METHOD_COLOURS, method_line

#: The lines of more tasks cannot be told apart; only the worst are then named.
FEW_TASKS = 14
NUM_NAMED = 3


def draw(data: Dataset, method: str) -> Figure | None:
    """Draw the beliefs of every task over environment steps, and their mean. Return None without beliefs."""
    curves = task_curves(data, method)
    if not curves:
        return None
    few = len(curves) <= FEW_TASKS
    legend = 0.13 * -(-(len(curves) + 1) // 3) if few else 0.28
    figure = Figure(figsize=(COLUMN_INCHES, 1.75 + legend))
    axes = figure.subplots()
    means = {task: float(np.mean(list(curve.values()))) for task, curve in curves.items()}
    named = set(sorted(means, key=means.__getitem__)[: len(curves) if few else NUM_NAMED])
    number = 0
    for task, curve in curves.items():
        if task in named:
            axes.plot(*_line(curve), linewidth=0.9, label=short(task), **method_line(number))
            number += 1 if (number + 2) % len(METHOD_COLOURS) else 2  # the last colour, black, is the mean's
        else:
            axes.plot(*_line(curve), linewidth=0.5, color="#b0b0b0", zorder=1)
    steps = sorted(set.intersection(*(set(curve) for curve in curves.values())))
    average = {step: float(np.mean([curve[step] for curve in curves.values()])) for step in steps}
    axes.plot(*_line(average), color="black", linewidth=1.8, label="mean of all tasks", zorder=3)
    last = max(max(curve) for curve in curves.values())
    axes.set_xscale("log")
    axes.set(xlim=(1, last), ylim=(-0.03, 1.03), xlabel="environment steps seen", ylabel="right task believed")
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500) if tick <= last]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(axis="y")
    figure.legend(loc="outside lower center", ncols=3 if few else 2, fontsize=6)
    return figure


def task_curves(data: Dataset, method: str) -> dict[str, dict[int, float]]:
    """Return, by task and step, the share of episodes with the right belief, over all seeds."""
    counts: dict[str, dict[int, list[int]]] = {task: defaultdict(lambda: [0, 0]) for task in data.tasks}
    for row in data.tables.retrieval:
        if row.method == method:
            cell = counts[row.task][row.step]
            cell[0] += row.correct
            cell[1] += row.episodes
    return {
        task: {step: correct / episodes for step, (correct, episodes) in sorted(cells.items())}
        for task, cells in counts.items()
        if cells
    }


def _line(curve: dict[int, float]) -> tuple[list[int], list[float]]:
    return list(curve), list(curve.values())


def caption(data: Dataset, method: str) -> str:
    """Say what the figure shows, without the conditions."""
    seeds = len({row.seed for row in data.tables.retrieval if row.method == method})
    few = len(data.tasks) <= FEW_TASKS
    alike = look_alikes(data)
    alike = f" Tasks of which episodes begin like another's: {alike}." if alike else ""
    named = "" if few else f" Named: the {NUM_NAMED} tasks that are recognised least."
    return (
        f"Task belief of {method} on {data.name} at the end of the stream: share of episodes in which "
        "the student, which is told nothing, believes in the right task after so many steps of acting by its own "
        f"beliefs; {seeds} seed{'s' * (seeds > 1)}; log scale. Episodes run on after success.{named}{alike}"
    )
