"""Published teachers, read from the files of `cpd publish`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from analysis.dataset import TeacherCurve, load_dataset, short
from cpd.evaluation.results_folder import HELD_OUT, TEACHER
from cpd.evaluation.student_measures import Rate
from cpd.reading import read_json
from cpd.run.descriptions import RlPolicy, RlTraining, check_identity
from cpd.run.directory import published_policy
from cpd.run.folders import kind_of
from cpd.run.tables import EvaluationRow

#: A bound that no teacher reaches: a larger number is a damaged one.
LONGEST_SECONDS = 1e12


class _Timing(TypedDict):
    """An entry of timings.json."""

    element: str
    cpu_seconds: NotRequired[Annotated[float, Field(ge=0.0, le=LONGEST_SECONDS)] | None]


@dataclass(frozen=True)
class PublishedTeacher:
    """One teacher: its training and its success."""

    task: str
    seed: int
    state: str
    recipe: str
    horizon: int
    before_rl: Rate | None
    """Success on validation goals after the warm start; None for a teacher trained from scratch."""
    validation: Rate
    """Success of the selected policy on validation goals, by which it was selected."""
    held_out: Rate
    """Success at any step on held-out goals."""
    held_out_last: Rate
    """The same episodes, success at the last step."""
    demonstration_steps: int
    env_steps: int
    """Environment steps of RL."""
    selected_env_steps: int
    """Environment steps of RL up to the selected policy."""
    policy_updates: int
    """Gradient steps of RL."""
    stopped_by: str
    cpu_seconds: float | None
    """Of all work on the teacher, including evaluation and rollouts; None if not measured."""
    curve: TeacherCurve

    @property
    def validated(self) -> tuple[Sequence[float], Sequence[float]]:
        """Steps of RL and the success on validation goals at each; step 0 is the warm start, if there was one."""
        if self.before_rl is None:
            return self.curve.validation_steps, self.curve.validation
        return (0.0, *self.curve.validation_steps), (self.before_rl.rate, *self.curve.validation)


@dataclass(frozen=True)
class PublishedTeachers:
    """The teachers of one folder, in the order of their stream."""

    name: str
    stream: tuple[str, ...]
    """Folders with equal streams are compared, even if some tasks have no policy."""
    labels: dict[str, str]
    gate: float
    teachers: tuple[PublishedTeacher, ...]

    @property
    def has_cpu_seconds(self) -> bool:
        """Whether the processor time of any teacher was measured."""
        return any(teacher.cpu_seconds is not None for teacher in self.teachers)


def find_published(folder: Path) -> list[Path]:
    """Return the folders of published teachers: `folder` itself, or those in it, sorted by name."""
    if kind_of(folder) == "teachers":
        return [folder]
    return sorted(child for child in folder.glob("*/") if kind_of(child) == "teachers")


def load_published(folder: Path) -> PublishedTeachers:
    """Read one folder of published teachers.

    Raises:
        ValueError: if a file is missing or damaged, naming it.
    """
    data = load_dataset([folder])
    config = data.tables.config
    curves = {(curve.task, curve.seed): curve for curve in data.teacher_curves}
    rows = [row for row in data.tables.evaluations if row.method == TEACHER and row.goal_set == HELD_OUT]
    held_out = {(row.task, row.seed): row for row in rows}
    for task, seed in held_out:
        for path in (published_policy(folder, task, seed), _description(folder, task, seed)):
            if not path.exists():
                raise ValueError(f"{path} is missing, but {folder} has its results; restore it or publish again")
    timings = read_json(folder / "timings.json", list[_Timing])
    cpu_seconds = {entry["element"]: entry.get("cpu_seconds") for entry in timings}
    goals = config["teacher"]["num_validation_goals"]
    teachers = []
    for task in dict.fromkeys(config["stream"]["tasks"]):
        for seed in config["teacher"]["seeds"]:
            path = _description(folder, task, seed)
            if path.exists():
                key = (task, seed)
                check_identity(path, task=task, seed=seed)
                training = read_json(path, RlPolicy)["training"]
                if key not in held_out:
                    raise ValueError(f"{folder / 'evaluations.csv'} has no held-out row of {task} (seed {seed})")
                state = "rejected" if key in data.rejected else "admitted"
                # Teachers reused from published policies have no training records.
                curve = curves.get(key) or TeacherCurve(task, seed, state, (), (), (), ())
                row = held_out[key]
                if (element := f"teachers/{task}/seed-{seed}") not in cpu_seconds:
                    raise ValueError(f"{folder / 'timings.json'} has no entry of {element}; publish again")
                teachers.append(_teacher(training, goals, row, curve, cpu_seconds[element]))
    return PublishedTeachers(config["name"], data.stream, data.labels, data.gate, tuple(teachers))


def _description(folder: Path, task: str, seed: int) -> Path:
    """Return the path of a published policy's description."""
    return published_policy(folder, task, seed).with_suffix(".json")


