"""Dark experience replay with labels, DER++ (Buzzega et al. 2020)."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from cpd.distill.batches import Batch
from cpd.distill.learner import StudentLearner
from cpd.distill.memory.segments import Segments
from cpd.distill.protection.base import Protection
from cpd.distill.protection.bc import student_outputs
from cpd.student.network import StudentOutput


class DERPP(Protection):
    """Replay with the teacher's labels and with the outputs that the student had when the steps were stored.

        loss = mean over the batch of D(student, teacher) + strength * [replayed] D(student, stored output)

    D is `distill.loss`; the paper derives its squared error of logits from a KL divergence of outputs. Both terms
    use the rows that `distill.replay_share` draws, so that a step takes as many samples as plain replay; the paper
    draws rows for each term. With half of the batch replayed, strength is the paper's alpha, and beta is 1.
    """

    def stored(self, learner: StudentLearner, segments: Segments) -> Segments:
        """Add the student's outputs."""
        return replace(segments, student_outputs=student_outputs(learner, segments))

    def loss(self, learner: StudentLearner, out: StudentOutput, batch: Batch) -> Tensor | None:
        """The distance to stored outputs."""
        if batch.student_outputs_RLP is None:
            return None
        mean_RLA, log_std_RLA = batch.student_outputs_RLP.chunk(2, -1)
        stored = batch._replace(teacher_mean_RLA=mean_RLA, teacher_log_std_RLA=log_std_RLA)
        weight_RL = batch.valid_RL * batch.replayed_R.unsqueeze(1)
        total = (weight_RL * learner.token_loss(out, stored)).sum() / batch.num_tokens
        return self.config.protection.strength * total
