"""Mixed precision: matrix products in bfloat16, everything else in the type of the parameters."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def parameter_type(precision: str) -> torch.dtype:
    """The type of parameters, gradients, optimiser state and losses for a value of `distill.precision`."""
    return torch.float64 if precision == "float64" else torch.float32


def mixed_precision(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """A context in which products run in bfloat16 if `precision` is `bfloat16`."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """A context without mixed precision, for operations on the device of `tensor`."""
    is_mixed = torch.is_autocast_enabled(tensor.device.type)
    return torch.autocast(tensor.device.type, enabled=False) if is_mixed else nullcontext()


def product_type(tensor: Tensor) -> torch.dtype:
    """The type in which products with `tensor` run here."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype
