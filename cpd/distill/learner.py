"""The student while it learns: its network, its flat parameters, and the gradient of its loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.func import functional_call

from cpd.comm import Comm
from cpd.config import Config
from cpd.distill.batches import Batch, BatchSource
from cpd.distill.contrast import ContrastSource
from cpd.distill.flat import AdamW, FlatParameters
from cpd.distill.growth import GrowthDecision
from cpd.distill.losses import LOSSES, load_balance_loss, router_z_loss
from cpd.distill.memory.segments import Segments
from cpd.distill.reduction import choose_backend, make_reduction
from cpd.distill.stage_data import StageData
from cpd.seeding import derive
from cpd.student.network import Student, StudentOutput
from cpd.student.precision import mixed_precision, parameter_type
from cpd.student.task_embedding import info_nce
from cpd.student.task_weights import TaskWeights, make_task_weights


class LossTerms(NamedTuple):
    """The terms of the loss of a batch, detached; the sums over ranks are the global values."""

    distance_RL: Tensor
    """Distance to the teacher of every token; 0 beyond a window's end."""
    load_balance: Tensor
    router_z: Tensor
    contrast: Tensor
    counts_LE: Tensor
    """Number of assignments to each open expert, by layer."""


@dataclass
class Progress:
    """The position of the student in the stream; part of checkpoints."""

    stage: int = 0
    step: int = 0
    """Steps done in this stage."""
    begun: bool = False
    """Whether the student has been prepared for this stage; a resumed stage must not grow it again."""
    num_opening: int = 0
    """Experts per layer that were added at the start of this stage and are opened gradually."""
    growth: list[GrowthDecision] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)
    """Tasks distilled so far, by position among the distinct ones, in order of their first stage."""
    skipped: list[int] = field(default_factory=list)
    """Stages that had no admitted teacher."""

    def next_stage(self) -> None:
        """Move to the start of the next stage."""
        self.stage, self.step, self.begun, self.num_opening = self.stage + 1, 0, False, 0


