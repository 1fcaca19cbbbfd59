"""Bit-exact scalar versions of the helpers that Meta-World's task code calls most.

For arguments that it was not written for, each calls the original. A namespace that holds these in place of the
originals therefore behaves like the original one.
"""

from __future__ import annotations

import functools
import importlib
import math
import types
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
from metaworld.utils import reward_utils
from scipy.spatial.transform import Rotation

_stock_norm: Final = np.linalg.norm
_stock_hstack: Final = np.hstack
_stock_tolerance: Final = reward_utils.tolerance
_stock_hamacher_product: Final = reward_utils.hamacher_product
_float64: Final = np.dtype(np.float64)
_FLOATS: Final = frozenset((float, np.float64))
_NUMBERS: Final = frozenset((float, np.float64, int))

#: The raw ufunc: `np.clip` is a wrapper that costs several times as much.
clip_ufunc: Final[Any] = importlib.import_module("numpy._core.umath").clip

# metaworld's `_sigmoids` computes these at each call, from its default value at the margin, 0.1.
_LONG_TAIL_SCALE: Final = float(np.sqrt(1 / 0.1 - 1))
_GAUSSIAN_SCALE: Final = float(np.sqrt(-2 * np.log(0.1)))


def tolerance(
    x: Any,
    bounds: Any = (0.0, 0.0),
    margin: Any = 0.0,
    sigmoid: Any = "gaussian",
    value_at_margin: Any = 0.1,
) -> Any:
    """`metaworld.utils.reward_utils.tolerance` for a scalar `x`, without arrays."""
    lower, upper = bounds
    if (
        type(x) not in _FLOATS
        or type(margin) not in _NUMBERS
        or type(lower) not in _NUMBERS
        or type(upper) not in _NUMBERS
        or value_at_margin != 0.1
        or lower > upper
        or margin < 0
    ):
        return _stock_tolerance(x, bounds, margin, sigmoid, value_at_margin)
    value, width = float(x), float(margin)  # Python's arithmetic on its own numbers takes half of the time
    if lower <= value <= upper:
        return 1.0
    if width == 0:
        return 0.0
    if sigmoid == "long_tail":
        return long_tail(value, lower, upper, width)
    if sigmoid == "gaussian":
        distance = (lower - value if value < lower else value - upper) / width
        try:
            # NumPy's exp and the C library's differ in the last bit.
            return float(np.exp(-0.5 * (distance * _GAUSSIAN_SCALE) ** 2))
        except OverflowError:  # Python's power raises where NumPy's returns infinity
            pass
    return _stock_tolerance(x, bounds, margin, sigmoid, value_at_margin)


def long_tail(x: float, lower: float, upper: float, margin: float) -> Any:
    """`tolerance` with the long-tail sigmoid, for numbers; their types are not checked."""
    if margin <= 0 or lower > upper:
        return _stock_tolerance(x, (lower, upper), margin, "long_tail")
    if lower <= x <= upper:
        return 1.0
    distance = float((lower - x if x < lower else x - upper) / margin)
    try:
        return 1 / ((distance * _LONG_TAIL_SCALE) ** 2 + 1)
    except OverflowError:  # Python's power raises where NumPy's returns infinity
        return _stock_tolerance(x, (lower, upper), margin, "long_tail")


def hamacher_product(a: Any, b: Any) -> Any:
    """`metaworld.utils.reward_utils.hamacher_product`; two float64 numbers of any kind get Python's arithmetic."""
    kinds = type(a), type(b)
    if not _FLOATS.issuperset(kinds):
        return _stock_hamacher_product(a, b)
    first, second = float(a), float(b)
    product = first * second
    denominator = first + second - product
    if not (0.0 <= first <= 1.0 and 0.0 <= second <= 1.0 and denominator > 0.0 and product <= denominator):
        return _stock_hamacher_product(a, b)
    # Of Meta-World's type, which decides that of later sums with float32 numbers.
    return np.float64(product / denominator) if np.float64 in kinds else product / denominator


def norm(x: Any, ord: Any = None, axis: Any = None, keepdims: bool = False) -> Any:
    """`numpy.linalg.norm`; a float64 vector gets NumPy's own two operations without its dispatch."""
    if (
        type(x) is np.ndarray
        and x.ndim == 1
        and x.dtype is _float64
        and x.flags.c_contiguous  # a strided dot product adds in another order than NumPy, which copies first
        and (ord is None or ord == 2)
        and axis is None
        and not keepdims
    ):
        return np.float64(math.sqrt(x.dot(x)))
    return _stock_norm(x, ord, axis, keepdims)


def length(x: np.ndarray[Any, Any]) -> float:
    """`norm` of a contiguous float64 vector; the type is not checked."""
    return math.sqrt(x.dot(x))


def clip(a: Any, a_min: Any, a_max: Any) -> Any:
    """`numpy.clip(a, a_min, a_max)` through the ufunc."""
    if a_min is None or a_max is None:
        return np.clip(a, a_min, a_max)
    return clip_ufunc(a, a_min, a_max)


