"""The interface of protections; the base class itself protects nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from cpd.config import Config
from cpd.distill.batches import Batch
from cpd.distill.flat import FlatParameters
from cpd.distill.learner import StudentLearner
from cpd.distill.memory.segments import Segments
from cpd.distill.stage_data import StageData
from cpd.student.network import StudentOutput


class Protection:
    """Hooks into the stages and steps of training. The base class does nothing: sequential fine-tuning.

    A hook must have the same effect on every rank. Vectors over parameters have the layout of `learner.flat`, [P].
    """

    #: Whether `begin_step` creates tensors that the step uses: a recorded step would not see those of later steps.
    DRAWS: ClassVar[bool] = False
    #: The attributes that a checkpoint stores, without their underscore.
    STATE: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Config) -> None:
        self.config = config

    def begin_stage(self, learner: StudentLearner) -> None:
        """Called once when a stage begins, after growth; not when a run resumes in the middle of one."""

    def grow(self, old: FlatParameters, new: FlatParameters) -> None:
        """Convert vectors to the layout after growth: `new.carried(vector, old)`."""

    def begin_step(self, learner: StudentLearner) -> None:
        """Change `learner.flat.values`, or draw batches, before the step's gradient is computed."""

    def loss(self, learner: StudentLearner, out: StudentOutput, batch: Batch) -> Tensor | None:
        """A term that is added to the loss of the global batch: this rank's summand; None for none."""
        return None

    def adjust_gradient(self, learner: StudentLearner) -> None:
        """Change `learner.flat.grads`, which are summed over ranks but not clipped yet.

        They have places for trainable parameters only: those that `update_mask` does not zero entirely.
        """

    def update_mask(self, learner: StudentLearner) -> Tensor | None:
        """[P] the factor on the update of every element; None for 1 everywhere.

        It holds for a whole stage, and what it zeroes entirely is frozen. A protection that changes it within the
        stage calls `learner.flat.freeze` itself.
        """
        return None

    def end_stage(self, learner: StudentLearner, data: StageData) -> None:
        """Record what later stages must preserve. Called before the memory chooses from `data`."""

    def stored(self, learner: StudentLearner, segments: Segments) -> Segments:
        """The `segments` of a stage, with the labels that the memory keeps of them. Called after `end_stage`."""
        return segments

    def report(self) -> dict[str, float]:
        """Numbers for metrics.jsonl at a stage's end."""
        return {}

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {name: getattr(self, f"_{name}") for name in self.STATE}

    def restore(self, state: Mapping[str, Any], learner: StudentLearner) -> None:
        """Continue from what `state()` returned. Called after `learner` is restored."""
        for name in self.STATE:
            value = state[name]
            setattr(self, f"_{name}", value.to(learner.device).clone() if isinstance(value, Tensor) else value)
