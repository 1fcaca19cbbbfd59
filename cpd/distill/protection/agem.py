"""Averaged gradient episodic memory, A-GEM (Chaudhry et al. 2019)."""

from __future__ import annotations

from cpd.distill.learner import StudentLearner
from cpd.distill.protection.base import Protection


class AGEM(Protection):
    """Project the gradient g if it opposes memory's gradient r, so that no step increases the loss on memory.

        g <- g - (g r / r r) r    where g r < 0    (the paper's eq. 11)

    r is the gradient on windows that every step draws from the memory, at the cost of a second backward pass; they
    are not part of the training batch. Both gradients are those of global batches, so that the projection is the
    same for any number of ranks.
    """

    STATE = ("num_steps", "num_projected")
    _num_steps = 0
    _num_projected = 0

    def begin_stage(self, learner: StudentLearner) -> None:
        """Reset the counts."""
        self._num_steps = self._num_projected = 0

    def adjust_gradient(self, learner: StudentLearner) -> None:
        """Project the gradient if it opposes memory's."""
        reference = learner.source.reference(learner.progress.step, self.config.protection.agem_windows)
        if reference is None:
            return
        grads = learner.flat.grads
        gradient = grads.clone()
        learner.gradient(reference, contrast=False)
        product = float(gradient @ grads)
        self._num_steps += 1
        if product < 0.0:
            self._num_projected += 1
            gradient.add_(grads, alpha=-product / float(grads @ grads))
        grads.copy_(gradient)

    def report(self) -> dict[str, float]:
        """The share of the stage's steps whose gradient was projected."""
        return {"projected_share": self._num_projected / max(self._num_steps, 1)}
