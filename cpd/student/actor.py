"""The student as a policy that acts in episodes, and its belief about the task of each episode.

Dimensions: B episodes, O observation size, A action size, K distinct tasks of the stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cpd.envs.episodes import Actor, Belief
from cpd.envs.suite import ACTION_CLIP
from cpd.reading import read_json
from cpd.run.descriptions import StudentStream
from cpd.student.network import Prepared, Student, load_student
from cpd.student.plans import FIRST_STEPS, Plan


def infer(student: Student, obs_BO: Tensor, tasks: Sequence[str]) -> tuple[list[Belief], Tensor]:
    """The beliefs in episodes with these first observations, and their plans `[B, 2]`, according to `student.act`.

    Args:
        student: infers the task.
        obs_BO: raw observations.
        tasks: the stream's distinct tasks, in order.
    """
    belief_BK = student.log_belief(obs_BO).exp()
    confidence_B, believed_B = belief_BK.max(1)
    plan_B2 = believed_B.unsqueeze(1).repeat(1, 2)
    if (act := student.config.act) != "most_likely":
        plan_B2 = student.plans.choose(belief_BK, hedged=act == "hedged")
    episodes = zip(believed_B.tolist(), confidence_B.tolist(), plan_B2.tolist(), strict=True)
    beliefs = [
        Belief(tasks[believed], confidence, *(tasks[task] for task in plan))
        for believed, confidence, plan in episodes
    ]
    return beliefs, plan_B2


class StudentActor:
    """Acts with the student's clipped mean, given the last `context` steps of each episode.

    Satisfies `cpd.envs.episodes.Actor`. With task identity `inferred`, the first observation of an episode gives a
    belief about its task, and the belief a plan, according to `student.act`.
    """

    def __init__(self, student: Student, tasks: Sequence[str], plan_of: Mapping[str, Plan] | None = None) -> None:
        """Make an actor for episodes of `tasks`, the stream's distinct ones in order.

        `plan_of` replaces the belief: the plan to follow in episodes of each task.
        """
        self._student = student
        self._tasks = list(tasks)
        self._plan_of = plan_of
        self._history: deque[npt.NDArray[np.float32]] = deque(maxlen=student.config.context)
        self._plan_B2: Tensor | None = None
        self._prepared: Prepared | None = None
        self._steps = 0
        self.beliefs: list[Belief] = []
        """Of the episodes since the reset, after their first observation; empty unless the task is inferred."""

    def reset(self, tasks: Sequence[str]) -> None:
        """Begin a new episode of each of `tasks`, which are used only if the student is given the task.

        Raises:
            ValueError: if the student is given the task and its stream lacks one of `tasks`.
        """
        self._history.clear()
        self.beliefs = []
        self._plan_B2, self._prepared, self._steps = None, None, 0
        if not self._student.is_conditioned or (self._infers_task and self._plan_of is None):
            return
        for task in tasks:
            if task not in self._tasks:
                raise ValueError(f"this student's stream has {', '.join(self._tasks)}, but not {task}")
        indices = [self._tasks.index(task) for task in tasks]
        plans = [Plan(index, index) for index in indices]
        if self._plan_of is not None:
            plans = [self._plan_of[task] for task in tasks]
        self._plan_B2 = torch.tensor(plans, device=self._student.device)

    @property
    def _infers_task(self) -> bool:
        return self._student.config.task_identity == "inferred"

    @torch.no_grad()
    def act(self, obs_BO: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Deterministic actions `[B, A]` in [-1, 1] for the next observations `[B, O]`."""
        student = self._student
        self._history.append(obs_BO.astype(np.float32, copy=True))
        if self._plan_B2 is None and self._infers_task:
            self.beliefs, self._plan_B2 = infer(student, torch.from_numpy(obs_BO).to(student.device), self._tasks)
        if self._plan_B2 is not None and (self._steps < student.config.context or self._steps == FIRST_STEPS):
            task_B = self._plan_B2[:, int(self._steps >= FIRST_STEPS)]
            self._prepared = student.prepare(task_B, len(self._history))
        self._steps += 1
        window = torch.from_numpy(np.stack(self._history, axis=1)).to(student.device, student.dtype)
        out = student(window, task_B=self._prepared)
        actions: npt.NDArray[np.float32] = (
            out.mean_BLA[:, -1].clamp(-ACTION_CLIP, ACTION_CLIP).float().cpu().numpy()
        )
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


def load_actor(path: str | Path, *, told: bool = False) -> Actor:
    """The policy of a published student, on the CPU, at the start of an episode.

    Args:
        path: the student's folder, or the file of weights of any student.
        told: whether `reset` tells a student the task that it would otherwise infer.

    Raises:
        DamagedFileError: if a file is missing or damaged, or if weights and description do not match.
        ValueError: if it is to be told, but does not infer the task.
    """
    weights = path if (path := Path(path)).suffix == ".safetensors" else path / "policy.safetensors"
    student = load_student(weights)
    tasks = read_json(weights.with_suffix(".json"), StudentStream)["distinct_tasks"]
    if not told:
        return make_actor(student, tasks)
    if (identity := student.config.task_identity) != "inferred":
        reason = "does not use the task" if identity == "none" else "is always told the task"
        raise ValueError(f"{path} {reason}, since its task_identity is {identity!r}: it cannot be told otherwise")
    return StudentActor(student, tasks, {task: Plan(index, index) for index, task in enumerate(tasks)})


def make_actor(student: Student, tasks: Sequence[str]) -> Actor:
    """The policy of `student`; `tasks` are the distinct tasks of its stream, in order.

    If weights depend on the task (`student.packing`), the policy of a task uses its own, and its `reset` raises
    ValueError for a task outside `tasks`.
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
