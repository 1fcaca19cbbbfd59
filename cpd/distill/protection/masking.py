"""Parameter masking: what matters to earlier tasks does not move, or moves less.

The optimiser's update is masked, not the gradient: Adam's normalisation would cancel a constant factor on the
gradient, and its momentum and weight decay would move a parameter whose gradient is zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cpd.distill.flat import FlatParameters
from cpd.distill.learner import StudentLearner
from cpd.distill.protection.base import Protection
from cpd.distill.protection.importance import FISHER_WINDOWS, fisher
from cpd.distill.stage_data import StageData


class Masking(Protection):
    """Masks of three kinds of parameters.

    - What a task has to itself (its vector, and the experts and router rows of its group or, in a student without
      tasks, those that were added for it): with `mask_experts` it moves in the stages of its own task only.
    - What all tasks share (embedding, attention, norms, head): it is protected as a whole or, with `mask_fraction`
      below 1, by its accumulated Fisher information: of the parameters that have any, the share with the greatest.
      (Others have had no part in any task: a window of one step leaves queries and keys without effect, 45 % of
      what is shared.) `hard`: what is protected does not move. `scaled`: with importance F and the least protected
      importance F*, it moves by the factor F* / F.
    - The task encoder is never masked: prototypes are made anew when it has changed.
    """

    def __init__(self, config: Any, seed: int) -> None:
        super().__init__(config, seed)
        self._importance: Tensor | None = None
        self._mask: Tensor | None = None

    def begin_stage(self, learner: StudentLearner) -> None:
        """Make the mask of the stage that begins."""
        self._mask = self._make_mask(learner)

    def grow(self, old: FlatParameters, new: FlatParameters) -> None:
        """New parameters have not mattered to anything yet."""
        if self._importance is not None:
            self._importance = new.carried(self._importance, old)

    def update_mask(self, learner: StudentLearner) -> Tensor | None:
        """The stage's mask; None in the first."""
        return self._mask

    def end_stage(self, learner: StudentLearner, data: StageData) -> None:
        """Add the stage's importance to what was accumulated."""
        if self.config.protection.needs_importance:
            found = fisher(learner, data, FISHER_WINDOWS)
            self._importance = found if self._importance is None else self._importance + found

    def report(self) -> dict[str, float]:
        """The share of all parameters that cannot move freely."""
        return {"masked_share": 0.0 if self._mask is None else float((self._mask < 1.0).double().mean())}

    def _make_mask(self, learner: StudentLearner) -> Tensor | None:
        progress, flat = learner.progress, learner.flat
        present = learner.current_task
        if all(task == present for task in progress.seen):
            return None
        mask = torch.ones_like(flat.values)
        shared = torch.ones(flat.size, dtype=torch.bool, device=mask.device)
        for name, slot in flat.slots.items():
            if name.startswith("encoder."):
                shared[slot] = False
            elif (own := self._own_share(name, learner, present)) is not None:
                shared[slot] = False
                if self.config.protection.mask_experts:
                    mask[slot] = own.expand(learner.flat.shapes[name]).reshape(-1)
        self._mask_shared(mask, shared)
        return mask

    def _own_share(self, name: str, learner: StudentLearner, present: int) -> Tensor | None:
        """1 where the present task may move a parameter that tasks have to themselves, else 0; None if shared."""
        student = learner.student
        if name == "task":
            rows = torch.zeros(student.num_tasks, 1, device=student.device, dtype=student.dtype)
            rows[present] = 1.0
            return rows
        parts = name.split(".")
        if "moe" not in parts or parts[3] not in ("experts", "router"):
            return None
        moe = student.moes[int(parts[1])]
        owners = self._owners(learner, int(parts[4]), int(moe.group_E[int(parts[4])]))
        return moe.logit_offset.new_tensor(float(owners == [present]))

    def _owners(self, learner: StudentLearner, expert: int, group: int) -> list[int]:
        """The tasks that an expert belongs to: those of its group; without groups, the one it was added for."""
        student, progress = learner.student, learner.progress
        if student.is_conditioned:
            return [task for task in progress.seen if int(student.group_K[task]) == group]
        added_for = [progress.seen[0]] * self.config.student.num_experts
        for decision in progress.growth:
            added_for += [decision.task] * decision.num_new
        return [added_for[expert]]

    def _mask_shared(self, mask: Tensor, shared: Tensor) -> None:
        protection = self.config.protection
        if protection.mask_fraction == 0.0:
            return
        if protection.mask_fraction == 1.0:
            mask[shared] = 0.0
            return
        assert self._importance is not None
        importance = self._importance[shared]
        num_protected = max(round(protection.mask_fraction * int((importance > 0).sum())), 1)
        least = importance.topk(num_protected).values[-1]
        is_protected = (importance >= least) & (importance > 0)
        factor = torch.where(is_protected, 0.0 if protection.mask_mode == "hard" else least / importance, 1.0)
        mask[shared] = factor.to(mask.dtype)

    def state(self) -> dict[str, Any]:
        """Accumulated importance and the present mask."""
        return {"importance": self._importance, "mask": self._mask}

    def restore(self, state: Mapping[str, Any], learner: StudentLearner) -> None:
        """Take both over."""
        self._importance, self._mask = (
            None if state[name] is None else state[name].to(learner.device) for name in ("importance", "mask")
        )
