"""The scalar helpers against their originals, bit for bit."""

import mujoco
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from metaworld.utils import reward_utils
from scipy.spatial.transform import Rotation

from cpd.envs.metaworld.fast import helpers as fast_math

numbers = st.floats(-1e3, 1e3, allow_nan=False)
small = st.floats(0, 2, allow_nan=False)


@given(numbers, small, small, small, st.sampled_from(["long_tail", "gaussian"]), st.booleans())
def test_tolerance(x, low, width, margin, sigmoid, as_numpy):
    x = np.float64(x) if as_numpy else x
    arguments = {"bounds": (low, low + width), "margin": margin, "sigmoid": sigmoid}
    with np.errstate(all="ignore"):
        expected, got = reward_utils.tolerance(x, **arguments), fast_math.tolerance(x, **arguments)
        unchecked = fast_math.long_tail(x, low, low + width, margin) if sigmoid == "long_tail" else got
    assert expected == got == unchecked and type(expected) is type(got) is type(unchecked)


@pytest.mark.parametrize("sigmoid", ["hyperbolic", "linear", "reciprocal", "tanh_squared"])
def test_other_sigmoids_and_arrays_go_to_the_original(sigmoid):
    for x in (0.3, np.array([0.1, 0.3, 0.9])):
        arguments = {"bounds": (0, 0.2), "margin": 0.5, "sigmoid": sigmoid}
        np.testing.assert_array_equal(fast_math.tolerance(x, **arguments), reward_utils.tolerance(x, **arguments))


@pytest.mark.parametrize(("bounds", "margin"), [((1, 0), 0.1), ((0, 1), -0.1)])
def test_tolerance_refuses_what_the_original_refuses(bounds, margin):
    for function in (reward_utils.tolerance, fast_math.tolerance):
        with pytest.raises(ValueError):
            function(0.5, bounds=bounds, margin=margin)
    with pytest.raises(ValueError):
        fast_math.long_tail(0.5, *bounds, margin)


@given(
    st.floats(0, 1),
    st.floats(0, 1) | st.sampled_from([0, 1, 5e-324, 1e-310]),
    st.sampled_from([float, np.float64, np.float32]),
    st.sampled_from([float, np.float64, np.float32]),
)
def test_hamacher_product(a, b, of_a, of_b):
    a, b = of_a(a), b if isinstance(b, int) else of_b(b)
    with np.errstate(all="ignore"):
        expected, got = reward_utils.hamacher_product(a, b), fast_math.hamacher_product(a, b)
    assert expected == got and type(expected) is type(got)


@pytest.mark.parametrize("other", [-0.1, 1.5, np.float64(2.0), float("nan")])
def test_hamacher_product_refuses_what_the_original_refuses(other):
    for function in (reward_utils.hamacher_product, fast_math.hamacher_product):
        with pytest.raises(ValueError):
            function(0.5, other)


@given(st.lists(numbers, min_size=4, max_size=4).filter(lambda q: np.linalg.norm(q) > 1e-6))
def test_rotation(quaternion):
    matrix = np.empty(9)
    mujoco.mju_quat2Mat(matrix, np.array(quaternion) / np.linalg.norm(quaternion))
    matrix = matrix.reshape(3, 3)
    expected = Rotation.from_matrix(matrix).as_quat()
    assert fast_math.FastRotation.from_matrix(matrix).as_quat().tobytes() == expected.tobytes()


def test_axis_aligned_rotations():
    for quaternion in (*np.eye(4), *(np.eye(4)[[0, 1, 2]] + np.eye(4)[3]), [1, 1, 1, 1], [1, -1, 1, -1]):
        matrix = Rotation.from_quat(quaternion).as_matrix()
        expected = Rotation.from_matrix(matrix).as_quat()
        assert fast_math.FastRotation.from_matrix(matrix).as_quat().tobytes() == expected.tobytes()


def test_matrices_that_are_no_rotations_go_to_scipy():
    skewed = np.array([[1.0, 0.2, 0.0], [0.0, 1.1, 0.0], [0.0, 0.0, 0.9]]) * 1.5
    np.testing.assert_array_equal(
        fast_math.FastRotation.from_matrix(skewed).as_quat(), Rotation.from_matrix(skewed).as_quat()
    )
    with pytest.raises(ValueError, match="determinant"):
        fast_math.FastRotation.from_matrix(np.zeros((3, 3)))


@given(st.lists(numbers, min_size=1, max_size=8), st.sampled_from([None, 2, 1, np.inf]))
def test_norm(values, order):
    for vector in (np.array(values), np.array(values)[::2], np.array(values, np.float32), values[0]):
        if np.ndim(vector) or order is None:
            expected, got = np.linalg.norm(vector, ord=order), fast_math.norm(vector, ord=order)
            assert expected == got and type(expected) is type(got)
    assert fast_math.length(np.array(values)) == np.linalg.norm(np.array(values))


def test_hstack_and_clip():
    a, b = np.arange(3.0), np.arange(2.0)
    matrix = np.ones((2, 2))
    for arrays in ((a, b), [a, 1.0], (matrix, matrix), ((1, 2), (3, 4))):
        np.testing.assert_array_equal(fast_math.hstack(arrays), np.hstack(arrays))
    for value, low, high in ((a, 0.5, 1.5), (np.float64(3), 0.0, 1.0), (a, None, 1.0), (a, b[0], a + 1)):
        np.testing.assert_array_equal(fast_math.clip(value, low, high), np.clip(value, low, high))


def test_the_self_check_passes_here_and_notices_a_difference(monkeypatch):
    assert fast_math.first_inexact_helper.__wrapped__() is None
    monkeypatch.setattr(fast_math, "norm", lambda x: np.linalg.norm(x) * (1 + 1e-15))
    assert fast_math.first_inexact_helper.__wrapped__() == "norm"
