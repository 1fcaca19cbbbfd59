"""The RBF kernel between candidates for replay, and the features that it compares.

Dimensions: N candidates, D features.
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
