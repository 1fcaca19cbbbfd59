"""The steps that a stage draws from: those of the memory, then those of every task of the stage.

Dimensions: S steps, n rows, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cpd.distill.losses import floored_log_std
from cpd.distill.memory.segments import Segments
from cpd.distill.stage_data import StageData
from cpd.run.shards.mapped import MappedRows, Rows

#: Rows that are copied to a table at once.
CHUNK = 262_144


def to_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Copy an array to a device, without waiting for what the device computes."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class StepTable:
    """Observations, teacher's mean and log deviation, and stored outputs of the student if the memory has any.

    One tensor, so that a batch is one gather. On the CPU, rows of mapped files stay there.
    """

    def __init__(
        self,
        memory: Segments,
        tasks: Sequence[StageData],
        std_floor: float,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.device, self.dtype, self._std_floor = device, dtype, std_floor
        steps: list[Segments | StageData] = [memory, *tasks]
        columns = [(s.observations, s.teacher_mean, s.teacher_log_std) for s in steps]
        self._sources: list[tuple[Rows, ...]] = [*columns]
        self.sizes = [rows.shape[1] for rows in columns[1]]
        if outputs := memory.student_outputs.shape[1]:
            self._sources[0] = (*columns[0], memory.student_outputs)
            self.sizes.append(outputs)
        #: [sources + 1] the first row of every source, and S.
        self.first_rows = np.cumsum([0, *(len(rows[0]) for rows in columns)])
        self._table: Tensor | None = None
        if device.type == "cuda" or not any(isinstance(rows, MappedRows) for rows, *_ in columns):
            self._table = torch.empty((int(self.first_rows[-1]), sum(self.sizes)), dtype=dtype, device=device)
            for first, source in zip(self.first_rows, self._sources, strict=False):
                for start in range(0, len(source[0]), CHUNK):
                    stop = min(start + CHUNK, len(source[0]))
                    self._read(source, slice(start, stop), self._table[first + start : first + stop])

    def take(self, rows_n: npt.NDArray[np.int64]) -> Tensor:
        """All columns of some rows, [n, C]; the log deviation of teachers is at least the floor's."""
        if self._table is not None:
            return self._table.index_select(0, to_device(rows_n, self.device))
        result = torch.empty((len(rows_n), sum(self.sizes)), dtype=self.dtype)
        number_n = np.searchsorted(self.first_rows, rows_n, side="right") - 1
        for number in np.unique(number_n):
            places = np.flatnonzero(number_n == number)
            part = torch.empty((len(places), sum(self.sizes)), dtype=self.dtype)
            self._read(self._sources[number], rows_n[places] - self.first_rows[number], part)
            result[torch.from_numpy(places)] = part
        return result

    def observations(self, rows_n: npt.NDArray[np.int64]) -> Tensor:
        """Raw observations, [n, O]."""
        return self.take(rows_n)[:, : self.sizes[0]]

    def _read(self, source: tuple[Rows, ...], rows: npt.NDArray[np.int64] | slice, out: Tensor) -> None:
        """Copy all columns of some rows of a source to `out` [n, C]; zeros where it stores no outputs."""
        columns = torch.split(out, self.sizes, dim=1)
        columns[-1].zero_()
        for column, array in zip(columns, source, strict=False):
            column.copy_(torch.from_numpy(array[rows]))
        columns[2].copy_(floored_log_std(columns[2], self._std_floor))
