"""Acting with a student whose weights have owners."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cpd.envs.episodes import Actor
from cpd.student.actor import StudentActor
from cpd.student.packing import Packing
from cpd.student.student import Student


def make_actor(student: Student, tasks: Sequence[str]) -> Actor:
    """The policy that `student` is; `tasks` are the stream's distinct ones, in order."""
    return (
        StudentActor(student, tasks) if student.packing is None else PackedActor(student, student.packing, tasks)
    )


class PackedActor:
    """Acts for each task with the weights that were there for it: told the task by its mask.

    Satisfies `cpd.envs.episodes.Actor`.
    """

    def __init__(self, student: Student, packing: Packing, tasks: Sequence[str]) -> None:
        """`tasks` are the stream's distinct tasks, in order."""
        self._student, self._packing, self._tasks = student, packing, list(tasks)
        self._actor = StudentActor(student, tasks)

    def reset(self, task: str, num_envs: int) -> None:
        """Begin `num_envs` fresh episodes of `task`.

        Raises:
            ValueError: if there is no mask for `task`.
        """
        if task not in self._tasks:
            raise ValueError(f"this student has masks for {', '.join(self._tasks)}, but not for {task}")
        view = self._packing.view(self._student, self._tasks.index(task))
        self._actor = StudentActor(view, self._tasks)
        self._actor.reset(task, num_envs)

    def act(self, obs_BO: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Deterministic actions `[B, A]` in [-1, 1] for the observations `[B, O]` that come next."""
        return self._actor.act(obs_BO)
