"""Memory aware synapses, MAS (Aljundi et al. 2018)."""

from __future__ import annotations

from torch import Tensor

from cpd.distill.learner import StudentLearner
from cpd.distill.protection.importance import FISHER_WINDOWS, sensitivity
from cpd.distill.protection.quadratic import QuadraticPenalty
from cpd.distill.stage_data import StageData


class MAS(QuadraticPenalty):
    """The quadratic penalty whose F_j is the sensitivity of the student's mean action.

    The paper's penalty lacks the factor 1/2: its strength is half of the one here.
    """

    def _importance(self, learner: StudentLearner, data: StageData) -> Tensor:
        return sensitivity(learner, data, FISHER_WINDOWS)
