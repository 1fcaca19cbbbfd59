"""The penalty that EWC, MAS and L2 share: a quadratic around the parameters at the end of each earlier stage."""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from cpd.config import Config
from cpd.distill.flat import FlatParameters
from cpd.distill.learner import StudentLearner
from cpd.distill.protection.base import Protection
from cpd.distill.stage_data import StageData


class QuadraticPenalty(Protection, abc.ABC):
    """A quadratic penalty towards the parameters at the end of each earlier stage, weighted by importance there.

    The penalty is a sum over earlier stages j (not an online average, in which early stages fade):

        strength / 2 * sum_j sum_p F_jp (theta_p - theta*_jp)^2

    A sum of quadratics is one quadratic, up to a constant, with precision sum_j F_j around the F-weighted mean of
    the theta*_j. Two vectors therefore suffice for any number of stages. A task that comes again adds one more
    term, and parameters that growth adds are free until their first stage has ended. No data are kept.
    """

    STATE = ("precision", "centre")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._precision = torch.zeros(0)
        self._centre = torch.zeros(0)

    @abc.abstractmethod
    def _importance(self, learner: StudentLearner, data: StageData) -> Tensor:
        """F_j, the importance of every parameter for the stage of `data`, [P]; a collective."""

    def grow(self, old: FlatParameters, new: FlatParameters) -> None:
        """Give new parameters precision 0: no penalty."""
        if len(self._precision):
            self._precision, self._centre = new.carried(self._precision, old), new.carried(self._centre, old)

    def adjust_gradient(self, learner: StudentLearner) -> None:
        """Add the gradient of the penalty."""
        if len(self._precision):
            strength, values = self.config.protection.strength, learner.flat.values
            learner.flat.grads.addcmul_(self._precision, values - self._centre, value=strength)

    def end_stage(self, learner: StudentLearner, data: StageData) -> None:
        """Add the term of this stage."""
        new = self._importance(learner, data)
        values = learner.flat.values
        if not len(self._precision):
            self._precision, self._centre = torch.zeros_like(values), values.clone()
        self._precision += new
        share = torch.where(self._precision > 0, new / self._precision, 0.0)
        self._centre += share * (values - self._centre)

    def report(self) -> dict[str, float]:
        """The mean precision; a useful strength is inversely proportional to it."""
        return {"mean_precision": float(self._precision.mean())}
