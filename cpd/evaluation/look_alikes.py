"""Which tasks cannot be told apart when an episode begins: what a student that is told nothing is up against.

A teacher's episode is put beside the first observations of all teachers' other episodes, those of its task on its
own goal left out. If the nearest is of another task, the tasks differ by less than their goals vary; tasks whose
first observations coincide are nearest to each other by chance, or more often where their goals coincide too.

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


class LookAlikes(NamedTuple):
    """How the episodes of one task begin."""

    obs_EO: npt.NDArray[np.float64]
    """Scaled as the student sees them."""
    goal_E: npt.NDArray[np.int64]


def start_rows(run: Run) -> list[StartRow]:
    """The table of a run whose teachers are finished, for the teachers of every seed.

    Empty while a teacher is not finished, and where the rollouts of one can no longer be read: results do not need
    them.
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
            starts = {teacher.task: _read(teacher) for teacher in admitted}
        except (ShardError, OSError):
            return []
        for (task, other), nearest in nearest_tasks(starts).items():
            rows.append(StartRow(task, seed, other, len(starts[task].goal_E), nearest))
    return rows


def _read(teacher: TeacherElement) -> LookAlikes:
    centre, scale = observation_scaling()
    observations, goals = first_observations(teacher.shards)
    return LookAlikes((observations - centre) / scale, goals)


def nearest_tasks(starts: Mapping[str, LookAlikes]) -> dict[tuple[str, str], int]:
    """By task and other task the episodes whose nearest first observation (Euclidean) is one of the other's.

    Every task's count with itself is there; of others, those that are not 0. An episode that has no other to be
    compared with does not count.
    """
    tasks = list(starts)
    every_EO = np.concatenate([starts[task].obs_EO for task in tasks])
    goal_E = np.concatenate([starts[task].goal_E for task in tasks])
    task_E = np.repeat(np.arange(len(tasks)), [len(starts[task].goal_E) for task in tasks])
    found: dict[tuple[str, str], int] = {}
    for number, task in enumerate(tasks):
        own = starts[task]
        # One task at a time: all pairs at once would be gigabytes with fifty tasks.
        distance_EE = np.square(own.obs_EO[:, None] - every_EO[None]).sum(-1)
        distance_EE[(own.goal_E[:, None] == goal_E[None]) & (task_E == number)[None]] = np.inf
        comparable_E = np.isfinite(distance_EE).any(1)
        nearest_E = task_E[distance_EE.argmin(1)[comparable_E]]
        counts = np.bincount(nearest_E, minlength=len(tasks))
        found[task, task] = int(counts[number])
        found |= {(task, tasks[k]): int(counts[k]) for k in np.flatnonzero(counts) if k != number}
    return found
