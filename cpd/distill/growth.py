"""Growth of the student at the start of a stage that brings a new task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from cpd.comm import Comm
from cpd.distill.batches import Batch
from cpd.seeding import generator
from cpd.student.student import Student

#: Standard deviation of the noise on a copied router row, relative to the row's root mean square.
ROW_NOISE: Final = 0.1


@dataclass(frozen=True)
class GrowthDecision:
    """One expert that was added to one layer, and why it started as it did."""

    stage: int
    layer: int
    expert: int
    """The new expert's number within its layer."""
    source: int
    """The expert that it copies."""
    source_share: float
    """Share of the new task's assignments that went to the source."""


def grow(
    student: Student, probe: Batch, comm: Comm, *, seed: int, stage: int, num_new: int
) -> list[GrowthDecision]:
    """Add `num_new` closed experts to every layer; a collective.

    They copy the experts that the new task's probe batch uses most, the j-th new one the j-th most used: what
    serves the new task best so far is what should be refined for it.

    Returns:
        What was done; the same on every rank.
    """
    with torch.no_grad():
        out = student(probe.obs_RLO, task_B=probe.task_R, valid_BL=probe.valid_RL)
    counts_LE = torch.stack([stats.counts_E for stats in out.stats]).double().cpu().numpy()
    comm.all_reduce_sum(counts_LE)
    decisions = []
    for layer, (moe, counts_E) in enumerate(zip(student.moes, counts_LE, strict=True)):
        ranking = np.argsort(-counts_E, kind="stable")
        for j in range(num_new):
            source = int(ranking[j % len(ranking)])
            row = moe.router[source].detach()
            noise = generator(seed, "growth", stage, layer, j).standard_normal(len(row))
            rms = float(row.square().mean().sqrt())
            moe.grow(source, torch.from_numpy(ROW_NOISE * rms * noise))
            share = float(counts_E[source] / counts_E.sum())
            decisions.append(GrowthDecision(stage, layer, moe.num_experts - 1, source, share))
    return decisions
