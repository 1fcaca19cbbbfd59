"""A parameter with a slice for every expert of a layer, of which a range may be trained alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Stack(nn.Module):
    """One tensor for all experts of a layer, `stack` [E, ...].

    Autograd computes gradients of whole tensors. If only a range of the experts is trained, `stack` needs no
    gradient, and `trained` holds the first expert of the range and a leaf tensor that shares its memory.
    """

    def __init__(self, *shape: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.zeros(shape, dtype=dtype))
        self.trained: tuple[int, Tensor] | None = None

    @torch.no_grad()
    def append(self, slice_: Tensor) -> None:
        """Add an expert."""
        self.stack = nn.Parameter(torch.cat([self.stack, slice_.unsqueeze(0)]))

    def of(self, experts: slice) -> Tensor:
        """The slices of some experts, with a gradient where they are trained."""
        if self.trained is None or not torch.is_grad_enabled():
            return self.stack if experts == slice(0, len(self.stack)) else self.stack[experts]
        first, leaf = self.trained
        if experts == slice(first, first + len(leaf)):
            return leaf
        return torch.cat([self.stack[:first], leaf, self.stack[first + len(leaf) :]])[experts]

    def leaf(self) -> tuple[int, Tensor]:
        """The first trained expert, and the tensor that gets the gradient of the trained ones."""
        return self.trained or (0, self.stack)
