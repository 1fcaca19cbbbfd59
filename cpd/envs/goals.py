"""Training, validation and held-out goals, drawn by Meta-World's own generator.

A goal is the vector that Meta-World draws at a reset (object and target positions, three to six numbers).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Final, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from cpd.envs.metaworld.goal_vectors import GOALS_PER_SEED, mt1_rand_vecs
from cpd.envs.metaworld.tasks import MAX_GOALS

Split = Literal["training", "validation", "held_out"]

#: The first MT1 seed of each split; further blocks of fifty use the seeds that follow.
FIRST_SEEDS: Final[dict[str, int]] = {"training": 1, "validation": 1001, "held_out": 2001}


class Goal(NamedTuple):
    """One initial condition of a task: where the object starts and where it must go."""

    task: str
    """Meta-World task name, such as "push-v3"."""
    split: str
    """One of "training", "validation" and "held_out"."""
    index: int  # type: ignore[assignment]  # shadows tuple.index, which nobody needs here
    """Position within the split, from 0."""
    rand_vec: npt.NDArray[np.float64]
    """[3..6] float64, read-only, metres; Meta-World's random vector, whose meaning is the task's."""


def goal_set(task: str, split: Split, num_goals: int = 50) -> tuple[Goal, ...]:
    """Return the first `num_goals` goals of a split, always the same ones.

    Args:
        task: Meta-World task name.
        split: which of the three disjoint sets.
        num_goals: 1 to 50,000; each further fifty come from the split's next seed.

    Returns:
        Goals in the order in which Meta-World draws them; cached per process.

    Raises:
        ValueError: unknown task or split, `num_goals` out of range, or goals that occur twice among the
            three splits (the message names the task and the goals).
    """
    if split not in get_args(Split):
        raise ValueError(f"unknown goal split {split!r}: choose one of {', '.join(get_args(Split))}")
    if not 1 <= num_goals <= MAX_GOALS:
        raise ValueError(f"num_goals must lie between 1 and {MAX_GOALS}, got {num_goals}")
    num_blocks = -(-num_goals // GOALS_PER_SEED)
    return _disjoint_splits(task, num_blocks)[split][:num_goals]


def check_disjoint(*goal_sets: Sequence[Goal]) -> None:
    """Raise ValueError, naming the task and the goals, if two goals of one task are equal.

    Goals are equal if their `rand_vec` are the same bit for bit, whether in one set or in two.
    """
    seen: dict[tuple[str, bytes], Goal] = {}
    for goal in (goal for goals in goal_sets for goal in goals):
        other = seen.setdefault((goal.task, goal.rand_vec.tobytes()), goal)
        if other is not goal:
            raise ValueError(
                f"{goal.task}: {other.split} goal {other.index} and {goal.split} goal {goal.index} are equal "
                f"({goal.rand_vec.tolist()}), so the goal sets are not disjoint"
            )


@cache
def _disjoint_splits(task: str, num_blocks: int) -> dict[str, tuple[Goal, ...]]:
    """`num_blocks` x 50 goals of every split, checked against one another."""
    splits: dict[str, tuple[Goal, ...]] = {}
    for split, first_seed in FIRST_SEEDS.items():
        vectors = [v for block in range(num_blocks) for v in mt1_rand_vecs(task, first_seed + block)]
        splits[split] = tuple(Goal(task, split, i, vector) for i, vector in enumerate(vectors))
    check_disjoint(*splits.values())
    return splits
