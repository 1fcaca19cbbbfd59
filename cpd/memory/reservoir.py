"""Reservoir sampling by random keys."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cpd.config import MemoryConfig
from cpd.memory.segments import Segments
from cpd.seeding import generator


class Reservoir:
    """A uniform sample of all segments offered so far, without knowing how many will come.

    Every segment has one random key for ever, and those with the smallest keys stay: the sample is what drawing
    without replacement from the whole stream would give, as with Vitter's (1985) Algorithm R, and a task that
    comes again does not count twice. With segments of equal length every step is equally likely to be held.
    """

    def __init__(self, seed: int, config: MemoryConfig) -> None:
        """No setting but the seed matters."""
        self._seed = seed

    def choose(self, held: Segments, offered: Segments, budget: int) -> npt.NDArray[np.int64]:
        """The longest run of segments in the order of their keys that fits into `budget` steps, ascending."""
        task = np.concatenate([held.task, offered.task])
        first_step = np.concatenate([held.first_step, offered.first_step])
        length = np.concatenate([held.length, offered.length])
        order = np.argsort(self._keys(task, first_step), kind="stable")
        fits = np.cumsum(length[order]) <= budget
        return np.sort(order[: int(fits.sum())]).astype(np.int64)

    def _keys(self, task: npt.NDArray[np.int64], first_step: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """A uniform number per segment, which depends on the seed and the segment's identity alone."""
        keys = np.empty(len(task))
        for one in np.unique(task):
            rows = task == one
            drawn = generator(self._seed, "reservoir", int(one)).random(int(first_step[rows].max()) + 1)
            keys[rows] = drawn[first_step[rows]]
        return keys
