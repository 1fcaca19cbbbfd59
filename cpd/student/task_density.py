"""The density of the observations that open a task's episodes, from which the student infers the task.

Dimensions: B episodes, N observations, O observation size, K tasks of the stream.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

#: Lower bound on the standard deviation of an entry of the observation, in its own unit (0.2 mm for positions).
STD_FLOOR: Final = 2e-4


class TaskDensity(nn.Module):
    """For each task, the posterior predictive density of its next first observation.

    The entries of the observation are independent normal variables with the reference prior on mean and variance.
    The next observation then follows a Student t distribution per entry (Gelman et al., Bayesian Data Analysis,
    3rd ed., section 3.2): with few observations its tails are heavy, so a small sample rules nothing out.

    A task's density is fitted once, from the data of its own stage: later stages never change it.

    Attributes:
        mean_KO: means.
        std_KO: standard deviations, at least `STD_FLOOR`.
        num_K: distinct observations that the task's density was fitted to; 0 if it has none.
    """

    mean_KO: Tensor
    std_KO: Tensor
    num_K: Tensor

    def __init__(self, num_tasks: int, observation_size: int) -> None:
        super().__init__()
        shape = (num_tasks, observation_size)
        # float64: differences of a fraction of a millimetre count.
        self.register_buffer("mean_KO", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("std_KO", torch.full(shape, STD_FLOOR, dtype=torch.float64))
        self.register_buffer("num_K", torch.zeros(num_tasks, dtype=torch.int64))

    @torch.no_grad()
    def fit(self, task: int, obs_NO: Tensor) -> None:
        """Fit the density of `task` to raw first observations; equal ones, of episodes on one goal, count once."""
        distinct_NO = torch.unique(obs_NO.double(), dim=0)
        self.num_K[task] = len(distinct_NO)
        self.mean_KO[task] = distinct_NO.mean(0)
        self.std_KO[task] = distinct_NO.std(0, correction=int(len(distinct_NO) > 1)).clamp(min=STD_FLOOR)

    @torch.no_grad()
    def log_density(self, obs_BO: Tensor, seen_O: Tensor | None = None) -> Tensor:
        """The log density of raw observations under each task, `[B, K]` float64; 0 for tasks without a density.

        `seen_O`: bool, entries that count; default: all.
        """
        num_K1 = self.num_K.unsqueeze(1).double().clamp(min=1.0)
        dof_K1 = (num_K1 - 1.0).clamp(min=1.0)
        scale_KO = self.std_KO * (1.0 + 1.0 / num_K1).sqrt()
        density = torch.distributions.StudentT(dof_K1, self.mean_KO, scale_KO)
        log_density_BKO: Tensor = density.log_prob(obs_BO.double().unsqueeze(1))  # type: ignore[no-untyped-call]
        log_density_BK = (log_density_BKO if seen_O is None else log_density_BKO.where(seen_O, 0.0)).sum(-1)
        return log_density_BK.where(self.num_K > 0, 0.0)
