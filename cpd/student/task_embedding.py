"""A contrastive embedding of observations, from which the student infers the task of an episode.

Dimensions: B episodes or rows, O observation size, Z embedding size, K tasks of the stream.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpd.envs.metaworld.tasks import OBSERVATION_SIZE

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

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(OBSERVATION_SIZE, EMBEDDING_SIZE, dtype=dtype)
        self.hidden = nn.Linear(OBSERVATION_SIZE, ENCODER_WIDTH, dtype=dtype)
        self.out = nn.Linear(ENCODER_WIDTH, EMBEDDING_SIZE, dtype=dtype)

    def forward(self, scaled_BO: Tensor) -> Tensor:
        """Scaled observations to unit vectors `[B, Z]`."""
        z_BZ = self.linear(scaled_BO) + self.out(F.gelu(self.hidden(scaled_BO)))
        return F.normalize(z_BZ, dim=-1)


def info_nce(z_BZ: Tensor, task_B: Tensor, num_tasks: int, temperature: float = TEMPERATURE) -> Tensor:
    """Contrastive loss with all other rows of the same task as positives, mean over rows.

    For row i with positives P(i): -1/|P(i)| sum_{p in P(i)} log(exp(z_i z_p / t) / sum_{a != i} exp(z_i z_a / t)),
    InfoNCE (van den Oord et al. 2018) with several positives (Khosla et al. 2020, eq. 2). Rows without a positive
    are ignored. The loss is 0 if all rows are of one task.

    Args:
        z_BZ: unit vectors.
        task_B: their tasks, less than `num_tasks`.
        num_tasks: K.
        temperature: t.
    """
    scaled_BZ = z_BZ / temperature
    itself_BB = z_BZ.new_zeros(len(z_BZ), len(z_BZ)).fill_diagonal_(NEVER)
    # Products of unit vectors are at most 1, so the exponentials are finite.
    log_sum_B = torch.addmm(itself_BB, scaled_BZ, z_BZ.t()).exp().sum(1).log()
    # The sum of z_i z_p over positives is z_i times the sum of all rows of the task, less z_i z_i.
    sum_KZ = z_BZ.new_zeros(num_tasks, z_BZ.shape[1]).index_add(0, task_B, z_BZ)
    count_K = z_BZ.new_zeros(num_tasks).index_add(0, task_B, torch.ones_like(z_BZ[:, 0]))
    num_positive_B = count_K[task_B] - 1.0
    positive_B = (scaled_BZ * (F.embedding(task_B, sum_KZ) - z_BZ)).sum(1)
    has_positive_B = (num_positive_B > 0).to(z_BZ.dtype)
    loss_B = has_positive_B * (log_sum_B - positive_B / num_positive_B.clamp(min=1.0))
    is_mixed = ((count_K > 0).sum() > 1).to(z_BZ.dtype)
    return is_mixed * loss_B.sum() / has_positive_B.sum().clamp(min=1.0)
