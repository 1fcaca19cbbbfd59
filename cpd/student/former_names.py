"""Tensors of earlier students, in which every expert had parameters of its own."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

#: Former names of an expert's tensors, by the stack that holds them now.
FORMER: Final = {
    "up": re.compile(r"(.*moe)\.experts\.(\d+)\.up\.weight"),
    "down": re.compile(r"(.*moe)\.experts\.(\d+)\.down\.weight"),
    "router": re.compile(r"(.*moe)\.router\.(\d+)"),
}


def stack_name(name: str) -> str | None:
    """The stack that holds the tensor with a former name; None for other names."""
    for stack, pattern in FORMER.items():
        if match := pattern.fullmatch(name):
            return f"{match[1]}.{stack}.stack"
    return None


def stack_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stack the tensors with former names, which may have any prefix, in the order of experts; keep all others."""
    result: dict[str, Tensor] = {}
    slices: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        stack = stack_name(name)
        if stack is None:
            result[name] = tensor
            continue
        (expert,) = re.findall(r"\.(?:experts|router)\.(\d+)", name)
        # The second matrix was stored transposed.
        slices[stack][int(expert)] = tensor.t() if name.endswith("down.weight") else tensor
    return result | {stack: torch.stack([of[expert] for expert in sorted(of)]) for stack, of in slices.items()}
