"""What the student does under doubt: plans, and how often each succeeds on each task.

A plan acts for one task, or first for one and then for another. Tasks that begin alike need not be told apart if
one policy, or one after another, succeeds on both.

Dimensions: B episodes, P plans, K tasks of the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

#: Steps that a plan of two tasks acts for the first one.
FIRST_STEPS: Final = 100
#: Weight of the belief among plans of equal expected success.
TIE_BREAK: Final = 1e-9


class Plan(NamedTuple):
    """The tasks acted for, by position; equal ones: this task until the end."""

    first: int
    second: int


class Plans(nn.Module):
    """The plans that a student chooses among, with their measured success.

    Attributes:
        tasks_P2: the tasks of each plan; the first K plans act for a single task each, in order.
        success_PK: the share of episodes of each task in which the plan succeeds. Where it was not measured, it is
            taken to be 1 for a plan of the task alone, and 0 otherwise.
    """

    tasks_P2: Tensor
    success_PK: Tensor

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.register_buffer("tasks_P2", torch.arange(num_tasks).unsqueeze(1).repeat(1, 2))
        self.register_buffer("success_PK", torch.eye(num_tasks, dtype=torch.float64))

    def resize(self, num_plans: int) -> None:
        """Make room for `num_plans` plans, before a state is loaded."""
        num_tasks = self.success_PK.shape[1]
        self.tasks_P2 = self.tasks_P2.new_zeros(num_plans, 2)
        self.success_PK = self.success_PK.new_zeros(num_plans, num_tasks)

    def record(self, plan: Plan, task: int, success: float) -> None:
        """Store the measured success of `plan` on `task`; a new plan is appended."""
        row = self.index(plan)
        if row is None:
            row = len(self.tasks_P2)
            self.tasks_P2 = torch.cat([self.tasks_P2, self.tasks_P2.new_tensor([plan])])
            self.success_PK = torch.cat([self.success_PK, torch.zeros_like(self.success_PK[:1])])
        self.success_PK[row, task] = success

    def index(self, plan: Plan) -> int | None:
        """The row of `plan`; None if there is none."""
        rows = (self.tasks_P2 == self.tasks_P2.new_tensor(plan)).all(1).nonzero()
        return int(rows[0]) if len(rows) else None

    def choose(self, belief_BK: Tensor, *, hedged: bool) -> Tensor:
        """The plan with the greatest expected success for each episode, its tasks `[B, 2]`.

        Args:
            belief_BK: probabilities of the tasks.
            hedged: whether plans of two tasks may be chosen.
        """
        num_plans = len(self.tasks_P2) if hedged else self.success_PK.shape[1]
        expected_BP = belief_BK.double() @ self.success_PK[:num_plans].t()
        # Among equals, the plan of the most likely task.
        expected_BP[:, : belief_BK.shape[1]] += TIE_BREAK * belief_BK
        return self.tasks_P2[expected_BP.argmax(1)]


def candidate_plans(tasks: Sequence[int]) -> list[Plan]:
    """All plans for a pair of tasks: each alone, and both in either order."""
    return [Plan(first, second) for first in tasks for second in tasks]
