"""The experts' computation, with a hand-written backward pass.

With autograd, many small operations would take longer than the matrix products. Here each expert takes two
products forward and four backward, and everything else is computed for all experts at once.

Dimensions: N tokens, k experts per token, M = N k assignments sorted by expert, D width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class _ExpertMix(torch.autograd.Function):
    """`mix_experts` for assignments that are sorted by expert."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, gates_Nk: Tensor, order_M: Tensor, sizes: list[int], *weights: Tensor
    ) -> Tensor:
        """Return the output [N, D].

        Args:
            ctx: keeps what `backward` needs.
            x_ND: tokens.
            gates_Nk: weight of each chosen expert.
            order_M: the assignments, numbered by token and then by choice, sorted by expert.
            sizes: number of assignments of each expert.
            weights: the first and the second matrix of every expert in turn, [F, D] and [D, F].
        """
        top_k = gates_Nk.shape[1]
        token_M = order_M // top_k
        # The inverse permutation: gathering by it undoes the sort without a scatter.
        place_M = torch.empty_like(order_M)
        place_M[order_M] = torch.arange(len(order_M), device=order_M.device)
        x_MD = x_ND.index_select(0, token_M)
        hidden_MF = x_MD.new_empty(len(x_MD), weights[0].shape[0])
        # Skip experts without tokens: most of them, if tokens choose within the group of their task.
        for start, stop, up_FD, _ in _parts(sizes, weights):
            if start < stop:
                torch.mm(x_MD[start:stop], up_FD.t(), out=hidden_MF[start:stop])
        active_MF = F.gelu(hidden_MF)
        y_MD = torch.empty_like(x_MD)
        for start, stop, _, down_DF in _parts(sizes, weights):
            if start < stop:
                torch.mm(active_MF[start:stop], down_DF.t(), out=y_MD[start:stop])
        y_NkD = y_MD.index_select(0, place_M).view(*gates_Nk.shape, -1)
        ctx.sizes = sizes
        ctx.save_for_backward(gates_Nk, order_M, place_M, x_MD, hidden_MF, active_MF, y_NkD, *weights)
        return (y_NkD * gates_Nk.unsqueeze(-1)).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of tokens, gates and matrices; None for `order_M`, `sizes` and unused matrices."""
        gates_Nk, order_M, place_M, x_MD, hidden_MF, active_MF, y_NkD, *weights = ctx.saved_tensors
        top_k = gates_Nk.shape[1]
        grad_gates_Nk = (y_NkD * grad_ND.unsqueeze(1)).sum(-1)
        gates_M = gates_Nk.reshape(-1).index_select(0, order_M)
        grad_y_MD = grad_ND.index_select(0, order_M // top_k) * gates_M.unsqueeze(1)
        grad_active_MF = torch.empty_like(active_MF)
        grad_weights: list[Tensor | None] = [None] * len(weights)
        needs = ctx.needs_input_grad[4:]
        for expert, (start, stop, _, down_DF) in enumerate(_parts(ctx.sizes, weights)):
            if start < stop:
                torch.mm(grad_y_MD[start:stop], down_DF, out=grad_active_MF[start:stop])
                if needs[2 * expert + 1]:
                    grad_weights[2 * expert + 1] = grad_y_MD[start:stop].t() @ active_MF[start:stop]
        grad_hidden_MF = torch.ops.aten.gelu_backward(grad_active_MF, hidden_MF)
        grad_x_MD = torch.empty_like(x_MD)
        for expert, (start, stop, up_FD, _) in enumerate(_parts(ctx.sizes, weights)):
            if start < stop:
                torch.mm(grad_hidden_MF[start:stop], up_FD, out=grad_x_MD[start:stop])
                if needs[2 * expert]:
                    grad_weights[2 * expert] = grad_hidden_MF[start:stop].t() @ x_MD[start:stop]
        grad_x_ND = grad_x_MD.index_select(0, place_M).view(y_NkD.shape).sum(1)
        return grad_x_ND, grad_gates_Nk, None, None, *grad_weights


def _parts(sizes: Sequence[int], weights: Sequence[Tensor]) -> list[tuple[int, int, Tensor, Tensor]]:
    """For each expert, the start and stop of its rows among the assignments, and its two matrices."""
    parts, start = [], 0
    for expert, size in enumerate(sizes):
        parts.append((start, start + size, weights[2 * expert], weights[2 * expert + 1]))
        start += size
    return parts


def mix_experts(
    x_ND: Tensor, gates_Nk: Tensor, chosen_Nk: Tensor, ups_FD: Sequence[Tensor], downs_DF: Sequence[Tensor]
) -> Tensor:
    """The sum of the chosen experts' outputs, `down gelu(up x)`, weighted by their gates.

    Args:
        x_ND: tokens.
        gates_Nk: weight of each chosen expert.
        chosen_Nk: indices of the chosen experts.
        ups_FD: first matrix of every expert.
        downs_DF: second matrix of every expert.

    Returns:
        `[N, D]`, differentiable once with respect to tokens, gates and matrices.
    """
    # A stable sort keeps the order of tokens within an expert, so that rounding is reproducible.
    order_M = chosen_Nk.reshape(-1).argsort(stable=True)
    sizes = torch.bincount(chosen_Nk.reshape(-1), minlength=len(ups_FD)).tolist()
    weights = [matrix for pair in zip(ups_FD, downs_DF, strict=True) for matrix in pair]
    return cast(Tensor, _ExpertMix.apply(x_ND, gates_Nk, order_M, sizes, *weights))  # type: ignore[no-untyped-call]
