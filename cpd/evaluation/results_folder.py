"""The long-form tables of a results folder, from which all measures derive.

Only the folder is needed, so results that were copied or published without their run can be read.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Final, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from cpd.config.load import merge
from cpd.config.retired import upgrade
from cpd.config.types import Count, Positive, Share
from cpd.envs.suite import DEFAULT_SUITE, load_suite
from cpd.evaluation.measures import curve_steps
from cpd.reading import DamagedFileError, check_shape, read_json
from cpd.run.directory import RunError
from cpd.run.provenance import Labels
from cpd.run.table_files import find_table
from cpd.run.tables import (
    CurveRow,
    EpisodeRow,
    EvaluationRow,
    LossRow,
    PlanRow,
    RetrievalRow,
    StageRow,
    StartRow,
    TableRow,
    TeacherRow,
    UsageRow,
    read_rows,
)

#: The row type of every table, by the name of its field and file.
TABLES: Final[dict[str, type[Any]]] = {
    "evaluations": EvaluationRow,
    "episodes": EpisodeRow,
    "curves": CurveRow,
    "teachers": TeacherRow,
    "losses": LossRow,
    "stages": StageRow,
    "plans": PlanRow,
    "usage": UsageRow,
    "retrieval": RetrievalRow,
    "starts": StartRow,
}
TEACHER = "teacher"
HELD_OUT = "held_out"


class _StreamConfig(TypedDict):
    tasks: Annotated[list[str], Field(min_length=1)]
    horizon: Positive


class _TeacherConfig(TypedDict):
    recipe: str
    seeds: Annotated[list[int], Field(min_length=1)]
    gate: Share
    num_validation_goals: Positive


class _DistillConfig(TypedDict):
    protocol: str
    steps_per_stage: Positive
    batch_size: Positive


class _EvaluationConfig(TypedDict, total=False):
    goal_set: str
    curve_points: Count


class _Variant(TypedDict, total=False):
    distill: dict[str, Any]


class ResultsConfig(TypedDict):
    """What is read of the config.json of results, of all versions."""

    name: str
    method: str
    seeds: Annotated[list[int], Field(min_length=1)]
    variants: NotRequired[dict[str, _Variant]]
    variants_only: NotRequired[bool]
    stream: _StreamConfig
    teacher: _TeacherConfig
    distill: _DistillConfig
    evaluation: _EvaluationConfig


@dataclass(frozen=True)
class Tables:
    """The contents of a results folder."""

    folder: Path
    config: dict[str, Any]
    """config.json, upgraded but not checked, since older results must stay readable."""
    evaluations: list[EvaluationRow]
    episodes: list[EpisodeRow]
    curves: list[CurveRow]
    teachers: list[TeacherRow]
    losses: list[LossRow]
    stages: list[StageRow]
    plans: list[PlanRow]
    usage: list[UsageRow]
    retrieval: list[RetrievalRow]
    starts: list[StartRow]

    @property
    def stream(self) -> tuple[str, ...]:
        """The task of every stage."""
        return tuple(self.config["stream"]["tasks"])

    @property
    def goal_set(self) -> str:
        """The goals that success was measured on; older results without this setting are on held-out goals."""
        return str(self.config["evaluation"].get("goal_set", HELD_OUT))

    @property
    def methods(self) -> tuple[str, ...]:
        """The labels of the run's methods."""
        base = () if self.config.get("variants_only") else (self.config["method"],)
        return (*base, *self.config.get("variants", {}))

    def method_config(self, method: str) -> dict[str, Any]:
        """Return config.json with the settings of a method."""
        return merge(self.config, self.config.get("variants", {}).get(method, {}))

    def teacher_seed(self, student_seed: int) -> int:
        """Return the seed of a student's teachers."""
        seeds: list[int] = self.config["teacher"]["seeds"]
        position: int = self.config["seeds"].index(student_seed)
        return seeds[position % len(seeds)]


def read_tables(folder: Path) -> Tables:
    """Read a results folder; a missing table is read as empty.

    Raises:
        RunError: if the folder lacks config.json.
        ValueError: if a file in it is damaged, a row is not of that configuration, a row is missing, or
            evaluations.csv and episodes.csv disagree; names the file and the row.
    """
    path = folder / "config.json"
    if not path.exists():
        raise RunError(
            f"{folder} is not a results folder: it has no config.json; name a run or its results folder"
        )

    config = upgrade(read_json(path, dict[str, Any]))
    check_shape(config, ResultsConfig, str(path))
    load_suite(config["stream"].get("suite", DEFAULT_SUITE))  # so that the tables may name its tasks

    def rows(name: str, kind: type[Any]) -> list[Any]:
        return read_rows(folder / name, kind) if find_table(folder / name) else []

    tables = Tables(
        folder,
        config,
        **{name: rows(f"{name}.csv", kind) for name, kind in TABLES.items()},
    )
    for name in TABLES:
        _check_rows(tables, f"{name}.csv", getattr(tables, name))
    for name, missing in _missing(tables):
        raise _damaged(tables, name, f" has no row of {missing}")
    if tables.episodes:
        _check_episodes(tables)
    return tables


def _damaged(tables: Tables, name: str, problem: str) -> DamagedFileError:
    path = find_table(tables.folder / name) or tables.folder / name
    return DamagedFileError(f"{path}{problem}: restore the file, or gather or publish its run again")


