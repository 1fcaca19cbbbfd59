"""PackNet (Mallya and Lazebnik 2018): every task owns some of the weights, and later tasks build on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from cpd.config import Config
from cpd.distill.learner import StudentLearner
from cpd.distill.protection.base import Protection
from cpd.distill.stage_data import StageData
from cpd.student.packing import Packing

#: Owner of weights that no stage has kept yet; greater than every stage.
FREE: Final = torch.iinfo(torch.int16).max


class PackNet(Protection):
    """Train, prune, retrain, and then freeze the weights that are left.

    - A stage trains all free weights. Those of earlier stages take part in the forward pass but get no update.
    - Before the last `packnet_retrain_share` of the stage's steps, the smallest trained weights of every matrix
      are set to 0 and become free again. The stage owns the rest and trains it further. Each stage keeps an equal
      share of each matrix: of n trained weights, n over the number of stages left, this one included. The last
      stage keeps all.
    - Everything but weight matrices (biases, norms, positions, router rows) belongs to the first stage.

    The policy for a task leaves out the weights of stages after the task's latest one. Results are therefore those
    of a student that knows the task. A task that comes again gets another share.
    """

    STATE = ("owner", "latest_stage", "is_pruned")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._owner = torch.zeros(0, dtype=torch.int16)
        self._latest_stage = torch.full((len(config.stream.distinct_tasks),), -1, dtype=torch.int16)
        self._mask: Tensor | None = None
        self._is_pruned = False

    def begin_stage(self, learner: StudentLearner) -> None:
        """Take all free weights."""
        progress = learner.progress
        if not len(self._owner):
            self._owner = torch.full_like(learner.flat.values, FREE, dtype=torch.int16)
        self._owner[self._owner == FREE] = progress.stage
        self._latest_stage[learner.current_task] = progress.stage
        self._is_pruned = False
        self._apply_owners(learner)

    def begin_step(self, learner: StudentLearner) -> None:
        """Prune before the first retraining step."""
        config = self.config.distill
        retrain_steps = round(self.config.protection.packnet_retrain_share * config.steps_per_stage)
        if not self._is_pruned and learner.progress.step >= config.steps_per_stage - retrain_steps:
            self._prune(learner)
            learner.flat.freeze(self._mask)

    def update_mask(self, learner: StudentLearner) -> Tensor | None:
        """1 for elements that the current stage owns, else 0."""
        return self._mask

    def end_stage(self, learner: StudentLearner, data: StageData) -> None:
        """Prune if the stage had no retraining steps."""
        if not self._is_pruned:
            self._prune(learner)

    @torch.no_grad()
    def _prune(self, learner: StudentLearner) -> None:
        """Keep the largest weights of every matrix; set the others to 0 and free them."""
        flat, stage = learner.flat, learner.progress.stage
        num_left = len(self.config.stream.tasks) - stage
        for slot in flat.matrix_slots():
            trained = torch.nonzero(self._owner[slot] == stage).squeeze(1)
            num_pruned = len(trained) - round(len(trained) / num_left)
            smallest = flat.values[slot][trained].abs().argsort(stable=True)[:num_pruned]
            pruned = slot.start + trained[smallest]
            flat.values[pruned] = 0.0
            self._owner[pruned] = FREE
        self._is_pruned = True
        self._apply_owners(learner)

    def _apply_owners(self, learner: StudentLearner) -> None:
        """Derive the update mask and the packing of the student from the owners."""
        flat = learner.flat
        self._mask = (self._owner == learner.progress.stage).to(flat.values)
        owners = {name: self._owner[slot].view(flat.shapes[name]) for name, slot in flat.slots.items()}
        learner.student.packing = Packing(owners, self._latest_stage)

    def report(self) -> dict[str, float]:
        """The share of all parameters that are free."""
        return {"free_share": float((self._owner == FREE).double().mean())}

    def restore(self, state: Mapping[str, Any], learner: StudentLearner) -> None:
        """Restore the owners and the mask."""
        super().restore(state, learner)
        if len(self._owner):
            self._apply_owners(learner)
