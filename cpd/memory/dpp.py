"""Determinantal point processes: choosing few items that are good and unlike each other.

An L-ensemble gives a set Y of candidates a probability proportional to det(L_Y), with L = diag(q) S diag(q),
qualities q and similarities S (Kulesza & Taskar 2012, "Determinantal point processes for machine learning").
Two ways to take k of N candidates: `greedy_map` grows the likeliest set an item at a time and returns an order;
`sample_k_dpp` draws a set of k exactly in proportion to det(L_Y). Both are pure functions of their arguments.

Dimensions: N candidates, D features, k chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IndexArray = npt.NDArray[np.int64]

#: Added to the diagonal of the RBF kernel: far above rounding, far below what tells two candidates apart.
RBF_JITTER: Final = 1e-6
#: Smaller jitters drown in the rounding of the factorisation.
MIN_JITTER: Final = 1e-9
#: A candidate of which this share of its variance or less is new lies in the span of those chosen before it.
RANK_TOLERANCE: Final = 1e-10
#: Residuals closer than this are equal up to rounding: the lower index wins.
TIE_TOLERANCE: Final = 1e-12
#: Rows among which the median distance is taken: half a million pairs.
BANDWIDTH_ROWS: Final = 1_000
#: Exact k-DPP sampling decomposes an N x N matrix: 200 MB and about a minute at this size.
MAX_SAMPLED_CANDIDATES: Final = 5_000


@dataclass(frozen=True)
class Similarity:
    """The similarity matrix S [N, N], never formed unless asked for: columns are computed from the features.

    Attributes:
        kind: `linear` is x.y, `rbf` is exp(-|x - y|^2 / 2), of the rows of `features`.
        features: [N, D]; unit rows for `linear`, divided by the bandwidth for `rbf`.
        jitter: added to the diagonal, which is 1 without it.
    """

    kind: Literal["linear", "rbf"]
    features: FloatArray
    jitter: float

    def __len__(self) -> int:
        """N."""
        return len(self.features)

    def column(self, item: int) -> FloatArray:
        """[N] similarities to `item`, without the jitter."""
        products: FloatArray = self.features @ self.features[item]
        return products if self.kind == "linear" else self._rbf(products, self._squares[item])

    def matrix(self) -> FloatArray:
        """[N, N] S with the jitter."""
        products = self.features @ self.features.T
        full = products if self.kind == "linear" else self._rbf(products, self._squares[:, None])
        full[np.diag_indices_from(full)] = 1.0 + self.jitter
        return full

    def __post_init__(self) -> None:
        object.__setattr__(self, "_squares", np.einsum("nd,nd->n", self.features, self.features))

    _squares: FloatArray = None  # type: ignore[assignment]

    def _rbf(self, products: FloatArray, squares: FloatArray) -> FloatArray:
        """The kernel from inner products, in place."""
        products -= 0.5 * self._squares
        products -= 0.5 * squares
        return np.exp(np.minimum(products, 0.0, out=products), out=products)
