"""Train one student over the stream: stages, growth, steps, memory. Uses neither files nor environments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from cpd.comm import Comm, DivergedError
from cpd.config import Config, DistillConfig
from cpd.distill.batches import Batch
from cpd.distill.contrast import prototypes_from_memory
from cpd.distill.flat import FlatParameters
from cpd.distill.former_checkpoint import upgrade_checkpoint
from cpd.distill.growth import GrowthDecision, grow, opening_offset, probe, probed_tasks
from cpd.distill.learner import LossTerms, StudentLearner
from cpd.distill.memory.memory import ReplayMemory
from cpd.distill.memory.selection import make_selection
from cpd.distill.protection import make_protection
from cpd.distill.recorded import RecordedUpdate, Update
from cpd.distill.rehearsal import Rehearsal
from cpd.distill.stage_data import StageData
from cpd.seeding import derive
from cpd.student.former_names import stack_name
from cpd.student.precision import mixed_precision

#: Learning rate at a stage's end, as a share of `distill.lr`.
FINAL_LR_SHARE: Final = 0.1
#: Steps after which the gradients are checked: seldom, since a GPU must have finished them all.
CHECK_EVERY: Final = 10


@dataclass(frozen=True)
class StepReport:
    """The numbers of one step, over the global batch; the scalars are logged under these names."""

    loss: float
    imitation: float
    """The distance to the teachers, mean over all tokens."""
    current: float
    """Distance on the current task's rows."""
    replay: float | None
    """Distance on rows from memory; None without any."""
    load_balance: float
    router_z: float
    contrast: float
    """InfoNCE of the task embedding, in nats; 0 while there is only one task."""
    grad_norm: float
    """Before clipping."""
    lr: float
    by_task: dict[int, float]
    """Distance by position of the task among the distinct ones."""
    expert_shares: list[list[float]]
    """Each expert's share of the assignments, by layer."""


def learning_rate(config: DistillConfig, step: int) -> float:
    """The learning rate of step `step` of a stage: linear warm-up, then a cosine down to `FINAL_LR_SHARE`."""
    if step < config.lr_warmup_steps:
        return config.lr * (step + 1) / config.lr_warmup_steps
    decay_steps = max(config.steps_per_stage - config.lr_warmup_steps, 1)
    progress = (step - config.lr_warmup_steps) / decay_steps
    return config.lr * (FINAL_LR_SHARE + (1.0 - FINAL_LR_SHARE) * (1.0 + math.cos(math.pi * progress)) / 2.0)


