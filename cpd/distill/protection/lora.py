"""Low-rank adaptation, LoRA (Hu et al. 2022), of a trunk that learns in the first stage only."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from cpd.distill.learner import StudentLearner
from cpd.distill.protection.base import Protection
from cpd.student.task_weights import LowRank


class LoRA(Protection):
    """The first stage trains the shared parameters; each later task k adds to every weight matrix a product.

        W_k = W + up_k down_k,    up_k of shape [O, r], down_k of shape [r, I], r = `lora_rank`

    up_k begins with 0. Only the factors of the current task are trained in later stages, so that earlier tasks do
    not change. The paper's factor alpha / r is 1. The paper adapts the projections of attention; here the context
    may be one step, and most weights are the experts', so that all matrices but the router's are adapted.
    """

    STATE = ("mask", "parameters_per_task")
    _mask: Tensor | None = None
    _parameters_per_task = 0

    def begin_stage(self, learner: StudentLearner) -> None:
        """Choose what the stage trains."""
        flat = learner.flat
        mask = torch.zeros_like(flat.values) if learner.earlier_tasks else torch.ones_like(flat.values)
        for name, slot in flat.slots.items():
            if name.startswith("packing."):
                rows = mask[slot].view(flat.shapes[name])
                rows.zero_()
                rows[learner.current_task] = float(bool(learner.earlier_tasks))
        self._mask = mask
        self._parameters_per_task = cast(LowRank, learner.student.packing).parameters_per_task

    def update_mask(self, learner: StudentLearner) -> Tensor | None:
        """1 for what the stage trains, else 0."""
        return self._mask

    def report(self) -> dict[str, float]:
        """The numbers that every task adds."""
        return {"parameters_per_task": self._parameters_per_task}
