"""Behavioural-cloning replay, as in ClonEx (Wolczyk et al. 2022, "Disentangling transfer in continual RL")."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from cpd.distill.learner import StudentLearner
from cpd.distill.losses import floored_log_std
from cpd.distill.memory.segments import Segments
from cpd.distill.protection.base import Protection

#: Segments per forward pass.
CHUNK: Final = 2_048


class BehaviouralCloning(Protection):
    """Replay stored observations with the policy of the student at the end of their own stage.

        loss = mean over the batch of D(student, label),    with D = `distill.loss`

    The label of a row of the current task is the teacher's Gaussian, that of a replayed row the Gaussian that the
    student had when the row was stored; later stages do not change it. `distill.replay_share` weighs the two. In
    contrast, `distill.rehearsal` labels mixed observations by the student of the previous stage, and plain replay
    keeps the teacher's labels.
    """

    def stored(self, learner: StudentLearner, segments: Segments) -> Segments:
        """Replace the teacher's labels by the student's."""
        mean, log_std = np.split(student_outputs(learner, segments), 2, axis=1)
        return replace(segments, teacher_mean=mean, teacher_log_std=log_std)


@torch.no_grad()
def student_outputs(learner: StudentLearner, segments: Segments) -> npt.NDArray[np.float32]:
    """The student's clipped means and floored log deviations at every step of segments of one task; a collective.

    Returns:
        [S, 2 A], the same on every rank.
    """
    position = np.arange(learner.config.student.context)
    parts = []
    for first in range(0, len(segments), CHUNK):
        start, length = (array[first : first + CHUNK, None] for array in (segments.start, segments.length))
        obs = torch.from_numpy(segments.observations[start + np.minimum(position, length - 1)])
        out = learner.student(obs.to(learner.device, learner.student.dtype), task_B=int(segments.task[0]))
        log_std = floored_log_std(out.log_std_BLA, learner.config.distill.std_floor)
        outputs = torch.cat([out.mean_BLA.clamp(-1.0, 1.0), log_std], -1).float().cpu().numpy()
        parts.append(outputs[position < length])
    # Rounding may differ between kinds of processors.
    return learner.comm.broadcast(np.concatenate(parts))