def hstack(arrays: Any) -> Any:
    """`numpy.hstack` of vectors through `concatenate`."""
    for array in arrays:
        if type(array) is not np.ndarray or array.ndim != 1:
            return _stock_hstack(arrays)
    return np.concatenate(arrays)


class FastRotation:
    """`scipy.spatial.transform.Rotation` as far as the tasks use it: matrix to quaternion."""

    def __init__(self, quaternion: np.ndarray[Any, Any]) -> None:
        self._quaternion = quaternion

    def as_quat(self) -> np.ndarray[Any, Any]:
        """[4] float64: x, y, z, w."""
        return self._quaternion

    @staticmethod
    def from_matrix(matrix: Any) -> Any:
        """The rotation of a [3, 3] matrix; SciPy itself for anything but a plain rotation matrix."""
        if type(matrix) is not np.ndarray or matrix.shape != (3, 3):
            return Rotation.from_matrix(matrix)
        (m00, m01, m02), (m10, m11, m12), (m20, m21, m22) = matrix.tolist()
        # Shuster's method, in SciPy's order of operations: divide by the largest component.
        trace = m00 + m11 + m22
        if m00 >= m11 and m00 >= m22 and m00 >= trace:
            x, y, z, w = 1 - trace + 2 * m00, m10 + m01, m20 + m02, m21 - m12
        elif m11 > m00 and m11 >= m22 and m11 >= trace:
            x, y, z, w = m01 + m10, 1 - trace + 2 * m11, m21 + m12, m02 - m20
        elif m22 > m00 and m22 > m11 and m22 >= trace:
            x, y, z, w = m02 + m20, m12 + m21, 1 - trace + 2 * m22, m10 - m01
        else:
            x, y, z, w = m21 - m12, m02 - m20, m10 - m01, 1 + trace
        length = math.sqrt(x * x + y * y + z * z + w * w)
        # For a rotation the length is four times the largest component, hence 2 to 4. SciPy treats other
        # matrices differently (it refuses singular ones and orthogonalises skewed ones).
        if not 1.999 < length < 4.001:
            return Rotation.from_matrix(matrix)
        return FastRotation(np.array((x / length, y / length, z / length, w / length)))


def _with(module: types.ModuleType, **replacements: Any) -> types.ModuleType:
    """Copy a module, with some of its members replaced."""
    copied = types.ModuleType(module.__name__)
    vars(copied).update(vars(module), **replacements)
    return copied


#: Replacements in the globals of rebound functions, by the identity of the original.
_REPLACEMENTS: Final = {
    id(np): _with(np, linalg=_with(np.linalg, norm=norm), clip=clip, hstack=hstack),
    id(reward_utils): _with(reward_utils, tolerance=tolerance, hamacher_product=hamacher_product),
    id(_stock_tolerance): tolerance,
    id(_stock_hamacher_product): hamacher_product,
    id(Rotation): FastRotation,
}


def fast_globals(original: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a module's globals, with the helpers of this module in place of the originals."""
    return {name: _REPLACEMENTS.get(id(value), value) for name, value in original.items()}


def rebind(function: Any, namespace: dict[str, Any]) -> Callable[..., Any]:
    """Return the same function (code, defaults and closure) with other globals."""
    bound = types.FunctionType(
        function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__
    )
    bound.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(bound, function)


@functools.cache
def first_inexact_helper() -> str | None:
    """Return the name of a helper that differs from its original in any bit on random samples; None if none does.

    The originals are compiled code of other packages. How that was compiled (fused multiply-add, vectorised
    exponentials) differs between machines, so the check runs on the machine that will use the helpers.
    """
    generator = np.random.default_rng(0)
    for i in range(200):
        x, margin = generator.normal() * 10.0 ** generator.uniform(-3, 1), generator.uniform(1e-3, 1)
        settings: dict[str, Any] = {
            "bounds": (0, 0.05) if i % 3 else (0.01, 0.06),
            "margin": margin,
            "sigmoid": "long_tail" if i % 2 else "gaussian",
        }
        if tolerance(x, **settings) != _stock_tolerance(x, **settings):
            return "tolerance"
        a, b = generator.uniform(size=2)
        if hamacher_product(a, b) != _stock_hamacher_product(a, b):
            return "hamacher_product"
        vector = generator.normal(size=2 + i % 3)
        if norm(vector) != _stock_norm(vector):
            return "norm"
        if clip(vector, -0.5, 0.5).tobytes() != np.clip(vector, -0.5, 0.5).tobytes():
            return "clip"
        matrix = Rotation.from_quat(generator.normal(size=4)).as_matrix()
        quaternion = Rotation.from_matrix(matrix).as_quat()
        if FastRotation.from_matrix(matrix).as_quat().tobytes() != quaternion.tobytes():
            return "FastRotation.from_matrix"
    return None
