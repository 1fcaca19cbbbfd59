"""A mixture-of-experts feed-forward block that can grow.

Dimensions: N tokens, D width, E open experts, P of them present, whom some token may choose, k experts chosen per
token.
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
        """The experts of all groups that there are tokens of, and every token's logits for them, `[N, P]`.

        Logits for experts of another group than the token's are -inf. A product for each group: in one for all
        experts, rounding would depend on how many there are, and a new group would move the outputs of the others.
        """
        groups = torch.unique(group_N).tolist()
        group_P = [(expert, group) for expert, group in enumerate(self.group_E.tolist()) if group in groups]
        present = [expert for expert, _ in group_P]
        if len(groups) == 1:
            return present, F.linear(x_ND, self._rows(present))
        logits_NP = x_ND.new_full((len(x_ND), len(present)), -math.inf)
        for group in groups:
            places = [place for place, (_, own) in enumerate(group_P) if own == group]
            tokens = (group_N == group).nonzero()
            logits_NP[tokens, torch.tensor(places, device=tokens.device)] = F.linear(
                x_ND[tokens.squeeze(1)], self._rows([present[place] for place in places])
            )
        return present, logits_NP

    def _rows(self, experts: list[int]) -> Tensor:
        """The router's rows of some experts."""
        return torch.stack([self.router[expert] for expert in experts])

    def _matrices(self, experts: list[int]) -> tuple[list[Tensor], list[Tensor]]:
        """The first and the second matrices of some experts."""
        found = [expert for expert in (self.experts[number] for number in experts) if isinstance(expert, Expert)]
        return [expert.up.weight for expert in found], [expert.down.weight for expert in found]


def _dense_stats(valid_N: Tensor) -> RouterStats:
    """With one expert there is no choice, and the router plays no part."""
    tokens_1 = valid_N.sum().reshape(1)
    return RouterStats(tokens_1, tokens_1, tokens_1.new_zeros(()))


def _for_all(stats: RouterStats, present: list[int], num_experts: int) -> RouterStats:
    """Statistics of all experts from those of the `present` ones."""
    places = torch.tensor(present, device=stats.counts_E.device)
    zeros_E = stats.prob_sums_E.new_zeros(num_experts)
    return RouterStats(
        zeros_E.index_copy(0, places, stats.counts_E),
        zeros_E.index_copy(0, places, stats.prob_sums_E),
        stats.z_square_sum,
    )


def _stats(logits_NE: Tensor, chosen_Nk: Tensor, valid_N: Tensor) -> RouterStats:
    weights = valid_N.repeat_interleave(chosen_Nk.shape[1])
    log_probs_NE = logits_NE.log_softmax(-1)
    # logsumexp, which log_softmax has worked out already; at a chosen expert, since others may be at -inf.
    first_N1 = chosen_Nk[:, :1]
    z_N = (logits_NE.gather(1, first_N1) - log_probs_NE.gather(1, first_N1)).squeeze(1)
    return RouterStats(
        torch.bincount(chosen_Nk.reshape(-1), weights=weights, minlength=logits_NE.shape[1]).detach(),
        valid_N @ log_probs_NE.exp(),
        valid_N @ z_N.square(),
    )
