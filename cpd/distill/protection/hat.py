"""Hard attention to the task, HAT (Serra et al. 2018)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from cpd.config import Config
from cpd.distill.batches import Batch
from cpd.distill.learner import StudentLearner
from cpd.distill.protection.base import Protection
from cpd.distill.stage_data import StageData
from cpd.student.network import StudentOutput
from cpd.student.task_weights import GATE_SCALE, Gates


class HAT(Protection):
    """Every task opens some of the hidden units, and weights of units that earlier tasks opened hardly change.

    - The gates of task t are a_t = sigmoid(s e_t) with a learned embedding e_t. Over the steps of a stage, s rises
      from 1 / s_max to s_max = 400, as in an epoch of the paper (eq. 3); the student acts with s_max.
    - With u = max over earlier tasks of a, the updates of a unit's weights are multiplied by 1 - u (eq. 2). The
      other side of these weights is the residual stream, which has no gates and counts as open.
    - The loss gets strength * sum a_t (1 - u) / sum (1 - u), over all units (eq. 4 and 5).

    What has no gates (embedding, attention, norms, head) counts as open from the first task on: it learns in the
    first stage only. The factor applies to updates, not to gradients, since Adam would cancel it.
    """

    STATE = ("used", "mask")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._used = torch.zeros(1, 1)
        self._mask: Tensor | None = None

    def begin_stage(self, learner: StudentLearner) -> None:
        """Compute the factors on updates."""
        flat, gates = learner.flat, _gates(learner)
        if not learner.earlier_tasks:
            self._used = torch.zeros_like(gates.embedding.stack[0])
        mask = torch.zeros_like(flat.values) if learner.earlier_tasks else torch.ones_like(flat.values)
        for down, used in zip(gates.names, self._used, strict=True):
            for name in (down, down.replace(".down.", ".up.")):
                shape = flat.shapes[name]
                mask[flat.slots[name]] = (1.0 - used).view(*shape[:2], 1).expand(shape).reshape(-1)
        name = "packing.embedding.stack"
        rows = mask[flat.slots[name]].view(flat.shapes[name])
        rows.zero_()
        rows[learner.current_task] = 1.0
        self._mask = mask

    def begin_step(self, learner: StudentLearner) -> None:
        """Raise the scale of the gates."""
        progress = learner.progress.step / max(self.config.distill.steps_per_stage - 1, 1)
        _gates(learner).scale.fill_(1.0 / GATE_SCALE + (GATE_SCALE - 1.0 / GATE_SCALE) * progress)

    def loss(self, learner: StudentLearner, out: StudentOutput, batch: Batch) -> Tensor | None:
        """The regulariser, which every rank computes completely."""
        gates, free = _gates(learner), 1.0 - self._used
        opened = (gates.gates(learner.current_task, gates.scale) * free).sum() / free.sum().clamp(min=1e-9)
        return self.config.protection.strength * opened / learner.comm.size

    def update_mask(self, learner: StudentLearner) -> Tensor | None:
        """1 - u for weights of gated units; 1 or 0 for all others."""
        return self._mask

    @torch.no_grad()
    def end_stage(self, learner: StudentLearner, data: StageData) -> None:
        """Add the units that the task opens to those in use."""
        self._used = torch.maximum(self._used, _gates(learner).gates(learner.current_task, GATE_SCALE))

    def report(self) -> dict[str, float]:
        """The share of units that tasks have opened."""
        return {"used_share": float(self._used.mean())}


def _gates(learner: StudentLearner) -> Gates:
    return cast(Gates, learner.student.packing)
