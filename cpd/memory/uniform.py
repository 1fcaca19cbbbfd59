"""A uniform choice within each task, and an equal share for every task."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cpd.config import MemoryConfig
from cpd.memory.segments import Segments
from cpd.memory.shares import equal_shares, starts_first
from cpd.seeding import generator


class Uniform:
    """Segments in a random order drawn once per task; each task seen keeps a prefix of its own.

    A prefix of a random order is a uniform sample without replacement of any size, so what stays when shares
    shrink is what a fresh draw would be distributed like. Unlike with `Reservoir`, a task's share does not
    depend on how many steps its teacher wrote.
    """

    def __init__(self, seed: int, config: MemoryConfig) -> None:
        """`config.start_share` is heeded."""
        self._seed, self._start_share = seed, config.start_share

    def choose(self, held: Segments, offered: Segments, budget: int) -> npt.NDArray[np.int64]:
        """The segments that equal shares of `budget` steps leave."""
        task = int(offered.task[0])
        preference = generator(self._seed, "uniform", task).permutation(len(offered))
        preference = starts_first(offered.opens_episode, preference, self._start_share)
        return equal_shares(held, offered, preference, budget)
