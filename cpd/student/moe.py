"""A mixture-of-experts feed-forward block that can grow.

Dimensions: N tokens, D width, E open experts, P of them present (some token may choose them), k experts chosen per
token.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpd.student.expert_mix import mix_experts


class RouterStats(NamedTuple):
    """Sums over the valid tokens of a rank, for the losses of the router and the usage of experts."""

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
    """Dropless top-k routing: a softmax over the k greatest logits weights the outputs of the experts.

    Every parameter belongs to one expert, router rows included, so that growth appends parameters and changes
    none. Every expert belongs to a group. A token that has a group chooses among the experts of that group only.

    `logit_offset` is added to the logits. An expert whose offset is minus infinity is closed: it is excluded from
    the computation, so that appending it does not change a single bit of the output. Closed experts are always the
    last ones. While only one expert is open, this is a dense layer, and its router is not trained.
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
        """The number of experts, including closed ones."""
        return len(self.experts)

    @torch.no_grad()
    def grow(self, source: int, row_noise_D: Tensor, *, group: int, closed: bool) -> None:
        """Append a copy of expert `source`; `row_noise_D` is added to its router row."""
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
            valid_N: 1 for tokens, 0 for padding; statistics are computed only with it.
            group_N: the group whose experts (at least k) each token may choose from; default: all experts.

        Returns:
            `[N, D]` and the statistics.
        """
        offsets = self.logit_offset.tolist()
        num_open = sum(offset > -math.inf for offset in offsets)
        if num_open == 1:
            return self.experts[0](x_ND), None if valid_N is None else _dense_stats(valid_N)
        if group_N is None:
            present = list(range(num_open))
            logits_NP = F.linear(x_ND, self._rows(present))
        else:
            present, logits_NP = self._logits_by_group(x_ND, group_N)
        if any(offsets[:num_open]):
            logits_NP = logits_NP + self.logit_offset[present]
        top_logits_Nk, chosen_Nk = logits_NP.topk(self.top_k, dim=-1)
        y_ND = mix_experts(x_ND, top_logits_Nk.softmax(-1), chosen_Nk, *self._matrices(present))
        if valid_N is None:
            return y_ND, None
        stats = _stats(logits_NP, chosen_Nk, valid_N)
        return y_ND, stats if group_N is None else _for_all(stats, present, num_open)

    def _logits_by_group(self, x_ND: Tensor, group_N: Tensor) -> tuple[list[int], Tensor]:
        """Return the experts of all groups that have tokens, and the logits of all tokens for them, `[N, P]`.

        Logits for experts of other groups than the token's are -inf.
        """
        groups = torch.unique(group_N).tolist()
        group_P = [(expert, group) for expert, group in enumerate(self.group_E.tolist()) if group in groups]
        present = [expert for expert, _ in group_P]
        if len(groups) == 1:
            return present, F.linear(x_ND, self._rows(present))
        logits_NP = x_ND.new_full((len(x_ND), len(present)), -math.inf)
        # One product per group: the rounding of a product with all experts would depend on their number, and a new
        # group would change the outputs of the others.
        for group in groups:
            columns = [column for column, (_, expert_group) in enumerate(group_P) if expert_group == group]
            tokens = (group_N == group).nonzero()
            logits_NP[tokens, torch.tensor(columns, device=tokens.device)] = F.linear(
                x_ND[tokens.squeeze(1)], self._rows([present[column] for column in columns])
            )
        return present, logits_NP

    def _rows(self, experts: list[int]) -> Tensor:
        """The router rows of some experts."""
        return torch.stack([self.router[expert] for expert in experts])

    def _matrices(self, experts: list[int]) -> tuple[list[Tensor], list[Tensor]]:
        """The first and the second matrices of some experts."""
        modules = [cast(Expert, self.experts[expert]) for expert in experts]
        return [module.up.weight for module in modules], [module.down.weight for module in modules]


def _dense_stats(valid_N: Tensor) -> RouterStats:
    """The statistics of a single expert, which every token uses without the router."""
    tokens_1 = valid_N.sum().reshape(1)
    return RouterStats(tokens_1, tokens_1, tokens_1.new_zeros(()))


def _for_all(stats: RouterStats, present: list[int], num_experts: int) -> RouterStats:
    """Extend the statistics of the `present` experts to all experts, with zeros."""
    indices = torch.tensor(present, device=stats.counts_E.device)
    zeros_E = stats.prob_sums_E.new_zeros(num_experts)
    return RouterStats(
        zeros_E.index_copy(0, indices, stats.counts_E),
        zeros_E.index_copy(0, indices, stats.prob_sums_E),
        stats.z_square_sum,
    )


def _stats(logits_NE: Tensor, chosen_Nk: Tensor, valid_N: Tensor) -> RouterStats:
    weights = valid_N.repeat_interleave(chosen_Nk.shape[1])
    log_probs_NE = logits_NE.log_softmax(-1)
    # logsumexp, recovered from log_softmax at a chosen expert, since the logits of others may be -inf.
    first_N1 = chosen_Nk[:, :1]
    z_N = (logits_NE.gather(1, first_N1) - log_probs_NE.gather(1, first_N1)).squeeze(1)
    return RouterStats(
        torch.bincount(chosen_Nk.reshape(-1), weights=weights, minlength=logits_NE.shape[1]).detach(),
        valid_N @ log_probs_NE.exp(),
        valid_N @ z_N.square(),
    )
