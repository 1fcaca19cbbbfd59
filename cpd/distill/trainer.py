"""The optimisation of one student over the stream: stages, growth, steps, memory. No files, no environments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cpd.comm import Comm, DivergedError
from cpd.config import Config
from cpd.distill.batches import Batch, BatchSource
from cpd.distill.contrast import ContrastSource, prototypes_from_memory
from cpd.distill.flat import AdamW, FlatParameters
from cpd.distill.growth import GrowthDecision, grow, probe
from cpd.distill.losses import LOSSES, load_balance_loss, router_z_loss
from cpd.distill.memory.memory import ReplayMemory, make_selection
from cpd.distill.protection import make_protection
from cpd.distill.rehearsal import Rehearsal
from cpd.distill.schedule import learning_rate, opening_offset
from cpd.distill.stage_data import StageData
from cpd.seeding import derive
from cpd.student.network import Student, StudentOutput
from cpd.student.task_embedding import info_nce


class LossTerms(NamedTuple):
    """The parts of a batch's loss, without gradient; this rank's summands of the global values."""

    distance_RL: Tensor
    """To the teachers, by token; 0 beyond a window's end."""
    load_balance: Tensor
    router_z: Tensor
    contrast: Tensor
    counts_LE: Tensor
    """Assignments to each open expert, by layer."""


@dataclass(frozen=True)
class StepReport:
    """One step's numbers, over the global batch."""

    loss: float
    imitation: float
    """The distance to the teachers, mean over all tokens."""
    load_balance: float
    router_z: float
    contrast: float
    """InfoNCE of the task embedding, in nats; 0 while there is but one task."""
    current: float
    """Distance on the current task's rows."""
    replay: float | None
    """Distance on rows from memory, if any."""
    by_task: dict[int, float]
    """Distance by position of the task among the distinct ones."""
    grad_norm: float
    """Before clipping."""
    lr: float
    expert_shares: list[list[float]]
    """Each expert's share of the assignments, by layer."""


@dataclass
class Progress:
    """Where in the stream the student is; kept in checkpoints."""

    stage: int = 0
    step: int = 0
    """Steps done in this stage."""
    begun: bool = False
    """Whether this stage's growth has happened."""
    num_opening: int = 0
    """Experts per layer that were added when this stage began."""
    growth: list[GrowthDecision] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)
    """Tasks distilled so far, by position among the distinct ones, in order of their first stage."""
    skipped: list[int] = field(default_factory=list)
    """Stages without an admitted teacher."""


def _batches(config: Config) -> dict[str, int]:
    """Rows of every kind of batch that the ranks share, by the setting that tells them."""
    protection = config.protection
    found = {"distill.batch_size": config.distill.batch_size}
    if config.distill.protocol != "continual":
        return found  # nothing is protected
    if protection.kind == "agem":
        found["protection.agem_windows"] = protection.agem_windows
    if protection.needs_importance:
        found["protection.fisher_windows"] = protection.fisher_windows
    return found


