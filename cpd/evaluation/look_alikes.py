"""Tasks whose episodes begin nearest to one of another task.

The first observation of each teacher's episodes is compared with those of all teachers' other episodes, except
episodes of the same task on the same goal. If the nearest one is of another task, the two tasks differ less than
goals of one task do. A Euclidean distance weighs all entries alike, so this does not mean that the tasks cannot be
told apart: a difference of a millimetre in an entry that is constant within each task is enough for a density.

Shapes: E episodes, O observation size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cpd.envs.suite import Spaces
from cpd.run.directory import Run, TeacherElement
from cpd.run.shards.reader import first_observations
from cpd.run.shards.schema import ShardError
from cpd.run.tables import StartRow


class FirstObservations(NamedTuple):
    """The first observations of one task's episodes, with their goals."""

    obs_EO: npt.NDArray[np.float64]
    """Scaled in the same way as the student's input."""
    goal_E: npt.NDArray[np.int64]
    """Index of each episode's goal within its set."""


def start_rows(run: Run) -> list[StartRow]:
    """Compute the rows of `starts.csv`, for the teachers of every seed.

    Returns:
        No rows while a teacher is unfinished, or if the rollouts of one can no longer be read: no other result
        depends on them.
    """
    rows: list[StartRow] = []
    for seed in run.config.teacher.seeds:
        teachers = [teacher for teacher in run.teachers() if teacher.seed == seed]
        admitted = [teacher for teacher in teachers if teacher.marker == teacher.complete]
        if not all(teacher.finished for teacher in teachers):
            return []
        if not admitted:
            continue
        try:
            spaces = run.config.stream.suite_object.spaces
            observations = {teacher.task: _read(teacher, spaces) for teacher in admitted}
        except (ShardError, OSError):
            return []
        for (task, other), nearest in nearest_tasks(observations).items():
            rows.append(StartRow(task, seed, other, len(observations[task].goal_E), nearest))
    return rows


def _read(teacher: TeacherElement, spaces: Spaces) -> FirstObservations:
    observations, goals = first_observations(teacher.shards)
    return FirstObservations((observations - spaces.centre) / spaces.scale, goals)


def nearest_tasks(observations: Mapping[str, FirstObservations]) -> dict[tuple[str, str], int]:
    """Count, by task and other task, the task's episodes whose nearest first observation is of the other task.

    Distances are Euclidean. An episode that cannot be compared with any other does not count.

    Returns:
        The count of every task with itself, and all other counts that are not 0.
    """
    tasks = list(observations)
    every_EO = np.concatenate([observations[task].obs_EO for task in tasks])
    goal_E = np.concatenate([observations[task].goal_E for task in tasks])
    task_E = np.repeat(np.arange(len(tasks)), [len(observations[task].goal_E) for task in tasks])
    nearest: dict[tuple[str, str], int] = {}
    for index, task in enumerate(tasks):
        first = observations[task]
        # One task at a time: the distances of all pairs of fifty tasks would take gigabytes.
        distance_EE = np.square(first.obs_EO[:, None] - every_EO[None]).sum(-1)
        distance_EE[(first.goal_E[:, None] == goal_E[None]) & (task_E == index)[None]] = np.inf
        comparable_E = np.isfinite(distance_EE).any(1)
        nearest_E = task_E[distance_EE.argmin(1)[comparable_E]]
        counts = np.bincount(nearest_E, minlength=len(tasks))
        nearest[task, task] = int(counts[index])
        nearest |= {(task, tasks[k]): int(counts[k]) for k in np.flatnonzero(counts) if k != index}
    return nearest
