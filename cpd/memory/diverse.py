"""Segments that are unlike each other, by a determinantal point process, and an equal share for every task."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cpd.config import MemoryConfig
from cpd.memory.dpp import select
from cpd.memory.dpp_kernel import FloatArray, standardise
from cpd.memory.segments import Segments
from cpd.memory.shares import equal_shares, starts_first
from cpd.seeding import generator
from cpd.student.observations import observation_scaling


class Diverse:
    """Greedy MAP inference at a task's first stage, among its segments that open an episode and among its others.

    The two orders are merged as `start_share` has it, and each task seen keeps a prefix of its merged order, in
    which segments are held, so that nothing else need be stored: of both kinds it is what greedy inference gives
    for its size. The RBF bandwidth is the median distance between the candidates of the kind. All segments have
    the same quality; states that are far from the others, noisy ones among them, therefore come early.
    """

    def __init__(self, seed: int, config: MemoryConfig) -> None:
        """`config.dpp_candidates` bounds cost: each kernel's factor has that many rows and columns at most."""
        self._seed, self._limit, self._start_share = seed, config.dpp_candidates, config.start_share

    def choose(self, held: Segments, offered: Segments, budget: int) -> npt.NDArray[np.int64]:
        """The segments that equal shares of `budget` steps leave."""
        known = bool(np.isin(offered.task, held.task).any())
        preference = np.zeros(0, np.int64) if known else self._preference(offered, budget)
        return equal_shares(held, offered, preference, budget)

    def _preference(self, offered: Segments, budget: int) -> npt.NDArray[np.int64]:
        """All segments: the greedy choice, as long as the budget can need it, then the others in random order.

        Segments that open an episode and the others are chosen from apart, since they are for different ends.
        """
        draws = generator(self._seed, "dpp", int(offered.task[0]))
        starts = np.flatnonzero(offered.opens_episode)
        parts = [np.arange(len(offered))]
        if self._start_share:
            parts = [starts, np.flatnonzero(~offered.opens_episode)]
        greedy = [part[self._greedy(offered.take(part), budget, draws)] for part in parts if len(part)]
        order = np.concatenate(greedy)
        return starts_first(offered.opens_episode, order, self._start_share)

    def _greedy(self, offered: Segments, budget: int, draws: np.random.Generator) -> npt.NDArray[np.int64]:
        most_that_fit = int((np.cumsum(np.sort(offered.length)) <= budget).sum())
        num_items = min(most_that_fit, self._limit, len(offered))
        quality = np.ones(len(offered))
        greedy = select(segment_features(offered), quality, num_items, draws, limit=self._limit)
        others = np.setdiff1d(np.arange(len(offered)), greedy)
        return np.concatenate([greedy, draws.permutation(others)])


def segment_features(segments: Segments) -> FloatArray:
    """The mean observation of every segment in the student's fixed scaling, [G, O].

    The mean, since all steps of a segment are kept and replayed, and since it damps the noise of a single step,
    which a choice of unlike items would seek out.
    """
    scaled_SO = standardise(segments.observations, *observation_scaling())
    sums_GO: FloatArray = np.add.reduceat(scaled_SO, segments.start, axis=0)
    return sums_GO / segments.length[:, None]
