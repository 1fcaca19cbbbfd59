"""Growth of the student at the start of a stage with a new task: which experts are added, and copies of which."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cpd.comm import Comm
from cpd.distill.batches import Batch
from cpd.seeding import generator
from cpd.student.network import Student, StudentOutput

#: Standard deviation of the noise on a copied router row, relative to the row's root mean square.
ROW_NOISE: Final = 0.1
#: Earlier tasks whose experts are probed for a new one: with all, a stream's cost would grow with its square.
MAX_PROBED: Final = 16

#: The loss of every token, [R, L], of a student's output on a batch.
TokenLoss = Callable[[StudentOutput, Batch], Tensor]


@dataclass(frozen=True)
class Probe:
    """How well the student serves a new task with the experts of an earlier one."""

    task: int
    """The earlier task; 0 for a student without task identity."""
    loss: float
    """Mean over the tokens of the global batch."""
    counts_LE: npt.NDArray[np.float64]
    """Number of assignments by layer and expert."""


@dataclass(frozen=True)
class GrowthDecision:
    """Whether experts were added for a task, and why."""

    stage: int
    task: int
    nearest_task: int
    """The earlier task whose experts serve the new one best; new experts are copies of them. The first task if the
    student is not conditioned on tasks, since all tasks then share all experts."""
    probe_loss: float
    """The loss of the new task with these experts."""
    reason: str
    num_new: int
    """Experts added to every layer."""
    sources: list[list[int]]
    """By layer, the experts of which the new ones are copies."""
    group: int
    """The group of experts that the task uses now."""


def probed_tasks(student: Student, seen: list[int], opening_NO: Tensor) -> list[int]:
    """The tasks of `seen` to probe for a new task: those under whose density its first observations are likeliest.

    Args:
        student: the student, with the densities of all tasks in `seen`.
        seen: earlier tasks, in order of arrival.
        opening_NO: raw first observations of the new task.
    """
    if len(seen) <= MAX_PROBED:
        return seen
    density_S = student.density.log_density(opening_NO).mean(0)[seen]
    nearest = density_S.argsort(descending=True, stable=True)[:MAX_PROBED]
    return [seen[position] for position in sorted(nearest.tolist())]


def probe(student: Student, batch: Batch, loss: TokenLoss, tasks: list[int], comm: Comm) -> Probe:
    """Evaluate a batch of a new task with the experts of each of `tasks`; returns the best. A collective."""
    best: Probe | None = None
    for task in tasks if student.is_conditioned else [0]:
        with torch.no_grad():
            out = student(batch.obs_RLO, task_B=task, valid_BL=batch.valid_RL)
            total = float((batch.valid_RL * loss(out, batch)).sum())
        counts_LE = torch.stack([stats.counts_E for stats in out.stats]).double().cpu().numpy()
        sums = np.append(counts_LE, total)
        comm.all_reduce_sum(sums)
        result = Probe(task, float(sums[-1]) / batch.num_tokens, sums[:-1].reshape(counts_LE.shape))
        if best is None or result.loss < best.loss:
            best = result
    assert best is not None
    return best


@torch.no_grad()
def grow(
    student: Student, best: Probe, *, seed: int, stage: int, task: int, num_new: int, reason: str
) -> GrowthDecision:
    """Add `num_new` experts, possibly none, to every layer for a new task.

    New experts are copies of those that serve the new task best according to `best`: the j-th new expert copies
    the j-th most used one, starting over once all are copied. In a student with task identity they form a new
    group, which tokens of other tasks never reach. In a student without, they are closed at first. Without new
    experts the task shares those of the nearest task.

    Returns:
        What was done; the same on every rank.
    """
    nearest_group = student.group_of(best.task)
    if student.task is not None:
        student.task[task] = student.task[best.task]
        student.assign_group(task, len(student.moes[0].groups) if num_new else nearest_group)
    group = student.group_of(task)
    sources = []
    for layer, (moe, counts_E) in enumerate(zip(student.moes, best.counts_LE, strict=True)):
        serving_E = moe.group_E.numpy(force=True) == nearest_group  # all, in a student without tasks
        ranking = [int(expert) for expert in np.argsort(-counts_E, kind="stable") if serving_E[expert]]
        sources.append([ranking[j % len(ranking)] for j in range(num_new)])
        for j, source in enumerate(sources[-1]):
            row = moe.router.stack[source].detach()
            noise = generator(seed, "growth", stage, layer, j).standard_normal(len(row))
            rms = float(row.square().mean().sqrt())
            moe.grow(
                source, torch.from_numpy(ROW_NOISE * rms * noise), group=group, closed=not student.is_conditioned
            )
    return GrowthDecision(stage, task, best.task, best.loss, reason, num_new, sources, group)


def opening_offset(step: int, opening_steps: int) -> float:
    """Router logit offset of experts that were added when the stage began.

    The logarithm of a share that grows linearly to 1: the unnormalised probability of a new expert grows from
    1/opening_steps of that of its source, of which it is a copy, to all of it.
    """
    return math.log(min(step + 1, opening_steps) / opening_steps)
