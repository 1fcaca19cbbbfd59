"""Generalised advantage estimation against its definition as a sum."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpd.teachers.ppo import gae


def by_definition(rewards, values, next_values, ends, gamma: float, lam: float) -> np.ndarray:
    """`A_t = sum_k (gamma lam)^k delta_{t+k}` up to the end of t's segment, one environment at a time."""
    num_steps, num_envs = rewards.shape
    advantages = np.zeros_like(rewards)
    for n in range(num_envs):
        for t in range(num_steps):
            for k in range(t, num_steps):
                delta = rewards[k, n] + gamma * next_values[k, n] - values[k, n]
                advantages[t, n] += (gamma * lam) ** (k - t) * delta
                if ends[k, n]:
                    break
    return advantages


@given(
    num_steps=st.integers(1, 12),
    num_envs=st.integers(1, 4),
    gamma=st.floats(0.0, 1.0),
    lam=st.floats(0.0, 1.0),
    end_rate=st.floats(0.0, 1.0),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_equals_the_definition(
    num_steps: int, num_envs: int, gamma: float, lam: float, end_rate: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rewards, values, next_values = rng.normal(size=(3, num_steps, num_envs))
    ends = rng.random((num_steps, num_envs)) < end_rate
    ends[-1] = True
    found = gae(*map(torch.from_numpy, (rewards, values, next_values, ends)), gamma, lam)
    expected = by_definition(rewards, values, next_values, ends, gamma, lam)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-12)


def test_monte_carlo_without_bootstrap_is_the_discounted_return() -> None:
    rewards = torch.ones(5, 1, dtype=torch.float64)
    zeros = torch.zeros_like(rewards)
    ends = torch.tensor([[False], [False], [False], [False], [True]])
    found = gae(rewards, zeros, zeros, ends, gamma=0.5, lam=1.0)
    assert found.flatten().tolist() == [1.9375, 1.875, 1.75, 1.5, 1.0]


def test_nothing_leaks_over_the_end_of_a_segment() -> None:
    rewards = torch.tensor([[0.0], [0.0], [1e6]], dtype=torch.float64)
    zeros = torch.zeros_like(rewards)
    ends = torch.tensor([[False], [True], [True]])
    assert gae(rewards, zeros, zeros, ends, 0.99, 0.95).flatten().tolist() == [0.0, 0.0, 1e6]