def _teacher(
    training: RlTraining,
    goals: int,
    row: EvaluationRow,
    curve: TeacherCurve,
    cpu_seconds: float | None,
) -> PublishedTeacher:
    start = training["warm_start"]
    assert row.successes_last is not None
    last = row.successes_last if row.normalised_return is None else row.total
    return PublishedTeacher(
        task=row.task,
        seed=row.seed,
        state=curve.state,
        recipe=row.teacher_recipe,
        horizon=row.horizon,
        before_rl=Rate.of(round(start["validation_success"] * goals), goals) if start else None,
        validation=Rate.of(round(training["validation_success"] * goals), goals),
        held_out=Rate.of(row.total, row.episodes),
        held_out_last=Rate.of(last, row.episodes),
        demonstration_steps=start["demonstration_env_steps"] if start else 0,
        env_steps=training["env_steps"],
        selected_env_steps=_selected_env_steps(training, curve),
        policy_updates=training["policy_updates"],
        stopped_by=training["stopped_by"],
        cpu_seconds=cpu_seconds,
        curve=curve,
    )


def _selected_env_steps(training: RlTraining, curve: TeacherCurve) -> int:
    """Return the environment steps of RL up to the selected iteration."""
    if curve.env_steps:
        return int(curve.env_steps[training["selected_iteration"] - 1])
    # Without records this is an estimate: iterations take equally many steps, except those of exploration.
    return int(training["env_steps"] * training["selected_iteration"] // training["iterations"])


def score_rows(published: PublishedTeachers) -> list[dict[str, Any]]:
    """Return one row per teacher, with exact numbers and labels."""
    names = ("reward_version", "metaworld", "mujoco", "suite", "suite_versions")
    versions = {name: published.labels[name] for name in names if name in published.labels}
    return [
        {
            "teacher_recipe": t.recipe,
            "horizon": t.horizon,
            "task": t.task,
            "seed": t.seed,
            "state": t.state,
            "success_before_rl": t.before_rl.rate if t.before_rl else None,
            "episodes_before_rl": t.before_rl.episodes if t.before_rl else None,
            "validation_success": t.validation.rate,
            "validation_episodes": t.validation.episodes,
            "held_out_episodes": t.held_out.episodes,
            "held_out_successes": t.held_out.successes,
            "held_out_success": t.held_out.rate,
            "low": t.held_out.low,
            "high": t.held_out.high,
            "held_out_successes_last": t.held_out_last.successes,
            "demonstration_env_steps": t.demonstration_steps,
            "rl_env_steps": t.env_steps,
            "rl_env_steps_selected": t.selected_env_steps,
            "rl_policy_updates": t.policy_updates,
            "stopped_by": t.stopped_by,
            "cpu_seconds": t.cpu_seconds,
            **versions,
        }
        for t in published.teachers
    ]


def markdown(published: PublishedTeachers) -> str:
    """Return the scores as a Markdown table for a README."""
    measured = published.has_cpu_seconds
    lines = [
        "| task | before RL | after RL, validation | held-out, any step | held-out, last step | RL env steps | "
        f"RL updates |{' CPU s |' if measured else ''}",
        f"|---|---|---|---|---|---|---|{'---|' if measured else ''}",
    ]
    for t in published.teachers:
        name = short(t.task) + (f" (seed {t.seed})" if _several_seeds(published.teachers) else "")
        cells = (
            name + (" **rejected**" if t.state == "rejected" else ""),
            f"{t.before_rl.rate:.2f}" if t.before_rl else "–",
            f"{t.validation.rate:.2f}",
            f"{t.held_out.rate:.2f} [{t.held_out.low:.2f}, {t.held_out.high:.2f}]",
            f"{t.held_out_last.rate:.2f}",
            f"{t.env_steps:,}",
            f"{t.policy_updates:,}",
            *([cpu_text(t)] if measured else []),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cpu_text(teacher: PublishedTeacher) -> str:
    """Return the processor seconds as a cell of a table."""
    return "–" if teacher.cpu_seconds is None else f"{teacher.cpu_seconds:,.0f}"


def _several_seeds(teachers: Sequence[PublishedTeacher]) -> bool:
    return len({teacher.seed for teacher in teachers}) > 1
