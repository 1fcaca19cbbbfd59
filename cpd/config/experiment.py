"""`Config`: the stream of tasks and all other sections of an experiment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer
from pydantic.dataclasses import dataclass

from cpd.config.checks import contradictions, without_effect
from cpd.config.load import STRICT, ConfigError, load, merge, overrides_of, to_dict
from cpd.config.retired import holds
from cpd.config.student import MethodConfig
from cpd.config.teacher import WARM_START_PPO, RolloutConfig, TeacherConfig
from cpd.config.types import (
    Count,
    Positive,
    Seeds,
    TaskOfSuite,
    check_horizon,
    check_suite_name,
    expand_stream,
    joined_suites,
)
from cpd.envs.suite import DEFAULT_SUITE, Suite, SuiteError, load_suite


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StreamConfig:
    """The tasks, in the order of distillation; a task may occur twice."""

    suite: Annotated[str, BeforeValidator(joined_suites), AfterValidator(check_suite_name)] = DEFAULT_SUITE
    """The suite of the tasks: metaworld, gym-mujoco, an entry point of the group cpd.suites, or
    package.module:Class; several, as a list or joined by +, for a stream of tasks of them all."""
    tasks: Annotated[tuple[TaskOfSuite, ...], BeforeValidator(expand_stream), Field(min_length=1)]
    """Task names, or the name of a stream of the suite; of Meta-World: demo, cw10, cw20, mt10, mt50."""
    horizon: Annotated[int, Field(ge=1), AfterValidator(check_horizon)] = field(
        default_factory=lambda: load_suite().horizon
    )
    """Episode length in environment steps, for rollouts, student and evaluation; default: the suite's longest."""

    @model_serializer(mode="wrap")
    def _without_default_suite(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Configurations from before there were suites, and their hashes, stay as they are.
        tables: dict[str, Any] = serialise(self)
        return {k: v for k, v in tables.items() if (k, v) != ("suite", DEFAULT_SUITE)}

    @property
    def suite_object(self) -> Suite:
        """The suite itself."""
        return load_suite(self.suite)

    @property
    def distinct_tasks(self) -> tuple[str, ...]:
        """The tasks without repetitions, in order of first occurrence."""
        return tuple(dict.fromkeys(self.tasks))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluationConfig:
    """Goals and numbers of episodes with which success rates are measured."""

    goal_set: Literal["held_out", "validation"] = "held_out"
    """Use validation goals to choose settings, and held-out goals only for results that you report."""
    num_episodes: Annotated[int, Field(ge=1, le=50)] = 50
    """Episodes per cell for teachers, the diagonal and the final row of the success matrix; the final row is
    measured on training goals, too."""
    num_episodes_brief: Annotated[int, Field(ge=1, le=50)] = 10
    """Episodes for every other cell and for each point of a curve."""
    num_episodes_unmet: Annotated[int, Field(ge=0, le=50)] = 0
    """Episodes for cells of tasks that the student meets after the next stage or later; 0: `num_episodes_brief`,
    as before the first stage. With one or a few, the cells above the diagonal cost little."""
    curve_points: Count = 10
    """Evaluations of the current task within a stage."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoggingConfig:
    """Settings that do not affect results and may change between launches."""

    checkpoint_every: Positive = 200
    """Distillation steps between checkpoints."""
    teacher_checkpoint_every: Positive = 2
    """Iterations of teacher training between checkpoints."""
    metrics_every: Positive = 20
    """Distillation steps between records in metrics.jsonl."""


def _check_label(label: str) -> str:
    if label in (".", ".."):
        raise ValueError(f"{label!r} is no name of a folder")
    return label


# Names of files consist of a label and a few more words, in at most 255 bytes.
Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$", max_length=200), AfterValidator(_check_label)]


if TYPE_CHECKING:
    Overrides = dict[str, Any]
else:
    Overrides = overrides_of(MethodConfig)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config(MethodConfig):
    """A whole experiment."""

    name: Label
    """Name of the experiment; the default run directory is runs/<name>."""
    method: Label = "moe"
    """Label of the method in directories and tables."""
    variants: dict[Label, Overrides] = field(default_factory=dict)
    """Further methods by label, each with the settings of student, memory, protection and distill that differ.
    Every method trains one student per seed, from the same teachers."""
    variants_only: bool = False
    """Train the variants only, not the method that they modify."""
    seeds: Seeds = (1,)
    """Student seeds; seed number s learns from teacher seed number s mod len(teacher.seeds)."""
    teachers_from: str | tuple[str, ...] = ""
    """Run directory, or folder of published teachers, from which existing teachers are reused; or a list, of
    which the first with a teacher counts. In a recipe, paths are relative to its folder."""
    stream: StreamConfig
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    rollouts: RolloutConfig = field(default_factory=RolloutConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @staticmethod
    def implied_defaults(tables: Mapping[str, Any]) -> dict[str, Any]:
        """Return the defaults that depend on the suite and on `teacher.recipe` in tables, complete or not."""
        teacher, stream = tables.get("teacher"), tables.get("stream")
        recipe = teacher.get("recipe", "rl") if isinstance(teacher, Mapping) else "rl"
        # Scripted experts use none of them, but get them too: runs of `lab_ablation`, which extends cw10, hold
        # these values in their config.json.
        implied: dict[str, Any] = {} if recipe == "rl" else {"teacher": {"ppo": WARM_START_PPO}}
        name = joined_suites(stream.get("suite", DEFAULT_SUITE)) if isinstance(stream, Mapping) else DEFAULT_SUITE
        if name == DEFAULT_SUITE or not isinstance(name, str):
            return implied
        try:
            horizon = load_suite(name).horizon
        except SuiteError:  # reported by the check of the setting
            return implied
        horizons = {"stream": {"horizon": horizon}, "teacher": {"horizon": min(horizon, TeacherConfig().horizon)}}
        return merge(implied, horizons)

    def __post_init__(self) -> None:
        problems = [
            *self._budget_problems(),
            *self._suite_problems(),
            *contradictions(self, len(self.stream.distinct_tasks)),
        ]
        # Every variant inherits the mistakes of the base and would report them again.
        if problems := problems or self._method_problems():
            raise ConfigError(problems, "the configuration")

    def _budget_problems(self) -> list[str]:
        """Check numbers against those of other sections."""
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

    def _suite_problems(self) -> list[str]:
        """Check the settings of teachers against what the suite offers."""
        suite, teacher, lines = self.stream.suite_object, self.teacher, []
        if teacher.horizon > suite.horizon:
            lines.append(
                f"teacher.horizon: {teacher.horizon} exceeds the {suite.horizon} steps after which the episodes "
                f"of the suite {suite.name!r} end"
            )
        starts = teacher.exploration.max_steps if teacher.exploration.start_share else 0
        if teacher.recipe != "scripted" and teacher.horizon <= suite.horizon < teacher.horizon + starts:
            lines.append(
                f"teacher: horizon ({teacher.horizon}) and exploration.max_steps ({starts}) together exceed the "
                f"{suite.horizon} steps after which the episodes of the suite {suite.name!r} end"
            )
        returned = [task for task in self.stream.distinct_tasks if suite.returns(task)]
        if returned and self.stream.horizon != suite.horizon:
            lines.append(
                f"stream.horizon: the suite {suite.name!r} has returns for episodes of {suite.horizon} steps, by "
                f"which {', '.join(returned)} is measured; leave this setting out"
            )
        if teacher.recipe != "rl" and not suite.has_experts:
            lines.append(
                f"teacher.recipe: {teacher.recipe!r} needs scripted experts, but the suite {suite.name!r} has "
                "none; set it to 'rl'"
            )
        if teacher.grasp_bonus and not suite.measures_grasps:
            lines.append(f"teacher.grasp_bonus: the suite {suite.name!r} measures no grasps; set it to 0")
        return lines

    def _method_problems(self) -> list[str]:
        """Check the labels, and every variant as a configuration."""
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
        """Labels of all methods to train."""
        return (*(() if self.variants_only else (self.method,)), *self.variants)

    def of_method(self, label: str) -> Config:
        """Configuration of a single method: `method` is the label, and there are no variants."""
        tables = {**to_dict(self), "method": label, "variants": {}, "variants_only": False}
        return load(Config, merge(tables, self.variants.get(label, {})), f"variant {label}")

    def check_student_ranks(self, num_ranks: int) -> None:
        """Raise ValueError if a batch of this method has fewer rows than a student has MPI ranks."""
        shared_batches = {"distill.batch_size": self.distill.batch_size}
        # A rank without rows has no gradient to contribute. Only the protocol `continual` protects anything.
        if self.distill.protocol == "continual" and self.protection.kind == "agem":
            shared_batches["protection.agem_windows"] = self.protection.agem_windows
        for name, rows in shared_batches.items():
            if rows < num_ranks:
                raise ValueError(
                    f"{name} = {rows} is less than the {num_ranks} ranks of a student; set fewer ranks in the "
                    "profile, or a larger value"
                )

    def row_episodes(self, stage: int, *, is_last: bool) -> dict[str, int]:
        """Episodes on each distinct task after `stage` (-1: before training), a row of the success matrix."""
        tasks, counts = self.stream.tasks, self.evaluation
        if is_last:
            return dict.fromkeys(tasks, counts.num_episodes)
        row = dict.fromkeys(tasks, counts.num_episodes_brief)
        if stage >= 0:
            # The next task's cell is where its learning curve begins.
            unmet = row.keys() - tasks[: stage + 2] if counts.num_episodes_unmet else ()
            row |= {tasks[stage]: counts.num_episodes, **dict.fromkeys(unmet, counts.num_episodes_unmet)}
        return row

    @property
    def teacher_folders(self) -> list[Path]:
        """`teachers_from` as a list."""
        folders = (self.teachers_from,) if isinstance(self.teachers_from, str) else self.teachers_from
        return [Path(folder) for folder in folders if folder]

    @property
    def memory_steps(self) -> int:
        """Memory budget for the whole stream, in time steps."""
        if self.memory.selection == "none" or self.distill.protocol != "continual":
            return 0
        return round(self.memory.share * len(self.stream.distinct_tasks) * self.rollouts.num_steps)

    def warnings(self) -> list[str]:
        """Return one line, which begins with a path, for each setting that has no effect or a doubtful one."""
        lines = self._method_warnings()
        for label, tables in self.variants.items():
            # A setting without effect that a variant inherits is intended; one that it sets is not.
            warnings = self.of_method(label)._method_warnings()
            lines += [f"variants.{label}.{line}" for line in warnings if holds(tables, line.split()[0])]
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


def differences(old: Config, new: Config) -> list[str]:
    """Return the settings that affect results and differ, as `dotted.path: old -> new`.

    `new` may add variants, and append student seeds.
    """
    ignored = ("logging", "teachers_from")
    stored, requested = ({k: v for k, v in to_dict(c).items() if k not in ignored} for c in (old, new))
    removed = [f"variants.{label}: missing; add it again" for label in old.variants if label not in new.variants]
    common = old.variants.keys() & new.variants.keys()
    for tables in (stored, requested):
        tables["variants"] = {label: tables["variants"][label] for label in common}
    if new.seeds[: len(old.seeds)] == old.seeds:
        requested["seeds"] = stored["seeds"]
    return [*changes(stored, requested), *removed]


def changes(old: Any, new: Any, path: str = "") -> list[str]:
    """Return the entries of nested tables that differ, as `dotted.path: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = [changes(old.get(k), new.get(k), f"{path}.{k}".lstrip(".")) for k in dict.fromkeys([*old, *new])]
        return [line for group in lines for line in group]
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]


def continued(old: Config, new: Config) -> Config:
    """Return `new` with the variants of `old` first, in their old order; `new` must have them all."""
    return replace(new, variants={**old.variants, **new.variants})
