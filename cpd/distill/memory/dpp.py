"""Determinantal point processes: choosing a few items that are unlike each other.

An L-ensemble gives a set Y of candidates a probability proportional to det(S_Y), where S holds the similarities of
the candidates (Kulesza & Taskar 2012, "Determinantal point processes for machine learning"; all qualities are
equal). `greedy_map` grows a likely set of k of N candidates item by item and returns the order, so that every
prefix is the choice for its size.

Dimensions: N candidates, D features, k chosen, b chosen since all candidates were last brought up to date.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IndexArray = npt.NDArray[np.int64]

#: Added to the kernel's diagonal: far above rounding, far below what distinguishes two steps. It gives the kernel
#: full rank even where candidates coincide.
JITTER: Final = 1e-6
#: Rows between which the median distance is taken, half a million pairs.
BANDWIDTH_ROWS: Final = 1_000
#: Residual variances closer than this are equal up to rounding, and the lowest index wins.
TIE_TOLERANCE: Final = 1e-12
#: Candidates that greedy selection updates at every step, and the number of steps after which it updates all.
NUM_CONTENDERS: Final = 1_024
MAX_BLOCK: Final = 64


def select(features: FloatArray, num_items: int, generator: np.random.Generator, limit: int) -> IndexArray:
    """Choose `num_items` of N candidates by `preselect`, `median_bandwidth` and `greedy_map`.

    Args:
        features: [N, D], in stream order.
        num_items: k, at most `limit`.
        generator: draws the pre-selection and the rows for the bandwidth, in this order.
        limit: the number of candidates that `preselect` keeps.

    Returns:
        [k] indices into `features`, in the order of choice.
    """
    assert num_items <= limit
    kept = preselect(len(features), limit, generator)
    similarity = Similarity.rbf(features[kept], median_bandwidth(features[kept], generator))
    return kept[greedy_map(similarity, num_items)]


def preselect(num_candidates: int, limit: int, generator: np.random.Generator) -> IndexArray:
    """Draw at most `limit` of the candidates in stream order, one from each of `limit` equal stretches.

    Neighbouring steps are nearly alike, so that this loses little, and no part of the stream is left out.
    Stretches differ by one candidate at most.

    Returns:
        [min(num_candidates, limit)], ascending; all candidates, without a draw, if there are at most `limit`.
    """
    if num_candidates <= limit:
        return np.arange(num_candidates)
    edges = np.arange(limit + 1) * num_candidates // limit
    return generator.integers(edges[:-1], edges[1:])


def median_bandwidth(features: FloatArray, generator: np.random.Generator) -> float:
    """The median distance between two different candidates (Gretton et al. 2012), the usual RBF bandwidth.

    It is taken between `BANDWIDTH_ROWS` random rows, or between all rows, without a draw, if there are no more.
    Distances of zero do not count; the bandwidth is 1 if there is no other.

    Args:
        features: [N, D].
        generator: draws the rows.
    """
    if len(features) > BANDWIDTH_ROWS:
        features = features[generator.choice(len(features), BANDWIDTH_ROWS, replace=False)]
    distances = np.concatenate(
        [np.linalg.norm(features[i + 1 :] - row, axis=1) for i, row in enumerate(features[:-1])] or [np.zeros(0)]
    )
    distances = distances[distances > 0]
    return float(np.median(distances)) if len(distances) else 1.0


@dataclass(frozen=True)
class Similarity:
    """The matrix S [N, N] of exp(-|x - y|^2 / 2), computed row by row, plus `JITTER` on its diagonal."""

    features: FloatArray
    """[N, D], the rows x and y, in units of the bandwidth."""

    @classmethod
    def rbf(cls, features: FloatArray, bandwidth: float) -> Similarity:
        """exp(-|x - y|^2 / (2 bandwidth^2)) between the rows of `features` [N, D]."""
        # Distances come from inner products, which lose fewer digits near the origin.
        return cls((features - features.mean(axis=0)) / bandwidth)

    def __len__(self) -> int:
        """N."""
        return len(self.features)

    def rows(self, items: Sequence[int] | IndexArray) -> FloatArray:
        """[len(items), N], without the jitter."""
        products: FloatArray = self.features[items] @ self.features.T
        products -= 0.5 * self._squares
        products -= 0.5 * self._squares[items, None]
        return np.exp(np.minimum(products, 0.0, out=products), out=products)

    def take(self, items: IndexArray) -> Similarity:
        """The same kernel between the candidates `items`."""
        return Similarity(self.features[items])

    @cached_property
    def _squares(self) -> FloatArray:
        return np.asarray(np.einsum("nd,nd->n", self.features, self.features))


def greedy_map(similarity: Similarity, num_items: int) -> IndexArray:
    """Grow the set by the candidate that raises log det(S_Y) most, `num_items` times.

    The gain of a candidate is log(r), where r is its residual: the part of its variance that the chosen leave
    unexplained, updated by an incremental Cholesky factorisation (Chen, Zhang & Zhou 2018, "Fast greedy MAP
    inference for determinantal point process"): O(N k) per item, and k x N float64 of memory. As residuals never
    grow, only the candidates with the highest ones need to be up to date while they stay ahead of the others' last
    residuals (Minoux 1978); the others catch up in blocks, by matrix products. The result is the same.

    Args:
        similarity: between the N candidates.
        num_items: k, at most N.

    Returns:
        [k] indices in the order of choice: the first m are the choice for a budget of m. Of candidates with
        equal gains the one with the lowest index comes first.
    """
    assert 0 <= num_items <= len(similarity)
    factor = _Factor(similarity, num_items)
    order: list[int] = []
    while len(order) < num_items:
        block, triangle = _next_items(factor, min(MAX_BLOCK, num_items - len(order)))
        order.extend(block.tolist())
        if len(order) < num_items:
            factor.extend(block, triangle)
    return np.array(order, np.int64)


class _Factor:
    """The Cholesky factor of S over the chosen, extended to all candidates: what the chosen explain of each.

    Attributes:
        size: items chosen.
        rows: [capacity, N], the first `size` filled; S = rows.T @ rows on the chosen.
        residual: [N] variance left unexplained; 0 or less for the chosen.
    """

    def __init__(self, similarity: Similarity, capacity: int) -> None:
        self.similarity = similarity
        self.size = 0
        self.rows: FloatArray = np.empty((capacity, len(similarity)))
        self.residual: FloatArray = np.ones(len(similarity)) + JITTER

    def add(self, item: int) -> None:
        """Choose one more."""
        pivot = np.sqrt(self.residual[item])
        row = self.similarity.rows([item])[0]
        row -= self.rows[: self.size, item] @ self.rows[: self.size]
        row /= pivot
        row[item] = pivot
        self.rows[self.size] = row
        self.residual -= row * row
        self.residual[item] = 0.0
        self.size += 1

    def extend(self, items: IndexArray, triangle: FloatArray) -> None:
        """Choose several, whose lower triangular factor, given the items chosen so far, is `triangle` [b, b]."""
        rows = self.similarity.rows(items)
        rows -= self.rows[: self.size, items].T @ self.rows[: self.size]
        new = self.rows[self.size : self.size + len(items)]
        # Much faster than solving for N columns, and safe: the inverse has a norm of at most 1 / sqrt(jitter).
        np.matmul(np.linalg.inv(triangle), rows, out=new)
        self.residual -= np.einsum("bn,bn->n", new, new)
        self.residual[items] = 0.0
        self.size += len(items)

    def take(self, candidates: IndexArray, room: int) -> _Factor:
        """The factor restricted to `candidates`, with room for `room` more items."""
        taken = _Factor(self.similarity.take(candidates), self.size + room)
        taken.rows[: self.size] = self.rows[: self.size, candidates]
        taken.residual, taken.size = self.residual[candidates], self.size
        return taken

    def best(self) -> tuple[int, float]:
        """The first candidate with the greatest residual, up to ties, and that residual."""
        greatest = float(self.residual.max())
        return int(np.argmax(self.residual + TIE_TOLERANCE >= greatest)), greatest


def _next_items(factor: _Factor, count: int) -> tuple[IndexArray, FloatArray]:
    """The next items, at least one and at most `count`, and their triangle [b, b]."""
    first, _ = factor.best()
    # The greatest residual with which a candidate could have won or tied; it never increases.
    upper = np.where(factor.residual > 0.0, factor.residual + TIE_TOLERANCE, -1.0)
    upper[first] = np.inf
    num_rest = max(len(upper) - NUM_CONTENDERS, 0)
    ranked = np.argpartition(upper, num_rest) if num_rest else np.arange(len(upper))
    contenders = np.sort(ranked[num_rest:])
    rest = float(upper[ranked[:num_rest]].max()) if num_rest else -1.0

    local = factor.take(contenders, count)
    item = int(np.searchsorted(contenders, first))
    chosen = [item]
    local.add(item)
    while len(chosen) < count:
        item, residual = local.best()
        if residual <= max(rest, 0.0):
            break
        chosen.append(item)
        local.add(item)
    return contenders[chosen], np.tril(local.rows[factor.size : local.size, chosen].T)
