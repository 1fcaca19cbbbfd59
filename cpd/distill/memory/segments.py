"""Segments: runs of consecutive time steps of one episode, the unit in which memory keeps and replays steps.

Dimensions: G segments, S steps, O observation size, A action size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from cpd.envs.suite import Sizes, load_suite
from cpd.run.shards.mapped import Rows

Array = npt.NDArray[Any]

#: The arrays with a row per segment; all others have a row per step.
PER_SEGMENT = ("task", "first_step", "length", "opens_episode")


@dataclass(frozen=True)
class Segments:
    """G segments, their S steps one after another."""

    task: npt.NDArray[np.int64]
    """[G] int64, position of the task among the stream's distinct ones."""
    first_step: npt.NDArray[np.int64]
    """[G] int64, number of the first step within its task's rollouts: with the task, its identity."""
    length: npt.NDArray[np.int64]
    """[G] int64, steps; at most the student's context."""
    opens_episode: npt.NDArray[np.bool_]
    """[G] bool, whether the first step is its episode's first."""
    observations: Rows
    """[S, O] float32, raw."""
    teacher_mean: Rows
    """[S, A] float32, as executed, in [-1, 1]."""
    teacher_log_std: Rows
    """[S, A] float32."""
    student_outputs: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    """[S, 2 A] float32, mean and log deviation of the student of the steps' own stage, for replay that needs them
    (DER++); otherwise without columns."""

    def __post_init__(self) -> None:
        assert len(self.task) == len(self.first_step) == len(self.length)
        assert len(self.observations) == len(self.teacher_mean) == len(self.teacher_log_std) == self.length.sum()

    @classmethod
    def empty(cls, sizes: Sizes | None = None) -> Segments:
        """No segments, of observations and actions of these sizes; None: Meta-World's."""
        sizes = sizes or load_suite().spaces.sizes
        none = np.zeros(0, np.int64)
        observations, actions = (np.zeros((0, size), np.float32) for size in sizes)
        return cls(none, none, none, none.astype(bool), observations, actions, actions)

    def __len__(self) -> int:
        """G."""
        return len(self.task)

    @property
    def num_steps(self) -> int:
        """S."""
        return len(self.observations)

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays().values())

    @property
    def start(self) -> npt.NDArray[np.int64]:
        """[G] row of each segment's first step in the arrays per step."""
        start = np.cumsum(self.length, dtype=self.length.dtype)
        start -= self.length
        return start

    def arrays(self) -> dict[str, Array]:
        """The arrays by name; those without columns are left out."""
        arrays = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: array for name, array in arrays.items() if array.ndim == 1 or array.shape[1]}

    def observations_by_task(self) -> dict[int, npt.NDArray[np.float32]]:
        """The raw observations of every held task, [steps, O], by position of the task."""
        task_S = np.repeat(self.task, self.length)
        return {int(task): self.observations[task_S == task] for task in np.unique(task_S)}

    def take(self, chosen: npt.NDArray[np.int64]) -> Segments:
        """The segments at the positions `chosen`, in that order."""
        length, start = self.length[chosen].astype(np.int64), self.start[chosen]
        # The rows of the chosen segments, one run after another.
        rows = np.arange(length.sum()) + np.repeat(start - (np.cumsum(length) - length), length)
        arrays = {name: array[chosen if name in PER_SEGMENT else rows] for name, array in self.arrays().items()}
        return Segments(**arrays | {"length": length, "first_step": arrays["first_step"].astype(np.int64)})

    @staticmethod
    def concatenate(groups: Sequence[Segments]) -> Segments:
        """All segments of all groups, in order."""
        filled = [group.arrays() for group in groups if len(group)] or [groups[0].arrays()]
        return Segments(**{name: np.concatenate([arrays[name] for arrays in filled]) for name in filled[0]})
