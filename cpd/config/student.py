"""Settings of the student, its memory, and its distillation."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Annotated, Final, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from cpd.config.load import STRICT
from cpd.config.types import Count, EpisodeChoice, NonNegativeFloat, Positive, PositiveFloat, Share


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StudentConfig:
    """The student: a causal Transformer with mixture-of-experts feed-forward blocks."""

    context: Positive = 1
    """Number of time steps that the student observes, including the current one. Meta-World's observation
    already contains the previous step; longer windows took more time and were not better on validation goals."""
    unobserved: tuple[tuple[Count, Positive], ...] = ()
    """Ranges [first, end) of the observation's entries that the student does not see: it sees 0. With
    `[[18, 36]]` it sees no previous time step of Meta-World, thus no velocities. Teachers see everything."""
    width: Positive = 64
    """Size of the residual stream."""
    num_layers: Positive = 2
    """Transformer blocks."""
    num_heads: Positive = 4
    """Attention heads per block."""
    expert_width: Positive = 128
    """Hidden width of each expert."""
    num_experts: Positive = 2
    """Experts per layer in the first stage."""
    top_k: Positive = 2
    """Experts that each token is routed to."""
    expansion: Literal["none", "per_task", "on_demand"] = "per_task"
    """When to add experts. none: never; per_task: at the start of every stage with a new task; on_demand: only if
    no earlier task's experts fit the new task well enough."""
    experts_per_task: Positive = 2
    """Experts per layer that each expansion adds."""
    new_experts: Literal["copy", "fresh"] = "copy"
    """How added experts start. copy: as copies of those that serve the new task best; fresh: at random."""
    demand_threshold: PositiveFloat = 0.5
    """on_demand: minimum loss of the new task under the best earlier task's experts at which experts are added."""
    opening_steps: Positive = 100
    """Steps over which the router logit of a new expert rises from minus infinity to its learned value. Has an
    effect only where all tasks share all experts (task_identity `none`)."""
    task_identity: Literal["inferred", "given", "onehot", "none"] = "inferred"
    """How the policy identifies the task when it acts. inferred: from the episode's first observation; given: the
    same student, which is told the true task; onehot: also told, without an embedding; none: the policy does not
    depend on the task."""
    belief: Literal["density", "embedding", "both"] = "both"
    """inferred: the evidence for each task in an episode's first observation. density: its likelihood among the
    first observations of the task's own stage; embedding: its similarity to the task's prototype."""
    act: Literal["most_likely", "expected_success", "hedged"] = "hedged"
    """inferred: what to do under doubt. most_likely: act for the most likely task; expected_success: act for the
    task whose policy is expected to succeed most often, by the measured success of policies on the tasks that the
    belief confuses; hedged: also consider plans that act for one task first and then for another."""

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"width ({self.width}) is not a multiple of num_heads ({self.num_heads})")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k ({self.top_k}) exceeds num_experts ({self.num_experts})")
        if self.expansion != "none" and self.task_identity != "none" and self.top_k > self.experts_per_task:
            raise ValueError(
                f"top_k ({self.top_k}) exceeds experts_per_task ({self.experts_per_task}), but each task uses "
                "only its own experts"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MemoryConfig:
    """The replay memory: a fixed budget of stored time steps for the whole stream."""

    selection: Literal["none", "reservoir", "uniform", "dpp"] = "dpp"
    """How to select stored steps. reservoir: uniformly over all steps so far; uniform and dpp: an equal share for
    each task so far, drawn uniformly, or chosen to be diverse (greedy MAP of a determinantal point process)."""
    start_share: Share = 0.5
    """uniform and dpp: share of each task's segments that begin an episode. The student infers the task from such
    observations."""
    share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """Budget as a share of the data of the whole stream, which is distinct tasks x rollouts.num_steps."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ProtectionConfig:
    """Protection of earlier tasks against forgetting, in addition to replay."""

    kind: Literal["none", "mask", "ewc", "mas", "l2", "agem", "derpp", "bc", "lwf", "packnet", "lora", "hat"] = (
        "mask"
    )
    """mask: freeze parameters that are important to earlier tasks, or scale their updates down; ewc, mas:
    quadratic penalty on changes of such parameters; l2: the same for all parameters; agem: project updates that
    conflict with the gradient on the memory; derpp: replay also with the student's own outputs when steps were
    stored; bc: only with these; lwf: keep the previous student's outputs on new observations; packnet, lora, hat:
    each task has its own weights, low-rank changes of weights, or gates of units, and the student needs the true
    task."""
    mask_experts: bool = True
    """mask: freeze the experts and router rows of earlier tasks."""
    mask_fraction: Share = 1.0
    """mask: share of the parameters common to all tasks that is protected after a stage: the most important ones
    by accumulated Fisher information, among those that some task uses. 1: all, so they learn in the first task
    only."""
    mask_mode: Literal["hard", "scaled"] = "hard"
    """mask: hard freezes protected parameters; scaled shrinks their updates, the more important the smaller."""
    strength: PositiveFloat = 1.0
    """ewc, mas, l2, derpp, lwf, hat: weight of the penalty relative to the mean loss of a batch."""
    agem_windows: Positive = 128
    """Memory windows per step for A-GEM's reference gradient, over all ranks; added to `distill.batch_size`."""
    packnet_retrain_share: Share = 0.3
    """Share of a stage's steps that follow PackNet's pruning."""
    lora_rank: Positive = 4
    """Rank of the change of each weight matrix that a task adds."""

    @property
    def needs_importance(self) -> bool:
        """Whether masks depend on the estimated importance of parameters."""
        return self.kind == "mask" and 0.0 < self.mask_fraction < 1.0

    @property
    def needs_task(self) -> bool:
        """Whether tasks have weights of their own, which the true task selects."""
        return self.kind in ("packnet", "lora", "hat")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DistillConfig:
    """Distillation of the teachers into the student."""

    protocol: Literal["continual", "joint", "single_task", "isolated", "teachers"] = "continual"
    """continual: one task after another. joint and single_task are reference bounds with the same number of steps
    and samples, without memory, protection or expansion. joint: every batch mixes the data of all tasks evenly;
    single_task: every stage trains a new student, and the student of a task's latest stage acts for it. isolated:
    the same, but the task is not given: the likeliest by the density of first observations acts. teachers: nothing
    is distilled, and the teacher of the task that the student infers acts. The last two are baselines."""
    episodes: EpisodeChoice = "successful"
    """Which of a teacher's episodes are distilled. Failed episodes, mostly due to the added noise, are long and
    consist mainly of dead ends. If no episode is successful, all are used."""
    steps_per_stage: Positive = 1_000
    """Gradient steps per stage."""
    batch_size: Positive = 256
    """Windows per step, over all ranks."""
    replay_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of each batch that is drawn from the memory, once it is not empty. The default protection needs no
    replay: it uses the memory only to tell tasks apart."""
    rehearsal: bool = False
    """Replay mixtures of two stored segments of a task, labelled by the student from the start of the stage,
    instead of stored segments with their teacher's labels."""
    contrast_coef: NonNegativeFloat = 1.0
    """Weight of the contrastive loss of the task embedding."""
    lr: PositiveFloat = 3e-3
    """Peak learning rate of a stage. A cosine lowers it to a tenth at the end of the stage."""
    lr_warmup_steps: Count = 50
    """Steps at the start of a stage over which the learning rate rises linearly to lr."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay (AdamW) of weight matrices."""
    max_grad_norm: PositiveFloat = 1.0
    """The gradient is clipped to this Euclidean norm."""
    loss: Literal["forward_kl", "reverse_kl", "mse"] = "reverse_kl"
    """reverse_kl: KL(student || teacher), which fits the teacher's mean in every state; forward_kl: KL(teacher ||
    student), which lets the student widen its deviation in states that are hard to imitate; mse: the mean only."""
    std_floor: PositiveFloat = 0.1
    """Lower bound on the teacher's standard deviation in the loss."""
    load_balance_coef: NonNegativeFloat = 0.01
    """Weight of the load-balancing loss. Has no effect if every group has `top_k` experts, as by default."""
    router_z_coef: NonNegativeFloat = 1e-3
    """Weight of the router z-loss (Zoph et al. 2022)."""
    precision: Literal["float32", "float64", "bfloat16"] = "float32"
    """Type of the student's parameters and computation. bfloat16: while the student learns, matrix products of its
    blocks run in bfloat16; parameters, router, losses and optimiser stay in float32. For a GPU: a CPU without
    instructions for bfloat16 multiplies many times slower."""

    @property
    def separates(self) -> bool:
        """Whether every stage trains a new student."""
        return self.protocol in ("single_task", "isolated")


#: Dense widths are multiples of this: others slow matrix products down by up to 2x on some processors.
WIDTH_MULTIPLE: Final = 16


def final_num_experts(student: StudentConfig, num_tasks: int) -> int:
    """Experts per layer after `num_tasks` distinct tasks; an upper bound for on-demand expansion."""
    num_expansions = 0 if student.expansion == "none" else num_tasks - 1
    return student.num_experts + student.experts_per_task * num_expansions


def dense_expert_width(student: StudentConfig, num_tasks: int) -> int:
    """Smallest `expert_width` with which a dense student has at least as many parameters as `student` in the end.

    A dense student has a single expert (`num_experts = 1`, `top_k = 1`, `expansion = "none"`) and otherwise the
    settings of `student`. Per layer, E experts of width F on tokens of width D have E (2 D F + D) parameters
    including router rows, and one expert of width F' has 2 D F' + D. F' is rounded up to a multiple of
    `WIDTH_MULTIPLE`.
    """
    num_experts = final_num_experts(student, num_tasks)
    exact = (num_experts * (2 * student.expert_width + 1) - 1) / 2
    return math.ceil(exact / WIDTH_MULTIPLE) * WIDTH_MULTIPLE


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MethodConfig:
    """Settings of how a student learns; variants of an experiment may change them."""

    student: StudentConfig = field(default_factory=StudentConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    protection: ProtectionConfig = field(default_factory=ProtectionConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
