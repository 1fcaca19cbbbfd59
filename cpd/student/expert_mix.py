"""The computation of experts that tokens choose, with a hand-written backward pass.

Tokens are sorted by expert, so that all experts take one grouped product. Shapes do not depend on the choice.

Dimensions: N tokens, k experts per token, M = N k assignments sorted by expert, E experts, D width, F hidden
width.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from cpd.student.precision import product_type
from cpd.student.stack import Stack


def _is_served(*tensors: Tensor) -> bool:
    """Whether `grouped_mm` accepts these matrices: it knows no float64, and reads 16 bytes at a time."""
    return all(
        tensor.dtype != torch.float64
        and tensor.data_ptr() % 16 == 0
        and all(size % 8 == 0 for size in tensor.shape[1:])
        for tensor in tensors
    )


def _grouped_product(a_MI: Tensor, b_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply rows by the matrix of their expert, to [M, O]; those of expert e end before row `ends_E[e]`."""
    if _is_served(a_MI, b_EIO):
        return F.grouped_mm(a_MI, b_EIO, offs=ends_E)
    out_MO, start = a_MI.new_empty(len(a_MI), b_EIO.shape[2]), 0
    for expert, end in enumerate(ends_E.tolist()):
        torch.mm(a_MI[start:end], b_EIO[expert], out=out_MO[start:end])
        start = end
    return out_MO


def _grouped_outer(a_MI: Tensor, b_MO: Tensor, ends_E: Tensor, first: int, count: int) -> Tensor:
    """`a^T b` over the rows of each of `count` experts from `first` on, [count, I, O]."""
    if _is_served(a_MI, b_MO):
        return F.grouped_mm(a_MI.t(), b_MO, offs=ends_E[: first + count])[first:].contiguous()
    out, ends = a_MI.new_empty(count, a_MI.shape[1], b_MO.shape[1]), [0, *ends_E.tolist()]
    for row, expert in enumerate(range(first, first + count)):
        rows = slice(ends[expert], ends[expert + 1])
        torch.mm(a_MI[rows].t(), b_MO[rows], out=out[row])
    return out


# Operators of their own: within a recorded step their shapes are known without reading `ends_E`.
# `torch.library.custom_op` would import torch._dynamo at the first call, which takes longer than torch itself.
torch.library.define("cpd::grouped_product", "(Tensor a, Tensor b, Tensor ends) -> Tensor")
torch.library.define("cpd::grouped_outer", "(Tensor a, Tensor b, Tensor ends, int first, int count) -> Tensor")
torch.library.impl("cpd::grouped_product", "default", _grouped_product)
torch.library.impl("cpd::grouped_outer", "default", _grouped_outer)
torch.library.register_fake("cpd::grouped_product", lambda a, b, ends: a.new_empty(a.shape[0], b.shape[2]))
torch.library.register_fake(
    "cpd::grouped_outer", lambda a, b, ends, first, count: a.new_empty(count, a.shape[1], b.shape[1])
)
grouped_product, grouped_outer = torch.ops.cpd.grouped_product.default, torch.ops.cpd.grouped_outer.default


class Dispatch(NamedTuple):
    """Tokens sorted by expert, and the matrices of the experts that get any."""

    token_M: Tensor
    """The token of each assignment."""
    place_M: Tensor
    """The row of each assignment of a token, by which a gather undoes the sort."""
    ends_U: Tensor
    up_UDF: Tensor
    down_UFD: Tensor

    @classmethod
    def of(cls, chosen_Nk: Tensor, up: Stack, down: Stack) -> Dispatch:
        """Sort the tokens that choose the experts `chosen_Nk`."""
        expert_M, order_M = chosen_Nk.reshape(-1).sort(stable=True)
        counts_E = expert_M.bincount()
        experts_U = counts_E.nonzero().flatten()
        matrices = up.stack[experts_U].transpose(1, 2), down.stack[experts_U]
        return cls(
            order_M // chosen_Nk.shape[1], order_M.argsort(), counts_E[experts_U].cumsum(0).int(), *matrices
        )

    def mix(self, x_ND: Tensor, gates_Nk: Tensor) -> Tensor:
        """What `mix_experts` returns, to the bit, without gradients."""
        active_MF = F.gelu(_grouped_product(x_ND.index_select(0, self.token_M), self.up_UDF, self.ends_U))
        y_MD = _grouped_product(active_MF, self.down_UFD, self.ends_U)
        y_NkD = y_MD.index_select(0, self.place_M).view(*gates_Nk.shape, -1)
        return (y_NkD * gates_Nk.unsqueeze(-1)).sum(1)


