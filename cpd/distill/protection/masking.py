"""Parameter masking: parameters that matter to earlier tasks get no update, or a smaller one.

The mask applies to the optimiser's update, not to the gradient: Adam's normalisation would cancel a constant
factor on the gradient, and momentum and weight decay would move a parameter whose gradient is zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpd.distill.flat import FlatParameters
from cpd.distill.learner import StudentLearner
from cpd.distill.protection.base import Protection
from cpd.distill.protection.importance import FISHER_WINDOWS, fisher
from cpd.distill.stage_data import StageData


class Masking(Protection):
    """Masks for three kinds of parameters.

    - Parameters that belong to one task (its vector, and the experts and router rows of its group or, in a student
      without task identity, those that were added for it): with `mask_experts`, only stages of that task update
      them.
    - Parameters that all tasks share (embedding, attention, norms, head): all are protected or, with
      `mask_fraction` below 1, those with the greatest accumulated Fisher information, as a share of the parameters
      that have any. (The others played no part in any task: a window of one step leaves queries and keys, 45 % of
      the shared parameters, without effect.) `hard`: protected parameters get no update. `scaled`: the update is
      multiplied by F* / F, where F is the importance and F* the least importance that is protected.
    - The task encoder is never masked: prototypes are recomputed when it changes.
    """

    STATE = ("importance", "mask")
    _importance: Tensor | None = None
    _mask: Tensor | None = None
    _masked_share = 0.0

    def begin_stage(self, learner: StudentLearner) -> None:
        """Compute the mask of the stage."""
        self._mask, self._masked_share = None, 0.0
        self._mask = self._make_mask(learner)

    def grow(self, old: FlatParameters, new: FlatParameters) -> None:
        """Give new parameters importance 0."""
        if self._importance is not None:
            self._importance = new.carried(self._importance, old)

    def update_mask(self, learner: StudentLearner) -> Tensor | None:
        """The mask of the stage; None while there is only one task."""
        return self._mask

    def end_stage(self, learner: StudentLearner, data: StageData) -> None:
        """Accumulate the importance of the stage; release its mask, before growth takes memory."""
        self._masked_share = self._share_now()
        self._mask = None
        if self.config.protection.needs_importance:
            importance = fisher(learner, data, FISHER_WINDOWS)
            self._importance = importance if self._importance is None else self._importance + importance

    def report(self) -> dict[str, float]:
        """The share of all parameters whose update is reduced in this stage; between stages, in the last one."""
        return {"masked_share": self._masked_share if self._mask is None else self._share_now()}

    def _share_now(self) -> float:
        return 0.0 if self._mask is None else int((self._mask < 1.0).sum()) / len(self._mask)

    def _make_mask(self, learner: StudentLearner) -> Tensor | None:
        flat = learner.flat
        if all(task == learner.current_task for task in learner.progress.seen):
            return None
        mask = torch.ones_like(flat.values)
        shared = torch.ones(flat.size, dtype=torch.bool, device=mask.device)
        for name, slot in flat.slots.items():
            if name.startswith("encoder."):
                shared[slot] = False
            elif (factor := self._task_factor(name, learner)) is not None:
                shared[slot] = False
                if self.config.protection.mask_experts:
                    mask[slot] = factor.expand(flat.shapes[name]).reshape(-1)
        self._mask_shared(mask, shared)
        return mask

    def _task_factor(self, name: str, learner: StudentLearner) -> Tensor | None:
        """1 where a parameter of tasks belongs to the current task alone, else 0; None if all tasks share it."""
        student = learner.student
        if name == "task":
            rows = torch.zeros(student.num_tasks, 1, device=student.device, dtype=student.dtype)
            rows[learner.current_task] = 1.0
            return rows
        if not name.endswith(".stack"):
            return None
        is_own = [owners == [learner.current_task] for owners in self._owners(learner)]
        factor_E = torch.tensor(is_own, device=student.device).to(student.dtype)
        return factor_E.view(-1, *[1] * (len(learner.flat.shapes[name]) - 1))

    def _owners(self, learner: StudentLearner) -> list[list[int]]:
        """The tasks that own each expert: those of its group or, without groups, the task it was added for."""
        student, progress = learner.student, learner.progress
        if student.is_conditioned:
            groups = student.moes[0].group_E.tolist()
            return [[task for task in progress.seen if student.group_of(task) == group] for group in groups]
        owners = [[progress.seen[0]]] * self.config.student.num_experts
        for decision in progress.growth:
            owners += [[decision.task]] * decision.num_new
        return owners

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
