"""Success of every teacher before and after RL, and the environment steps of RL."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.captions import RECIPES, versions
from analysis.dataset import short
from analysis.published_teachers import PublishedTeachers, cpu_text
from analysis.style import COLUMN_INCHES, GUIDE, TEACHER_COLOUR, method_colour


def draw(published: PublishedTeachers) -> Figure:
    """Draw for every teacher where RL began, held-out success with its interval, and success at the last step."""
    teachers = published.teachers
    figure = Figure(figsize=(COLUMN_INCHES, 0.62 + 0.165 * len(teachers)))
    axes = figure.subplots()
    colour = method_colour(0)
    several = len({teacher.seed for teacher in teachers}) > 1
    heights = -np.arange(len(teachers), dtype=float)
    for height, teacher in zip(heights, teachers, strict=True):
        rate = teacher.held_out
        if teacher.before_rl:
            start = teacher.before_rl.rate
            axes.plot([start, rate.rate], [height] * 2, color=colour, alpha=0.3, linewidth=1.6, zorder=2)
            axes.plot(start, height, "o", markerfacecolor="white", markeredgecolor=colour, markeredgewidth=0.9)
        axes.plot([rate.low, rate.high], [height] * 2, color=colour, linewidth=0.8, zorder=3)
        axes.plot(rate.rate, height, "o", color=colour, zorder=4)
        axes.plot(teacher.held_out_last.rate, height, "|", color=TEACHER_COLOUR, markersize=6, zorder=5)
        axes.text(1.27, height, _steps(teacher.env_steps), fontsize=6.5, ha="right", va="center")
        if published.has_cpu_seconds:
            axes.text(1.45, height, cpu_text(teacher), fontsize=6.5, ha="right", va="center")
    top = 0.85
    axes.text(1.27, top, "RL steps", fontsize=6.5, ha="right", va="center", color="#555555")
    if published.has_cpu_seconds:
        axes.text(1.45, top, "CPU s", fontsize=6.5, ha="right", va="center", color="#555555")
    axes.axvline(published.gate, color=GUIDE, linewidth=0.7, linestyle=":", zorder=0)
    axes.set_yticks(heights, [short(t.task) + (f" ({t.seed})" if several else "") for t in teachers])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(heights[-1] - 0.6, 1.2)
    axes.set_xlim(-0.03, 1.45 if published.has_cpu_seconds else 1.27)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", ".25", ".5", ".75", "1"])
    axes.spines["bottom"].set_bounds(0, 1)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("success rate", x=0.35)
    styles: list[tuple[str, dict[str, Any]]] = [
        ("before RL", {"marker": "o", "linestyle": "", "markerfacecolor": "white", "markeredgecolor": colour}),
        ("after RL, held-out", {"marker": "o", "color": colour, "linewidth": 0.8}),
        ("at the last step", {"marker": "|", "linestyle": "", "color": TEACHER_COLOUR}),
    ]
    if not any(teacher.before_rl for teacher in teachers):
        styles = styles[1:]
    handles = [Line2D([], [], label=label, **style) for label, style in styles]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=6.5)
    return figure


def _steps(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count / 1e3:.0f} k"


def caption(published: PublishedTeachers) -> str:
    """Say what the figure shows, with its conditions."""
    labels, teachers = published.labels, published.teachers
    episodes = {teacher.held_out.episodes for teacher in teachers}
    goals = {t.before_rl.episodes for t in teachers if t.before_rl}
    start = f"open: on {min(goals)} validation goals, where RL began; " if goals else ""
    cost = ", processor seconds of all work on the teacher" if published.has_cpu_seconds else ""
    return (
        f"Teachers of {published.name} (recipe {labels['teacher_recipe']}: "
        f"{RECIPES.get(labels['teacher_recipe'], 'several')}). Success with deterministic actions; {start}"
        f"filled: at any step on {min(episodes)} held-out goals that no stopping rule saw, with Wilson 95 % "
        "intervals; grey: at the last step of the same episodes, which run on after success. Dotted: the gate of "
        f"{published.gate:g}. Right: environment steps of RL{cost}. "
        f"Horizon {labels['horizon']}; {versions(labels)}; one run per line."
    )
