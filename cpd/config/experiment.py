"""A whole experiment: the stream, and every section together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from cpd.config.checks import contradictions, without_effect
from cpd.config.load import STRICT, ConfigError, load, merge, overrides_of, to_dict
from cpd.config.student import MethodConfig
from cpd.config.teacher import RolloutConfig, TeacherConfig
from cpd.config.types import Count, Positive, Seeds, Task, expand_stream
from cpd.envs.tasks import MAX_EPISODE_STEPS


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StreamConfig:
    """The tasks, in the order in which they are distilled; a task may come twice."""

    tasks: Annotated[tuple[Task, ...], BeforeValidator(expand_stream), Field(min_length=1)]
    """Task names, or the name of a stream: demo, cw10, cw20, mt10, mt50."""
    horizon: Annotated[int, Field(ge=1, le=MAX_EPISODE_STEPS)] = MAX_EPISODE_STEPS
    """Episode length in environment steps, for rollouts, student and evaluation."""

    @property
    def distinct_tasks(self) -> tuple[str, ...]:
        """The stream's tasks without repetition, in order of first appearance."""
        return tuple(dict.fromkeys(self.tasks))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluationConfig:
    """Which goals success is measured on, and in how many episodes per cell of the success matrix."""

    goal_set: Literal["held_out", "validation"] = "held_out"
    """validation: to choose settings by, so that the held-out goals, which reports are about, stay unseen."""
    num_episodes: Annotated[int, Field(ge=1, le=50)] = 50
    """Diagonal, final row and teachers; the final row on training goals too."""
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
    """A learner's iterations between resume checkpoints."""
    metrics_every: Positive = 20
    """Distillation steps between records in metrics.jsonl."""


Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]


if TYPE_CHECKING:
    Overrides = dict[str, Any]
