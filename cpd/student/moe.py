"""A mixture-of-experts feed-forward block that can grow.

Dimensions: N tokens, D width, F hidden width of an expert, E experts, C experts that a token may choose from, k
experts chosen per token, G groups.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpd.student.expert_mix import Dispatch, mix_experts
from cpd.student.precision import full_precision
from cpd.student.stack import Stack


class RouterStats(NamedTuple):
    """Sums over the valid tokens of a rank, for the losses of the router and the usage of experts."""

    counts_E: Tensor
    """Assignments to each open expert, k per token; no gradient."""
    prob_sums_E: Tensor
    """Probabilities of the softmax over all experts that a token may choose from."""
    z_square_sum: Tensor
    """logsumexp(logits)^2."""


class Route(NamedTuple):
    """What the groups of tokens alone decide, if each group has just the k experts that a token takes."""

    candidates_NC: Tensor
    rows_NCD: Tensor
    """Their router rows."""
    dispatch: Dispatch


class MoE(nn.Module):
    """Dropless top-k routing: a softmax over the k greatest logits weights the outputs of the experts.

    All parameters are stacks with a slice for each expert, router rows included, so that growth appends slices
    and changes none. Every expert belongs to a group, and the experts of a group are adjacent. A token that has a
    group chooses among the experts of that group only. Where all tokens may choose from the same k experts, they
    take all: a dense layer with gates, or without if k is 1, which leaves the router untrained.

    `logit_offset` is added to the logits. An expert whose offset is minus infinity is closed: it is excluded from
    the computation, so that appending it does not change a single bit of the output. Closed experts are always the
    last ones.

    Attributes:
        groups: the experts of every group.
        num_open: the number of open experts.
    """

    logit_offset: Tensor
    group_E: Tensor
    starts_G: Tensor
    sizes_G: Tensor

    def __init__(self, width: int, expert_width: int, num_experts: int, top_k: int, dtype: torch.dtype) -> None:
        super().__init__()
        assert num_experts >= top_k
        self.top_k = top_k
        self.up = Stack(num_experts, expert_width, width, dtype=dtype)
        self.down = Stack(num_experts, expert_width, width, dtype=dtype)
        self.router = Stack(num_experts, width, dtype=dtype)
        self.register_buffer("logit_offset", torch.zeros(num_experts, dtype=dtype))
        self.register_buffer("group_E", torch.zeros(num_experts, dtype=torch.int64))
        self.read_layout()
        self.register_load_state_dict_post_hook(_read_layout)  # type: ignore[no-untyped-call]

    def read_layout(self) -> None:
        """Derive `groups` and `num_open` from the buffers, so that no forward pass waits for the device."""
        self.num_open = int((self.logit_offset > -math.inf).sum())
        group_E = self.group_E.tolist()
        starts = [group_E.index(group) for group in sorted(set(group_E))]
        self.groups = [slice(*bounds) for bounds in zip(starts, [*starts[1:], len(group_E)], strict=True)]
        starts_G = self.group_E.new_tensor(starts)
        self.register_buffer("starts_G", starts_G, persistent=False)
        self.register_buffer(
            "sizes_G", starts_G.new_tensor([*starts[1:], len(group_E)]) - starts_G, persistent=False
        )

    @property
    def num_experts(self) -> int:
        """The number of experts, including closed ones."""
        return len(self.router.stack)

    @torch.no_grad()
    def initialise(self, residual_scale: float, generator: torch.Generator, first: int = 0) -> None:
        """Draw the experts from `first` on: matrices by fan-in, the second ones scaled, and small router rows."""
        hidden, width = self.up.stack.shape[1:]
        for up_FD, down_FD in zip(self.up.stack[first:], self.down.stack[first:], strict=True):
            up_FD.normal_(0.0, 1.0 / math.sqrt(width), generator=generator)
            down_DF = up_FD.new_empty(width, hidden)
            down_FD.copy_(down_DF.normal_(0.0, residual_scale / math.sqrt(hidden), generator=generator).t())
        for row_D in self.router.stack[first:]:
            row_D.normal_(0.0, 0.02, generator=generator)

    @torch.no_grad()
    def grow(self, source: int, row_noise_D: Tensor, *, group: int, closed: bool) -> None:
        """Append a copy of expert `source`; `row_noise_D` is added to its router row."""
        self.up.append(self.up.stack[source])
        self.down.append(self.down.stack[source])
        self.router.append(self.router.stack[source] + row_noise_D.to(self.router.stack))
        offset = self.logit_offset.new_tensor([-math.inf if closed else 0.0])
        self.logit_offset = torch.cat([self.logit_offset, offset])
        self.group_E = torch.cat([self.group_E, self.group_E.new_tensor([group])])
        self.read_layout()

    def route(self, group_N: Tensor) -> Route | None:
        """Prepare forward passes without gradients over tokens of these groups; None if groups leave a choice."""
        if any(group.stop - group.start != self.top_k for group in self.groups):
            return None
        candidates_NC = self.starts_G[group_N].unsqueeze(1) + torch.arange(self.top_k, device=group_N.device)
        dispatch = Dispatch.of(candidates_NC, self.up, self.down)
        return Route(candidates_NC, F.embedding(candidates_NC, self.router.stack), dispatch)

    def forward(
        self, x_ND: Tensor, valid_N: Tensor | None = None, group: int | Tensor | Route | None = None
    ) -> tuple[Tensor, RouterStats | None]:
        """Route and transform.

        Args:
            x_ND: tokens.
            valid_N: 1 for tokens, 0 for padding; statistics are computed only with it.
            group: the group whose experts (at least k) tokens may choose from, one for all or one for each [N],
                or what `route` prepared from these; default: all open experts.

        Returns:
            `[N, D]` and the statistics.
        """
        if isinstance(group, Route):
            logits_NC = (x_ND.unsqueeze(1) * group.rows_NCD).sum(-1)
            return self._mix(x_ND, group.candidates_NC, logits_NC, valid_N, group.dispatch)
        if isinstance(group, Tensor):
            candidates_NC, logits_NC = self._logits_by_group(x_ND, group)
            return self._mix(x_ND, candidates_NC, logits_NC, valid_N)
        experts = slice(0, self.num_open) if group is None else self.groups[group]
        if experts.stop - experts.start == self.top_k:
            return self._dense(x_ND, experts, valid_N)
        candidates_C = torch.arange(experts.start, experts.stop, device=x_ND.device)
        with full_precision(x_ND):
            logits_NC = self._logits(x_ND, experts)
        return self._mix(x_ND, candidates_C.expand(len(x_ND), -1), logits_NC, valid_N)

    def _logits(self, x_ND: Tensor, experts: slice) -> Tensor:
        return F.linear(x_ND, self.router.of(experts)) + self.logit_offset[experts]

    def _logits_by_group(self, x_ND: Tensor, group_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts of each token's group, [N, C], and its logits for them; -inf where there are fewer.

        A sum per token: the rounding of a product with all router rows would depend on their number, and a new
        group would change the outputs of the others.
        """
        number_C = torch.arange(max(g.stop - g.start for g in self.groups), device=x_ND.device)
        last_N1 = self.sizes_G[group_N].unsqueeze(1) - 1
        candidates_NC = self.starts_G[group_N].unsqueeze(1) + torch.minimum(number_C, last_N1)
        rows_NCD = F.embedding(candidates_NC, self.router.of(slice(0, self.num_experts)))
        logits_NC = (x_ND.unsqueeze(1) * rows_NCD).sum(-1)
        return candidates_NC, logits_NC.masked_fill(number_C > last_N1, -math.inf)

    def _dense(self, x_ND: Tensor, experts: slice, valid_N: Tensor | None) -> tuple[Tensor, RouterStats | None]:
        """All tokens take all of `experts`: one product up, one down, gates between."""
        hidden_NF = F.gelu(F.linear(x_ND, self.up.of(experts).flatten(0, 1)))
        down_FD = self.down.of(experts).flatten(0, 1)
        around = (experts.start, self.num_open - experts.stop)
        if self.top_k == 1:
            y_ND = hidden_NF @ down_FD
            if valid_N is None:
                return y_ND, None
            tokens_E = F.pad(valid_N.sum().reshape(1), around)
            return y_ND, RouterStats(tokens_E, tokens_E, tokens_E.new_zeros(()))
        with full_precision(x_ND):
            logits_Nk = self._logits(x_ND, experts)
            gates_Nk = logits_Nk.softmax(-1)
        y_ND = (hidden_NF.view(len(x_ND), self.top_k, -1) * gates_Nk.unsqueeze(-1)).flatten(1) @ down_FD
        if valid_N is None:
            return y_ND, None
        with full_precision(x_ND):
            return y_ND, RouterStats(
                F.pad(valid_N.sum().expand(self.top_k), around),
                F.pad(valid_N @ gates_Nk, around),
                valid_N @ logits_Nk.logsumexp(-1).square(),
            )

    def _mix(
        self,
        x_ND: Tensor,
        candidates_NC: Tensor,
        logits_NC: Tensor,
        valid_N: Tensor | None,
        dispatch: Dispatch | None = None,
    ) -> tuple[Tensor, RouterStats | None]:
        """Each token takes k of its candidates."""
        if logits_NC.shape[1] == self.top_k:
            top_logits_Nk, chosen_Nk = logits_NC, candidates_NC
        else:
            top_logits_Nk, places_Nk = logits_NC.topk(self.top_k, dim=-1)
            chosen_Nk = candidates_NC.gather(1, places_Nk)
        gates_Nk = top_logits_Nk.softmax(-1)
        if dispatch is None:
            y_ND = mix_experts(x_ND, gates_Nk, chosen_Nk, self.up, self.down)
        else:
            y_ND = dispatch.mix(x_ND, gates_Nk)
        if valid_N is None:
            return y_ND, None
        zeros_E = valid_N.new_zeros(self.num_open)
        weights_M = valid_N.repeat_interleave(self.top_k)
        probs_NC = valid_N.unsqueeze(1) * logits_NC.softmax(-1)
        with full_precision(x_ND):
            return y_ND, RouterStats(
                zeros_E.index_add(0, chosen_Nk.flatten(), weights_M),
                zeros_E.index_add(0, candidates_NC.flatten(), probs_NC.flatten()),
                valid_N @ logits_NC.logsumexp(-1).square(),
            )


def _read_layout(moe: MoE, _: object) -> None:
    moe.read_layout()
