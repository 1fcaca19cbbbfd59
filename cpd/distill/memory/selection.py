"""Segments that are unlike each other, by a determinantal point process, and an equal share for every task."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from cpd.config import MemoryConfig
from cpd.distill.memory.dpp import FloatArray, select, standardise
from cpd.distill.memory.segments import Segments
from cpd.seeding import generator
from cpd.student.observations import observation_scaling

#: Segments of a task, of those that open an episode and of the others each, among which `dpp` chooses; of more,
#: this many are drawn evenly over its rollouts. It bounds the rows and columns of a kernel's factor.
MAX_CANDIDATES: Final = 2_000


def starts_first(
    opens_episode: npt.NDArray[np.bool_], preference: npt.NDArray[np.int64], start_share: float
) -> npt.NDArray[np.int64]:
    """Reorder so that every prefix holds `start_share` segments that open an episode, to one, while they last.

    Args:
        opens_episode: [G] of the offered segments.
        preference: positions in them, best first.
        start_share: 0 leaves the order as it is.

    Returns:
        The same positions; the order among those that open an episode, and among the others, is kept.
    """
    if not start_share:
        return preference
    is_start = opens_episode[preference]
    # Where in the new order the i-th start and the j-th other would stand, were there enough of both.
    rank = np.empty(len(preference))
    rank[is_start] = np.arange(int(is_start.sum())) / start_share
    rank[~is_start] = (np.arange(int((~is_start).sum())) + 0.5) / max(1.0 - start_share, 1e-9)
    return preference[np.argsort(rank, kind="stable")]


def equal_shares(
    held: Segments, offered: Segments, preference: npt.NDArray[np.int64], budget: int
) -> npt.NDArray[np.int64]:
    """Keep a prefix of every task's order of preference, as equal in steps as whole segments allow.

    Segments are taken by the number of steps that their task has with them, the older task first where equal,
    until the next would exceed the budget. So shares are equal up to one segment, a task with less data than its
    share leaves the rest to the others, and a share that shrinks keeps a prefix of what it was. With a budget of
    less than a segment per task the latest tasks go without.

    Args:
        held: in the order in which an earlier call returned them.
        offered: of one task. Nothing of it is taken if the task is held: it was chosen from when it came first.
        preference: [at most len(offered)] positions in `offered`, best first; others are not taken.
        budget: steps.

    Returns:
        Positions in `held` followed by `offered`, task by task in order of preference.
    """
    if np.isin(offered.task, held.task).any():
        preference = preference[:0]
    position = np.concatenate([np.arange(len(held)), len(held) + preference])
    task = np.concatenate([held.task, offered.task[preference]])
    length = np.concatenate([held.length, offered.length[preference]])
    steps_of_task = np.empty(len(task), np.int64)
    for one in np.unique(task):
        rows = task == one
        steps_of_task[rows] = np.cumsum(length[rows])
    order = np.argsort(steps_of_task, kind="stable")
    num_kept = int((np.cumsum(length[order]) <= budget).sum())
    return position[np.sort(order[:num_kept])].astype(np.int64)


class Diverse:
    """Greedy MAP inference at a task's first stage, among its segments that open an episode and among its others.

    The two orders are merged as `start_share` has it, and each task seen keeps a prefix of its merged order, in
    which segments are held, so that nothing else need be stored: of both kinds it is what greedy inference gives
    for its size. The RBF bandwidth is the median distance between the candidates of the kind. All segments have
    the same quality; states that are far from the others, noisy ones among them, therefore come early.
    """

    def __init__(self, seed: int, config: MemoryConfig) -> None:
        """`config.start_share` is heeded."""
        self._seed, self._start_share = seed, config.start_share

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
        num_items = min(most_that_fit, MAX_CANDIDATES, len(offered))
        quality = np.ones(len(offered))
        greedy = select(segment_features(offered), quality, num_items, draws, limit=MAX_CANDIDATES)
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
