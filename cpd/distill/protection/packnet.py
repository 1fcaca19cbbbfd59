"""PackNet (Mallya and Lazebnik 2018): every task's weights are its own, and later tasks build on them."""

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

#: Owner of weights that no stage has needed yet; greater than every stage.
FREE: Final = torch.iinfo(torch.int16).max


class PackNet(Protection):
    """Train, prune, retrain, and leave what is left alone for ever.

    - A stage trains all weights without an owner, while those of earlier stages take part but do not move.
    - When all but `packnet_retrain_share` of the stage's steps are done, the smallest of the trained weights
      of every matrix become 0 and have no owner again; the rest is the stage's own, and is trained on. What a
      stage keeps is its equal share of each matrix: of n trained weights, n over the number of stages left,
      this one included. The last stage keeps all.
    - Everything but weight matrices (biases, norms, positions, router rows) belongs to the first stage.

    A task is acted for without the weights of stages after its latest, which the student must be told: its
    results are of a student that knows the task. A task that comes again gets a share of its own again.
    """

    def __init__(self, config: Config, seed: int) -> None:
        super().__init__(config, seed)
        self._owner = torch.zeros(0, dtype=torch.int16)
        self._latest_stage = torch.full((len(config.stream.distinct_tasks),), -1, dtype=torch.int16)
        self._mask: Tensor | None = None
        self._is_pruned = False

    def begin_stage(self, learner: StudentLearner) -> None:
        """Take all weights that have no owner."""
        progress = learner.progress
        if not len(self._owner):
            self._owner = torch.full_like(learner.flat.values, FREE, dtype=torch.int16)
        self._owner[self._owner == FREE] = progress.stage
        self._latest_stage[learner.current_task] = progress.stage
        self._is_pruned = False
        self._follow_owners(learner)

    def begin_step(self, learner: StudentLearner) -> None:
        """Prune when the time has come."""
        config = self.config.distill
        retrain_steps = round(self.config.protection.packnet_retrain_share * config.steps_per_stage)
        if not self._is_pruned and learner.progress.step >= config.steps_per_stage - retrain_steps:
            self._prune(learner)

    def update_mask(self, learner: StudentLearner) -> Tensor | None:
        """1 for what the present stage owns."""
        return self._mask

    def end_stage(self, learner: StudentLearner, data: StageData) -> None:
        """Prune, if there were no steps to retrain."""
        if not self._is_pruned:
            self._prune(learner)

    @torch.no_grad()
    def _prune(self, learner: StudentLearner) -> None:
        """Keep the largest weights of every matrix, set the others to 0, and give them up."""
        flat, stage = learner.flat, learner.progress.stage
        num_left = len(self.config.stream.tasks) - stage
        for slot in flat.slots.values():
            mine = torch.nonzero((self._owner[slot] == stage) & (flat.matrices[slot] > 0)).squeeze(1)
            num_given_up = len(mine) - round(len(mine) / num_left)
            smallest = flat.values[slot][mine].abs().argsort(stable=True)[:num_given_up]
            given_up = slot.start + mine[smallest]
            flat.values[given_up] = 0.0
            self._owner[given_up] = FREE
        self._is_pruned = True
        self._follow_owners(learner)

    def _follow_owners(self, learner: StudentLearner) -> None:
        """Make the mask of updates, and tell the student who owns what."""
        flat = learner.flat
        self._mask = (self._owner == learner.progress.stage).to(flat.values)
        owners = {name: self._owner[slot].view(flat.shapes[name]) for name, slot in flat.slots.items()}
        learner.student.packing = Packing(owners, self._latest_stage)

    def report(self) -> dict[str, float]:
        """The share of all parameters that have no owner yet."""
        return {"free_share": float((self._owner == FREE).double().mean())}

    def state(self) -> dict[str, Any]:
        """Owners and where in the stage."""
        return {"owner": self._owner, "latest_stage": self._latest_stage, "is_pruned": self._is_pruned}

    def restore(self, state: Mapping[str, Any], learner: StudentLearner) -> None:
        """Take them over."""
        self._owner = state["owner"].to(learner.device).clone()
        self._latest_stage = state["latest_stage"].clone()
        self._is_pruned = state["is_pruned"]
        if len(self._owner):
            self._follow_owners(learner)
