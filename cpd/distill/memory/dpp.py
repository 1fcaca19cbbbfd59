"""Determinantal point processes: choosing a few items that are good and unlike each other.

An L-ensemble gives a set Y of candidates a probability proportional to det(L_Y), where L = diag(q) S diag(q) with
qualities q and similarities S (Kulesza & Taskar 2012, "Determinantal point processes for machine learning").
`greedy_map` grows a likely set of k of N candidates item by item and returns the order, so that every prefix is
the choice for its size. Scaling all qualities alike changes nothing.

Dimensions: N candidates, D features, k chosen, b chosen since the last look at all candidates.
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

#: Added to the RBF kernel's diagonal: far above rounding, far below what tells two distinct steps apart.
RBF_JITTER: Final = 1e-6
#: Smaller jitters drown in the rounding of the factorisation.
MIN_JITTER: Final = 1e-9
#: Rows between which the median distance is taken, half a million pairs.
BANDWIDTH_ROWS: Final = 1_000


@dataclass(frozen=True)
class Similarity:
    """The matrix S [N, N] of exp(-|x - y|^2 / 2), by its columns: it is formed only where `matrix` is called.

    Attributes:
        features: [N, D], the rows x and y, in units of the bandwidth.
        jitter: added to the diagonal.
    """

    features: FloatArray
    jitter: float = 0.0

    def __len__(self) -> int:
        """N."""
        return len(self.features)

    @cached_property
    def diagonal(self) -> FloatArray:
        """[N], with the jitter."""
        return np.ones(len(self)) + self.jitter

    def rows(self, items: Sequence[int] | IndexArray) -> FloatArray:
        """[len(items), N], without the jitter."""
        products: FloatArray = self.features[items] @ self.features.T
        products -= 0.5 * self._squares
        products -= 0.5 * self._squares[items, None]
        return np.exp(np.minimum(products, 0.0, out=products), out=products)

    def matrix(self) -> FloatArray:
        """[N, N], with the jitter."""
        full = self.rows(np.arange(len(self)))
        np.fill_diagonal(full, self.diagonal)
        return full

    def take(self, items: IndexArray) -> Similarity:
        """The same kernel between some of the candidates."""
        return Similarity(self.features[items], self.jitter)

    @cached_property
    def _squares(self) -> FloatArray:
        return np.asarray(np.einsum("nd,nd->n", self.features, self.features))


def standardise(observations: npt.ArrayLike, centre: npt.ArrayLike, scale: npt.ArrayLike) -> FloatArray:
    """Features for the kernel, `(observations - centre) / scale` as [N, D] float64.

    With fixed constants, such as the student's `observation_scaling()`, a step has the same features for ever,
    so that choices made after different stages are comparable.

    Args:
        observations: [N, D].
        centre: [D].
        scale: [D], positive; what counts as one unit of difference.

    Raises:
        ValueError: a shape does not fit, or a scale is not positive.
    """
    raw = checked_features(observations)
    centre_D, scale_D = np.asarray(centre, np.float64), np.asarray(scale, np.float64)
    if centre_D.shape != raw.shape[1:] or scale_D.shape != raw.shape[1:]:
        raise ValueError(
            f"centre {centre_D.shape} and scale {scale_D.shape} do not fit observations of shape {raw.shape}"
        )
    if not (scale_D > 0).all():
        raise ValueError(f"scale[{int(np.argmin(scale_D))}] = {scale_D.min()}: scales must be positive")
    return (raw - centre_D) / scale_D


def rbf_similarity(features: npt.ArrayLike, bandwidth: float, jitter: float = RBF_JITTER) -> Similarity:
    """exp(-|x - y|^2 / (2 bandwidth^2)): of full rank as long as no two candidates coincide, or with jitter.

    Args:
        features: [N, D].
        bandwidth: in the unit of the features, e.g. `median_bandwidth(features, generator)`.
        jitter: 0, or at least `MIN_JITTER`.

    Raises:
        ValueError: a feature is not finite, the bandwidth not positive, or the jitter too small.
    """
    raw = checked_features(features)
    if not bandwidth > 0:
        raise ValueError(f"bandwidth = {bandwidth} must be positive")
    # Distances come from inner products, which lose fewer digits near the origin.
    return Similarity((raw - raw.mean(axis=0)) / bandwidth, _checked_jitter(jitter))


def median_bandwidth(features: npt.ArrayLike, generator: np.random.Generator) -> float:
    """The median distance between two different candidates (Gretton et al. 2012), the usual RBF bandwidth.

    Taken between `BANDWIDTH_ROWS` random rows, or all where there are no more (then nothing is drawn). Distances
    of zero do not count; 1 if there is no other.

    Args:
        features: [N, D].
        generator: draws the rows.
    """
    rows = checked_features(features)
    if len(rows) > BANDWIDTH_ROWS:
        rows = rows[generator.choice(len(rows), BANDWIDTH_ROWS, replace=False)]
    distances = np.concatenate(
        [np.linalg.norm(rows[i + 1 :] - row, axis=1) for i, row in enumerate(rows[:-1])] or [np.zeros(0)]
    )
    distances = distances[distances > 0]
    return float(np.median(distances)) if len(distances) else 1.0


def checked_features(features: npt.ArrayLike) -> FloatArray:
    """[N, D] float64.

    Raises:
        ValueError: another shape, or a value that is not finite.
    """
    array = np.asarray(features, np.float64)
    if array.ndim != 2:
        raise ValueError(f"features must have shape [N, D], not {array.shape}")
    if not np.isfinite(array).all():
        row = int(np.argmin(np.isfinite(array).all(axis=1)))
        raise ValueError(f"features[{row}] holds a value that is not finite")
    return array


def _checked_jitter(jitter: float) -> float:
    if jitter and not jitter >= MIN_JITTER:
        raise ValueError(f"jitter = {jitter} must be 0 or at least {MIN_JITTER:g}, or rounding hides it")
    return float(jitter)


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
