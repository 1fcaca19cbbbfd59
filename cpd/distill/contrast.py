"""What the task embedding learns from: observations of every task seen, in equal shares, and prototypes.

The batch of a step is small and the same on every rank: each works through all of it, so that the loss, which is
no mean over samples, needs no communication.

Dimensions: N observations, O observation size.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cpd.config import DistillConfig
from cpd.distill.memory.segments import Segments
from cpd.distill.stage_data import StageData
from cpd.seeding import generator
from cpd.student.network import Student
from cpd.student.observations import observation_scaling

#: Observations per step, an equal share for every task seen.
BATCH_SIZE: Final = 256
#: Standard deviation of the noise on them, in the student's scaling of observations (15 cm are 1).
NOISE: Final = 0.1
#: Observations of the present task from which its prototype is made while its stage lasts.
PROTOTYPE_SIZE: Final = 512


class ContrastSource:
    """The contrastive batches of one stage.

    Of a present task (jointly: of all tasks) half of the observations open an episode, the others are drawn from
    all. Of the tasks before, which have few observations left in memory, they are mixtures of two stored ones.
    """

    def __init__(
        self, data: StageData, memory: Segments, config: DistillConfig, seed: int, stage: int, device: torch.device
    ) -> None:
        self._seed, self._stage, self._device = seed, stage, device
        self._dtype = getattr(torch, config.precision)
        self._lessons = {lesson.task: lesson for lesson in (data, *data.others)}
        stored = memory.observations_by_task()
        self._stored = {task: obs for task, obs in stored.items() if task not in self._lessons}

    def batch(self, step: int) -> tuple[Tensor, Tensor] | None:
        """Raw observations `[N, O]` and their tasks `[N]`; None while there is but one task."""
        num_tasks = len(self._stored) + len(self._lessons)
        if num_tasks == 1:
            return None
        rng = generator(self._seed, "contrast", self._stage, step)
        num_each = max(BATCH_SIZE // num_tasks, 2)
        parts = [self._mixtures(stored, num_each, rng) for stored in self._stored.values()]
        parts += [self._drawn(lesson, num_each, rng) for lesson in self._lessons.values()]
        obs_NO = np.concatenate(parts)
        obs_NO += NOISE * observation_scaling()[1] * rng.standard_normal(obs_NO.shape)
        task_N = np.repeat([*self._stored, *self._lessons], num_each)
        return torch.from_numpy(obs_NO).to(self._device, self._dtype), torch.from_numpy(task_N).to(self._device)

    def _drawn(self, data: StageData, count: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
        opening = rng.choice(data.offsets[:-1], count // 2)
        others = rng.integers(data.num_steps, size=count - count // 2)
        drawn: npt.NDArray[np.float64] = data.observations[np.concatenate([opening, others])].astype(np.float64)
        return drawn

    def _mixtures(
        self, stored: npt.NDArray[np.float32], count: int, rng: np.random.Generator
    ) -> npt.NDArray[np.float64]:
        first, second = stored[rng.integers(len(stored), size=(2, count))].astype(np.float64)
        weight = rng.random((count, 1))
        mixed: npt.NDArray[np.float64] = weight * first + (1.0 - weight) * second
        return mixed

    def refresh_prototypes(self, student: Student) -> None:
        """Make every task's prototype anew: from memory, and that of the present task from its data."""
        rng = generator(self._seed, "prototype", self._stage)
        drawn = {task: self._drawn(lesson, PROTOTYPE_SIZE, rng) for task, lesson in self._lessons.items()}
        for task, obs_NO in [*self._stored.items(), *drawn.items()]:
            student.set_prototype(task, torch.from_numpy(obs_NO).to(self._device, self._dtype))


def prototypes_from_memory(student: Student, memory: Segments) -> None:
    """Make the prototype of every task that the memory holds from what it holds of it."""
    for task, obs_NO in memory.observations_by_task().items():
        student.set_prototype(task, torch.from_numpy(obs_NO).to(student.device, student.dtype))