class StudentLearner:
    """One rank's copy of the student, its optimiser, and the batches of the current stage.

    A `StudentTrainer` moves it through the stages; the hooks of a `Protection` receive it.

    Attributes:
        student: the network.
        flat: its parameters and gradients as flat vectors.
        optimizer: AdamW on `flat`.
        progress: the position in the stream.
        reduction: sums gradients over ranks.
        has_action_KA: bool, which components of an action each distinct task has; None if all have all.
    """

    def __init__(self, config: Config, seed: int, comm: Comm, device: torch.device) -> None:
        """Draw the initial weights, the same on every rank."""
        self.config, self.seed, self.comm, self.device = config, seed, comm, device
        self.reduction = make_reduction(comm, device, choose_backend(comm, device))
        self.progress = Progress()
        self._source: BatchSource | None = None
        self._contrast: ContrastSource | None = None
        self.has_action_KA = self._has_action()
        self.initialise()

    def initialise(self) -> None:
        """Draw the initial weights and create a new optimiser."""
        # The same generator in every stage: with the protocol `single_task` all students start alike.
        student = self.build(self.config.student.num_experts)
        student.initialise(torch.Generator().manual_seed(derive(self.seed, "student")))
        self._set_student(student)

    def build(self, num_experts: int) -> Student:
        """A student of this configuration with `num_experts` experts per layer, on the CPU."""
        config = self.config
        dtype = parameter_type(config.distill.precision)
        num_tasks = len(config.stream.distinct_tasks)
        spaces = config.stream.suite_object.spaces
        student = Student(config.student, num_tasks, num_experts=num_experts, dtype=dtype, spaces=spaces)
        student.packing = make_task_weights(config, student)
        return student

    def _set_student(self, student: Student) -> None:
        """Use `student`, with a new optimiser."""
        self.student = student.to(self.device)
        self.flat = FlatParameters(self.student)
        self.optimizer = AdamW(self.flat, self.config.distill.weight_decay)

    @property
    def source(self) -> BatchSource:
        """The batches of the current stage."""
        assert self._source is not None, "open_stage comes first"
        return self._source

    @property
    def current_task(self) -> int:
        """The task of the current stage, by position among the distinct ones."""
        return self.source.task

    @property
    def earlier_tasks(self) -> list[int]:
        """The tasks of earlier stages, by position among the distinct ones, in order of their first stage."""
        stream = self.config.stream
        names = stream.tasks[: self.progress.stage]
        return [task for task in self.progress.seen if stream.distinct_tasks[task] in names]

    def open_stage(self, data: StageData, memory: Segments) -> None:
        """Create the batches of the current stage, from its data and the memory."""
        config, stage = self.config, self.progress.stage
        self._source = BatchSource(
            data, memory, config.distill, config.student.context, self.seed, stage, self.comm, self.device
        )
        if self.student.encoder is not None:
            self._contrast = ContrastSource(self._source, data, memory, self.seed, stage, self.student.spaces)

    def close_stage(self) -> None:
        """Release the batches of the current stage, and with them its data."""
        self._source = self._contrast = None

    def refresh_prototypes(self) -> None:
        """Recompute the prototypes with the current encoder; call it before the student acts within a stage."""
        if self._contrast is not None:
            self._contrast.refresh_prototypes(self.student)

    def add_parameters(self) -> FlatParameters:
        """Add the parameters that growth has added to `flat` and the optimiser.

        Returns:
            The previous `flat`, of which only the layout is left: its vectors are released.
        """
        old = self.flat
        old.release()
        self.flat = FlatParameters(self.student)
        self.optimizer.grow(self.flat)
        return old

    def contrast_batch(self) -> Tensor | None:
        """The observations `[J, N, O]` of this step's contrastive loss; None if there is none."""
        return None if self._contrast is None else self._contrast.batch(self.progress.step)

    def gradient(
        self,
        batch: Batch,
        contrast: Tensor | None = None,
        added: Callable[[StudentOutput], Tensor | None] = lambda out: None,
    ) -> LossTerms:
        """Set `flat.grads` to the gradient of the loss of the global batch, the same on every rank; a collective.

        Args:
            batch: this rank's rows.
            contrast: observations `[J, N, O]` of the contrastive loss, which is added.
            added: this rank's summand of a further term, given the output on `batch`.
        """
        config = self.config.distill
        with mixed_precision(self.device, config.precision):
            out = self._output(batch)
        distance_RL = batch.valid_RL * self.token_loss(out, batch)
        # Sums over this rank's tokens, divided by the global count: their sum over ranks is the global mean,
        # also if ranks have different numbers of tokens.
        imitation = distance_RL.sum() / batch.num_tokens
        balance = self._balance(out, batch)
        router_z = router_z_loss(torch.stack([stats.z_square_sum for stats in out.stats]), batch.num_tokens)
        contrastive = self._contrastive_loss(contrast)
        total = imitation + config.load_balance_coef * balance + config.router_z_coef * router_z
        total = total + config.contrast_coef * contrastive
        if (term := added(out)) is not None:
            total = total + term
        self.reduction.backward(total, self.flat)
        counts_LE = torch.stack([stats.counts_E for stats in out.stats])
        return LossTerms(
            distance_RL.detach(), balance.detach(), router_z.detach(), contrastive.detach(), counts_LE
        )

    def _output(self, batch: Batch) -> StudentOutput:
        """The output on a batch, with the weights of the current task if tasks have weights of their own."""
        student = self.student
        if not isinstance(student.packing, TaskWeights):
            task_B = batch.task_R if batch.task is None else batch.task
            return cast(StudentOutput, student(batch.obs_RLO, task_B=task_B, valid_BL=batch.valid_RL))
        weights = student.packing.effective(dict(student.named_parameters()), self.current_task, is_training=True)
        return cast(StudentOutput, functional_call(student, weights, batch.obs_RLO, {"valid_BL": batch.valid_RL}))

    def _contrastive_loss(self, contrast: Tensor | None) -> Tensor:
        """This rank's summand of the contrastive loss, which every rank computes completely."""
        if contrast is None:
            return self.flat.values.new_zeros(())
        return info_nce(self.student.embedding(contrast)) / self.comm.size

    def _balance(self, out: StudentOutput, batch: Batch) -> Tensor:
        """This rank's summand of the load-balancing loss, which is 1 if tokens have no choice among experts."""
        # Skipped then, since the global shares of experts take a collective in the middle of every step.
        if not self.student.chooses_experts:
            return self.flat.values.new_full((), 1.0 / self.comm.size)
        counts_LE = torch.stack([stats.counts_E for stats in out.stats])
        self.reduction.sum(counts_LE)
        shares_LE = counts_LE / (batch.num_tokens * self.config.student.top_k)
        return load_balance_loss(
            torch.stack([stats.prob_sums_E for stats in out.stats]),
            shares_LE,
            batch.num_tokens,
            self.student.moes[0].group_E[: shares_LE.shape[1]],
        )

    def token_loss(self, out: StudentOutput, batch: Batch) -> Tensor:
        """The distance to the teacher, [R, L]."""
        loss = LOSSES[self.config.distill.loss]
        mean_RLA, log_std_RLA = out.mean_BLA, out.log_std_BLA
        if self.has_action_KA is not None:
            # Components that a task lacks are at no distance, and get no gradient.
            has_R1A = self.has_action_KA[batch.task_R].unsqueeze(1)
            mean_RLA = torch.where(has_R1A, mean_RLA, batch.teacher_mean_RLA)
            log_std_RLA = torch.where(has_R1A, log_std_RLA, batch.teacher_log_std_RLA)
        return loss(mean_RLA, log_std_RLA, batch.teacher_mean_RLA, batch.teacher_log_std_RLA)

    def _has_action(self) -> Tensor | None:
        """Which components of an action each distinct task has, [K, A] bool; None if all have all."""
        suite, tasks = self.config.stream.suite_object, self.config.stream.distinct_tasks
        sizes = torch.tensor([suite.sizes(task).action for task in tasks])
        action_size = suite.spaces.action_size
        if bool((sizes == action_size).all()):
            return None
        return (torch.arange(action_size) < sizes.unsqueeze(1)).to(self.device)

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, for a checkpoint; random streams are functions of seed and step."""
        # The names give the order of `values`.
        return {
            "progress": asdict(self.progress),
            "num_experts": self.student.num_experts,
            "buffers": {n: t for n, t in self.student.state_dict().items() if n not in self.flat.slots},
            "names": self.flat.names,
            "values": self.flat.values,
            "optimizer": self.optimizer.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state()` returned, on any number of ranks."""
        progress = dict(state["progress"])
        progress["growth"] = [GrowthDecision(**decision) for decision in progress["growth"]]
        self.progress = Progress(**progress)
        student = self.build(state["num_experts"])
        # Not strict, since the parameters come from `values` below.
        student.load(state["buffers"], strict=False)
        self._set_student(student)
        self.flat.values.copy_(state["values"])
        self.optimizer.restore(state["optimizer"])
        # Batches that are open belong to another stage or memory: `open_stage` creates new ones.
        self.close_stage()
