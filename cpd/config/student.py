"""Settings of the student, its memory, and its distillation."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Annotated, Final, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from cpd.config.load import STRICT
from cpd.config.types import (
    Count,
    EpisodeChoice,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Share,
)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StudentConfig:
    """The student: a causal Transformer with mixture-of-experts feed-forward blocks."""

    context: Positive = 1
    """L: time steps that the student sees, the present one included. Meta-World's observation holds the step
    before as well; longer windows took more time and did no better on validation goals."""
    width: Positive = 64
    num_layers: Positive = 2
    num_heads: Positive = 4
    expert_width: Positive = 128
    """Hidden width of one expert."""
    num_experts: Positive = 2
    """Experts per layer at the first stage."""
    top_k: Positive = 2
    expansion: Literal["none", "per_task", "on_demand"] = "per_task"
    """Experts are added at the start of every stage that brings a new task, never, or only if the experts of no
    task before serve the new one well enough."""
    experts_per_task: Positive = 2
    demand_threshold: PositiveFloat = 0.5
    """on_demand: least loss of the new task under the best other task's experts with which experts are added."""
    opening_steps: Positive = 100
    """Steps over which a new expert's router logit rises from minus infinity to its learned value, where all
    experts are open to all tasks (task_identity `none`)."""
    task_identity: Literal["inferred", "given", "onehot", "none"] = "inferred"
    """How the policy comes to know the task when it acts. inferred: from the episode's observations alone, by
    contrastive embedding; given: the same student, but told which task's prototype to believe in; onehot: told the
    task's number, there is no embedding; none: not at all, there is no task in the policy."""

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"width ({self.width}) is not a multiple of num_heads ({self.num_heads})")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k ({self.top_k}) exceeds num_experts ({self.num_experts})")
        if self.expansion != "none" and self.task_identity != "none" and self.top_k > self.experts_per_task:
            raise ValueError(
                f"top_k ({self.top_k}) exceeds experts_per_task ({self.experts_per_task}), but a task has no "
                "experts beside its own"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MemoryConfig:
    """The replay memory: a fixed budget of stored time steps for the whole stream."""

    selection: Literal["none", "reservoir", "uniform", "dpp"] = "dpp"
    """reservoir: uniform over all steps seen; uniform and dpp: an equal share for each task seen, drawn uniformly
    or chosen to be unlike each other (greedy MAP of a determinantal point process)."""
    start_share: Share = 0.5
    """uniform and dpp: share of each task's segments that open an episode: by these a task is recognised."""
    share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """Budget as a share of the whole stream's data (distinct tasks x rollouts.num_steps)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ProtectionConfig:
    """What guards a student's earlier tasks beside replay."""

    kind: Literal["none", "mask", "ewc", "agem", "packnet"] = "mask"
    """mask: parameters that matter to earlier tasks do not move, or move less; ewc: a quadratic pull back to what
    earlier tasks need; agem: no update against the gradient on memory; packnet: every task keeps weights of its
    own, and the student must be told the task."""
    mask_experts: bool = True
    """mask: the experts and the router rows of earlier tasks do not move at all."""
    mask_fraction: Share = 1.0
    """mask: share of the parameters common to all tasks that is protected after a stage, of those that have had a
    part in a task the most important ones by accumulated Fisher information. 1: all that is common, which is
    learned with the first task."""
    mask_mode: Literal["hard", "scaled"] = "hard"
    """mask: protected parameters do not move; or by the less the more important they are."""
    ewc_strength: PositiveFloat = 1.0
    """Weight of EWC's penalty against the mean loss of a batch."""
    agem_windows: Positive = 128
    """Windows from memory per step for A-GEM's reference gradient, over all ranks, beside `distill.batch_size`."""
    packnet_retrain_share: Share = 0.3
    """Share of a stage's steps after PackNet has pruned."""

    @property
    def needs_importance(self) -> bool:
        """Whether it goes by how much parameters have mattered."""
        return self.kind == "ewc" or (self.kind == "mask" and 0.0 < self.mask_fraction < 1.0)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DistillConfig:
    """Continual distillation of the teachers into the student."""

    protocol: Literal["continual", "joint", "single_task"] = "continual"
    """continual: one task after another. Two bounds on it, without memory, protection or growth, with as many
    steps and samples: joint, where every stage's batches mix the data of all tasks evenly; and single_task,
    where every stage trains a fresh student, and each task is acted for by the student of its latest stage."""
    episodes: EpisodeChoice = "successful"
    """Which of a teacher's episodes are distilled. Those that failed, mostly for the noise in them, are long and
    full of states from which nothing leads on; where no episode succeeded all are taken."""
    steps_per_stage: Positive = 1_000
    batch_size: Positive = 256
    """Windows per step over all ranks."""
    replay_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of a batch drawn from memory once it holds something. The default protection needs none: there memory
    is for telling tasks apart."""
    rehearsal: bool = False
    """Replay mixtures of two stored segments of a task, labelled by the student as the stage found it, in place
    of stored segments with their teacher's labels."""
    contrast_coef: NonNegativeFloat = 1.0
    """Weight of the contrastive loss of the task embedding."""
    lr: PositiveFloat = 3e-3
    lr_warmup_steps: Count = 50
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    loss: Literal["forward_kl", "reverse_kl", "mse"] = "reverse_kl"
    """reverse_kl: the student's mean is drawn to the teacher's equally everywhere; forward_kl lets it give up on
    states that are hard to imitate, by a wider deviation there."""
    std_floor: PositiveFloat = 0.1
    """Least standard deviation of the teacher that the loss sees."""
    load_balance_coef: NonNegativeFloat = 0.01
    """Has no effect where every group has `top_k` experts, as with the default settings: there is no choice."""
    router_z_coef: NonNegativeFloat = 1e-3
    precision: Literal["float32", "float64"] = "float32"


#: Dense widths are multiples of this: with others, matrix products take up to twice the time on some processors.
WIDTH_MULTIPLE: Final = 16


def final_num_experts(student: StudentConfig, num_tasks: int) -> int:
    """Experts per layer after `num_tasks` distinct tasks: exactly, or at most where growth depends on demand."""
    grown = 0 if student.expansion == "none" else student.experts_per_task * (num_tasks - 1)
    return student.num_experts + grown


def dense_expert_width(student: StudentConfig, num_tasks: int) -> int:
    """The least `expert_width` of a dense student with at least as many parameters as `student` has in the end.

    A dense student is one of a single expert: `num_experts = 1`, `top_k = 1`, `expansion = "none"`, and all else
    as in `student`. Per layer, E experts of width F on tokens of width D have E (2 D F + D) parameters, router
    rows included, and the one of width F' has 2 D F' + D. F' is rounded up to a multiple of `WIDTH_MULTIPLE`.
    """
    num_experts = final_num_experts(student, num_tasks)
    exact = (num_experts * (2 * student.expert_width + 1) - 1) / 2
    return math.ceil(exact / WIDTH_MULTIPLE) * WIDTH_MULTIPLE


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MethodConfig:
    """How a student learns: what the variants of an experiment may change."""

    student: StudentConfig = field(default_factory=StudentConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    protection: ProtectionConfig = field(default_factory=ProtectionConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
