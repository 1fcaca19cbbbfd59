"""Determinantal point processes: choosing a few items that are good and unlike each other.

An L-ensemble gives a set Y of candidates a probability proportional to det(L_Y), where L = diag(q) S diag(q) with
qualities q and similarities S (Kulesza & Taskar 2012, "Determinantal point processes for machine learning").
`greedy_map` grows a likely set of k of N candidates item by item and returns the order, so that every prefix is
the choice for its size. Scaling all qualities alike changes nothing.

Dimensions: N candidates, D features, k chosen, b chosen since the last look at all candidates.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from cpd.memory.dpp_kernel import (
    RBF_JITTER,
    FloatArray,
    IndexArray,
    Similarity,
    checked_features,
    median_bandwidth,
    rbf_similarity,
)

#: A candidate whose residual variance (1 before anything is chosen) is at most this is spanned by the chosen.
RANK_TOLERANCE: Final = 1e-10
#: Residual variances closer than this are equal up to rounding, and the lowest index wins.
TIE_TOLERANCE: Final = 1e-12
#: Candidates that greedy selection keeps up to date at every step, and the steps after which it looks at all.
NUM_CONTENDERS: Final = 1_024
MAX_BLOCK: Final = 64


def preselect(num_candidates: int, limit: int, generator: np.random.Generator) -> IndexArray:
    """At most `limit` of the candidates in stream order, one drawn from each of `limit` equal stretches.

    Neighbouring steps are nearly alike, so that this loses little, and no part of the stream is left out.
    Stretches differ by one candidate at most.

    Returns:
        [min(num_candidates, limit)], ascending; all of them, without a draw, where no more than `limit`.
    """
    if limit < 1:
        raise ValueError(f"limit = {limit}: at least one candidate must be left")
    if num_candidates <= limit:
        return np.arange(num_candidates)
    edges = np.arange(limit + 1) * num_candidates // limit
    return generator.integers(edges[:-1], edges[1:])


def greedy_map(similarity: Similarity, quality: npt.ArrayLike, num_items: int) -> IndexArray:
    """Grow the set by the candidate that raises log det(L_Y) most, `num_items` times.

    The gain of candidate i is log(q_i^2 r_i), where r_i is the part of its variance that the chosen leave
    unexplained, kept up to date by an incremental Cholesky factorisation (Chen, Zhang & Zhou 2018, "Fast greedy
    MAP inference for determinantal point process"): O(N k) per item, and k x N float64 of memory. As r_i never
    grows, only the candidates with the highest gains need be up to date while they stay ahead of the others'
    last gains (Minoux 1978); the others catch up in blocks, by matrix products. The result is the same.

    Args:
        similarity: between the N candidates.
        quality: [N], positive; the more, the likelier an item is to be chosen despite its likeness to others.
        num_items: k.

    Returns:
        [k] indices in the order of choice: the first m are the choice for a budget of m. Of candidates with
        equal gains the one with the lowest index comes first.

    Raises:
        ValueError: the kernel's rank is less than `num_items`, or the arguments do not fit.
    """
    weight = _checked_quality(quality, similarity, num_items) ** 2
    factor = _Factor(similarity, num_items)
    order: list[int] = []
    while len(order) < num_items:
        block, triangle = _next_items(factor, weight, min(MAX_BLOCK, num_items - len(order)))
        if not len(block):
            raise _rank_error(similarity, len(order), num_items)
        order.extend(block.tolist())
        if len(order) < num_items:
            factor.extend(block, triangle)
    return np.array(order, np.int64)


def select(
    features: npt.ArrayLike,
    quality: npt.ArrayLike,
    num_items: int,
    generator: np.random.Generator,
    *,
    jitter: float = RBF_JITTER,
    limit: int | None = None,
) -> IndexArray:
    """Choose `num_items` of N candidates: `preselect`, `rbf_similarity` and `greedy_map` in one call.

    Args:
        features: [N, D], in stream order.
        quality: [N], positive.
        num_items: k.
        generator: draws pre-selection and bandwidth rows, in this order.
        jitter: see `rbf_similarity`.
        limit: candidates left by `preselect`; None keeps all.

    Returns:
        [k] indices into `features`, in the order of choice.

    Raises:
        ValueError: as the functions named above.
    """
    raw, quality_N = checked_features(features), np.asarray(quality, np.float64)
    if quality_N.shape != raw.shape[:1]:
        raise ValueError(f"quality has shape {quality_N.shape}, but there are {len(raw)} candidates")
    if limit is not None and limit < num_items:
        raise ValueError(f"limit = {limit} leaves fewer candidates than the {num_items} items wanted: raise it")
    if num_items == 0:
        return np.zeros(0, np.int64)
    left = np.arange(len(raw)) if limit is None else preselect(len(raw), limit, generator)
    raw = raw[left]
    similarity = rbf_similarity(raw, median_bandwidth(raw, generator), jitter)
    return left[greedy_map(similarity, quality_N[left], num_items)]


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
        self.residual: FloatArray = similarity.diagonal.copy()

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
        """Choose several, of which [b, b] `triangle` is the lower triangular factor given those before."""
        rows = self.similarity.rows(items)
        rows -= self.rows[: self.size, items].T @ self.rows[: self.size]
        new = self.rows[self.size : self.size + len(items)]
        # Much faster than solving for N columns, and safe: the inverse has a norm of at most 1 / sqrt(jitter).
        np.matmul(np.linalg.inv(triangle), rows, out=new)
        self.residual -= np.einsum("bn,bn->n", new, new)
        self.residual[items] = 0.0
        self.size += len(items)

    def take(self, candidates: IndexArray, room: int) -> _Factor:
        """The same for some of the candidates, with room for as many more items."""
        part = _Factor(self.similarity.take(candidates), self.size + room)
        part.rows[: self.size] = self.rows[: self.size, candidates]
        part.residual, part.size = self.residual[candidates], self.size
        return part


def _best(weight: FloatArray, residual: FloatArray) -> tuple[int, float]:
    """The first candidate of the greatest gain, and the gain; (-1, 0) if none adds anything."""
    useful = residual > RANK_TOLERANCE
    if not useful.any():
        return -1, 0.0
    best = float((weight * residual)[useful].max())
    return int(np.argmax(useful & (weight * (residual + TIE_TOLERANCE) >= best))), best


def _next_items(factor: _Factor, weight: FloatArray, count: int) -> tuple[IndexArray, FloatArray]:
    """The next items, `count` at most but one at least if any adds something, and their triangle [b, b]."""
    first, _ = _best(weight, factor.residual)
    if first < 0:
        return np.zeros(0, np.int64), np.zeros((0, 0))
    # The greatest gain with which a candidate could have won or tied; none will ever have more.
    upper = np.where(factor.residual > RANK_TOLERANCE, weight * (factor.residual + TIE_TOLERANCE), -1.0)
    upper[first] = np.inf
    num_rest = max(len(upper) - NUM_CONTENDERS, 0)
    ranked = np.argpartition(upper, num_rest) if num_rest else np.arange(len(upper))
    contenders = np.sort(ranked[num_rest:])
    rest = float(upper[ranked[:num_rest]].max()) if num_rest else -1.0

    part = factor.take(contenders, count)
    item = int(np.searchsorted(contenders, first))
    chosen = [item]
    part.add(item)
    while len(chosen) < count:
        item, gain = _best(weight[contenders], part.residual)
        if item < 0 or gain <= rest:
            break
        chosen.append(item)
        part.add(item)
    return contenders[chosen], np.tril(part.rows[factor.size : part.size, chosen].T)


def _rank_error(similarity: Similarity, rank: int, num_items: int) -> ValueError:
    remedy = "use a larger jitter" if similarity.jitter else "use a jitter"
    return ValueError(
        f"the RBF kernel of {len(similarity)} candidates with jitter {similarity.jitter:g} has "
        f"numerical rank {rank}, which cannot give {num_items} items: {remedy}, or ask for at most {rank}"
    )


def _checked_quality(quality: npt.ArrayLike, similarity: Similarity, num_items: int) -> FloatArray:
    """[N] quality as a share of the greatest, after a look at `num_items`."""
    array = np.asarray(quality, np.float64)
    if array.shape != (len(similarity),):
        raise ValueError(f"quality has shape {array.shape}, but there are {len(similarity)} candidates")
    if not (np.isfinite(array) & (array > 0)).all():
        row = int(np.argmin(np.isfinite(array) & (array > 0)))
        raise ValueError(f"quality[{row}] = {array[row]}: qualities must be positive and finite")
    if not 0 <= num_items <= len(array):
        raise ValueError(f"{num_items} items cannot be chosen from {len(array)} candidates")
    return array / array.max() if len(array) else array
