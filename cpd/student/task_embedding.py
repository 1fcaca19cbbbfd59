"""A contrastive embedding of observations, from which the student infers the task of an episode.

Dimensions: B episodes or rows, J tasks of a batch with N rows each, O observation size, Z embedding size.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EMBEDDING_SIZE: Final = 32
#: Hidden width of the encoder.
ENCODER_WIDTH: Final = 128
TEMPERATURE: Final = 0.1
#: Evidence for an unknown task.
NEVER: Final = float("-inf")


class TaskEncoder(nn.Module):
    """Maps an observation to the unit sphere by the sum of a linear map and a hidden layer.

    With its initial weights, the linear map is a random projection, which nearly preserves distances (Johnson and
    Lindenstrauss 1984): tasks that look different are told apart before any training.
    """

    def __init__(self, observation_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(observation_size, EMBEDDING_SIZE, dtype=dtype)
        self.hidden = nn.Linear(observation_size, ENCODER_WIDTH, dtype=dtype)
        self.out = nn.Linear(ENCODER_WIDTH, EMBEDDING_SIZE, dtype=dtype)

    def forward(self, scaled_BO: Tensor) -> Tensor:
        """Scaled observations to unit vectors `[B, Z]`."""
        z_BZ = self.linear(scaled_BO) + self.out(F.gelu(self.hidden(scaled_BO)))
        return F.normalize(z_BZ, dim=-1)


def info_nce(z_JNZ: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Contrastive loss with all other rows of the same task as positives, mean over rows.

    For row i with positives P(i): -1/|P(i)| sum_{p in P(i)} log(exp(z_i z_p / t) / sum_{a != i} exp(z_i z_a / t)),
    InfoNCE (van den Oord et al. 2018) with several positives (Khosla et al. 2020, eq. 2).

    Args:
        z_JNZ: unit vectors, at least two of each task.
        temperature: t.
    """
    num_each = z_JNZ.shape[1]
    z_BZ = z_JNZ.flatten(0, 1)
    itself_BB = z_BZ.new_zeros(len(z_BZ), len(z_BZ)).fill_diagonal_(NEVER)
    # Products of unit vectors are at most 1, so the exponentials are finite.
    log_sum = torch.addmm(itself_BB, z_BZ / temperature, z_BZ.t()).exp().sum(1).log().sum()
    # Summed over the rows i of a task, z_i z_p over all p is the squared norm of their sum, and z_i z_i is 1.
    positive = (z_JNZ.sum(1).square().sum() - len(z_BZ)) / (temperature * (num_each - 1))
    return (log_sum - positive) / len(z_BZ)