else:
    Overrides = overrides_of(MethodConfig)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config(MethodConfig):
    """A whole experiment."""

    name: Label
    """Name of the experiment; the run directory is runs/<name> unless told otherwise."""
    method: Label = "moe"
    """Label of the student's method in directories and tables."""
    variants: dict[Label, Overrides] = field(default_factory=dict)
    """Further methods by label: the settings of how a student learns in which each differs. Every method has
    students of all seeds, from the same teachers."""
    variants_only: bool = False
    """Leave out the method that the variants vary."""
    seeds: Seeds = (1,)
    """Student seeds; seed number s learns from teacher seed number s mod len(teacher.seeds)."""
    teachers_from: str = ""
    """Another run's directory, or a folder of published teachers: those that are there are taken over."""
    stream: StreamConfig
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    rollouts: RolloutConfig = field(default_factory=RolloutConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        problems = [*self._budget_problems(), *contradictions(self, len(self.stream.distinct_tasks))]
        # A variant inherits the mistakes of the whole, which would come up again with each.
        if problems := problems or self._method_problems():
            raise ConfigError(problems, "the configuration")

    def _budget_problems(self) -> list[str]:
        """Numbers that another section makes too large or too small."""
        lines = []
        if self.evaluation.curve_points > self.distill.steps_per_stage:
            lines.append(
                f"evaluation.curve_points: {self.evaluation.curve_points} exceeds distill.steps_per_stage = "
                f"{self.distill.steps_per_stage}"
            )
        windows = len(self.stream.distinct_tasks) if self.memory.selection in ("uniform", "dpp") else 1
        has_memory = self.distill.protocol == "continual" and self.memory.selection != "none"
        if has_memory and self.memory_steps < windows * self.student.context:
            lines.append(
                f"memory.share: {self.memory.share} gives {self.memory_steps} steps, less than {windows} windows "
                f"of student.context = {self.student.context}; increase it, or set memory.selection = 'none'"
            )
        return lines

    def _method_problems(self) -> list[str]:
        """Labels that clash, and the mistakes of every variant as a configuration of its own."""
        problems = []
        if self.method == "teacher":
            problems.append("method: 'teacher' is the label of the teachers; choose another")
        if self.method in self.variants:
            problems.append(f"variants.{self.method}: method has the same label; choose another")
        if self.variants_only and not self.variants:
            problems.append("variants_only: there are no variants; add one, or set it to false")
        for label in self.variants:
            try:
                self.of_method(label)
            except ConfigError as error:
                problems += [f"variants.{label}.{line}" for line in error.problems]
        return problems

    @property
    def methods(self) -> tuple[str, ...]:
        """The labels of all methods that have students."""
        return (*(() if self.variants_only else (self.method,)), *self.variants)

    def of_method(self, label: str) -> Config:
        """The configuration of one of the methods alone: its `method` is the label, and it has no variants."""
        tables = {**to_dict(self), "method": label, "variants": {}, "variants_only": False}
        return load(Config, merge(tables, self.variants.get(label, {})), f"variant {label}")

    @property
    def memory_steps(self) -> int:
        """The memory's budget in stored time steps for the whole stream."""
        if self.memory.selection == "none" or self.distill.protocol != "continual":
            return 0
        return round(self.memory.share * len(self.stream.distinct_tasks) * self.rollouts.num_steps)

    def warnings(self) -> list[str]:
        """Settings without effect, or with an odd one: a line each, which begins with a path."""
        lines = self._method_warnings()
        for label, tables in self.variants.items():
            # What a variant inherits without effect is no mistake of its author.
            typed = [line for line in self.of_method(label)._method_warnings() if _mentions(tables, line)]
            lines += [f"variants.{label}.{line}" for line in typed]
        return lines

    def _method_warnings(self) -> list[str]:
        lines = without_effect(self, len(self.stream.distinct_tasks))
        steps = self.distill.steps_per_stage
        opens = self.student.expansion != "none" and self.student.task_identity == "none"
        if opens and self.student.opening_steps > steps:
            lines.append(
                f"student.opening_steps = {self.student.opening_steps} exceeds distill.steps_per_stage = {steps}: "
                "new experts open fully only when their stage ends"
            )
        if self.distill.lr_warmup_steps >= steps:
            lines.append(
                f"distill.lr_warmup_steps = {self.distill.lr_warmup_steps} is not below distill.steps_per_stage = "
                f"{steps}: the learning rate reaches distill.lr only at the end of a stage, or never"
            )
        return lines + [f"teacher.{line}" for line in self.teacher.warnings()]


def _mentions(tables: Mapping[str, Any], warning: str) -> bool:
    """Whether the setting that a warning begins with is given in `tables`."""
    value: Any = tables
    for part in warning.split()[0].split("."):
        if not isinstance(value, Mapping) or part not in value:
            return False
        value = value[part]
    return True


def differences(old: Config, new: Config) -> list[str]:
    """The settings that affect results and differ, as `dotted.path: old -> new`.

    Variants may be added freely, and student seeds behind those that there are.
    """
    without = ("logging", "teachers_from")
    before, after = ({k: v for k, v in to_dict(c).items() if k not in without} for c in (old, new))
    gone = [f"variants.{label}: not asked for" for label in before["variants"] if label not in after["variants"]]
    both = set(before["variants"]) & set(after["variants"])
    for tables in (before, after):
        tables["variants"] = {label: own for label, own in tables["variants"].items() if label in both}
    if new.seeds[: len(old.seeds)] == old.seeds:
        after["seeds"] = before["seeds"]
    return [*changes(before, after), *gone]


def changes(old: Any, new: Any, path: str = "") -> list[str]:
    """The entries of nested tables that differ, as `dotted.path: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = [changes(old.get(k), new.get(k), f"{path}.{k}".lstrip(".")) for k in dict.fromkeys([*old, *new])]
        return [line for group in lines for line in group]
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]


def continued(old: Config, new: Config) -> Config:
    """`new` with the variants that `old` has in their old places, so that what is added comes last."""
    order = dict.fromkeys([*old.variants, *new.variants])
    return replace(new, variants={label: new.variants[label] for label in order})
