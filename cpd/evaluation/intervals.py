"""Confidence intervals from episode counts (Wilson) and over seeds (bootstrap), and the statistics they are of.

Shapes: J tasks, N seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]

#: 97.5 % quantile of the normal distribution.
Z_95 = 1.959963984540054
#: With fewer seeds than these there is no interval over seeds.
FEW_SEEDS = 5


def wilson(successes: ArrayLike, episodes: ArrayLike) -> tuple[Floats, Floats]:
    """Compute the Wilson 95 % score interval of a success rate (Wilson 1927).

    `(p + z^2/2n ± z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)`, where `p` is the success rate of `n` episodes and z
    is `Z_95`.

    Args:
        successes: number of successes, or an array of any shape.
        episodes: number of episodes, of the same shape.

    Returns:
        The lower and the upper limit, NaN where there are no episodes.
    """
    n, z = np.asarray(episodes, float), Z_95
    with np.errstate(invalid="ignore", divide="ignore"):
        p = np.asarray(successes, float) / n
        centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
        # At rates of 0 and 1, rounding would otherwise move a limit past the rate itself.
        return np.minimum(np.clip(centre - half, 0, 1), p), np.maximum(np.clip(centre + half, 0, 1), p)


def mean_interval(estimates: Floats, low: Floats, high: Floats) -> tuple[float, float]:
    """Compute the interval of a mean of independent quantities from their intervals (MOVER, Zou and Donner 2008).

    `mean ± sqrt(sum of squared distances to the limits) / J`. All arguments are (J,).
    """
    centre, count = float(estimates.mean()), len(estimates)
    below = float(np.sqrt(((estimates - low) ** 2).sum())) / count
    above = float(np.sqrt(((high - estimates) ** 2).sum())) / count
    return centre - below, centre + above


def difference_interval(
    first: tuple[Floats, Floats, Floats], second: tuple[Floats, Floats, Floats]
) -> tuple[Floats, Floats]:
    """Compute the interval of `p1 - p2` from `(rate, low, high)` of each (Newcombe 1998, method 10).

    The rates are treated as independent, which gives too wide an interval if they were measured on the same goals.
    """
    (p1, l1, u1), (p2, l2, u2) = first, second
    return p1 - p2 - np.hypot(p1 - l1, u2 - p2), p1 - p2 + np.hypot(u1 - p1, p2 - l2)


def ratio_interval(
    first: tuple[Floats, Floats, Floats], second: tuple[Floats, Floats, Floats]
) -> tuple[Floats, Floats]:
    """Compute the interval of `p1 / p2` from `(rate, low, high)` of each, with `p2 > 0` (Donner and Zou 2012)."""
    (p1, l1, u1), (p2, l2, u2) = first, second
    product = p1 * p2
    root = np.sqrt(np.maximum(product**2 - l1 * u2 * (2 * p1 - l1) * (2 * p2 - u2), 0))
    # The published formula, multiplied by its conjugate: it has no pole at u2 = 2 p2.
    numerator, denominator = l1 * (2 * p1 - l1), product + root
    low = np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
    root = np.sqrt(np.maximum(product**2 - u1 * l2 * (2 * p1 - u1) * (2 * p2 - l2), 0))
    return low, (product + root) / (l2 * (2 * p2 - l2))


def mean_score(scores: Floats) -> Floats:
    """Compute the mean over seeds and tasks; scores are (..., N, J), as in the next three functions."""
    mean: Floats = scores.mean(axis=(-2, -1))
    return mean


def interquartile_mean(scores: Floats) -> Floats:
    """Return the mean of the middle half of all N x J scores; it hides the worst tasks, so never show it alone."""
    flat = np.sort(scores.reshape(*scores.shape[:-2], -1), axis=-1)
    cut = flat.shape[-1] // 4
    middle: Floats = flat[..., cut : flat.shape[-1] - cut].mean(axis=-1)
    return middle


def lowest_task(scores: Floats) -> Floats:
    """Return the lowest of the tasks' means over seeds."""
    lowest: Floats = scores.mean(axis=-2).min(axis=-1)
    return lowest


def highest_task(scores: Floats) -> Floats:
    """Return the highest of the tasks' means over seeds: the worst task if lower is better, as in forgetting."""
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


def over_seeds(scores: Floats, statistic: Statistic, num_resamples: int = 10_000) -> Aggregate:
    """Compute a statistic and its 95 % interval over seeds by the percentile bootstrap.

    With fewer than five seeds there is no interval, and the note says so. With five seeds the interval covers the
    true value in about 80 % of cases instead of 95 %.

    Args:
        scores: (N, J) scores by seed and task.
        statistic: maps (..., N, J) to (...).
        num_resamples: number of bootstrap resamples.
    """
    num_seeds = len(scores)
    estimate = float(statistic(scores))
    per_seed = tuple(float(statistic(scores[n : n + 1])) for n in range(num_seeds))
    if num_seeds < FEW_SEEDS:
        plural = "" if num_seeds == 1 else "s"
        note = f"{num_seeds} seed{plural}: every seed is given, no interval over seeds"
        return Aggregate(estimate, None, None, per_seed, note)
    rng = np.random.default_rng(0)
    values = np.empty(num_resamples)
    chunk = max(1, 1_000_000 // scores.size)  # resamples at a time: bounds the memory
    for start in range(0, num_resamples, chunk):
        stop = min(start + chunk, num_resamples)
        # Seeds are drawn with all of their tasks. Agarwal et al. 2021 resample within each task, but there every
        # task is a separate run. Here one student learns all tasks of a seed, so that their scores correlate.
        values[start:stop] = statistic(scores[rng.integers(num_seeds, size=(stop - start, num_seeds))])
    low, high = np.quantile(values, [0.025, 0.975])
    note = f"{num_seeds} seeds: bootstrap over seeds, {num_resamples} resamples, 95 %"
    return Aggregate(estimate, float(low), float(high), per_seed, note)


def probability_of_improvement(scores: Floats, other: Floats) -> float:
    """Compute the mean over tasks of `P(X_j > Y_j) + P(X_j = Y_j) / 2` over pairs of seeds (Agarwal et al. 2021).

    Args:
        scores: (N, J) scores of X by seed and task.
        other: (M, J) scores of Y.
    """
    left, right = scores[:, None], other[None]
    return float(((left > right) + 0.5 * (left == right)).mean())
