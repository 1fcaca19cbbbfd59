"""Learning without forgetting, LwF (Li and Hoiem 2016): distillation from the previous student, without memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from cpd.distill.batches import Batch
from cpd.distill.learner import StudentLearner
from cpd.distill.protection.base import Protection
from cpd.distill.rehearsal import Rehearsal
from cpd.distill.step_table import to_device
from cpd.seeding import generator
from cpd.student.network import StudentOutput


class LwF(Protection):
    """Keep what the student of the previous stage does for earlier tasks on the observations of the current one.

        loss = mean over the batch of D(student, teacher) + strength * sum_k D(student_k, previous student_k)

    D is `distill.loss`, k the earlier tasks, and student_k the student as it acts for task k, in place of the
    paper's output layer of task k. The sum is estimated without bias from one earlier task for each row, drawn at
    random. A student without a task identity has one output for all tasks, and the sum one term.
    """

    DRAWS = True
    STATE = ("values",)
    _values: Tensor | None = None
    _previous: Rehearsal | None = None
    _task_R: Tensor | None = None
    _num_terms = 1

    def begin_stage(self, learner: StudentLearner) -> None:
        """Copy the student."""
        self._values = learner.flat.values.clone() if learner.earlier_tasks else None
        self._copy(learner)

    def begin_step(self, learner: StudentLearner) -> None:
        """Draw an earlier task for every row."""
        if self._previous is None or not learner.student.is_conditioned:
            return
        earlier, progress = np.array(learner.earlier_tasks), learner.progress
        rng = generator(learner.seed, "lwf tasks", progress.stage, progress.step)
        drawn = earlier[rng.integers(len(earlier), size=self.config.distill.batch_size)]
        self._task_R = to_device(drawn[learner.comm.rank :: learner.comm.size], learner.device)
        self._num_terms = len(earlier)

    def loss(self, learner: StudentLearner, out: StudentOutput, batch: Batch) -> Tensor | None:
        """The distance to the previous student."""
        if self._previous is None:
            return None
        if self._task_R is not None:
            out = learner.student(batch.obs_RLO, task_B=self._task_R)
        mean_RLA, log_std_RLA = self._previous.label(batch.obs_RLO, self._task_R)
        labelled = batch._replace(teacher_mean_RLA=mean_RLA, teacher_log_std_RLA=log_std_RLA)
        total = (batch.valid_RL * learner.token_loss(out, labelled)).sum() / batch.num_tokens
        return self.config.protection.strength * self._num_terms * total

    def restore(self, state: Mapping[str, Any], learner: StudentLearner) -> None:
        """Restore the copy."""
        super().restore(state, learner)
        self._copy(learner)

    def _copy(self, learner: StudentLearner) -> None:
        self._previous = self._task_R = None
        if self._values is not None:
            std_floor, num_opening = self.config.distill.std_floor, learner.progress.num_opening
            self._previous = Rehearsal(learner.student, self._values, learner.flat, std_floor, num_opening)
