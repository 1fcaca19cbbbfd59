"""A mixture-of-experts feed-forward block that can grow.

Dimensions: N tokens, D width, E open experts, k experts chosen per token, G groups of experts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpd.student.expert_mix import mix_experts


class RouterStats(NamedTuple):
    """Sums over a rank's valid tokens, from which the router's losses and the experts' usage follow."""

    counts_E: Tensor
    """Assignments to each expert, k per token; no gradient."""
    prob_sums_E: Tensor
    """Probabilities of the softmax over all experts."""
    z_square_sum: Tensor
    """logsumexp(logits)^2."""


class Expert(nn.Module):
    """`down gelu(up x)`: the two matrices of one expert, without biases."""

    def __init__(self, width: int, expert_width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.up = nn.Linear(width, expert_width, bias=False, dtype=dtype)
        self.down = nn.Linear(expert_width, width, bias=False, dtype=dtype)

    def forward(self, x_ND: Tensor) -> Tensor:
        """`[N, D]` to `[N, D]`, this expert alone."""
        y_ND: Tensor = self.down(F.gelu(self.up(x_ND)))
        return y_ND


class MoE(nn.Module):
    """Dropless top-k routing: a softmax over the k greatest logits weighs the experts' outputs.

    Everything is kept per expert, router rows included, so that growth appends parameters and touches none.
    Every expert is of a group; a token that is given a group chooses among that group's experts alone.

    `logit_offset` is added to the logits. An expert whose offset is minus infinity is closed: it is left out of
    the computation altogether, so that outputs do not change by a single bit when it is appended. Closed
    experts are always the last ones. While but one is open this is a dense layer, and its router is not trained.
    """

    logit_offset: Tensor
    group_E: Tensor

    def __init__(self, width: int, expert_width: int, num_experts: int, top_k: int, dtype: torch.dtype) -> None:
        super().__init__()
        assert num_experts >= top_k
        self.width, self.expert_width, self.top_k, self.dtype = width, expert_width, top_k, dtype
        self.experts = nn.ModuleList(Expert(width, expert_width, dtype) for _ in range(num_experts))
        self.router = nn.ParameterList(nn.Parameter(torch.zeros(width, dtype=dtype)) for _ in range(num_experts))
        self.register_buffer("logit_offset", torch.zeros(num_experts, dtype=dtype))
        self.register_buffer("group_E", torch.zeros(num_experts, dtype=torch.int64))

    @property
    def num_experts(self) -> int:
        """Experts, closed ones included."""
        return len(self.experts)

    @torch.no_grad()
    def grow(self, source: int, row_noise_D: Tensor, *, group: int, closed: bool) -> None:
        """Append an expert: a copy of expert `source` whose router row is moved by `row_noise_D`."""
        original = self.experts[source]
        copy = Expert(self.width, self.expert_width, self.dtype).to(self.logit_offset.device)
        copy.load_state_dict(original.state_dict())
        self.experts.append(copy)
        self.router.append(nn.Parameter(self.router[source] + row_noise_D.to(self.router[source])))
        offset = self.logit_offset.new_tensor([-math.inf if closed else 0.0])
        self.logit_offset = torch.cat([self.logit_offset, offset])
        self.group_E = torch.cat([self.group_E, self.group_E.new_tensor([group])])

    def forward(
        self, x_ND: Tensor, valid_N: Tensor | None = None, group_N: Tensor | None = None
    ) -> tuple[Tensor, RouterStats | None]:
        """Route and transform.

        Args:
            x_ND: tokens.
            valid_N: 1 for tokens that count, 0 for padding; statistics are only made if it is given.
            group_N: the group whose experts each token may choose, of at least k; default: all experts.

        Returns:
            `[N, D]` and the statistics.
        """
        offsets = self.logit_offset.tolist()
        num_open = sum(offset > -math.inf for offset in offsets)
        if num_open == 1:
            return self.experts[0](x_ND), None if valid_N is None else _dense_stats(valid_N)
        if group_N is None:
            logits_NE = F.linear(x_ND, torch.stack(list(self.router)[:num_open]))
        else:
            logits_NE = self._logits_by_group(x_ND, group_N)
        if any(offsets[:num_open]):
            logits_NE = logits_NE + self.logit_offset[:num_open]
        top_logits_Nk, chosen_Nk = logits_NE.topk(self.top_k, dim=-1)
        y_ND = mix_experts(x_ND, top_logits_Nk.softmax(-1), chosen_Nk, *self._matrices(num_open))
        return y_ND, None if valid_N is None else _stats(logits_NE, chosen_Nk, valid_N)

    def _logits_by_group(self, x_ND: Tensor, group_N: Tensor) -> Tensor:
        """Every token's logits for the experts of its group, -inf for all others.

        A product for each group: in one for all experts, rounding would depend on how many there are, and a new
        group would move the outputs of the others.
        """
        logits_NE = x_ND.new_full((len(x_ND), self.num_experts), -math.inf)
        group_E, groups = self.group_E.tolist(), torch.unique(group_N).tolist()
        for group in groups:
            members = [expert for expert, own in enumerate(group_E) if own == group]
            rows_GD = torch.stack([self.router[expert] for expert in members])
            if len(groups) == 1:
                logits_NE[:, members] = F.linear(x_ND, rows_GD)
            else:
                tokens = (group_N == group).nonzero()
                logits_NE[tokens, torch.tensor(members, device=tokens.device)] = F.linear(
                    x_ND[tokens.squeeze(1)], rows_GD
                )
        return logits_NE

    def _matrices(self, num_open: int) -> tuple[list[Tensor], list[Tensor]]:
        """The first and the second matrices of the open experts."""
        experts = [expert for expert in self.experts if isinstance(expert, Expert)][:num_open]
        return [expert.up.weight for expert in experts], [expert.down.weight for expert in experts]


def _dense_stats(valid_N: Tensor) -> RouterStats:
    """With one expert there is no choice, and the router plays no part."""
    tokens_1 = valid_N.sum().reshape(1)
    return RouterStats(tokens_1, tokens_1, tokens_1.new_zeros(()))


def _stats(logits_NE: Tensor, chosen_Nk: Tensor, valid_N: Tensor) -> RouterStats:
    num_open = logits_NE.shape[1]
    weights = valid_N.repeat_interleave(chosen_Nk.shape[1])
    log_probs_NE = logits_NE.log_softmax(-1)
    # logsumexp, which log_softmax has worked out already; at a chosen expert, since others may be at -inf.
    first_N1 = chosen_Nk[:, :1]
    z_N = (logits_NE.gather(1, first_N1) - log_probs_NE.gather(1, first_N1)).squeeze(1)
    return RouterStats(
        torch.bincount(chosen_Nk.reshape(-1), weights=weights, minlength=num_open).detach(),
        valid_N @ log_probs_NE.exp(),
        valid_N @ z_N.square(),
    )
