"""Running moments against the plain formulas."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpd.teachers.policy import RunningMoments


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    offset=st.floats(-1e3, 1e3),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_batches_merge_to_the_moments_of_the_whole(
    sizes: list[int], offset: float, scale: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    batches = [rng.normal(offset, scale, size=(size, 3)) for size in sizes]
    moments = RunningMoments(3, min_std=1e-9)
    for batch in batches:
        moments.update(torch.from_numpy(batch))
    whole = np.concatenate(batches)
    assert float(moments.count) == len(whole)
    np.testing.assert_allclose(moments.mean.numpy(), whole.mean(axis=0), rtol=1e-9, atol=1e-9 * scale)
    # Nothing beats cancellation: deviations are known to the precision of the offset.
    atol = 1e-9 * scale + 1e-12 * abs(offset)
    np.testing.assert_allclose(moments.std.numpy(), np.maximum(whole.std(axis=0), 1e-9), rtol=1e-7, atol=atol)


def test_constant_components_keep_the_floor_and_no_data_means_identity() -> None:
    moments = RunningMoments(2, min_std=0.5)
    assert moments.std.tolist() == [1.0, 1.0]
    assert moments.mean.tolist() == [0.0, 0.0]
    moments.update(torch.tensor([[3.0, 0.0], [3.0, 10.0]]))
    assert moments.std.tolist() == [0.5, 5.0]
    assert moments.mean.tolist() == [3.0, 5.0]


def test_they_travel_with_a_state_dict() -> None:
    moments, other = RunningMoments(4, 1e-3), RunningMoments(4, 1e-3)
    moments.update(torch.randn(100, 4, generator=torch.Generator().manual_seed(1)))
    other.load_state_dict(moments.state_dict())
    assert torch.equal(moments.std, other.std)
    assert torch.equal(moments.mean, other.mean)
