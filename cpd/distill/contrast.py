"""Training data of the task embedding (observations of several tasks, in equal shares) and prototypes.

The batch of a step is small and the same on every rank. Every rank processes all of it: the loss is not a mean
over samples, so dividing the batch takes a gather of embeddings, which costs more than it saves (docs/slurm.md).

Dimensions: J tasks in a batch, N observations of each, S stored steps, O observation size, B steps of a block.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cpd.distill.batches import BatchSource
from cpd.distill.memory.segments import Segments
from cpd.distill.stage_data import StageData
from cpd.distill.step_table import to_device
from cpd.envs.suite import Spaces, load_suite
from cpd.seeding import generator
from cpd.student.network import Student

#: Observations per step, in equal shares for every task of the batch.
BATCH_SIZE: Final = 128
#: Tasks in a batch: with all tasks of a long stream, a step's cost would grow with the stream.
MAX_TASKS: Final = 8
#: Standard deviation of the noise added to observations, in the student's scaling of them (15 cm are 1).
NOISE: Final = 0.1
#: Steps whose batches are drawn together: a draw for a single step takes longer than its arithmetic.
BLOCK: Final = 32
#: Observations from which the prototype of the current task is computed during its stage.
PROTOTYPE_SIZE: Final = 512


class ContrastSource:
    """The contrastive batches of one stage.

    The current task is in every batch; the others are drawn. Half of the observations of a current task (in joint
    training: of any task) are first ones of an episode, the others are drawn from all steps. Of earlier tasks, the
    memory holds few observations, so mixtures of two stored ones are used.
    """

    def __init__(
        self,
        source: BatchSource,
        data: StageData,
        memory: Segments,
        seed: int,
        stage: int,
        spaces: Spaces | None = None,
    ) -> None:
        """Draw from the observations of `source`, whose rows are those of `memory`, then those of `data`.

        `spaces` are those of the tasks' suite; None: Meta-World's.
        """
        self._source, self._seed, self._stage = source, seed, stage
        self._scale_O = (spaces or load_suite().spaces).scale
        self._current = {task_data.task: task_data for task_data in (data, *data.others)}
        stored = memory.observations_by_task()
        self._stored = {task: obs for task, obs in stored.items() if task not in self._current}
        first_row = np.cumsum([memory.num_steps, *(task.num_steps for task in self._current.values())])
        task_S = np.repeat(memory.task, memory.length)
        # Current tasks first, so that task 0 is that of the stage.
        starts = [task.offsets[:-1] + row for task, row in zip(self._current.values(), first_row, strict=False)]
        listed = [*starts, *(np.flatnonzero(task_S == task) for task in self._stored)]
        self._listed, self._num_listed = np.concatenate(listed), np.array([len(rows) for rows in listed])
        self._begin = np.cumsum(self._num_listed) - self._num_listed
        self._first_row, self._num_rows = first_row[:-1], np.diff(first_row)
        self._block: tuple[int, Tensor] | None = None

    def batch(self, step: int) -> Tensor | None:
        """Raw observations `[J, N, O]`; None while there is only one task."""
        if len(self._num_listed) == 1:
            return None
        block, number = divmod(step, BLOCK)
        if self._block is None or self._block[0] != block:
            self._block = block, self._draw_block(generator(self._seed, "contrast", self._stage, block))
        return self._block[1][number]

    def _draw_block(self, rng: np.random.Generator) -> Tensor:
        """The batches of BLOCK steps, `[B, J, N, O]`."""
        num_tasks = min(len(self._num_listed), MAX_TASKS)
        others = 1 + rng.random((BLOCK, len(self._num_listed) - 1)).argsort(axis=1)[:, : num_tasks - 1]
        task_BJ1 = np.hstack([np.zeros((BLOCK, 1), np.int64), others])[:, :, None]
        shape = (BLOCK, num_tasks, max(BATCH_SIZE // num_tasks, 2))
        uniform_BJN = rng.random(shape)
        begin_BJ1, num_listed_BJ1 = self._begin[task_BJ1], self._num_listed[task_BJ1]
        row_BJN = self._listed[begin_BJ1 + (uniform_BJN * num_listed_BJ1).astype(np.int64)]
        partner_BJN = self._listed[begin_BJ1 + (rng.random(shape) * num_listed_BJ1).astype(np.int64)]
        is_current_BJ1 = task_BJ1 < len(self._current)
        task_BJ1 = np.minimum(task_BJ1, len(self._current) - 1)
        any_row_BJN = self._first_row[task_BJ1] + (uniform_BJN * self._num_rows[task_BJ1]).astype(np.int64)
        from_all_BJN = is_current_BJ1 & (np.arange(shape[2]) >= shape[2] // 2)
        row_BJN = np.where(from_all_BJN, any_row_BJN, row_BJN)
        weight_BJN = np.where(is_current_BJ1, 1.0, rng.random(shape))
        noise_BJNO = rng.standard_normal((*shape, len(self._scale_O)), np.float32)
        return self._gather(row_BJN, partner_BJN, weight_BJN, noise_BJNO)

    def _gather(
        self,
        row_BJN: npt.NDArray[np.int64],
        partner_BJN: npt.NDArray[np.int64],
        weight_BJN: npt.NDArray[np.float64],
        noise_BJNO: npt.NDArray[np.float32],
    ) -> Tensor:
        """Mixtures of the observations of two rows, with noise."""
        table = self._source.table
        obs, mixed_in = (
            table.observations(rows.ravel()).view(noise_BJNO.shape) for rows in (row_BJN, partner_BJN)
        )
        weight, noise, noise_scale = (
            to_device(array, table.device).to(table.dtype)
            for array in (weight_BJN[..., None], noise_BJNO, NOISE * self._scale_O)
        )
        return torch.lerp(mixed_in, obs, weight).addcmul_(noise, noise_scale)

    def refresh_prototypes(self, student: Student) -> None:
        """Recompute every prototype: those of current tasks from their data, all others from memory."""
        rng = generator(self._seed, "prototype", self._stage)
        drawn = {task: self._openings_and_others(data, rng) for task, data in self._current.items()}
        for task, obs_NO in [*self._stored.items(), *drawn.items()]:
            student.set_prototype(task, torch.from_numpy(obs_NO).to(student.device, student.dtype))

    def _openings_and_others(self, data: StageData, rng: np.random.Generator) -> npt.NDArray[np.float32]:
        openings = rng.choice(data.offsets[:-1], PROTOTYPE_SIZE // 2)
        others = rng.integers(data.num_steps, size=PROTOTYPE_SIZE // 2)
        drawn: npt.NDArray[np.float32] = data.observations[np.concatenate([openings, others])]
        return drawn


def prototypes_from_memory(student: Student, memory: Segments) -> None:
    """Recompute the prototype of every task in memory from its stored observations."""
    for task, obs_NO in memory.observations_by_task().items():
        student.set_prototype(task, torch.from_numpy(obs_NO).to(student.device, student.dtype))
