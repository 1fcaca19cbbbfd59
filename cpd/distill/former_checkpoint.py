"""Checkpoints of earlier versions, in which every expert had parameters of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cpd.distill.flat import FlatParameters
from cpd.student.former_names import stack_experts, stack_name


def upgrade_checkpoint(state: Mapping[str, Any], flat: FlatParameters) -> dict[str, Any]:
    """Reorder every vector over parameters in a trainer's state to the layout of `flat`."""
    order = _order(state["names"], flat)
    ages = torch.cat([torch.full((stop - start,), age) for start, stop, age in state["optimizer"]["cohorts"]])
    values, counts = torch.unique_consecutive(ages[order], return_counts=True)
    stops = counts.cumsum(0)
    cohorts = torch.stack([stops - counts, stops, values], 1).tolist()

    def reordered(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: reordered(entry) for name, entry in value.items()}
        is_vector = isinstance(value, Tensor) and value.shape == order.shape
        return value[order] if is_vector else value

    upgraded: dict[str, Any] = reordered(state)
    upgraded["optimizer"]["cohorts"] = cohorts
    return upgraded


def _order(names: Sequence[str], flat: FlatParameters) -> Tensor:
    """For every element of `flat`, its former place."""
    places: dict[str, Tensor] = {}
    start = 0
    for name in names:
        stack = stack_name(name)
        shape = flat.shapes[name] if stack is None else flat.shapes[stack][1:]
        # The second matrices were stored transposed.
        shape = shape[::-1] if name.endswith("down.weight") else shape
        places[name] = torch.arange(start, start + shape.numel()).view(shape)
        start += shape.numel()
    stacked = stack_experts(places)
    return torch.cat([stacked[name].flatten() for name in flat.names])