def _check_rows(tables: Tables, name: str, rows: Sequence[TableRow]) -> None:
    """Raise DamagedFileError if a row is not of the configuration."""
    config, stream = tables.config, tables.stream
    horizon = config["stream"]["horizon"]
    shared: dict[str, Collection[Any]] = {
        "task": set(stream),
        "other": set(stream),
        **{column: {*stream, None} for column in ("believed", "plan_first", "plan_second")},
        "goal_set": {tables.goal_set, "training"},
        "length": range(1, horizon + 1),
        "teacher_recipe": {config["teacher"]["recipe"]},
        "horizon": {horizon},
    }
    teachers = {"method": {TEACHER}, "seed": config["teacher"]["seeds"], "stage": {None}, **shared}
    students = {"method": tables.methods, "seed": config["seeds"], "stage": range(-1, len(stream)), **shared}
    columns = [column for column in teachers if rows and hasattr(rows[0], column)]
    for line, row in enumerate(rows, start=2):
        permitted = teachers if getattr(row, "method", TEACHER) == TEACHER else students
        if isinstance(row, CurveRow | LossRow | StageRow) and row.stage in permitted["stage"]:
            permitted = {**permitted, "task": {stream[row.stage] if row.stage >= 0 else None}}
        for column in columns:
            if (value := getattr(row, column)) not in permitted[column]:
                raise _damaged(tables, name, f", line {line}: {column} {value!r} does not agree with config.json")


def _missing(tables: Tables) -> Iterator[tuple[str, str]]:
    """Yield the table and the key of every row that the others imply."""
    tasks = tuple(dict.fromkeys(tables.stream))
    students = [row for row in tables.evaluations if row.method != TEACHER]
    # A student is evaluated on all tasks at once.
    at_once: dict[str, Sequence[Any]] = {"usage": tables.usage, "retrieval": tables.retrieval}
    for name, rows in {"evaluations": students, **at_once}.items():
        measured = defaultdict(set)
        for row in rows:
            measured[tuple((c, getattr(row, c)) for c in row.KEY if c != "task")].add(row.task)
        for key, present in measured.items():
            for task in tasks if len(present) < len(tasks) else ():
                if task not in present:
                    yield f"{name}.csv", f"{task} with {', '.join(f'{c} {value}' for c, value in key)}"
    expected_teachers = product(tasks, tables.config["teacher"]["seeds"]) if tables.teachers else ()
    for task, seed in sorted({*expected_teachers} - {(row.task, row.seed) for row in tables.teachers}):
        yield "teachers.csv", f"{task} seed {seed}"
    evaluated = {(row.method, row.seed, row.stage) for row in students} if tables.stages else set()
    for method, seed, stage in sorted(evaluated - {(row.method, row.seed, row.stage) for row in tables.stages}):
        yield "stages.csv", f"{method} seed {seed} stage {stage}"
    curves = defaultdict(list)
    for row in tables.curves:
        curves[row.method, row.seed, row.stage].append(row.step)
    for (method, seed, stage), steps in curves.items():
        settings = tables.method_config(method)
        due = curve_steps(settings["evaluation"]["curve_points"], settings["distill"]["steps_per_stage"])
        for step in due:
            if step not in steps and step < max(steps):
                yield "curves.csv", f"{method} seed {seed} stage {stage} step {step}"
    starts = {(row.task, row.seed): row for row in tables.starts}
    for task, seed in starts.keys() - {(row.task, row.seed) for row in tables.starts if row.other == row.task}:
        yield "starts.csv", f"{task} seed {seed} with itself"


def _check_episodes(tables: Tables) -> None:
    """Raise DamagedFileError unless every evaluation is that of its episodes."""
    cells = defaultdict(list)
    for episode in tables.episodes:
        cells[tuple(getattr(episode, column) for column in EvaluationRow.KEY)].append(episode)
    for line, row in enumerate(tables.evaluations, start=2):
        measured = cells.pop(tuple(getattr(row, column) for column in row.KEY), [])
        values: dict[str, float] = {
            "episodes": len(measured),
            "successes": sum(episode.success for episode in measured),
            "successes_last": sum(bool(episode.success_last) for episode in measured),
            "mean_return": sum(episode.episode_return for episode in measured) / max(len(measured), 1),
            "normalised_return": sum(e.normalised_return or 0.0 for e in measured) / max(len(measured), 1),
        }
        for column, value in values.items():
            stated = getattr(row, column)
            if stated is not None and not math.isclose(stated, value, rel_tol=1e-9, abs_tol=1e-9):
                problem = f", line {line}: {column} is {stated}, but {value} by the rows of episodes.csv"
                raise _damaged(tables, "evaluations.csv", problem)
    for key in cells:
        raise _damaged(tables, "evaluations.csv", f" has no row of {key}, of which episodes.csv has episodes")


def merge_tables(tables: Sequence[Tables]) -> Tables:
    """Return the first of `tables` with the rows of all; equal rows occur once."""
    rows: dict[str, Any] = {
        name: list(dict.fromkeys(row for table in tables for row in getattr(table, name))) for name in TABLES
    }
    return replace(tables[0], **rows)


def labels_of(rows: Iterable[EvaluationRow]) -> dict[str, str]:
    """Return the labels of the rows, different values joined by a slash. Those without values are left out."""
    rows = list(rows)
    values = {field: [getattr(row, field.name) for row in rows] for field in fields(Labels)}
    return {
        field.name: "/".join(dict.fromkeys(str(value) for value in of_rows if value is not None))
        for field, of_rows in values.items()
        if field.default is MISSING or any(value is not None for value in of_rows)
    }
