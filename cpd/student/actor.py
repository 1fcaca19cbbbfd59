"""The student as a policy that acts in episodes, and its belief about the task of each episode.

Dimensions: B episodes, O observation size, A action size, K distinct tasks of the stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cpd.envs.episodes import Actor
from cpd.student.network import Student
from cpd.student.task_embedding import NEVER

#: Weight of each further observation of an episode in the belief, relative to the previous one.
BELIEF_DECAY: Final = 0.9


class StudentActor:
    """Acts with the student's clipped mean, given the last `context` steps of each episode.

    Satisfies `cpd.envs.episodes.Actor`. With task identity `inferred`, the actor sums the evidence of all
    observations since the episode began and acts for the task with the most evidence. The t-th observation is
    weighted by `BELIEF_DECAY`^t: later observations depend more and more on the student's actions, and so on its
    earlier belief.
    """

    def __init__(self, student: Student, tasks: Sequence[str]) -> None:
        """`tasks` are the stream's distinct tasks, in order."""
        self._student = student
        self._tasks = list(tasks)
        self._history: deque[npt.NDArray[np.float32]] = deque(maxlen=student.config.context)
        self._given_task_B: Tensor | None = None
        self._evidence_BK: Tensor | None = None
        self._weight = 1.0
        self.believed: list[npt.NDArray[np.int64]] = []
        """For every step since the reset, the tasks [B] that the student acted for; empty if unconditioned."""

    def reset(self, tasks: Sequence[str]) -> None:
        """Begin a new episode of each of `tasks`, which are used only if the student is given the task.

        Raises:
            ValueError: if the student is given the task and its stream lacks one of `tasks`.
        """
        student = self._student
        self._history.clear()
        self.believed = []
        self._given_task_B, self._evidence_BK, self._weight = None, None, 1.0
        if student.config.task_identity == "inferred":
            never_K = torch.where(student.known_K, 0.0, NEVER).to(student.dtype)
            self._evidence_BK = never_K.repeat(len(tasks), 1)
        elif student.is_conditioned:
            for task in tasks:
                if task not in self._tasks:
                    raise ValueError(f"this student's stream has {', '.join(self._tasks)}, but not {task}")
            self._given_task_B = torch.tensor([self._tasks.index(task) for task in tasks], device=student.device)

    @torch.no_grad()
    def act(self, obs_BO: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Deterministic actions `[B, A]` in [-1, 1] for the next observations `[B, O]`."""
        student = self._student
        self._history.append(obs_BO.astype(np.float32, copy=True))
        window = torch.from_numpy(np.stack(self._history, axis=1)).to(student.device, student.dtype)
        task_B = self._given_task_B
        if self._evidence_BK is not None:
            if student.known_K.any():
                self._evidence_BK += self._weight * student.evidence(window[:, -1])
                self._weight *= BELIEF_DECAY
            task_B = self._evidence_BK.argmax(1)
        if task_B is not None:
            self.believed.append(task_B.cpu().numpy())
        out = student(window, task_B=task_B)
        actions: npt.NDArray[np.float32] = out.mean_BLA[:, -1].clamp(-1.0, 1.0).float().cpu().numpy()
        return actions


class TaskwiseActor:
    """Uses a separate actor for each task; satisfies `cpd.envs.episodes.Actor`."""

    def __init__(self, make: Callable[[str], Actor]) -> None:
        """`make` creates the actor of a task; it is called at most once per task."""
        self._make = make
        self._actors: dict[str, Actor] = {}
        self._rows: dict[str, npt.NDArray[np.intp]] = {}
        self._order_B = np.zeros(0, np.intp)

    def reset(self, tasks: Sequence[str]) -> None:
        """Begin a new episode of each of `tasks`."""
        self._rows = {task: np.flatnonzero(np.array(tasks) == task) for task in dict.fromkeys(tasks)}
        self._order_B = np.argsort(np.concatenate(list(self._rows.values())))
        for task, rows in self._rows.items():
            if task not in self._actors:
                self._actors[task] = self._make(task)
            self._actors[task].reset([task] * len(rows))

    def act(self, obs_BO: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The actions `[B, A]` of the actors of all tasks."""
        parts = [self._actors[task].act(obs_BO[rows]) for task, rows in self._rows.items()]
        return np.concatenate(parts)[self._order_B]


def make_actor(student: Student, tasks: Sequence[str]) -> Actor:
    """The policy of `student`; `tasks` are the distinct tasks of its stream, in order.

    If weights have owners (PackNet), the policy of a task uses only the weights that existed at its latest stage,
    and its `reset` raises ValueError for a task outside `tasks`.
    """
    packing = student.packing
    if packing is None:
        return StudentActor(student, tasks)

    def actor_of(task: str) -> Actor:
        """The actor of `task`, with its weights only."""
        if task not in tasks:
            raise ValueError(f"this student has masks for {', '.join(tasks)}, but not for {task}")
        return StudentActor(packing.view(student, tasks.index(task)), tasks)

    return TaskwiseActor(actor_of)
