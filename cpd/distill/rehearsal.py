"""The student as it was before the stage, which labels replayed rows (rehearsal by self-distillation)."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from cpd.distill.batches import Batch
from cpd.distill.flat import FlatParameters
from cpd.distill.losses import floored_log_std
from cpd.student.network import Student


class Rehearsal:
    """A frozen copy of the student, which labels observations."""

    def __init__(
        self, student: Student, values: Tensor, flat: FlatParameters, std_floor: float, num_opening: int
    ) -> None:
        """Copy `student` with parameters `values`, laid out as `flat`, and close its last `num_opening` experts.

        When a run resumes in the middle of a stage, these are partly open, but were closed when the stage began.
        """
        self.values = values
        self._student = copy.deepcopy(student)
        for name, parameter in self._student.named_parameters():
            parameter.data = values[flat.slots[name]].view(parameter.shape)
            parameter.requires_grad_(False)
        if num_opening:
            self._student.set_logit_offset(num_opening, -math.inf)
        self._std_floor = std_floor

    def relabel(self, batch: Batch) -> Batch:
        """Label replayed rows with the copy's Gaussian, with a clipped mean and a floored standard deviation."""
        count = batch.num_replayed
        if not count:
            return batch
        mean_RLA, log_std_RLA = self.label(batch.obs_RLO[:count], batch.task_R[:count])
        return batch._replace(
            teacher_mean_RLA=torch.cat([mean_RLA, batch.teacher_mean_RLA[count:]]),
            teacher_log_std_RLA=torch.cat([log_std_RLA, batch.teacher_log_std_RLA[count:]]),
        )

    @torch.no_grad()
    def label(self, obs_RLO: Tensor, task_R: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and log deviation of the copy's Gaussian, [R, L, A], clipped and floored like a teacher's."""
        out = self._student(obs_RLO, task_B=task_R)
        return out.mean_BLA.clamp(-1.0, 1.0), floored_log_std(out.log_std_BLA, self._std_floor)
