"""A causal pre-norm Transformer whose feed-forward blocks are mixtures of experts.

Dimensions: B windows, L time steps, D width, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpd.student.moe import MoE, Route, RouterStats


class CausalSelfAttention(nn.Module):
    """Multi-head attention of every step to itself and earlier steps (Vaswani et al. 2017)."""

    def __init__(self, width: int, num_heads: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, dtype=dtype)
        self.out = nn.Linear(width, width, dtype=dtype)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """`[B, L, D]` to `[B, L, D]`."""
        batch, length, width = x_BLD.shape
        if length == 1:
            # A single key gets all the attention, whatever the query, so the output is the value.
            value_BLD = F.linear(x_BLD, self.qkv.weight[2 * width :], self.qkv.bias[2 * width :])
            alone: Tensor = self.out(value_BLD)
            return alone
        qkv = self.qkv(x_BLD).view(batch, length, 3, self.num_heads, width // self.num_heads)
        q_BHLd, k_BHLd, v_BHLd = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed_BHLd = F.scaled_dot_product_attention(q_BHLd, k_BHLd, v_BHLd, is_causal=True)
        out: Tensor = self.out(mixed_BHLd.transpose(1, 2).reshape(batch, length, width))
        return out


class Block(nn.Module):
    """Attention, then experts, each on normalised input and added to the residual stream (Xiong et al. 2020)."""

    def __init__(
        self, width: int, num_heads: int, expert_width: int, num_experts: int, top_k: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, dtype=dtype)
        self.attention = CausalSelfAttention(width, num_heads, dtype)
        self.moe_norm = nn.LayerNorm(width, dtype=dtype)
        self.moe = MoE(width, expert_width, num_experts, top_k, dtype)

    def forward(
        self, x_BLD: Tensor, valid_N: Tensor | None, group: int | Tensor | Route | None
    ) -> tuple[Tensor, RouterStats | None]:
        """`[B, L, D]` to `[B, L, D]`; `valid_N` and `group` (N = B L) as in `MoE.forward`."""
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD))
        y_ND, stats = self.moe(self.moe_norm(x_BLD).flatten(0, 1), valid_N, group)
        return x_BLD + y_ND.view_as(x_BLD), stats
