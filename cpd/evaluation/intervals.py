"""Intervals: from episode counts (Wilson) and over seeds (stratified bootstrap)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]

Z_95 = 1.959963984540054
#: With fewer seeds than these there is no interval over seeds.
FEW_SEEDS = 5


def wilson(successes: ArrayLike, episodes: ArrayLike, z: float = Z_95) -> tuple[Floats, Floats]:
    """Wilson score interval of a success rate (Wilson 1927).

    `(p + z^2/2n ± z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)`, with `p` successes out of `n`; (NaN, NaN) for
    `n = 0`. Takes numbers or arrays of any one shape.
    """
    n = np.asarray(episodes, float)
    with np.errstate(invalid="ignore", divide="ignore"):
        p = np.asarray(successes, float) / n
        centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
        # Rounding must not push the limits past the rate itself at 0 and 1.
        return np.minimum(np.clip(centre - half, 0, 1), p), np.maximum(np.clip(centre + half, 0, 1), p)


def mean_interval(estimates: Floats, low: Floats, high: Floats) -> tuple[float, float]:
    """Interval of the mean of independent quantities from each one's own interval (MOVER, Zou and Donner 2008).

    `mean ± sqrt(sum of squared distances to the limits) / J`; all arguments are (J,).
    """
    centre, count = float(estimates.mean()), len(estimates)
    below = float(np.sqrt(((estimates - low) ** 2).sum())) / count
    above = float(np.sqrt(((high - estimates) ** 2).sum())) / count
    return centre - below, centre + above


def difference_interval(
    first: tuple[Floats, Floats, Floats], second: tuple[Floats, Floats, Floats]
) -> tuple[Floats, Floats]:
    """Interval of `p1 - p2` from `(rate, low, high)` of each (Newcombe 1998, method 10).

    Both are taken as independent, which is cautious where they share their goals.
    """
    (p1, l1, u1), (p2, l2, u2) = first, second
    return p1 - p2 - np.hypot(p1 - l1, u2 - p2), p1 - p2 + np.hypot(u1 - p1, p2 - l2)


def ratio_interval(
    first: tuple[Floats, Floats, Floats], second: tuple[Floats, Floats, Floats]
) -> tuple[Floats, Floats]:
    """Interval of `p1 / p2` from `(rate, low, high)` of each, `p2 > 0` (Donner and Zou 2012).

    The lower limit is written in the conjugate form of theirs, which has no pole at `u2 = 2 p2`.
    """
    (p1, l1, u1), (p2, l2, u2) = first, second
    product = p1 * p2
    root = np.sqrt(np.maximum(product**2 - l1 * u2 * (2 * p1 - l1) * (2 * p2 - u2), 0))
    below, weight = l1 * (2 * p1 - l1), product + root
    low = np.divide(below, weight, out=np.zeros_like(below), where=weight > 0)
    root = np.sqrt(np.maximum(product**2 - u1 * l2 * (2 * p1 - u1) * (2 * p2 - l2), 0))
    return low, (product + root) / (l2 * (2 * p2 - l2))


def mean_score(scores: Floats) -> Floats:
    """Mean over seeds and tasks."""
    mean: Floats = scores.mean(axis=(-2, -1))
    return mean


def interquartile_mean(scores: Floats) -> Floats:
    """Mean of the middle half of all N x J scores; it drops exactly the worst tasks, so never show it alone."""
    flat = np.sort(scores.reshape(*scores.shape[:-2], -1), axis=-1)
    cut = flat.shape[-1] // 4
    middle: Floats = flat[..., cut : flat.shape[-1] - cut].mean(axis=-1)
    return middle


def lowest_task(scores: Floats) -> Floats:
    """The least of the tasks' means over seeds."""
    lowest: Floats = scores.mean(axis=-2).min(axis=-1)
    return lowest


def highest_task(scores: Floats) -> Floats:
    """The largest of the tasks' means over seeds: the worst task where less is better, as with forgetting."""
    highest: Floats = scores.mean(axis=-2).max(axis=-1)
    return highest


@dataclass(frozen=True)
class Aggregate:
    """A statistic over seeds."""

    estimate: float
    low: float | None
    """95 % interval, None with fewer than five seeds."""
    high: float | None
    per_seed: tuple[float, ...]
    note: str


def over_seeds(scores: Floats, statistic: Statistic, num_resamples: int = 10_000, seed: int = 0) -> Aggregate:
    """A statistic with its bootstrap 95 % interval over seeds.

    Seeds are drawn with replacement, each with all of its tasks, and the interval is that of the percentiles. (Of
    Agarwal et al. 2021, where every task is a run of its own, come strata by task; here one student does all tasks
    of a seed, and strata would hide that its tasks fare well or badly together.) With fewer than five seeds every
    seed's value is given instead, and the note says so. Of five seeds such an interval holds the truth some four
    times in five rather than nineteen in twenty.

    Args:
        scores: (N, J) scores by seed and task.
        statistic: maps (..., N, J) to (...).
        num_resamples: bootstrap resamples.
        seed: of the resampling.
    """
    num_seeds = len(scores)
    estimate = float(statistic(scores))
    per_seed = tuple(float(statistic(scores[n : n + 1])) for n in range(num_seeds))
    if num_seeds < FEW_SEEDS:
        plural = "" if num_seeds == 1 else "s"
        note = f"{num_seeds} seed{plural}: every seed is given, no interval over seeds"
        return Aggregate(estimate, None, None, per_seed, note)
    rng = np.random.default_rng(seed)
    values = np.empty(num_resamples)
    chunk = max(1, 1_000_000 // scores.size)  # resamples at a time: bounds the memory
    for start in range(0, num_resamples, chunk):
        stop = min(start + chunk, num_resamples)
        values[start:stop] = statistic(scores[rng.integers(num_seeds, size=(stop - start, num_seeds))])
    low, high = np.quantile(values, [0.025, 0.975])
    note = f"{num_seeds} seeds: bootstrap over seeds, {num_resamples} resamples, 95 %"
    return Aggregate(estimate, float(low), float(high), per_seed, note)


def probability_of_improvement(scores: Floats, other: Floats) -> float:
    """Mean over tasks of `P(X_j > Y_j) + P(X_j = Y_j) / 2` over pairs of seeds (Agarwal et al. 2021).

    Args:
        scores: (N, J) scores of X by seed and task.
        other: (M, J) scores of Y.
    """
    left, right = scores[:, None], other[None]
    return float(((left > right) + 0.5 * (left == right)).mean())
