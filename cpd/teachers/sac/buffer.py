"""The replay buffer of off-policy learners: a ring of transitions.

Shape letters: C capacity, S steps of an iteration, N environments, O = 39, A = 4.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cpd.envs.tasks import ACTION_SIZE, OBSERVATION_SIZE
from cpd.teachers.rollout import Experience

_WIDTHS: Final = {
    "obs": OBSERVATION_SIZE,
    "next_obs": OBSERVATION_SIZE,
    "actions": ACTION_SIZE,
    "rewards": 1,
    "terminated": 1,
}


class ReplayBuffer:
    """The newest `capacity` transitions.

    Args:
        capacity: C.
        device: where the tables are kept.

    Attributes:
        tables: float32 by name: `obs` [C, O], `next_obs` [C, O], `actions` [C, A] as executed, `rewards` [C, 1] as
            in `Experience`, `terminated` [C, 1] (1 where success ended the episode).
        size: rows that hold a transition; they are the first ones.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.size = 0
        self._next = 0
        self.tables = {name: torch.empty((capacity, width), device=device) for name, width in _WIDTHS.items()}

    def add(self, batch: Experience) -> None:
        """Take in an iteration's transitions, in the order of time; the oldest make room."""
        fields: dict[str, npt.NDArray[Any]] = {
            "obs": batch.obs,
            "next_obs": batch.next_obs,
            "actions": np.clip(batch.actions, -1.0, 1.0),
            "rewards": batch.rewards,
            "terminated": batch.terminated.astype(np.float32),
        }
        num_new = min(batch.rewards.size, self.capacity)
        rows = torch.from_numpy((self._next + np.arange(num_new)) % self.capacity)
        for name, values in fields.items():
            table = self.tables[name]
            new = np.ascontiguousarray(values).reshape(-1, table.shape[1])[-num_new:]
            table[rows.to(table.device)] = torch.from_numpy(new).to(table.device)
        self._next = (self._next + num_new) % self.capacity
        self.size = min(self.size + num_new, self.capacity)

    def state(self) -> dict[str, Any]:
        """For a checkpoint: a copy of what is filled."""
        tables: dict[str, Tensor] = {name: table[: self.size].cpu() for name, table in self.tables.items()}
        return {"next": self._next, "tables": {name: table.clone() for name, table in tables.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state` gave."""
        self._next = state["next"]
        self.size = len(state["tables"]["rewards"])
        for name, table in self.tables.items():
            table[: self.size] = state["tables"][name].to(table.device)
