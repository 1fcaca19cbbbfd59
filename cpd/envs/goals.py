"""Goals: the initial conditions of a task, in three disjoint sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Split = Literal["training", "validation", "held_out"]

#: The first seed of each split, for suites that draw goals by seeds.
FIRST_SEEDS: Final[dict[str, int]] = {"training": 1, "validation": 1001, "held_out": 2001}


class Goal(NamedTuple):
    """One initial condition of a task, such as where the object starts and where it must go."""

    task: str
    """Name of the task, such as "push-v3"."""
    split: str
    """One of "training", "validation" and "held_out"."""
    index: int  # type: ignore[assignment]  # shadows tuple.index, which nobody needs here
    """Position within the split, from 0."""
    vector: npt.NDArray[np.float64]
    """[1..16] float64, read-only; its meaning is the task's."""

    @property
    def seed(self) -> int:
        """The goal as a seed: its first number."""
        return int(self.vector[0])


def check_disjoint(*goal_sets: Sequence[Goal]) -> None:
    """Raise ValueError, naming the task and the goals, if two goals of one task are equal.

    Goals are equal if their `vector` are the same bit for bit, whether in one set or in two.
    """
    seen: dict[tuple[str, bytes], Goal] = {}
    for goal in (goal for goals in goal_sets for goal in goals):
        other = seen.setdefault((goal.task, goal.vector.tobytes()), goal)
        if other is not goal:
            raise ValueError(
                f"{goal.task}: {other.split} goal {other.index} and {goal.split} goal {goal.index} are equal "
                f"({goal.vector.tolist()}), so the goal sets are not disjoint"
            )
