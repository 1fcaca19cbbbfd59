"""Generalised advantage estimation (Schulman et al. 2016) over segments of several environments."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    rewards_TN: Tensor, values_TN: Tensor, next_values_TN: Tensor, ends_TN: Tensor, gamma: float, lam: float
) -> Tensor:
    """Advantages `[T, N]`: `A_t = delta_t + gamma * lam * A_{t+1}`, with `A_{t+1} = 0` where a segment ends.

    `delta_t = r_t + gamma * V'_t - V_t`, where V' is the value of what follows step t: of the next observation
    where the episode goes on, of the last one where it was cut by a time limit, and whatever stands for the
    future where it ended in a terminal state.

    Args:
        rewards_TN: rewards of T steps in N environments.
        values_TN: values of the observations before each step.
        next_values_TN: V'.
        ends_TN: bool, true at the last step of every segment; must be true at the last step of all.
        gamma: discount per step.
        lam: lambda, 0 (one-step) to 1 (Monte Carlo).
    """
    assert bool(ends_TN[-1].all())
    deltas_TN = rewards_TN + gamma * next_values_TN - values_TN
    decay_TN = gamma * lam * (~ends_TN).to(deltas_TN.dtype)
    advantages_TN = torch.empty_like(deltas_TN)
    following_N = torch.zeros_like(deltas_TN[0])
    for t in range(len(deltas_TN) - 1, -1, -1):
        following_N = deltas_TN[t] + decay_TN[t] * following_N
        advantages_TN[t] = following_N
    return advantages_TN