class StudentTrainer:
    """One rank's copy of the student and all that training changes. Every method is a collective."""

    def __init__(self, config: Config, seed: int, comm: Comm, device: torch.device) -> None:
        """Draw the first weights, the same on every rank.

        Raises:
            ValueError: if a batch of any kind has fewer rows than there are ranks.
        """
        for name, rows in _batches(config).items():
            if rows < comm.size:
                raise ValueError(
                    f"{name} = {rows} is less than the {comm.size} ranks; give fewer ranks or larger batches"
                )
        self.config, self.seed, self.comm, self.device = config, seed, comm, device
        self._initialise_student()
        self.memory = ReplayMemory(make_selection(config.memory, seed), config.memory_steps)
        self.protection = make_protection(config, seed)
        self.progress = Progress()
        self._source: BatchSource | None = None
        self._contrast: ContrastSource | None = None
        self._rehearsal: Rehearsal | None = None

    def _initialise_student(self) -> None:
        """Draw the first weights, and forget what the optimiser knows."""
        self.student = self._build(self.config.student.num_experts)
        self.student.initialise(torch.Generator().manual_seed(derive(self.seed, "student")))
        self.student.to(self.device)
        self.flat = FlatParameters(self.student)
        self.optimizer = AdamW(self.flat, self.config.distill.weight_decay)

    def _build(self, num_experts: int) -> Student:
        config = self.config
        dtype = getattr(torch, config.distill.precision)
        num_tasks = len(config.stream.distinct_tasks)
        return Student(config.student, num_tasks, num_experts=num_experts, dtype=dtype)

    @property
    def present_task(self) -> int:
        """The task of the stage that has begun."""
        return self.source.task

    @property
    def source(self) -> BatchSource:
        """The batches of the stage that has begun."""
        assert self._source is not None, "begin_stage comes first"
        return self._source

    def begin_stage(self, data: StageData) -> list[GrowthDecision]:
        """Make the stage's batches, and get the student ready for its task; returns what was decided on growth.

        After a resume in the middle of a stage only the former is done.
        """
        config, progress = self.config, self.progress
        self._source = BatchSource(
            data,
            self.memory.segments,
            config.distill,
            config.student.context,
            self.seed,
            progress.stage,
            self.comm,
            self.device,
        )
        if self.student.encoder is not None:
            self._contrast = ContrastSource(
                data, self.memory.segments, config.distill, self.seed, progress.stage, self.device
            )
        if progress.begun:
            self._freeze_masked()
            return []
        if config.distill.protocol == "single_task":
            self._initialise_student()
            progress.seen.clear()
        lessons = [lesson.task for lesson in (data, *data.others)]
        decisions = [found for task in lessons if task not in progress.seen for found in self._learn_of(task)]
        if config.distill.rehearsal:
            self._rehearse(self.flat.values.clone())
        progress.begun = True
        self.protection.begin_stage(self)
        self._freeze_masked()
        return decisions

    def _freeze_masked(self) -> None:
        """Leave out of the stage's work what its mask holds in place as a whole."""
        self.flat.freeze(self.protection.update_mask(self))
        assert self.flat.trainable

    def _learn_of(self, task: int) -> list[GrowthDecision]:
        """Make the student ready for a task that it has not met: experts for it, or a reason to do without."""
        config, progress, student = self.config.student, self.progress, self.student
        decisions: list[GrowthDecision] = []
        # Learning all tasks at once, there is nothing that experts could be new to.
        if progress.seen and config.expansion != "none" and self.config.distill.protocol != "joint":
            found = probe(student, self.source.probe(), self._token_loss, progress.seen, self.comm)
            num_new, reason = config.experts_per_task, "every new task gets experts"
            if config.expansion == "on_demand":
                lacking = found.loss > config.demand_threshold
                num_new = num_new if lacking else 0
                verdict = "exceeds" if lacking else "is within"
                reason = f"the loss {found.loss:.3g} {verdict} demand_threshold = {config.demand_threshold:g}"
            decision = grow(
                student, found, seed=self.seed, stage=progress.stage, task=task, num_new=num_new, reason=reason
            )
            old, self.flat = self.flat, FlatParameters(student, self.flat.names)
            self.optimizer.grow(self.flat)
            self.protection.grow(old, self.flat)
            progress.num_opening = 0 if student.is_conditioned else num_new
            decisions.append(decision)
            progress.growth.append(decision)
        student.known_K[task] = True
        progress.seen.append(task)
        return decisions

    def _token_loss(self, out: StudentOutput, batch: Batch) -> Tensor:
        """[R, L] the distance to the teacher."""
        loss = LOSSES[self.config.distill.loss]
        return loss(out.mean_BLA, out.log_std_BLA, batch.teacher_mean_RLA, batch.teacher_log_std_RLA)

    def _rehearse(self, values: Tensor) -> None:
        """From now on replayed rows are labelled by the student that the stage found, with parameters `values`."""
        std_floor, num_opening = self.config.distill.std_floor, self.progress.num_opening
        self._rehearsal = Rehearsal(self.student, values, self.flat, std_floor, num_opening)

    def refresh_prototypes(self) -> None:
        """Bring the prototypes up to date with the encoder; before the student acts in the middle of a stage."""
        if self._contrast is not None:
            self._contrast.refresh_prototypes(self.student)

    def skip_stage(self) -> None:
        """Pass over a stage that has no admitted teacher."""
        self.progress.skipped.append(self.progress.stage)
        self._next_stage()

    def end_stage(self, data: StageData) -> None:
        """Let protection and memory take what they need of the stage's data, and go on to the next stage."""
        self.flat.freeze(None)
        self.protection.end_stage(self, data)
        self.refresh_prototypes()
        self.memory.offer(data.segments(self.config.student.context), self.comm)
        if self.student.encoder is not None:
            prototypes_from_memory(self.student, self.memory.segments)
        self._source = self._contrast = self._rehearsal = None
        self._next_stage()

    def _next_stage(self) -> None:
        progress = self.progress
        progress.stage, progress.step, progress.begun, progress.num_opening = progress.stage + 1, 0, False, 0

    def train_step(self, report: bool = False) -> StepReport | None:
        """One update on the global batch of the present step; with its numbers if `report`.

        Raises:
            DivergedError: on every rank, if the gradient is not finite.
        """
        config, progress = self.config.distill, self.progress
        if progress.num_opening:
            opening_steps = min(self.config.student.opening_steps, config.steps_per_stage)
            offset = opening_offset(progress.step, opening_steps)
            self.student.set_logit_offset(progress.num_opening, offset)
        self.protection.begin_step(self)
        batch = self.source.batch(progress.step)
        if self._rehearsal is not None:
            batch = self._rehearsal.relabel(batch)
        terms = self.gradient(batch)
        self.protection.adjust_gradient(self)
        grad_norm = self.flat.clip_grads(config.max_grad_norm)
        if not math.isfinite(grad_norm):
            raise DivergedError(
                f"the gradient is not finite at stage {progress.stage}, step {progress.step} "
                f"({self.config.stream.tasks[progress.stage]}): lower distill.lr, or look for values in the "
                "teacher's rollouts that are far out of range"
            )
        lr = learning_rate(config, progress.step)
        self.optimizer.step(lr, self.protection.update_mask(self))
        progress.step += 1
        if not report:
            return None
        return self._report(batch, terms, grad_norm, lr)

    def gradient(self, batch: Batch, *, contrast: bool = True) -> LossTerms:
        """Make `flat.grads` the gradient of the global batch's loss, the same on every rank; a collective.

        The contrastive loss is of the step's own batch, whatever `batch` is; without `contrast` it is left out.
        """
        config = self.config.distill
        out = self.student(batch.obs_RLO, task_B=batch.task_R, valid_BL=batch.valid_RL)
        distance_RL = batch.valid_RL * self._token_loss(out, batch)
        # Sums over this rank's tokens, divided by the global count: the sum over ranks is the global mean.
        imitation = distance_RL.sum() / batch.num_tokens
        balance = self._balance(out, batch)
        router_z = router_z_loss(torch.stack([stats.z_square_sum for stats in out.stats]), batch.num_tokens)
        contrastive = self._contrastive_loss() if contrast else self.flat.values.new_zeros(())
        total = imitation + config.load_balance_coef * balance + config.router_z_coef * router_z
        total = total + config.contrast_coef * contrastive
        self.flat.grads.zero_()
        total.backward()  # type: ignore[no-untyped-call]
        self.flat.reduce_grads(self.comm)
        counts_LE = torch.stack([stats.counts_E for stats in out.stats])
        return LossTerms(
            distance_RL.detach(), balance.detach(), router_z.detach(), contrastive.detach(), counts_LE
        )

    def _contrastive_loss(self) -> Tensor:
        """This rank's part of the contrastive loss, which every rank computes as a whole."""
        contrast = None if self._contrast is None else self._contrast.batch(self.progress.step)
        if contrast is None:
            return self.flat.values.new_zeros(())
        obs_NO, task_N = contrast
        temperature = self.config.student.embedding_temperature
        return info_nce(self.student.embedding(obs_NO), task_N, temperature) / self.comm.size

    def _balance(self, out: StudentOutput, batch: Batch) -> Tensor:
        """This rank's part of the load balance loss; where tokens have no choice, of its constant value, 1.

        Not worked out then: the experts' global shares take a collective, for which all ranks would wait in the
        middle of every step.
        """
        if not self.student.chooses_experts:
            return self.flat.values.new_tensor(1.0 / self.comm.size)
        counts_LE = torch.stack([stats.counts_E for stats in out.stats]).cpu()
        self.comm.all_reduce_sum(counts_LE.numpy())
        shares_LE = counts_LE.to(self.device, self.student.dtype) / (batch.num_tokens * self.config.student.top_k)
        return load_balance_loss(
            torch.stack([stats.prob_sums_E for stats in out.stats]),
            shares_LE,
            batch.num_tokens,
            self.student.moes[0].group_E[: shares_LE.shape[1]],
        )

    def _report(self, batch: Batch, terms: LossTerms, grad_norm: float, lr: float) -> StepReport:
        """Sum what this rank saw over all ranks."""
        num_tasks = self.student.num_tasks
        # Distances and tokens by (replayed or not, task); load balance, z-loss, contrast; the experts' counts.
        cell_R = batch.task_R + num_tasks * batch.replayed_R.long()
        sums = [
            torch.bincount(cell_R, weights=values, minlength=2 * num_tasks)
            for values in (terms.distance_RL.sum(1), batch.valid_RL.sum(1))
        ]
        scalar_terms = torch.stack([terms.load_balance, terms.router_z, terms.contrast])
        counts_M = terms.counts_LE.flatten()
        totals = torch.cat([*sums, scalar_terms, counts_M]).double().cpu().numpy()
        self.comm.all_reduce_sum(totals)
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
        """All that the next step depends on, for a checkpoint; random streams are functions of seed and step."""
        return {
            "progress": asdict(self.progress),
            "num_experts": self.student.num_experts,
            "buffers": {n: t for n, t in self.student.state_dict().items() if n not in self.flat.slots},
            "rehearsal": None if self._rehearsal is None else self._rehearsal.values,
            "names": self.flat.names,
            "values": self.flat.values,
            "optimizer": self.optimizer.state(),
            "memory": self.memory.state(),
            "protection": self.protection.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state()` returned, on any number of ranks."""
        progress = dict(state["progress"])
        progress["growth"] = [GrowthDecision(**decision) for decision in progress["growth"]]
        self.progress = Progress(**progress)
        self.student = self._build(state["num_experts"]).to(self.device)
        self.student.load_state_dict(state["buffers"], strict=False)
        self.flat = FlatParameters(self.student, state["names"])
        self.flat.values.copy_(state["values"])
        self.optimizer = AdamW(self.flat, self.config.distill.weight_decay)
        self.optimizer.restore(state["optimizer"])
        self.memory.restore(state["memory"])
        self.protection.restore(state["protection"], self)
        self._source = self._contrast = self._rehearsal = None
        if state["rehearsal"] is not None:
            self._rehearse(state["rehearsal"].to(self.device))
