"""Determinantal point processes: choosing a few items that are good and unlike each other.

An L-ensemble gives a set Y of candidates a probability proportional to det(L_Y), where L = diag(q) S diag(q) with
qualities q and similarities S (Kulesza & Taskar 2012, "Determinantal point processes for machine learning").
There are two ways to take k of N candidates: `greedy_map` grows a likely set item by item and returns the order;
`sample_k_dpp` draws a set of k exactly in proportion to det(L_Y). Scaling all qualities alike changes neither.

Dimensions: N candidates, D features, k chosen, b chosen since the last look at all candidates.
"""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from cpd.memory.dpp_kernel import (
    RBF_JITTER,
    FloatArray,
    IndexArray,
    Similarity,
    checked_features,
    linear_similarity,
    median_bandwidth,
    rbf_similarity,
)

#: A candidate whose residual variance (1 before anything is chosen) is at most this is spanned by the chosen.
RANK_TOLERANCE: Final = 1e-10
#: Residual variances closer than this are equal up to rounding, and the lowest index wins.
TIE_TOLERANCE: Final = 1e-12
#: Exact sampling decomposes an N x N matrix: 200 MB each for it and its eigenvectors at this size.
MAX_SAMPLED_CANDIDATES: Final = 5_000
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


def sample_k_dpp(
    similarity: Similarity, quality: npt.ArrayLike, num_items: int, generator: np.random.Generator
) -> IndexArray:
    """Draw a set of exactly `num_items` with probability det(L_Y) / e_k (Kulesza & Taskar 2012, algorithm 8).

    Eigenvectors of L are chosen by elementary symmetric polynomials of the eigenvalues, then items from the
    projection that they span. A linear kernel without jitter is decomposed in its dual form, D x D.

    Args:
        similarity: between the N candidates; N at most `MAX_SAMPLED_CANDIDATES`, except in the dual form.
        quality: [N], positive.
        num_items: k.
        generator: draws the set.

    Returns:
        [k] distinct indices, in the order of drawing, which means nothing.

    Raises:
        ValueError: the kernel's rank is less than `num_items`, there are too many candidates, or the arguments
            do not fit.
    """
    weight = _checked_quality(quality, similarity, num_items)
    if num_items == 0:
        return np.zeros(0, np.int64)
    values, vectors, basis = _decompose(similarity, weight)
    if len(values) < num_items:
        raise _rank_error(similarity, len(values), num_items)
    picked = _sample_eigenvectors(np.log(values), num_items, generator)
    span = vectors[:, picked] if basis is None else np.linalg.qr(basis @ vectors[:, picked])[0]

    factor = _Factor(Similarity("linear", span), num_items)
    chosen: list[int] = []
    for _ in range(num_items):
        mass = np.maximum(factor.residual, 0.0)
        chosen.append(int(generator.choice(len(mass), p=mass / mass.sum())))
        factor.add(chosen[-1])
    return np.array(chosen, np.int64)


def select(
    features: npt.ArrayLike,
    quality: npt.ArrayLike,
    num_items: int,
    generator: np.random.Generator,
    *,
    kernel: Literal["linear", "rbf"] = "rbf",
    inference: Literal["greedy", "k_dpp"] = "greedy",
    bandwidth: float | None = None,
    jitter: float | None = None,
    limit: int | None = None,
) -> IndexArray:
    """Choose `num_items` of N candidates: pre-selection, kernel and inference in one call.

    Args:
        features: [N, D], in stream order.
        quality: [N], positive.
        num_items: k.
        generator: draws pre-selection, bandwidth rows and the k-DPP, in this order.
        kernel: see `linear_similarity` and `rbf_similarity`.
        inference: see `greedy_map` and `sample_k_dpp`.
        bandwidth: of the RBF kernel; None: `median_bandwidth` of the pre-selected.
        jitter: None: the kernel's default, 0 for `linear` and `RBF_JITTER` for `rbf`.
        limit: candidates left by `preselect`; None keeps all.

    Returns:
        [k] indices into `features`; for `greedy` in the order of choice.

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
    if kernel == "linear":
        similarity = linear_similarity(raw, 0.0 if jitter is None else jitter)
    else:
        width = median_bandwidth(raw, generator) if bandwidth is None else bandwidth
        similarity = rbf_similarity(raw, width, RBF_JITTER if jitter is None else jitter)
    if inference == "greedy":
        return left[greedy_map(similarity, quality_N[left], num_items)]
    return left[sample_k_dpp(similarity, quality_N[left], num_items, generator)]


def log_elementary_symmetric(log_values: npt.ArrayLike, degree: int) -> FloatArray:
    """Logarithms of the elementary symmetric polynomials e_l of the first n values, [degree + 1, N + 1].

    e_l(n) = e_l(n - 1) + value_n e_(l-1)(n - 1) (Kulesza & Taskar 2012, algorithm 7), in logarithms because
    e_l overflows float64 within a few hundred values.

    Args:
        log_values: [N].
        degree: the highest l.
    """
    logs = np.asarray(log_values, np.float64)
    table = np.full((len(logs) + 1, degree + 1), -np.inf)
    table[:, 0] = 0.0
    for n, log_value in enumerate(logs, start=1):
        np.logaddexp(table[n - 1, 1:], log_value + table[n - 1, :-1], out=table[n, 1:])
    return table.T


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


def _decompose(similarity: Similarity, weight: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray | None]:
    """The eigenvalues of L above zero and their eigenvectors; in the dual form also what maps these to L's."""
    num_candidates, num_features = similarity.features.shape
    basis = None
    if similarity.kind == "linear" and not similarity.jitter and num_features < num_candidates:
        basis = weight[:, None] * similarity.features
        values, vectors = np.linalg.eigh(basis.T @ basis)
    elif num_candidates <= MAX_SAMPLED_CANDIDATES:
        values, vectors = np.linalg.eigh(similarity.matrix() * np.outer(weight, weight))
    else:
        raise ValueError(
            f"exact k-DPP sampling takes at most {MAX_SAMPLED_CANDIDATES} candidates, not {num_candidates}: "
            "pre-select some of them (limit), or use greedy selection"
        )
    if similarity.jitter:
        # The jitter keeps every eigenvalue at least this large, though rounding may have swallowed it.
        least = similarity.jitter * float(weight.min()) ** 2
        return np.maximum(values, max(least, float(np.finfo(np.float64).tiny))), vectors, basis
    kept = values > values[-1] * num_candidates * np.finfo(np.float64).eps
    return values[kept], vectors[:, kept], basis


def _sample_eigenvectors(log_values: FloatArray, count: int, generator: np.random.Generator) -> list[int]:
    """`count` positions, a set J with probability proportional to the product of its values."""
    table = log_elementary_symmetric(log_values, count)
    log_uniform = -generator.standard_exponential(len(log_values))
    chosen: list[int] = []
    for n in range(len(log_values), 0, -1):
        left = count - len(chosen)
        if left == 0:
            break
        # Exactly 0 once all that are left are needed, so that the count is always met.
        log_probability = log_values[n - 1] + table[left - 1, n - 1] - table[left, n]
        if log_uniform[n - 1] <= log_probability:
            chosen.append(n - 1)
    assert len(chosen) == count
    return chosen


def _rank_error(similarity: Similarity, rank: int, num_items: int) -> ValueError:
    remedy = "use the rbf kernel, or a jitter" if similarity.kind == "linear" else "use a jitter"
    if similarity.jitter:
        remedy = "use a larger jitter"
    return ValueError(
        f"the {similarity.kind} kernel of {len(similarity)} candidates with jitter {similarity.jitter:g} has "
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
