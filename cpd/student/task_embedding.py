"""A contrastive embedding of observations, from which the student infers the task of an episode.

Dimensions: B episodes or rows, O observation size, Z embedding size, K tasks of the stream.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpd.envs.tasks import OBSERVATION_SIZE

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


def info_nce(z_BZ: Tensor, task_B: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Contrastive loss with all other rows of the same task as positives, mean over rows.

    For row i with positives P(i): -1/|P(i)| sum_{p in P(i)} log(exp(z_i z_p / t) / sum_{a != i} exp(z_i z_a / t)),
    InfoNCE (van den Oord et al. 2018) with several positives (Khosla et al. 2020, eq. 2). Rows without a positive
    are ignored. The loss is 0 if all rows are of one task.
    """
    if bool((task_B == task_B[0]).all()):
        return z_BZ.sum() * 0.0
    logits_BB = z_BZ @ z_BZ.t() / temperature
    self_BB = torch.eye(len(z_BZ), dtype=torch.bool, device=z_BZ.device)
    log_probs_BB = logits_BB - logits_BB.masked_fill(self_BB, NEVER).logsumexp(1, keepdim=True)
    positive_BB = (task_B.unsqueeze(0) == task_B.unsqueeze(1)) & ~self_BB
    num_positive_B = positive_BB.sum(1)
    has_positive_B = num_positive_B > 0
    mean_B = (log_probs_BB * positive_BB).sum(1) / num_positive_B.clamp(min=1)
    return -mean_B[has_positive_B].mean()
