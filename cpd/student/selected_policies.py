"""Separate policies of the tasks, of which the one of the most likely task acts: teachers, or isolated students.

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


class SelectedPolicies:
    """Acts in each episode with the policy of the task that a student infers from the first observation.

    Satisfies `cpd.envs.episodes.Actor`. While the student knows no task, all actions are 0.
    """

    def __init__(self, student: Student, tasks: Sequence[str], policy_of: Callable[[str], Actor]) -> None:
        """`tasks` are the stream's distinct tasks, in order; `policy_of` makes the actor of a task."""
        self._student, self._tasks = student, list(tasks)
        self._policies = TaskwiseActor(policy_of)
        self.beliefs: list[Belief] = []

    def reset(self, tasks: Sequence[str]) -> None:
        """Begin new episodes; `tasks` are not used."""
        self.beliefs = []

    def act(self, obs_BO: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The selected policies' actions `[B, A]` in [-1, 1]."""
        if not self._student.known_K.any():
            return np.zeros((len(obs_BO), self._student.spaces.action_size), np.float32)
        if not self.beliefs:
            self.beliefs, _ = infer(self._student, torch.from_numpy(obs_BO).to(self._student.device), self._tasks)
            self._policies.reset([belief.plan_first for belief in self.beliefs])
        return self._policies.act(obs_BO)