class StudentTrainer:
    """Moves one rank's learner through the stream, with replay memory and protection.

    Every method is a collective.
    """

    def __init__(self, config: Config, seed: int, comm: Comm, device: torch.device) -> None:
        """Draw the initial weights, the same on every rank.

        Raises:
            ValueError: if a batch of any kind has fewer rows than there are ranks.
        """
        config.check_student_ranks(comm.size)
        self.config = config
        self.learner = StudentLearner(config, seed, comm, device)
        spaces = config.stream.suite_object.spaces
        self.memory = ReplayMemory(make_selection(config.memory, seed, spaces), config.memory_steps, spaces.sizes)
        self.protection = make_protection(config)
        self._rehearsal: Rehearsal | None = None
        self._run_update: Update = self._update
        self._num_finite = torch.zeros((), dtype=torch.int64, device=device)
        self._num_unchecked = 0

    def begin_stage(self, data: StageData) -> list[GrowthDecision]:
        """Create the batches of the stage and prepare the student for its tasks; returns the decisions on growth.

        When a run resumes in the middle of a stage, the student is already prepared.
        """
        config, learner = self.config.distill, self.learner
        decisions: list[GrowthDecision] = []
        # First, since growth probes the student on a batch of the new task.
        learner.open_stage(data, self.memory.segments)
        if not learner.progress.begun:
            if config.separates:
                self._start_anew()
            for task_data in (data, *data.others):
                # A task that returns later in the stream already has its experts.
                if task_data.task not in learner.progress.seen:
                    opening_NO = torch.from_numpy(task_data.observations[task_data.offsets[:-1]]).to(
                        learner.device
                    )
                    decisions += self._add_task(task_data.task, opening_NO)
                    learner.student.density.fit(task_data.task, opening_NO)
            if config.rehearsal:  # a copy of the values, since training changes them in place
                self._rehearse(learner.flat.values.clone())
            learner.progress.begun = True
            self.protection.begin_stage(learner)
        # Parameters that the mask excludes entirely need no gradient: leaving them out saves backward passes,
        # communication and optimiser steps.
        learner.flat.freeze(self.protection.update_mask(learner))
        assert len(learner.flat.grads), "something is trained"  # the first use, which takes the memory
        # Several ranks sum within the step: MPI on the host, and NCCL was not tried in a recording.
        if learner.device.type == "cuda" and learner.comm.size == 1 and not self.protection.DRAWS:
            self._run_update = RecordedUpdate(self._update, learner.flat)
        return decisions

    def _start_anew(self) -> None:
        """Replace the student by a new one; `isolated`: it keeps the densities, which choose a student."""
        learner, earlier = self.learner, self.learner.student
        learner.initialise()
        learner.progress.seen.clear()
        if self.config.distill.protocol == "isolated":
            learner.student.density.load_state_dict(earlier.density.state_dict())
            learner.student.known_K.copy_(earlier.known_K)

    def _add_task(self, task: int, opening_NO: Tensor) -> list[GrowthDecision]:
        """Prepare the student for a new task; returns the decision on growth, if there was one to take.

        Args:
            task: its position among the distinct tasks.
            opening_NO: its raw first observations.
        """
        config, learner = self.config.student, self.learner
        progress, student = learner.progress, learner.student
        decisions: list[GrowthDecision] = []
        # The first task uses the initial experts. In joint training all tasks arrive together: none comes later.
        if progress.seen and config.expansion != "none" and self.config.distill.protocol == "continual":
            candidates = probed_tasks(student, progress.seen, opening_NO)
            best = probe(student, learner.source.probe(), learner.token_loss, candidates, learner.comm)
            num_new, reason = config.experts_per_task, "every new task gets experts"
            if config.expansion == "on_demand":
                exceeds = best.loss > config.demand_threshold
                num_new = num_new if exceeds else 0
                verdict = "exceeds" if exceeds else "is within"
                reason = f"the loss {best.loss:.3g} {verdict} demand_threshold = {config.demand_threshold:g}"
            decision = grow(
                student, best, seed=learner.seed, stage=progress.stage, task=task, num_new=num_new, reason=reason
            )
            if config.new_experts == "fresh" and num_new:
                draw = torch.Generator().manual_seed(derive(learner.seed, "new experts", progress.stage))
                student.initialise_newest(num_new, task, draw)
            old = learner.add_parameters()
            self.protection.grow(old, learner.flat)
            # With task identity, no token of an earlier task reaches the new experts: they can be open at once.
            progress.num_opening = 0 if student.is_conditioned else num_new
            decisions.append(decision)
            progress.growth.append(decision)
        student.known_K[task] = True
        progress.seen.append(task)
        return decisions

    def _rehearse(self, values: Tensor) -> None:
        """Label replayed rows with the student as it was when the stage began, with parameters `values`."""
        std_floor, num_opening = self.config.distill.std_floor, self.learner.progress.num_opening
        self._rehearsal = Rehearsal(self.learner.student, values, self.learner.flat, std_floor, num_opening)

    def skip_stage(self) -> None:
        """Skip a stage that has no admitted teacher."""
        self.learner.progress.skipped.append(self.learner.progress.stage)
        self.learner.progress.next_stage()

    def end_stage(self, data: StageData) -> None:
        """Update protection and memory from the stage's data, and move on to the next stage."""
        learner = self.learner
        self.check_finite()
        # Importance is estimated from the gradients of all parameters, frozen ones included.
        learner.flat.freeze(None)
        self.protection.end_stage(learner, data)
        learner.refresh_prototypes()
        segments = self.protection.stored(learner, data.segments(self.config.student.context))
        self.memory.offer(segments, learner.comm)
        # Later stages have only the memory to recompute prototypes from, so this stage's must not use more.
        if learner.student.encoder is not None:
            prototypes_from_memory(learner.student, self.memory.segments)
        learner.close_stage()
        self._rehearsal, self._run_update = None, self._update
        learner.progress.next_stage()

    def train_step(self, report: bool = False) -> StepReport | None:
        """One update on the global batch of the current step; returns its numbers if `report`.

        Raises:
            DivergedError: on every rank, at most `CHECK_EVERY` steps after a gradient that is not finite.
        """
        config, learner, progress = self.config.distill, self.learner, self.learner.progress
        if progress.num_opening:
            # No more than the stage has, so that its last step trains the experts as they act later.
            opening_steps = min(self.config.student.opening_steps, config.steps_per_stage)
            learner.student.set_logit_offset(progress.num_opening, opening_offset(progress.step, opening_steps))
        self.protection.begin_step(learner)
        lr = learning_rate(config, progress.step)
        batch = learner.source.batch(progress.step)
        terms, grad_norm = self._run_update(batch, learner.contrast_batch(), learner.flat.values.new_full((), lr))
        progress.step += 1
        self._num_unchecked += 1
        if report or self._num_unchecked == CHECK_EVERY:
            self.check_finite()
        return self._report(batch, terms, float(grad_norm), lr) if report else None

    def _update(self, batch: Batch, contrast: Tensor | None, lr: Tensor) -> tuple[LossTerms, Tensor]:
        """The update from a batch; returns the terms of the loss and the norm of the gradient.

        The same operations on tensors of the same shapes in every step of a stage: a GPU can be given them without
        waiting for their results. Only where MPI sums the gradients of several ranks, the host waits for them.
        """
        if self._rehearsal is not None:
            with mixed_precision(self.learner.device, self.config.distill.precision):
                batch = self._rehearsal.relabel(batch)
        terms = self.learner.gradient(batch, contrast, lambda out: self.protection.loss(self.learner, out, batch))
        self.protection.adjust_gradient(self.learner)
        grad_norm = self.learner.flat.clip_grads(self.config.distill.max_grad_norm)
        self.learner.optimizer.step(lr)
        self._num_finite += grad_norm < math.inf  # not true of NaN, and one operation instead of four
        return terms, grad_norm

    def check_finite(self) -> None:
        """Check the gradients of the steps since the last check; it comes before a checkpoint.

        Raises:
            DivergedError: on every rank, if one was not finite.
        """
        num_finite, num_unchecked = int(self._num_finite), self._num_unchecked
        self._num_finite.zero_()
        self._num_unchecked = 0
        # A gradient that is not finite leaves parameters of which all later gradients are not finite either.
        if num_finite < num_unchecked:
            progress = self.learner.progress
            task, step = self.config.stream.tasks[progress.stage], progress.step - num_unchecked + num_finite
            raise DivergedError(
                f"the gradient is not finite at stage {progress.stage}, step {step} ({task}): lower distill.lr, "
                "or check the teacher's rollouts for values that are far out of range"
            )

    def _report(self, batch: Batch, terms: LossTerms, grad_norm: float, lr: float) -> StepReport:
        """Sum the numbers of all ranks, in one collective."""
        num_tasks = self.learner.student.num_tasks
        # Distances and tokens by (replayed or not, task); load balance, z-loss, contrast; the experts' counts.
        cell_R = batch.task_R + num_tasks * batch.replayed_R.long()
        sums = [
            torch.bincount(cell_R, weights=values, minlength=2 * num_tasks)
            for values in (terms.distance_RL.sum(1), batch.valid_RL.sum(1))
        ]
        scalar_terms = torch.stack([terms.load_balance, terms.router_z, terms.contrast])
        counts_M = terms.counts_LE.flatten()
        totals = torch.cat([*sums, scalar_terms, counts_M]).double().cpu().numpy()
        self.learner.comm.all_reduce_sum(totals)
        cells, rest = np.split(totals, [4 * num_tasks])
        distance, tokens = cells.reshape(2, 2, num_tasks)
        load_balance, z, contrast = (float(term) for term in rest[:3])
        shares_LE = rest[3:].reshape(terms.counts_LE.shape) / (batch.num_tokens * self.config.student.top_k)
        config = self.config.distill
        imitation = float(distance.sum() / tokens.sum())
        task_distance, task_tokens = distance.sum(0), tokens.sum(0)
        return StepReport(
            loss=imitation
            + config.load_balance_coef * load_balance
            + config.router_z_coef * z
            + config.contrast_coef * contrast,
            imitation=imitation,
            load_balance=load_balance,
            router_z=z,
            contrast=contrast,
            current=float(distance[0].sum() / tokens[0].sum()),
            replay=float(distance[1].sum() / tokens[1].sum()) if tokens[1].any() else None,
            by_task={int(t): float(task_distance[t] / task_tokens[t]) for t in np.flatnonzero(task_tokens)},
            grad_norm=grad_norm,
            lr=lr,
            expert_shares=shares_LE.tolist(),
        )

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, for a checkpoint."""
        return self.learner.state() | {
            "rehearsal": None if self._rehearsal is None else self._rehearsal.values,
            "memory": self.memory.state(),
            "protection": self.protection.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state()` returned, on any number of ranks."""
        if any(stack_name(name) for name in state["names"]):
            state = upgrade_checkpoint(state, FlatParameters(self.learner.build(state["num_experts"])))
        self.learner.restore(state)
        self.memory.restore(state["memory"])
        self.protection.restore(state["protection"], self.learner)
        self._rehearsal = None
        if state["rehearsal"] is not None:
            self._rehearse(state["rehearsal"].to(self.learner.device))
