"""Averaged gradient episodic memory, A-GEM (Chaudhry et al. 2019)."""

from __future__ import annotations

import torch
from torch import Tensor

from cpd.distill.batches import Batch
from cpd.distill.learner import StudentLearner
from cpd.distill.protection.base import Protection


class AGEM(Protection):
    """Project the gradient g if it opposes memory's gradient r, so that no step increases the loss on memory.

        g <- g - (g r / r r) r    where g r < 0    (the paper's eq. 11)

    r is the gradient on windows that every step draws from the memory, at the cost of a second backward pass; they
    are not part of the training batch. Both gradients are those of global batches, so that the projection is the
    same for any number of ranks.
    """

    DRAWS = True
    STATE = ("num_steps", "num_projected")
    _num_steps = 0
    _num_projected: int | Tensor = 0
    _reference: Batch | None = None

    def begin_stage(self, learner: StudentLearner) -> None:
        """Reset the counts."""
        self._num_steps = self._num_projected = 0

    def begin_step(self, learner: StudentLearner) -> None:
        """Draw the windows of the reference gradient."""
        self._reference = learner.source.reference(learner.progress.step, self.config.protection.agem_windows)
        self._num_steps += self._reference is not None

    def adjust_gradient(self, learner: StudentLearner) -> None:
        """Project the gradient if it opposes memory's."""
        if self._reference is None:
            return
        grads = learner.flat.grads
        gradient = grads.clone()
        learner.gradient(self._reference)
        product = gradient @ grads
        self._num_projected = self._num_projected + (product < 0.0)
        share = torch.where(product < 0.0, product / (grads @ grads), 0.0)
        grads.copy_(gradient - share * grads)

    def report(self) -> dict[str, float]:
        """The share of the stage's steps whose gradient was projected."""
        return {"projected_share": int(self._num_projected) / max(self._num_steps, 1)}
