"""Every setting of an experiment, as frozen dataclasses.

A recipe is a TOML file whose tables are the sections of `Config`, read by `cpd.strict_load`. Everything in
`Config` outside `logging` affects results and is frozen in the run directory.
"""

from __future__ import annotations

from dataclasses import field, replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.dataclasses import dataclass

from cpd.strict_load import STRICT, suggestion, to_dict
from cpd.tasks import ALL_TASKS, STREAMS

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]


def _expand_stream(value: object) -> object:
    """Replace the name of a stream (`"cw10"`) by its list of tasks."""
    if isinstance(value, str):
        if value not in STREAMS:
            raise ValueError(f"unknown stream {value!r}{suggestion(value, STREAMS)}")
        return STREAMS[value]
    return tuple(value) if isinstance(value, list) else value


def _known_task(task: str) -> str:
    if task not in ALL_TASKS:
        raise ValueError(f"unknown task {task!r}{suggestion(task, ALL_TASKS)}")
    return task


def _distinct(values: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(values)) != len(values):
        raise ValueError("the same seed stands twice")
    return values


# Meta-World's custom-mt environments treat seed 0 as unseeded; keep to seeds from 1 everywhere.
Seeds = Annotated[tuple[Positive, ...], Field(min_length=1), AfterValidator(_distinct)]
Task = Annotated[str, AfterValidator(_known_task)]
#: Settings of the PPO learner for which `demo_rl` has its own, named `rl_...`.
DEMO_RL_SETTINGS = ("hidden_sizes", "init_log_std", "learning_rate", "target_kl")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StreamConfig:
    """The tasks, in the order in which they are distilled; a task may come twice."""

    tasks: Annotated[tuple[Task, ...], BeforeValidator(_expand_stream), Field(min_length=1)]
    """Task names, or the name of a stream: demo, cw10, cw20, mt10, mt50."""
    horizon: Annotated[int, Field(ge=1, le=500)] = 500
    """Episode length in environment steps, for rollouts, student and evaluation."""
    reward_version: Literal["v1", "v2"] = "v2"
    """Meta-World's reward functions (not the -v3 suffix of the tasks)."""

    @property
    def distinct_tasks(self) -> tuple[str, ...]:
        """The stream's tasks without repetition, in order of first appearance."""
        return tuple(dict.fromkeys(self.tasks))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PPOConfig:
    """The PPO learner (Schulman et al. 2017)."""

    hidden_sizes: tuple[Positive, ...] = (128, 128)
    """Widths of the hidden layers, of policy and value network alike."""
    num_envs: Positive = 25
    """Environments stepped in lock-step; independent of the number of worker processes."""
    steps_per_env: Positive = 200
    """Environment steps per environment and iteration."""
    learning_rate: PositiveFloat = 1e-3
    num_epochs: Positive = 12
    """Passes over an iteration's samples."""
    minibatch_size: Positive = 500
    clip_ratio: PositiveFloat = 0.2
    target_kl: PositiveFloat = 0.05
    """An iteration's epochs stop once the approximate KL from the old policy exceeds this."""
    max_grad_norm: PositiveFloat = 1.0
    entropy_coef: NonNegativeFloat = 0.0
    gamma: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.99
    gae_lambda: Share = 0.95
    reward_scale: PositiveFloat = 0.1
    noise_correlation: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """AR(1) coefficient of the exploration noise over time; 0 is white noise."""
    init_log_std: float = -0.3
    min_log_std: float = -3.0
    max_log_std: float = 0.5
    mean_penalty: NonNegativeFloat = 0.01
    """Weight of the penalty on action means beyond +-1.2."""

    def __post_init__(self) -> None:
        if self.minibatch_size > self.num_envs * self.steps_per_env:
            raise ValueError(
                f"minibatch_size ({self.minibatch_size}) exceeds the samples of an iteration, "
                f"num_envs x steps_per_env = {self.num_envs * self.steps_per_env}"
            )
        if not self.min_log_std <= self.init_log_std <= self.max_log_std:
            raise ValueError("init_log_std must lie between min_log_std and max_log_std")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WarmStartConfig:
    """The warm start of `demo_rl`: cloning of the scripted expert, which must stop while much is left to RL."""

    success_target: Share = 0.5
    """Cloning ends as soon as the success rate on validation goals has reached this."""
    success_cap: Annotated[float, Field(ge=0.0, le=0.7)] = 0.7
    """RL never starts from a clone that succeeds more often: cloning goes back and takes smaller steps."""
    num_demonstrations: Positive = 40
    """Episodes of the expert, on training goals at the training horizon."""
    light_share: Share = 0.25
    """Share of demonstrations with white noise of `light_scale`; the others get bursts."""
    light_scale: NonNegativeFloat = 0.1
    burst_scale: NonNegativeFloat = 0.6
    """Standard deviation of the vector that a burst adds to every executed action."""
    burst_steps: Positive = 8
    """Longest burst."""
    burst_every: Positive = 25
    """Mean number of steps from the start of one burst to the next."""
    steps_after_success: Count = 30
    num_dagger_rounds: Count = 5
    """Rounds in which the clone acts and the expert labels (Ross et al. 2011), until the target is reached."""
    num_dagger_episodes: Positive = 20
    num_cloning_steps: Positive = 1_000
    """Gradient steps on the demonstrations, and again after each DAgger round."""
    steps_per_check: Positive = 200
    """Gradient steps between validations; halved whenever the cap was overshot."""
    batch_size: Positive = 256
    learning_rate: PositiveFloat = 1e-3
    critic_iterations: Count = 2
    """Iterations in which the value network alone learns, before the first policy gradient."""
    rl_hidden_sizes: tuple[Positive, ...] = (256, 256)
    rl_init_log_std: float = -2.0
    """Standard deviation 0.135: enough to explore around a policy that half succeeds, little enough to keep it."""
    rl_learning_rate: PositiveFloat = 2e-4
    rl_target_kl: PositiveFloat = 0.02

    def __post_init__(self) -> None:
        if self.success_target > self.success_cap:
            raise ValueError(f"success_target ({self.success_target}) exceeds success_cap ({self.success_cap})")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TeacherConfig:
    """Single-task teachers."""

    recipe: Literal["rl", "demo_rl", "scripted"] = "rl"
    """rl: PPO from scratch; demo_rl: PPO from a capped warm start on demonstrations; scripted: Meta-World's expert
    as a labelled stand-in."""
    seeds: Seeds = (1,)
    """One teacher per distinct task and seed."""
    max_env_steps: Positive = 1_000_000
    """Budget of training steps in the environment."""
    horizon: Annotated[int, Field(ge=1, le=500)] = 200
    """Episode length while training; teachers are judged at the stream's horizon."""
    num_training_goals: Positive = 50
    num_validation_goals: Positive = 50
    validate_every: Positive = 3
    """Iterations between evaluations on validation goals."""
    validate_from: Share = 0.5
    """Share of successful training episodes from which on validations are worth their time."""
    stop_success: Share = 1.0
    """Training ends once the success rate on validation goals has reached this ..."""
    stop_passes: Positive = 2
    """... in this many successive validations: one alone may be luck."""
    gate: Share = 0.9
    """Least validation success with which a teacher is admitted to distillation."""
    on_rejected: Literal["skip", "stop"] = "skip"
    """What a rejected teacher does to its stage: skip it (recorded) or stop the chain."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)

    def __post_init__(self) -> None:
        if self.stop_success < self.gate:
            raise ValueError(f"stop_success ({self.stop_success}) lies below the gate ({self.gate})")
        if self.recipe != "scripted" and self.ppo.steps_per_env < self.horizon:
            raise ValueError(
                f"ppo.steps_per_env ({self.ppo.steps_per_env}) is below the training horizon ({self.horizon}): "
                "every iteration starts from fresh resets, so that no episode would ever last that long"
            )
        first = (self.warm_start.critic_iterations + 1) * self.ppo.num_envs * self.ppo.steps_per_env
        if self.recipe == "demo_rl" and self.max_env_steps < first:
            raise ValueError(
                f"max_env_steps ({self.max_env_steps}) ends before the first policy gradient ({first})"
            )

    @property
    def learner(self) -> PPOConfig:
        """The learner's settings: those of `ppo`, some of which `demo_rl` replaces by its own."""
        if self.recipe != "demo_rl":
            return self.ppo
        return replace(self.ppo, **{name: getattr(self.warm_start, f"rl_{name}") for name in DEMO_RL_SETTINGS})


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RolloutConfig:
    """What every teacher writes to its shards."""

    num_steps: Positive = 8_000
    """Time steps per teacher; the last episode is cut to meet it exactly."""
    noisy_share: Share = 0.5
    """Share of episodes in which noise is added to the executed action."""
    noise_scales: tuple[NonNegativeFloat, ...] = (0.1, 0.3, 0.6)
    """Standard deviations of that noise, in turn."""
    noise_hold: Positive = 8
    """Steps for which each noise sample is held, in every second turn through the scales."""
    steps_after_success: Count = 20
    """Steps kept after an episode's first success, at which it ends."""
    shard_steps: Positive = 50_000
    """A shard is rolled once it holds this many steps."""
    assumed_std: PositiveFloat = 0.1
    """Standard deviation declared for deterministic teachers (labelled `assumed`)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StudentConfig:
    """The student: a causal Transformer with mixture-of-experts feed-forward blocks."""

    context: Positive = 4
    """L: past time steps that the student sees."""
    width: Positive = 64
    num_layers: Positive = 2
    num_heads: Positive = 4
    expert_width: Positive = 128
    """Hidden width of one expert."""
    num_experts: Positive = 4
    """Experts per layer at the first stage."""
    top_k: Positive = 2
    expansion: Literal["none", "per_task"] = "per_task"
    """Experts are added at the start of every stage that brings a new task, or never."""
    experts_per_task: Positive = 1
    opening_steps: Positive = 100
    """Steps over which a new expert's router logit rises from minus infinity to its learned value."""
    task_identity: Literal["onehot", "none"] = "none"
    """What the student is told of the task, in training and evaluation alike."""
    min_log_std: float = -3.0
    max_log_std: float = 0.5

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"width ({self.width}) is not a multiple of num_heads ({self.num_heads})")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k ({self.top_k}) exceeds num_experts ({self.num_experts})")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MemoryConfig:
    """The replay memory: a fixed budget of stored time steps for the whole stream."""

    selection: Literal["none", "reservoir", "uniform", "dpp"] = "reservoir"
    """reservoir: uniform over all steps seen; uniform and dpp: an equal share for each task seen, drawn uniformly
    or chosen to be unlike each other (greedy MAP of a determinantal point process)."""
    share: Share = 0.1
    """Budget as a share of the whole stream's data (distinct tasks x rollouts.num_steps)."""
    dpp_candidates: Annotated[int, Field(ge=1, le=5_000)] = 2_000
    """Segments of a task between which `dpp` chooses; of more, this many are drawn evenly over its rollouts."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DistillConfig:
    """Continual distillation of the teachers into the student."""

    steps_per_stage: Positive = 1_000
    batch_size: Positive = 256
    """Windows per step over all ranks."""
    replay_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """Share of a batch drawn from memory once it holds something."""
    lr: PositiveFloat = 1e-3
    lr_warmup_steps: Count = 50
    final_lr_share: Share = 0.1
    """Learning rate at a stage's end, as a share of `lr` (cosine decay within each stage)."""
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    loss: Literal["forward_kl", "reverse_kl", "mse"] = "forward_kl"
    std_floor: PositiveFloat = 0.1
    """Least standard deviation of the teacher that the loss sees."""
    load_balance_coef: NonNegativeFloat = 0.01
    router_z_coef: NonNegativeFloat = 1e-3
    precision: Literal["float32", "float64"] = "float32"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluationConfig:
    """Episode counts of the success matrix, per cell."""

    num_episodes: Annotated[int, Field(ge=1, le=50)] = 50
    """Diagonal, final row and teachers (held-out goals; the final row on training goals too)."""
    num_episodes_brief: Annotated[int, Field(ge=1, le=50)] = 10
    """Every other cell, and each point of a curve."""
    curve_points: Count = 10
    """Evaluations of the current task within a stage."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoggingConfig:
    """Settings without influence on results; they may change between launches."""

    checkpoint_every: Positive = 200
    """Distillation steps between resume checkpoints."""
    teacher_checkpoint_every: Positive = 2
    """PPO iterations between resume checkpoints."""
    metrics_every: Positive = 20
    """Distillation steps between records in metrics.jsonl."""
    agree_every: Positive = 10
    """Distillation steps between the ranks' agreements on whether to stop."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config:
    """A whole experiment."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    """Name of the experiment; the run directory is runs/<name> unless told otherwise."""
    method: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")] = "moe"
    """Label of the student's method in directories and tables."""
    seeds: Seeds = (1,)
    """Student seeds; seed number s learns from teacher seed number s mod len(teacher.seeds)."""
    torch_threads: Positive = 1
    """Threads of a process's tensor arithmetic: part of the recipe, since it changes rounding."""
    stream: StreamConfig
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    rollouts: RolloutConfig = field(default_factory=RolloutConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        if self.evaluation.curve_points > self.distill.steps_per_stage:
            raise ValueError(
                f"evaluation.curve_points ({self.evaluation.curve_points}) exceeds "
                f"distill.steps_per_stage ({self.distill.steps_per_stage})"
            )
        if self.memory_steps and self.memory_steps < self.student.context:
            raise ValueError(
                f"memory.share = {self.memory.share} gives {self.memory_steps} steps, less than one window "
                f"(student.context = {self.student.context}); raise it or set memory.selection = 'none'"
            )

    @property
    def memory_steps(self) -> int:
        """The memory's budget in stored time steps for the whole stream."""
        if self.memory.selection == "none":
            return 0
        return round(self.memory.share * len(self.stream.distinct_tasks) * self.rollouts.num_steps)

    def warnings(self) -> list[str]:
        """Settings that are given but have no effect."""
        found = []
        if self.memory.selection == "none" and self.distill.replay_share != DistillConfig().replay_share:
            found.append("distill.replay_share has no effect: memory.selection is 'none'")
        if self.memory.selection == "none" and self.memory.share != MemoryConfig().share:
            found.append("memory.share has no effect: memory.selection is 'none'")
        if self.memory.selection != "dpp" and self.memory.dpp_candidates != MemoryConfig().dpp_candidates:
            found.append(f"memory.dpp_candidates has no effect: memory.selection is {self.memory.selection!r}")
        if self.student.expansion == "none" and self.student.experts_per_task != 1:
            found.append("student.experts_per_task has no effect: student.expansion is 'none'")
        if self.teacher.recipe == "scripted" and self.teacher.ppo != PPOConfig():
            found.append("teacher.ppo has no effect: teacher.recipe is 'scripted'")
        if self.teacher.recipe == "demo_rl":
            found += [
                f"teacher.ppo.{name} has no effect: demo_rl takes teacher.warm_start.rl_{name}"
                for name in DEMO_RL_SETTINGS
                if getattr(self.teacher.ppo, name) != getattr(PPOConfig(), name)
            ]
        elif self.teacher.warm_start != WarmStartConfig():
            found.append("teacher.warm_start has no effect: teacher.recipe is not 'demo_rl'")
        return found


def differences(old: Config, new: Config) -> list[str]:
    """The settings that affect results and differ, as `dotted.path: old -> new`."""

    def walk(left: Any, right: Any, path: str) -> list[str]:
        if isinstance(left, dict) and isinstance(right, dict):
            keys = dict.fromkeys([*left, *right])
            lines = [walk(left.get(key), right.get(key), f"{path}.{key}".lstrip(".")) for key in keys]
            return [line for group in lines for line in group]
        return [] if left == right else [f"{path}: {left!r} -> {right!r}"]

    before, after = ({k: v for k, v in to_dict(c).items() if k != "logging"} for c in (old, new))
    return walk(before, after, "")
