"""Running means and variances, merged batch by batch (Chan, Golub & LeVeque 1979)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cpd.comm import Comm, SerialComm
from cpd.teachers.ranks import moments


class RunningMoments(nn.Module):
    """Mean and variance of everything seen, kept in float64 as buffers so that they travel with their module.

    Args:
        size: D, number of components.
        min_std: least standard deviation given out; a constant component is not blown up.
    """

    count: Tensor
    mean: Tensor
    sum_of_squares: Tensor

    def __init__(self, size: int, min_std: float) -> None:
        super().__init__()
        self._min_std = min_std
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        # Of deviations from the mean.
        self.register_buffer("sum_of_squares", torch.zeros(size, dtype=torch.float64))

    @torch.no_grad()
    def update(self, x_BD: Tensor, comm: Comm | None = None) -> None:
        """Take in the rows of `x_BD`, those of all ranks with a communicator; a collective then."""
        num_new, new_mean, new_squares = moments(x_BD.to(self.mean.device).double(), comm or SerialComm())
        total = self.count + num_new
        delta = new_mean - self.mean
        self.sum_of_squares += new_squares + delta**2 * (self.count * num_new / total)
        self.mean += delta * (num_new / total)
        self.count.copy_(total)

    @property
    def std(self) -> Tensor:
        """[D] float64, population standard deviation, at least `min_std`; ones before the first update."""
        if self.count == 0:
            return torch.ones_like(self.mean)
        return (self.sum_of_squares / self.count).sqrt().clamp_min(self._min_std)