class _ExpertMix(torch.autograd.Function):
    """`mix_experts`; only `up_leaf` and `down_leaf`, the trained experts from `first` on, get gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        gates_Nk: Tensor,
        chosen_Nk: Tensor,
        up_EFD: Tensor,
        down_EFD: Tensor,
        up_leaf: Tensor,
        down_leaf: Tensor,
        first: int,
    ) -> Tensor:
        """Return the output [N, D]."""
        # A stable sort keeps the order of tokens within an expert, so that rounding is reproducible.
        expert_M, order_M = chosen_Nk.reshape(-1).sort(stable=True)
        experts_E = torch.arange(len(up_EFD), device=expert_M.device)
        ends_E = torch.searchsorted(expert_M, experts_E, right=True).int()
        # The inverse permutation: gathering by it undoes the sort without a scatter.
        place_M = order_M.argsort()
        x_MD = x_ND.index_select(0, order_M // gates_Nk.shape[1])
        hidden_MF = grouped_product(x_MD, up_EFD.transpose(1, 2), ends_E)
        active_MF = F.gelu(hidden_MF)
        y_MD = grouped_product(active_MF, down_EFD, ends_E)
        y_NkD = y_MD.index_select(0, place_M).view(*gates_Nk.shape, -1)
        ctx.first, ctx.count = first, len(up_leaf)
        ctx.save_for_backward(
            gates_Nk, order_M, place_M, ends_E, x_MD, hidden_MF, active_MF, y_NkD, up_EFD, down_EFD
        )
        out_ND: Tensor = (y_NkD * gates_Nk.unsqueeze(-1)).sum(1)
        return out_ND

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of tokens, gates and trained matrices."""
        gates_Nk, order_M, place_M, ends_E, x_MD, hidden_MF, active_MF, y_NkD, up_EFD, down_EFD = ctx.saved_tensors
        grad_gates_Nk = (y_NkD * grad_ND.unsqueeze(1)).sum(-1)
        gates_M = gates_Nk.reshape(-1).index_select(0, order_M)
        grad_y_MD = grad_ND.index_select(0, order_M // gates_Nk.shape[1]) * gates_M.unsqueeze(1)
        grad_y_MD = grad_y_MD.to(x_MD.dtype)
        grad_active_MF = grouped_product(grad_y_MD, down_EFD.transpose(1, 2), ends_E)
        grad_hidden_MF = torch.ops.aten.gelu_backward(grad_active_MF, hidden_MF)
        grad_x_MD = grouped_product(grad_hidden_MF, up_EFD, ends_E)
        grad_x_ND = grad_x_MD.index_select(0, place_M).view(y_NkD.shape).sum(1)
        grad_up = grad_down = None
        if ctx.needs_input_grad[5]:
            grad_up = grouped_outer(grad_hidden_MF, x_MD, ends_E, ctx.first, ctx.count)
            grad_down = grouped_outer(active_MF, grad_y_MD, ends_E, ctx.first, ctx.count)
        return grad_x_ND, grad_gates_Nk, None, None, None, grad_up, grad_down, None


def mix_experts(x_ND: Tensor, gates_Nk: Tensor, chosen_Nk: Tensor, up: Stack, down: Stack) -> Tensor:
    """The sum of the chosen experts' outputs, `gelu(x up^T) down`, weighted by their gates.

    Args:
        x_ND: tokens.
        gates_Nk: weight of each chosen expert.
        chosen_Nk: indices of the chosen experts.
        up: first matrices, [E, F, D].
        down: second matrices, [E, F, D].

    Returns:
        `[N, D]`, differentiable once with respect to tokens, gates and trained matrices.
    """
    first, up_leaf = up.leaf()
    _, down_leaf = down.leaf()
    dtype = product_type(x_ND)
    matrices = up.stack.detach().to(dtype), down.stack.detach().to(dtype), up_leaf, down_leaf
    return cast(Tensor, _ExpertMix.apply(x_ND.to(dtype), gates_Nk, chosen_Nk, *matrices, first))  # type: ignore[no-untyped-call]
