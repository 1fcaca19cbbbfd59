"""Rows of shards that are mapped into memory instead of copied."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

#: Rollouts of at most this size are copied into arrays, which are faster to index than mapped rows.
MAX_COPIED_BYTES: Final = 16 * 2**20


class MappedFile:
    """A file whose arrays are read from the page cache when they are used."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def array(self, dataset: Any) -> npt.NDArray[Any]:
        """The values of an HDF5 dataset of this file; copied only if it is not contiguous, as ours are."""
        offset: int | None = dataset.id.get_offset()
        if offset is None:
            return np.asarray(dataset[:])
        return np.frombuffer(self._map, dataset.dtype, int(np.prod(dataset.shape)), offset).reshape(dataset.shape)

    def release(self) -> None:
        """Unmap the pages that were read; the page cache keeps them, and the next access maps them again."""
        self._map.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True)
class MappedRows:
    """The rows of N steps in E episodes, which lie in several mapped files; indexing copies rows.

    Pages count as resident while they are mapped, so indexing releases them.
    """

    files: Sequence[MappedFile]
    arrays: Sequence[FloatArray]
    """[rows of the file, C] of every file."""
    offsets: npt.NDArray[np.int64]
    """[E + 1] episode e has steps offsets[e]:offsets[e + 1]."""
    file_E: npt.NDArray[np.int64]
    """The position in `files` of the file that holds the episode."""
    first_row_E: npt.NDArray[np.int64]
    """The row of the episode's first step in its file."""

    @property
    def shape(self) -> tuple[int, int]:
        """N, C."""
        return int(self.offsets[-1]), self.arrays[0].shape[1]

    @property
    def ndim(self) -> int:
        """Number of dimensions, 2."""
        return len(self.shape)

    def __len__(self) -> int:
        """N."""
        return self.shape[0]

    def __getitem__(self, steps: npt.NDArray[np.int64] | slice) -> FloatArray:
        """Copy the rows of `steps` [...], in that order; returns [..., C]."""
        if isinstance(steps, slice):
            steps = np.arange(*steps.indices(len(self)))
        steps_n = steps.ravel()
        episode_n = np.searchsorted(self.offsets, steps_n, side="right") - 1
        row_n = self.first_row_E[episode_n] + steps_n - self.offsets[episode_n]
        file_n = self.file_E[episode_n]
        result = np.empty((len(steps_n), self.shape[1]), np.float32)
        for number in np.unique(file_n):
            places = np.flatnonzero(file_n == number)
            result[places] = self.arrays[number][row_n[places]]
            self.files[number].release()
        return result.reshape(*steps.shape, -1)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> FloatArray:
        """Copy all rows to one array."""
        lengths = np.diff(self.offsets)
        pieces = zip(self.file_E, self.first_row_E, self.first_row_E + lengths, strict=True)
        return np.concatenate([self.arrays[number][first:stop] for number, first, stop in pieces])

    def of_episodes(self, kept_E: npt.NDArray[np.bool_]) -> MappedRows:
        """The rows of some episodes."""
        offsets = np.append(0, np.cumsum(np.diff(self.offsets)[kept_E]))
        return MappedRows(self.files, self.arrays, offsets, self.file_E[kept_E], self.first_row_E[kept_E])


#: Rows in memory or in mapped files. Index them by integers.
Rows = FloatArray | MappedRows
