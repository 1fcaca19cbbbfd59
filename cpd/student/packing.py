"""Owners of weights (PackNet): every task uses only the weights that existed at its latest stage."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)

#: Prefix of the names of owners in a file of weights.
PREFIX = "owner."
#: Name of `latest_stage` in a file of weights.
LATEST = "latest_stage"


@dataclass(frozen=True)
class Packing:
    """The owners of all weights."""

    owners: Mapping[str, Tensor]
    """For every parameter, the stage that owns each of its elements, int16."""
    latest_stage: Tensor
    """[tasks] int16, the latest stage of each distinct task of the stream; -1 for none."""

    def view(self, student: Module, task: int) -> Module:
        """A copy of `student` for `task`, with the weights of stages after the task's latest one set to 0.

        If the task has had no stage, all weights are kept.
        """
        stage = int(self.latest_stage[task])
        result = copy.deepcopy(student)
        if stage >= 0:
            with torch.no_grad():
                for name, parameter in result.named_parameters():
                    parameter.mul_((self.owners[name] <= stage).to(parameter))
        return result

    def tensors(self) -> dict[str, Tensor]:
        """The entries for a file of weights."""
        return {f"{PREFIX}{name}": owner for name, owner in self.owners.items()} | {LATEST: self.latest_stage}

    @classmethod
    def pop_from(cls, tensors: dict[str, Tensor]) -> Packing | None:
        """Remove the entries of a packing from the tensors of a file; returns None if there are none."""
        if LATEST not in tensors:
            return None
        names = [name for name in tensors if name.startswith(PREFIX)]
        return cls({name.removeprefix(PREFIX): tensors.pop(name) for name in names}, tensors.pop(LATEST))
