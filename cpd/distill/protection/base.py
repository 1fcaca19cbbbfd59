"""The interface of protections; the base class itself protects nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cpd.config import Config
from cpd.distill.flat import FlatParameters
from cpd.distill.learner import StudentLearner
from cpd.distill.stage_data import StageData


class Protection:
    """Hooks of the trainer's stages and steps; as it stands, sequential fine-tuning.

    Everything that a hook does must be the same on every rank. Vectors over parameters are laid out as
    `learner.flat`, [P].
    """

    def __init__(self, config: Config, seed: int) -> None:
        self.config, self.seed = config, seed

    def begin_stage(self, learner: StudentLearner) -> None:
        """Called once when a stage begins, after growth; not when a run resumes in the middle of one."""

    def grow(self, old: FlatParameters, new: FlatParameters) -> None:
        """Lay vectors out anew after growth: `new.carried(vector, old)`."""

    def begin_step(self, learner: StudentLearner) -> None:
        """Change `learner.flat.values` before the step's gradient is computed."""

    def adjust_gradient(self, learner: StudentLearner) -> None:
        """Change `learner.flat.grads`, which is summed over ranks but not clipped yet.

        It has places for what is trainable only: for everything unless `update_mask` holds parameters in place.
        """

    def update_mask(self, learner: StudentLearner) -> Tensor | None:
        """[P] the factor on every parameter's update in this step; None for 1 everywhere.

        What it holds in place as a whole when a stage begins rests for the whole stage: within a stage a mask may
        narrow, not widen.
        """
        return None

    def end_stage(self, learner: StudentLearner, data: StageData) -> None:
        """Learn what must be kept from now on; before the memory chooses from `data`."""

    def report(self) -> dict[str, float]:
        """Numbers for metrics.jsonl at a stage's end."""
        return {}

    def state(self) -> dict[str, Any]:
        """For a checkpoint: tensors, numbers, and lists and dictionaries of them."""
        return {}

    def restore(self, state: Mapping[str, Any], learner: StudentLearner) -> None:
        """Take over what `state()` returned; the trainer's flat vector has been restored before."""
