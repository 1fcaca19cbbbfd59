"""What students believed about the task of each episode at the end of the stream, and what they did about it."""

from __future__ import annotations

from dataclasses import dataclass

from analysis.dataset import Dataset
from cpd.run.tables import EpisodeRow


@dataclass(frozen=True)
class Beliefs:
    """Sums over the episodes of the final row of a method's students."""

    episodes: int
    right: int
    """Episodes whose most likely task is the right one."""
    mean_confidence: float
    """Mean probability of the most likely task."""
    other_plans: int
    """Episodes in which the student does not act for the most likely task alone."""
    other_successes: int
    """Successes among them."""


def final_episodes(data: Dataset, method: str) -> list[EpisodeRow]:
    """Return the episodes of the final row in which a method's students inferred the task."""
    final = {s.measures.seed: s.measures.final_stage for s in data.of_method(method)}
    return [
        row
        for row in data.tables.episodes
        if row.method == method
        and row.believed is not None
        and row.stage is not None
        and row.stage == final.get(row.seed)
        and row.goal_set == data.tables.goal_set
    ]


def beliefs(data: Dataset, method: str) -> Beliefs | None:
    """Return the sums of a method; None if its students infer no task, or from tables of earlier versions."""
    rows = final_episodes(data, method)
    if not rows:
        return None
    other = [row for row in rows if not row.plan_first == row.plan_second == row.believed]
    return Beliefs(
        episodes=len(rows),
        right=sum(row.believed == row.task for row in rows),
        mean_confidence=sum(row.confidence or 0.0 for row in rows) / len(rows),
        other_plans=len(other),
        other_successes=sum(row.success for row in other),
    )
