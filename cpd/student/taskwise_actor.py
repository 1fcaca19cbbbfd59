"""Acting for each task with what there is for it alone, such as a student whose weights have owners."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from cpd.envs.episodes import Actor
from cpd.student.actor import StudentActor
from cpd.student.student import Student


class TaskwiseActor:
    """Acts in the episodes of each task with an actor of its own; satisfies `cpd.envs.episodes.Actor`."""

    def __init__(self, make: Callable[[str], Actor]) -> None:
        """`make` gives the actor of a task, and is called once for each at most."""
        self._make = make
        self._made: dict[str, Actor] = {}
        self._rows: dict[str, npt.NDArray[np.intp]] = {}
        self._order_B = np.zeros(0, np.intp)

    def reset(self, tasks: Sequence[str]) -> None:
        """Begin a fresh episode of each of `tasks`."""
        self._rows = {task: np.flatnonzero(np.array(tasks) == task) for task in dict.fromkeys(tasks)}
        self._order_B = np.argsort(np.concatenate(list(self._rows.values())))
        for task, rows in self._rows.items():
            if task not in self._made:
                self._made[task] = self._make(task)
            self._made[task].reset([task] * len(rows))

    def act(self, obs_BO: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The actions `[B, A]` of each task's own actor."""
        parts = [self._made[task].act(obs_BO[rows]) for task, rows in self._rows.items()]
        return np.concatenate(parts)[self._order_B]


def make_actor(student: Student, tasks: Sequence[str]) -> Actor:
    """The policy that `student` is; `tasks` are the stream's distinct ones, in order.

    Where weights have owners, it acts for each task with those that were there for it: told the task by its mask.
    It raises ValueError for a task that has none.
    """
    packing = student.packing
    if packing is None:
        return StudentActor(student, tasks)

    def own_actor(task: str) -> Actor:
        if task not in tasks:
            raise ValueError(f"this student has masks for {', '.join(tasks)}, but not for {task}")
        return StudentActor(packing.view(student, tasks.index(task)), tasks)

    return TaskwiseActor(own_actor)
