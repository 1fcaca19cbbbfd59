"""L2 regularisation towards earlier parameters, the reference without importance (Kirkpatrick et al. 2017)."""

from __future__ import annotations

import torch
from torch import Tensor

from cpd.distill.learner import StudentLearner
from cpd.distill.protection.quadratic import QuadraticPenalty
from cpd.distill.stage_data import StageData


class L2(QuadraticPenalty):
    """The quadratic penalty in which all parameters matter alike: F_jp = 1."""

    def _importance(self, learner: StudentLearner, data: StageData) -> Tensor:
        return torch.ones_like(learner.flat.values)
