"""Which tasks look alike when an episode begins: no student without a task label can tell these apart at once.

The first observation of a teacher's episode is compared with those of all teachers' other episodes, except
episodes of the same task on the same goal. If the nearest one belongs to another task, the tasks differ less than
their goals do. Tasks whose first observations coincide are nearest to each other by chance, or more often if their
goals coincide too.

Dimensions: E episodes, O observation size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cpd.run.directory import Run, TeacherElement
from cpd.run.shards.reader import first_observations
from cpd.run.shards.schema import ShardError
from cpd.run.tables import StartRow
from cpd.student.observations import observation_scaling


class FirstObservations(NamedTuple):
    """The first observations of one task's episodes, with their goals."""

    obs_EO: npt.NDArray[np.float64]
    """Scaled as the student's input is."""
    goal_E: npt.NDArray[np.int64]


def start_rows(run: Run) -> list[StartRow]:
    """The table of look-alikes of a run, for the teachers of every seed.

    It is empty while a teacher is unfinished. It is also empty if the rollouts of one can no longer be read, since
    results do not depend on them.
    """
    rows: list[StartRow] = []
    for seed in run.config.teacher.seeds:
        teachers = [teacher for teacher in run.teachers() if teacher.seed == seed]
        admitted = [teacher for teacher in teachers if teacher.complete.exists()]
        if not all(teacher.finished for teacher in teachers):
            return []
        if not admitted:
            continue
        try:
            observations = {teacher.task: _read(teacher) for teacher in admitted}
        except (ShardError, OSError):
            return []
        for (task, other), nearest in nearest_tasks(observations).items():
            rows.append(StartRow(task, seed, other, len(observations[task].goal_E), nearest))
    return rows


def _read(teacher: TeacherElement) -> FirstObservations:
    centre, scale = observation_scaling()
    observations, goals = first_observations(teacher.shards)
    return FirstObservations((observations - centre) / scale, goals)


def nearest_tasks(observations: Mapping[str, FirstObservations]) -> dict[tuple[str, str], int]:
    """Count, by task and other task, the episodes whose nearest first observation (Euclidean) is of the other.

    The count of every task with itself is always included, other counts only if they are not 0. An episode that
    can be compared with no other does not count.
    """
    tasks = list(observations)
    every_EO = np.concatenate([observations[task].obs_EO for task in tasks])
    goal_E = np.concatenate([observations[task].goal_E for task in tasks])
    task_E = np.repeat(np.arange(len(tasks)), [len(observations[task].goal_E) for task in tasks])
    nearest: dict[tuple[str, str], int] = {}
    for number, task in enumerate(tasks):
        first = observations[task]
        # One task at a time: the distances of all pairs of fifty tasks would take gigabytes.
        distance_EE = np.square(first.obs_EO[:, None] - every_EO[None]).sum(-1)
        distance_EE[(first.goal_E[:, None] == goal_E[None]) & (task_E == number)[None]] = np.inf
        comparable_E = np.isfinite(distance_EE).any(1)
        nearest_E = task_E[distance_EE.argmin(1)[comparable_E]]
        counts = np.bincount(nearest_E, minlength=len(tasks))
        nearest[task, task] = int(counts[number])
        nearest |= {(task, tasks[k]): int(counts[k]) for k in np.flatnonzero(counts) if k != number}
    return nearest
