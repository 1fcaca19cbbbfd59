"""Elastic weight consolidation (Kirkpatrick et al. 2017)."""

from __future__ import annotations

from torch import Tensor

from cpd.distill.learner import StudentLearner
from cpd.distill.protection.importance import FISHER_WINDOWS, fisher
from cpd.distill.protection.quadratic import QuadraticPenalty
from cpd.distill.stage_data import StageData


class EWC(QuadraticPenalty):
    """The quadratic penalty whose F_j is the diagonal Fisher information of the student."""

    def _importance(self, learner: StudentLearner, data: StageData) -> Tensor:
        return fisher(learner, data, FISHER_WINDOWS)
