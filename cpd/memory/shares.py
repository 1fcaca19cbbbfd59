"""Equal shares of the memory for every task seen, by an order of preference within each task."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cpd.memory.segments import Segments


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
