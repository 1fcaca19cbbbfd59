"""Weights that have owners, so that every task can be acted for with those that were there for it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)

#: Prefix of the owners' names in a file of weights.
PREFIX = "owner."
#: Name of the tasks' latest stages there.
LATEST = "latest_stage"


@dataclass(frozen=True)
class Packing:
    """Who owns which weight.

    Attributes:
        owners: for every parameter of the student the stage that owns each of its elements, int16.
        latest_stage: [tasks] int16, the latest stage of each of the stream's distinct tasks; -1 for none.
    """

    owners: Mapping[str, Tensor]
    latest_stage: Tensor

    def view(self, student: Module, task: int) -> Module:
        """A copy of `student` for `task`: 0 where a weight belongs to a stage after the task's latest.

        For a task without a stage nothing is left out.
        """
        stage = int(self.latest_stage[task])
        result = copy.deepcopy(student)
        if stage >= 0:
            with torch.no_grad():
                for name, parameter in result.named_parameters():
                    parameter.mul_((self.owners[name] <= stage).to(parameter))
        return result

    def tensors(self) -> dict[str, Tensor]:
        """As they are kept in a file of weights."""
        return {f"{PREFIX}{name}": owner for name, owner in self.owners.items()} | {LATEST: self.latest_stage}

    @classmethod
    def pop_from(cls, tensors: dict[str, Tensor]) -> Packing | None:
        """Take what `tensors()` returned out of a file's tensors; None if there is nothing of it."""
        if LATEST not in tensors:
            return None
        names = [name for name in tensors if name.startswith(PREFIX)]
        return cls({name.removeprefix(PREFIX): tensors.pop(name) for name in names}, tensors.pop(LATEST))
