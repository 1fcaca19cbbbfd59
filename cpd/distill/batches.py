"""Batches: the global batch of a step is a pure function of seed, stage and step; every rank takes some rows.

Dimensions: B rows (windows) of the global batch, R rows of this rank, L time steps, S stored steps.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cpd.comm import Comm
from cpd.config import DistillConfig
from cpd.distill.memory.segments import Segments
from cpd.distill.stage_data import StageData
from cpd.distill.step_table import StepTable, to_device
from cpd.seeding import generator
from cpd.student.precision import parameter_type


class Windows(NamedTuple):
    """Rows of the global batch, as positions in the stage's table of steps."""

    start: npt.NDArray[np.int64]
    """[B] first step."""
    length: npt.NDArray[np.int64]
    """[B] number of steps."""
    mixture: tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]] | None = None
    """With rehearsal, which mixes observations: [B] first step of the other window, [B] weight of the row's own
    observations (1: not mixed)."""


class Batch(NamedTuple):
    """This rank's rows of a global batch."""

    obs_RLO: Tensor
    """Raw observations; positions beyond a window's end repeat its last step and do not count."""
    teacher_mean_RLA: Tensor
    teacher_log_std_RLA: Tensor
    """At least the logarithm of `distill.std_floor`."""
    valid_RL: Tensor
    """1 for steps, 0 beyond a window's end."""
    task_R: Tensor
    """Positions of the tasks among the distinct tasks of the stream, int64."""
    replayed_R: Tensor
    """1 for rows from memory."""
    num_tokens: int
    """Valid steps of the global batch, over all ranks."""
    num_replayed: int = 0
    """The number of this rank's rows from memory, which come first."""
    task: int | None = None
    """The task of all rows, if all are of the current one."""
    student_outputs_RLP: Tensor | None = None
    """Of rows from memory, mean and log deviation of the student that stored them, P = 2 A; 0 in other rows. None
    if the memory has none."""


