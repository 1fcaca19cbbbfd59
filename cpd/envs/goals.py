"""Training, validation and held-out goals, drawn by Meta-World's own generator.

A goal is the vector that Meta-World draws at a reset (object and target positions, three to six numbers).
`metaworld.MT1(task, seed=s)` draws fifty of them per seed; this module draws the same vectors, but
does not simulate how the hand moves to its place, which makes MT1 slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Final, Literal, NamedTuple, get_args

import mujoco
import numpy as np
import numpy.typing as npt

from cpd.envs.registry import build_stock, metaworld_class
from cpd.envs.tasks import MAX_GOALS

Split = Literal["training", "validation", "held_out"]

#: Goals that MT1 draws for one seed.
GOALS_PER_SEED: Final = 50

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
        vectors = [v for block in range(num_blocks) for v in _mt1_rand_vecs(task, first_seed + block)]
        splits[split] = tuple(Goal(task, split, i, vector) for i, vector in enumerate(vectors))
    check_disjoint(*splits.values())
    return splits


@cache
def _mt1_rand_vecs(task: str, seed: int) -> tuple[npt.NDArray[np.float64], ...]:
    """The fifty vectors of `metaworld.MT1(task, seed=seed)`, in order.

    The draws do not depend on the physics: a reset draws until its rejection test passes, and that test reads
    only the drawn positions. So the task's own reset code runs here, but without placing the hand.
    """
    env: Any = build_stock(_goal_drawing_class(task))
    env.generator = np.random.RandomState(seed)  # the legacy generator, as in MT1
    env._set_task_called = True
    vectors = []
    for _ in range(GOALS_PER_SEED):
        env.reset()
        vector = np.array(env._last_rand_vec, dtype=np.float64)
        vector.flags.writeable = False
        vectors.append(vector)
    env.close()
    return tuple(vectors)


@cache
def _goal_drawing_class(task: str) -> type[Any]:
    """Subclass the task's class: resets draw goals from a given generator and skip the physics."""
    base: Any = metaworld_class(task)

    class GoalDrawing(base):  # type: ignore[misc]
        """The task without physics."""

        def _reset_hand(self, steps: int = 1) -> None:
            super()._reset_hand(steps=1)

        def do_simulation(self, ctrl: Any, n_frames: Any) -> None:
            """Leave the hand where it is: moving it makes a reset slow."""
            mujoco.mj_forward(self.model, self.data)

        def _get_state_rand_vec(self) -> Any:
            space = self._random_reset_space
            self._last_rand_vec = self.generator.uniform(space.low, space.high, size=space.low.size)
            return self._last_rand_vec

    return GoalDrawing
