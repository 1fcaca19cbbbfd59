"""Distances between the teacher's and the student's diagonal Gaussians, in closed form and per token.

Every loss takes means and log standard deviations `[..., A]` and returns `[...]`: a sum over the action's
dimensions, which are independent given the observation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, Literal

from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def forward_kl(mean: Tensor, log_std: Tensor, teacher_mean: Tensor, teacher_log_std: Tensor) -> Tensor:
    """KL(teacher || student), which makes the student cover the teacher's distribution.

    With student N(m, s^2) and teacher N(n, t^2), per dimension: log(s/t) + (t^2 + (m - n)^2) / (2 s^2) - 1/2
    (Kullback and Leibler 1951; the diagonal case of e.g. Rasmussen and Williams 2006, eq. A.23). The error of
    the mean is weighted by 1/s^2, hence the floor on the teacher's deviation.
    """
    return reverse_kl(teacher_mean, teacher_log_std, mean, log_std)


def reverse_kl(mean: Tensor, log_std: Tensor, teacher_mean: Tensor, teacher_log_std: Tensor) -> Tensor:
    """KL(student || teacher), `forward_kl` with roles exchanged: it makes the student seek the teacher's mode."""
    log_ratio = teacher_log_std - log_std
    scaled_error = (mean - teacher_mean) * (-teacher_log_std).exp()
    per_dimension = log_ratio + 0.5 * ((-2.0 * log_ratio).exp() + scaled_error.square() - 1.0)
    return per_dimension.sum(-1)


def squared_error(mean: Tensor, log_std: Tensor, teacher_mean: Tensor, teacher_log_std: Tensor) -> Tensor:
    """Squared distance of the means, |m - n|^2; the student's deviation gets no gradient."""
    return (mean - teacher_mean).square().sum(-1)


LOSSES: Final[dict[Literal["forward_kl", "reverse_kl", "mse"], Loss]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "mse": squared_error,
}


def floored_log_std(log_std: Tensor, std_floor: float) -> Tensor:
    """The teacher's log standard deviation for the loss: at least log(std_floor)."""
    return log_std.clamp(min=math.log(std_floor))


def load_balance_loss(prob_sums_LE: Tensor, shares_LE: Tensor, num_tokens: int, group_E: Tensor) -> Tensor:
    """E * sum_e f_e P_e, mean over layers: 1 if tokens are spread evenly over E experts, up to E if not.

    If each token chooses within one group of experts, the loss is the mean over groups, weighted by their tokens:
    with E_g experts in group g and its share w_g of all tokens, sum_g E_g / w_g sum_{e in g} f_e P_e.

    The form of Switch Transformers (Fedus et al. 2022, eq. 4), for top-k as in GShard (Lepikhin et al. 2021). It
    is not a mean over tokens. With the shares of the global batch, a rank's summand of the gradient is still
    exact, since shares have no gradient and P_e is a mean.

    Args:
        prob_sums_LE: router probabilities per layer and expert, summed over this rank's tokens.
        shares_LE: f, each expert's share of the assignments of the global batch's tokens; no gradient.
        num_tokens: tokens of the global batch.
        group_E: each expert's group.

    Returns:
        This rank's summand of the global value.
    """
    same_EE = (group_E.unsqueeze(0) == group_E.unsqueeze(1)).to(shares_LE.dtype)
    tokens_LE = (shares_LE @ same_EE).clamp(min=1e-12)
    weights_LE = same_EE.sum(0) * shares_LE / tokens_LE
    return (weights_LE * prob_sums_LE).sum(1).mean() / num_tokens


def router_z_loss(z_square_sums_L: Tensor, num_tokens: int) -> Tensor:
    """Mean square of the log partition of the router's logits, mean over layers (ST-MoE, Zoph et al. 2022, eq. 5).

    Args:
        z_square_sums_L: logsumexp(logits)^2 per layer, summed over this rank's tokens.
        num_tokens: tokens of the global batch.

    Returns:
        This rank's summand of the global value.
    """
    return z_square_sums_L.mean() / num_tokens
