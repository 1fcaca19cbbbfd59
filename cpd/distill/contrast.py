"""Training data of the task embedding (observations of every task so far, in equal shares) and prototypes.

The batch of a step is small and the same on every rank. Every rank processes all of it: the loss is not a mean
over samples, so dividing the batch would take communication.

Dimensions: N observations, O observation size.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cpd.config import DistillConfig
from cpd.distill.batches import to_device
from cpd.distill.memory.segments import Segments
from cpd.distill.stage_data import StageData
from cpd.envs.metaworld.scaling import observation_scaling
from cpd.seeding import generator
from cpd.student.network import Student

#: Observations per step, in equal shares for every task so far.
BATCH_SIZE: Final = 256
#: Standard deviation of the noise added to them, in the student's scaling of observations (15 cm are 1).
NOISE: Final = 0.1
#: Observations from which the prototype of the current task is computed during its stage.
PROTOTYPE_SIZE: Final = 512


class ContrastSource:
    """The contrastive batches of one stage.

    Half of the observations of a current task (in joint training: of all tasks) are first ones of an episode, the
    others are drawn from all steps. Of earlier tasks, the memory holds few observations, so mixtures of two stored
    ones are used.
    """

    def __init__(
        self, data: StageData, memory: Segments, config: DistillConfig, seed: int, stage: int, device: torch.device
    ) -> None:
        self._seed, self._stage, self._device = seed, stage, device
        self._dtype = getattr(torch, config.precision)
        self._current = {task_data.task: task_data for task_data in (data, *data.others)}
        stored = memory.observations_by_task()
        self._stored = {task: obs for task, obs in stored.items() if task not in self._current}

    def batch(self, step: int) -> tuple[Tensor, Tensor] | None:
        """Raw observations `[N, O]` and their tasks `[N]`; None while there is only one task."""
        num_tasks = len(self._stored) + len(self._current)
        if num_tasks == 1:
            return None
        rng = generator(self._seed, "contrast", self._stage, step)
        num_each = max(BATCH_SIZE // num_tasks, 2)
        drawn = [self._mix(stored, num_each, rng) for stored in self._stored.values()]
        drawn += [self._draw(data, num_each, rng) for data in self._current.values()]
        obs_NO = np.concatenate(drawn)
        obs_NO += NOISE * observation_scaling()[1] * rng.standard_normal(obs_NO.shape)
        task_N = np.repeat([*self._stored, *self._current], num_each)
        return to_device(obs_NO, self._device).to(self._dtype), to_device(task_N, self._device)

    def _draw(self, data: StageData, count: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
        opening = rng.choice(data.offsets[:-1], count // 2)
        others = rng.integers(data.num_steps, size=count - count // 2)
        drawn: npt.NDArray[np.float64] = data.observations[np.concatenate([opening, others])].astype(np.float64)
        return drawn

    def _mix(
        self, stored: npt.NDArray[np.float32], count: int, rng: np.random.Generator
    ) -> npt.NDArray[np.float64]:
        first, second = stored[rng.integers(len(stored), size=(2, count))].astype(np.float64)
        weight = rng.random((count, 1))
        mixed: npt.NDArray[np.float64] = weight * first + (1.0 - weight) * second
        return mixed

    def refresh_prototypes(self, student: Student) -> None:
        """Recompute every prototype: those of current tasks from their data, all others from memory."""
        rng = generator(self._seed, "prototype", self._stage)
        drawn = {task: self._draw(data, PROTOTYPE_SIZE, rng) for task, data in self._current.items()}
        for task, obs_NO in [*self._stored.items(), *drawn.items()]:
            student.set_prototype(task, torch.from_numpy(obs_NO).to(self._device, self._dtype))


def prototypes_from_memory(student: Student, memory: Segments) -> None:
    """Recompute the prototype of every task in memory from its stored observations."""
    for task, obs_NO in memory.observations_by_task().items():
        student.set_prototype(task, torch.from_numpy(obs_NO).to(student.device, student.dtype))
