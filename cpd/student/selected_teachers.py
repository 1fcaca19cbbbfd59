"""The baseline that distils nothing: keep all teachers, and act with the one whose task is the most likely.

Dimensions: B episodes, O observation size, A action size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from cpd.envs.episodes import Actor, Belief
from cpd.student.actor import TaskwiseActor, infer
from cpd.student.network import Student


class SelectedTeachers:
    """Acts in each episode with the teacher of the task that a student infers from the first observation.

    Satisfies `cpd.envs.episodes.Actor`. While the student knows no task, all actions are 0.
    """

    def __init__(self, student: Student, tasks: Sequence[str], teacher_of: Callable[[str], Actor]) -> None:
        """`tasks` are the stream's distinct tasks, in order; `teacher_of` makes the actor of a task's teacher."""
        self._student, self._tasks = student, list(tasks)
        self._teachers = TaskwiseActor(teacher_of)
        self.beliefs: list[Belief] = []

    def reset(self, tasks: Sequence[str]) -> None:
        """Begin new episodes; `tasks` are not used."""
        self.beliefs = []

    def act(self, obs_BO: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The selected teachers' actions `[B, A]` in [-1, 1]."""
        if not self._student.known_K.any():
            return np.zeros((len(obs_BO), self._student.spaces.action_size), np.float32)
        if not self.beliefs:
            self.beliefs, _ = infer(self._student, torch.from_numpy(obs_BO).to(self._student.device), self._tasks)
            self._teachers.reset([belief.plan_first for belief in self.beliefs])
        return self._teachers.act(obs_BO)
