"""Measure, at the end of a stage, what a student can do in episodes of tasks that its belief confuses.

Dimensions: N observations, O observation size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from cpd.comm import Comm
from cpd.distill.memory.segments import Segments
from cpd.envs.cells import Cell, EnvPool, evaluate_cells
from cpd.envs.episodes import Outcome
from cpd.student.actor import StudentActor
from cpd.student.network import Student
from cpd.student.plans import Plan, candidate_plans

#: Two tasks are confused if the mean belief in one, in episodes of the other, exceeds this.
MAX_CONFUSION: Final = 0.01
#: Training goals that each plan is measured on, per task.
NUM_EPISODES: Final = 20
#: Episodes per forward pass: few, so that several ranks share the work.
CHUNK: Final = 5


def opening_observations(memory: Segments) -> dict[int, npt.NDArray[np.float32]]:
    """The raw observations in memory that open an episode, [N, O], by position of the task."""
    task, rows = memory.task[memory.opens_episode], memory.start[memory.opens_episode]
    return {int(k): memory.observations[rows[task == k]] for k in np.unique(task)}


def confused_pairs(student: Student, memory: Segments) -> list[tuple[int, int]]:
    """The pairs of tasks that the belief confuses and whose plans are not measured yet, by position."""
    belief = {
        task: student.log_belief(torch.from_numpy(obs_NO).to(student.device)).exp().mean(0).tolist()
        for task, obs_NO in opening_observations(memory).items()
    }
    return [
        (i, j)
        for i, j in combinations(belief, 2)
        if max(belief[i][j], belief[j][i]) > MAX_CONFUSION and student.plans.index(Plan(i, j)) is None
    ]


def measure_plans(
    student: Student,
    tasks: Sequence[str],
    pairs: Sequence[tuple[int, int]],
    horizon: int,
    pool: EnvPool,
    comm: Comm,
    *,
    should_stop: Callable[[], bool],
) -> dict[Plan, dict[int, list[Outcome]]] | None:
    """Run episodes of every plan for each pair on both of its tasks, on training goals; a collective.

    Args:
        student: the policy.
        tasks: the stream's distinct tasks, in order.
        pairs: positions of tasks.
        horizon: steps per episode.
        pool: this rank's environments.
        comm: the ranks that share the work.
        should_stop: polled before every step.

    Returns:
        Their outcomes by plan and task, on every rank; None if any rank was asked to stop.
    """
    measured: dict[Plan, dict[int, list[Outcome]]] = {}
    for pair in pairs:
        cells = [Cell(tasks[task], "training", NUM_EPISODES) for task in pair]
        for plan in candidate_plans(pair):
            outcomes = evaluate_cells(
                StudentActor(student, tasks, dict.fromkeys(tasks, plan)),
                cells,
                horizon,
                pool,
                comm,
                chunk=CHUNK,
                should_stop=should_stop,
            )
            if outcomes is None:
                return None
            measured.setdefault(plan, {}).update(zip(pair, outcomes, strict=True))
    return measured