class BatchSource:
    """The batches of one stage.

    A row from the current task is the window that ends with a step drawn uniformly from all steps of the task.
    Every step is therefore seen with its full past, and windows at the start of an episode are short, as when the
    student acts. In joint training a task is drawn first. A row from memory is a whole segment, drawn uniformly.
    With rehearsal its observations are mixed, with a uniform random weight, with those of another segment of the
    task, over the steps that both have.
    """

    def __init__(
        self,
        data: StageData,
        memory: Segments,
        config: DistillConfig,
        context: int,
        seed: int,
        stage: int,
        comm: Comm,
        device: torch.device,
    ) -> None:
        self.task = data.task
        self._config, self._context, self._seed, self._stage, self._comm = config, context, seed, stage, comm
        self._memory_start, self._memory_length = memory.start, memory.length
        tasks = [data, *data.others]
        self.table = StepTable(memory, tasks, config.std_floor, parameter_type(config.precision), device)
        first_row = self.table.first_rows[1:]
        self._task_rows, self._task_sizes = first_row[:-1] - first_row[0], np.diff(first_row)
        self._first_current = int(first_row[0])
        # The first row of every episode of the stage's data: windows do not reach into the episode before.
        self._episode_rows = np.concatenate(
            [task.offsets[:-1] + row for task, row in zip(tasks, first_row, strict=False)]
        )
        self._current_tasks = np.array([task.task for task in tasks])
        self._memory_tasks = np.repeat(memory.task, memory.length)
        self._num_replayed = 0
        if len(memory):
            self._num_replayed = min(round(config.replay_share * config.batch_size), config.batch_size - 1)
        self._position = np.arange(context)
        # Segments ordered by task, so that a partner for rehearsal is drawn by its number within the task.
        self._by_task = np.argsort(memory.task, kind="stable")
        _, self._group, self._group_sizes = np.unique(memory.task, return_inverse=True, return_counts=True)
        self._group_begins = np.cumsum(self._group_sizes) - self._group_sizes

    def windows(self, step: int) -> Windows:
        """The global batch of `step`, rows from memory first."""
        rng = generator(self._seed, "batch", self._stage, step)
        replayed = rng.integers(max(len(self._memory_start), 1), size=self._num_replayed)
        current = self._current_rows(rng, self._config.batch_size - self._num_replayed)
        current_start, current_length = self.windows_of(current)
        start = np.concatenate([self._memory_start[replayed], current_start])
        length = np.concatenate([self._memory_length[replayed], current_length])
        if not (self._config.rehearsal and self._num_replayed):
            return Windows(start, length)
        group = self._group[replayed]
        number = np.floor(rng.random(self._num_replayed) * self._group_sizes[group]).astype(np.int64)
        other = self._by_task[self._group_begins[group] + number]
        partner, weight = start.copy(), np.ones(len(start))
        partner[: self._num_replayed] = self._memory_start[other]
        weight[: self._num_replayed] = rng.random(self._num_replayed)
        length[: self._num_replayed] = np.minimum(length[: self._num_replayed], self._memory_length[other])
        return Windows(start, length, (partner, weight))

    def _current_rows(self, rng: np.random.Generator, num_rows: int) -> npt.NDArray[np.int64]:
        """Draw steps of the stage's data; every task is equally likely, whatever its number of steps."""
        if len(self._task_sizes) == 1:
            rows: npt.NDArray[np.int64] = rng.integers(self._task_sizes[0], size=num_rows)
            return rows
        task = rng.integers(len(self._task_sizes), size=num_rows)
        rows = self._task_rows[task]
        rows += np.floor(rng.random(num_rows) * self._task_sizes[task]).astype(np.int64)
        return rows

    def windows_of(self, current: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """First row and length of the windows that end with steps of the stage's data."""
        last = current + self._first_current
        episode = np.searchsorted(self._episode_rows, last, side="right") - 1
        start = np.maximum(last - self._context + 1, self._episode_rows[episode])
        return start, last - start + 1

    def _tasks_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The tasks of some rows of the table."""
        tasks = self._current_tasks[np.searchsorted(self.table.first_rows[2:-1], rows, side="right")]
        is_stored = rows < self._first_current
        tasks[is_stored] = self._memory_tasks[rows[is_stored]]
        return tasks

    def batch(self, step: int) -> Batch:
        """This rank's rows, `rank::size`, of the global batch of `step`."""
        return self._gather(self.windows(step), self._num_replayed)

    @property
    def _only_task(self) -> int | None:
        """The task of all rows that are not from memory; None in joint training."""
        return self.task if len(self._task_sizes) == 1 else None

    def reference(self, step: int, num_windows: int) -> Batch | None:
        """This rank's rows of `num_windows` segments from memory, independent of `batch`; None without memory."""
        if not len(self._memory_start):
            return None
        rows = generator(self._seed, "reference", self._stage, step).integers(
            len(self._memory_start), size=num_windows
        )
        return self._gather(Windows(self._memory_start[rows], self._memory_length[rows]), num_windows)

    def probe(self) -> Batch:
        """This rank's rows of a global batch of the current task alone, independent of training batches."""
        return self.sample(self._config.batch_size, "probe")

    def sample(self, num_windows: int, purpose: str) -> Batch:
        """This rank's rows of `num_windows` windows of the current task, from the random stream `purpose`."""
        rows = self._current_rows(generator(self._seed, purpose, self._stage), num_windows)
        return self._gather(Windows(*self.windows_of(rows)), 0)

    def _gather(self, windows: Windows, num_replayed: int) -> Batch:
        mine = slice(self._comm.rank, None, self._comm.size)
        start_R1, length_R1 = windows.start[mine, None], windows.length[mine, None]
        device, dtype = self.table.device, self.table.dtype
        steps_RL = np.minimum(self._position, length_R1 - 1)
        rows_RL = start_R1 + steps_RL
        valid_RL = to_device(self._position < length_R1, device).to(dtype)
        replayed = np.arange(len(windows.start))[mine] < num_replayed
        gathered = self.table.take(rows_RL.ravel()).view(*rows_RL.shape, -1)
        obs, mean, log_std, *outputs = torch.split(gathered, self.table.sizes, dim=-1)
        if windows.mixture is not None:
            partner, weight = windows.mixture
            weight_R11 = to_device(weight[mine, None, None], device).to(dtype)
            mixed_in = self.table.observations((partner[mine, None] + steps_RL).ravel())
            obs = torch.lerp(mixed_in.view_as(obs), obs, weight_R11)
        return Batch(
            obs,
            mean,
            log_std,
            valid_RL,
            to_device(self._tasks_of(rows_RL[:, 0]), device),
            to_device(replayed, device).to(dtype),
            int(windows.length.sum()),
            int(replayed.sum()),
            None if num_replayed else self._only_task,
            *outputs,
        )
