"""Selection rules: which segments the memory keeps when a stage has ended.

`SELECTIONS` lists them by the names that `MemoryConfig.selection` uses; a new rule is a class and a line here.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from cpd.config import MemoryConfig
from cpd.distill.memory.dpp import FloatArray, preselect, select
from cpd.distill.memory.segments import Segments
from cpd.envs.suite import Spaces, load_suite
from cpd.seeding import generator

#: The number of segments among which `dpp` chooses, of those that open an episode and of the others each; larger
#: sets are thinned evenly over the rollouts. It bounds the rows and columns of a kernel's factor.
MAX_CANDIDATES: Final = 2_000


class Selection(Protocol):
    """Which segments stay when a stage has ended."""

    def choose(self, held: Segments, offered: Segments, budget: int) -> npt.NDArray[np.int64]:
        """Positions in `held` followed by `offered`, of segments with at most `budget` steps in total.

        The memory holds segments in the order returned, and `held` comes in that order: a selection may rely on
        this order and on nothing else. The result must be a pure function of the arguments, the seed and the
        settings, since a resumed run calls it again.
        """


class Reservoir:
    """A uniform sample of all segments offered so far, without knowing how many will come.

    Every segment has one fixed random key, and those with the smallest keys stay: the sample is what drawing
    without replacement from the whole stream would give, as with Vitter's (1985) Algorithm R, and a task that
    comes again does not count twice. With segments of equal length every step is equally likely to be held.
    """

    def __init__(self, seed: int, config: MemoryConfig, spaces: Spaces) -> None:
        """Only the seed matters."""
        self._seed = seed

    def choose(self, held: Segments, offered: Segments, budget: int) -> npt.NDArray[np.int64]:
        """The segments with the smallest keys, as many as fit into `budget` steps; positions ascend."""
        task = np.concatenate([held.task, offered.task])
        first_step = np.concatenate([held.first_step, offered.first_step])
        length = np.concatenate([held.length, offered.length])
        # A key depends on the seed and the segment's identity alone.
        keys = np.empty(len(task))
        for one in np.unique(task):
            rows = task == one
            drawn = generator(self._seed, "reservoir", int(one)).random(int(first_step[rows].max()) + 1)
            keys[rows] = drawn[first_step[rows]]
        order = np.argsort(keys, kind="stable")
        fits = np.cumsum(length[order]) <= budget
        return np.sort(order[: int(fits.sum())]).astype(np.int64)


class _EqualShares(abc.ABC):
    """Equal shares for all tasks: each keeps a prefix of the order of preference that its first stage gives."""

    def __init__(self, seed: int, config: MemoryConfig, spaces: Spaces) -> None:
        """Uses `config.start_share`, and the scaling of observations."""
        self._seed, self._start_share, self._spaces = seed, config.start_share, spaces

    def choose(self, held: Segments, offered: Segments, budget: int) -> npt.NDArray[np.int64]:
        """The segments that equal shares of `budget` steps leave."""
        is_held = np.isin(offered.task, held.task).any()
        preference = np.zeros(0, np.int64) if is_held else self._preference(offered, budget)
        return equal_shares(held, offered, preference, budget)

    @abc.abstractmethod
    def _preference(self, offered: Segments, budget: int) -> npt.NDArray[np.int64]:
        """Positions in `offered`, best first."""


class Uniform(_EqualShares):
    """Segments in a random order drawn once per task; each task keeps a prefix of its order.

    A prefix of a random order is a uniform sample without replacement of any size, so what stays when shares
    shrink has the distribution of a new draw. Unlike with `Reservoir`, the share of a task does not depend on how
    many steps its teacher wrote.
    """

    def _preference(self, offered: Segments, budget: int) -> npt.NDArray[np.int64]:
        preference = generator(self._seed, "uniform", int(offered.task[0])).permutation(len(offered))
        return starts_first(offered.opens_episode, preference, self._start_share)


class DPP(_EqualShares):
    """Greedy MAP inference of a determinantal point process, and equal shares for all tasks.

    At a task's first stage, segments that open an episode and all others are ranked separately, since they serve
    different purposes, and `start_share` merges the two orders. Each task keeps a prefix of its merged order, so
    nothing but the order of the held segments needs to be stored: a prefix of a greedy order is the greedy choice
    for its size. States far from the others, noisy ones among them, come early.
    """

    def _preference(self, offered: Segments, budget: int) -> npt.NDArray[np.int64]:
        """All segments: first the greedy choice, as far as the budget can need it, then the others at random."""
        draws = generator(self._seed, "dpp", int(offered.task[0]))
        opens = offered.opens_episode
        kinds = [opens, ~opens] if self._start_share else [np.ones_like(opens)]
        order = [self._rank(offered, kind, budget, draws) for kind in kinds if kind.any()]
        return starts_first(opens, np.concatenate(order), self._start_share)

    def _rank(
        self, offered: Segments, kind: npt.NDArray[np.bool_], budget: int, draws: np.random.Generator
    ) -> npt.NDArray[np.int64]:
        """The segments of `kind` in order of preference; those that no budget can reach are left out."""
        # Arrays over the segments of a stage that is larger than memory must be few and small: no int64.
        rows = np.arange(len(offered), dtype=offered.first_step.dtype)[kind]
        most_that_fit = num_that_fit(offered.length[rows], budget)
        num_items = min(most_that_fit, MAX_CANDIDATES, len(rows))
        greedy = np.zeros(0, np.int64)
        if num_items:
            kept = preselect(len(rows), MAX_CANDIDATES, draws)
            features = segment_features(offered.take(rows[kept]), self._spaces)
            greedy = kept[select(features, num_items, draws, MAX_CANDIDATES)]
        others = np.delete(rows, greedy)
        draws.shuffle(others)
        # The one that exceeds the budget counts: it ends the selection.
        ranked = np.concatenate([rows[greedy], others[: most_that_fit + 1]])
        return ranked[: most_that_fit + 1].astype(np.int64)


def num_that_fit(lengths: npt.NDArray[np.integer[Any]], budget: int) -> int:
    """The most segments of these lengths [G] that fit into `budget` steps: the shortest first."""
    parts = np.array_split(lengths, len(lengths) // 2**20 + 1)  # bincount copies to int64
    counts = sum(np.bincount(part, minlength=int(lengths.max()) + 1) for part in parts)
    num_fitting, left = 0, budget
    for length, count in enumerate(np.asarray(counts)[1:], start=1):
        fits = min(int(count), left // length)
        num_fitting, left = num_fitting + fits, left - fits * length
    return num_fitting


SELECTIONS: Final[Mapping[str, Callable[[int, MemoryConfig, Spaces], Selection]]] = {
    "reservoir": Reservoir,
    "uniform": Uniform,
    "dpp": DPP,
}


def make_selection(config: MemoryConfig, seed: int, spaces: Spaces | None = None) -> Selection | None:
    """The selection rule that `config.selection` names, for the suite with `spaces`; None for `none`."""
    if config.selection == "none":
        return None
    return SELECTIONS[config.selection](seed, config, spaces or load_suite().spaces)


def segment_features(segments: Segments, spaces: Spaces | None = None) -> FloatArray:
    """The mean observation of every segment in the student's fixed scaling, [G, O].

    The mean, since all steps of a segment are kept and replayed, and since it damps the noise of a single step,
    which a choice of dissimilar items would favour. The scaling is constant, so that choices made after different
    stages are comparable.
    """
    spaces = spaces or load_suite().spaces
    scaled_SO = (np.asarray(segments.observations, np.float64) - spaces.centre) / spaces.scale
    sums_GO: FloatArray = np.add.reduceat(scaled_SO, segments.start, axis=0)
    return sums_GO / segments.length[:, None]


def starts_first(
    opens_episode: npt.NDArray[np.bool_], preference: npt.NDArray[np.int64], start_share: float
) -> npt.NDArray[np.int64]:
    """Reorder so that `start_share` of every prefix, to within one segment, opens an episode, while supplies last.

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
    # Where in the new order the i-th start and the j-th other would stand if there were enough of both.
    rank = np.empty(len(preference))
    rank[is_start] = np.arange(int(is_start.sum())) / start_share
    rank[~is_start] = (np.arange(int((~is_start).sum())) + 0.5) / max(1.0 - start_share, 1e-9)
    return preference[np.argsort(rank, kind="stable")]


def equal_shares(
    held: Segments, offered: Segments, preference: npt.NDArray[np.int64], budget: int
) -> npt.NDArray[np.int64]:
    """Keep a prefix of every task's order of preference; shares are as equal as whole segments allow.

    Segments are taken in the order of the number of steps that their task has with them, the older task first on
    ties, until the next would exceed the budget. Shares are therefore equal up to one segment, a task with less
    data than its share leaves the rest to the others, and a share that shrinks keeps a prefix of what it was. With
    a budget of less than a segment per task, the latest tasks get nothing.

    Args:
        held: in the order in which an earlier call returned them.
        offered: of one task. If the task is already held, nothing is taken: it was selected at its first stage.
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
