"""Reads results folders into the data set that figures and tables are made from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

import numpy as np
from pydantic import FiniteFloat
from typing_extensions import TypedDict

from cpd.evaluation.intervals import Floats
from cpd.evaluation.results_folder import TEACHER, Tables, merge_tables, read_tables
from cpd.evaluation.student_measures import Rate, StudentResults
from cpd.evaluation.summary import MethodMeasures, Summary, summarize, without_students
from cpd.reading import DamagedFileError, read_for_display
from cpd.run.progress import read_status
from cpd.run.table_files import find_table
from cpd.run.tables import TrainingRow, read_rows

#: A task looks like others if more than this share of its episodes begin nearest to one of another task.
LOOK_ALIKE_SHARE = 0.05


def short(task: str) -> str:
    """Return a task's name without its version, such as -v3."""
    return re.sub(r"-v\d+$", "", task)


class Timing(TypedDict):
    """When an element of a role was in which phase (Unix time)."""

    role: str
    spans: list[tuple[str, FiniteFloat, FiniteFloat]]
    cpu_seconds: NotRequired[FiniteFloat | None]
    nodes: NotRequired[int]
    """On Slurm: nodes of a job, and cores of one of its ranks."""
    cpus: NotRequired[int]


@dataclass(frozen=True)
class TeacherCurve:
    """Training records of one teacher: one value per record, or per validation in `validation` and its steps."""

    task: str
    seed: int
    state: str
    env_steps: tuple[float, ...]
    validation_steps: tuple[float, ...]
    """Environment steps of the values in `validation`."""
    validation: tuple[float, ...]
    training: tuple[float, ...]
    """Success rate of the training episodes, NaN where none ended."""


@dataclass(frozen=True)
class Dataset:
    """Results on one stream under one set of conditions: students by method and seed, and their teachers."""

    name: str
    labels: dict[str, str]
    tables: Tables
    """The rows of all results folders, with the configuration of the first."""
    students: tuple[StudentResults, ...]
    methods: tuple[MethodMeasures, ...]
    distill: dict[str, dict[str, Any]]
    """The distillation settings of every method."""
    task_identities: dict[str, str]
    """How the students of each method know the task."""
    teacher_rates: dict[tuple[str, int], Rate]
    """Teachers' success by task and teacher seed."""
    rejected: frozenset[tuple[str, int]]
    """Task and seed of the teachers whose validation success is below the gate."""
    teacher_curves: tuple[TeacherCurve, ...]
    timings: tuple[Timing, ...]
    missing: tuple[str, ...]

    @property
    def stream(self) -> tuple[str, ...]:
        """The task of every stage."""
        return self.tables.stream

    @property
    def goals(self) -> str:
        """The goals that success was measured on: `held-out` or `validation`."""
        return self.tables.goal_set.replace("_", "-")

    @property
    def gate(self) -> float:
        """The success on validation goals from which a teacher is admitted."""
        return float(self.tables.config["teacher"]["gate"])

    @property
    def tasks(self) -> tuple[str, ...]:
        """The distinct tasks of the stream."""
        return tuple(dict.fromkeys(self.stream))

    @property
    def method_names(self) -> tuple[str, ...]:
        """The methods that have students, in the order of the recipe."""
        return tuple(dict.fromkeys(student.method for student in self.students))

    def of_method(self, method: str) -> list[StudentResults]:
        """Return a method's students that are evaluated to the stream's end, or all students while none is.

        All numbers of a method are thus from the same seeds.
        """
        students = [student for student in self.students if student.method == method]
        return [student for student in students if student.measures.final_stage is not None] or students

    @property
    def returned(self) -> tuple[str, ...]:
        """The tasks without a success measure: normalised returns stand in for their success rates."""
        rows = self.tables.evaluations
        return tuple(dict.fromkeys(row.task for row in rows if row.normalised_return is not None))

    @property
    def measure(self) -> str:
        """What rates are, for the labels of figures and tables."""
        if not self.returned:
            return "success"
        return "normalised return" if {*self.returned} == {*self.tasks} else "success or normalised return"

    @property
    def rate(self) -> str:
        """The measure as a rate, for axes."""
        return "success rate" if self.measure == "success" else self.measure

    @property
    def look_alikes(self) -> dict[str, dict[str, float]]:
        """Shares of episodes that begin nearest to another task, by task that looks like others and other task."""
        alike: dict[str, dict[str, float]] = {}
        for task in self.tasks:
            rows = [row for row in self.tables.starts if row.task == task]
            episodes = sum(row.episodes for row in rows if row.other == task)
            shares = {
                other: sum(row.nearest for row in rows if row.other == other) / episodes
                for other in self.tasks
                if episodes and other != task
            }
            if sum(shares.values()) > LOOK_ALIKE_SHARE:
                alike[task] = {other: share for other, share in shares.items() if share}
        return alike

    @property
    def teacher_scores(self) -> list[float]:
        """Success of every teacher, 0 for a rejected one, so that teachers compare with average performance."""
        return [0.0 if key in self.rejected else rate.rate for key, rate in self.teacher_rates.items()]

    def teachers_of(self, task: str) -> list[Rate]:
        """Return the success of every teacher of a task, in the order of seeds."""
        return [rate for (name, _), rate in sorted(self.teacher_rates.items()) if name == task]


def mean_rate(rates: Sequence[Rate | None]) -> float:
    """Return the mean over seeds, NaN if nothing was measured."""
    measured = [rate.rate for rate in rates if rate is not None]
    return float(np.mean(measured)) if measured else np.nan


def load_dataset(folders: Sequence[Path]) -> Dataset:
    """Read results folders as one data set.

    Raises:
        ValueError: if their streams or conditions differ, or if two of them have the same method.
    """
    tables = [read_tables(folder) for folder in folders]
    summaries = [summarize(table) for table in tables]
    _check_comparable(tables, summaries)
    merged = merge_tables(tables)
    distill = {
        method.method: table.method_config(method.method)["distill"]
        for table, summary in zip(tables, summaries, strict=True)
        for method in summary.methods
    }
    return Dataset(
        name=" + ".join(dict.fromkeys(s.name for s in summaries)),
        labels=_joined([s.labels for s in summaries]),
        tables=merged,
        students=tuple(student for s in summaries for student in s.students),
        methods=tuple(method for s in summaries for method in s.methods),
        distill=distill,
        task_identities={row.method: row.task_identity for row in merged.evaluations if row.method != TEACHER},
        teacher_rates=dict(_teacher_rates(merged)),
        rejected=frozenset((row.task, row.seed) for row in merged.teachers if row.state == "rejected"),
        teacher_curves=tuple({(c.task, c.seed): c for t in tables for c in _teacher_curves(t)}.values()),
        timings=tuple(entry for t in tables for entry in _timings(t)),
        missing=tuple(_missing(summaries)),
    )


def _missing(summaries: Sequence[Summary]) -> Iterable[str]:
    """Yield what the folders together lack: a method's students may be in only one of several folders."""
    yield from dict.fromkeys(
        line for s in summaries for line in s.missing if line not in without_students(s.unevaluated)
    )
    evaluated = {method.method for s in summaries for method in s.methods}
    yield from without_students(
        [m for m in dict.fromkeys(m for s in summaries for m in s.unevaluated) if m not in evaluated]
    )


def _check_comparable(tables: Sequence[Tables], summaries: Sequence[Summary]) -> None:
    """Raise ValueError unless streams, goals, conditions and teachers agree, and no method occurs twice."""
    folder_of: dict[str, Path] = {}
    for table, summary in zip(tables, summaries, strict=True):
        if table.stream != tables[0].stream:
            raise ValueError(f"{table.folder} and {tables[0].folder} have different streams; build each alone")
        if table.goal_set != tables[0].goal_set:
            raise ValueError(
                f"{table.folder} was evaluated on {table.goal_set} goals and {tables[0].folder} on "
                f"{tables[0].goal_set} goals, which cannot be compared; build each alone"
            )
        differing = _differences(summary.labels, summaries[0].labels)
        if differing:
            raise ValueError(
                f"{table.folder} and {tables[0].folder} have different conditions ({differing}), which cannot be "
                "compared; build each alone"
            )
        for method in summary.methods:
            if method.method in folder_of:
                raise ValueError(
                    f"{folder_of[method.method]} and {table.folder} both have method {method.method!r}; "
                    "name one run of each method, with all its seeds"
                )
            folder_of[method.method] = table.folder
    _check_same_teachers(tables)


def _check_same_teachers(tables: Sequence[Tables]) -> None:
    """Raise ValueError unless all students learned from the same teachers, admitted by the same gate."""
    teachers: dict[tuple[str, int], tuple[Path, Rate]] = {}
    for table in tables:
        gate, first = table.config["teacher"]["gate"], tables[0].config["teacher"]["gate"]
        if gate != first:
            raise ValueError(
                f"{table.folder} and {tables[0].folder} admitted teachers by different gates, {gate} and {first}; "
                "build each alone"
            )
        for (task, seed), rate in _teacher_rates(table):
            folder, other = teachers.setdefault((task, seed), (table.folder, rate))
            if rate != other:
                raise ValueError(
                    f"{table.folder} and {folder} have different teachers of {task} (seed {seed}; successes "
                    f"{rate.successes}/{rate.episodes} and {other.successes}/{other.episodes}); build each alone"
                )


def _joined(labels: Sequence[dict[str, str]]) -> dict[str, str]:
    values = {key: [value for label in labels for value in label[key].split("/")] for key in labels[0]}
    return {key: "/".join(dict.fromkeys(parts)) for key, parts in values.items()}


def _differences(left: dict[str, str], right: dict[str, str]) -> str:
    """Describe the labels that differ, except the task identity, which is a property of the method."""
    keys = [key for key in {**left, **right} if key != "task_identity" and left.get(key) != right.get(key)]
    return ", ".join(f"{key} {left.get(key)!r} and {right.get(key)!r}" for key in keys)


def _teacher_rates(tables: Tables) -> Iterable[tuple[tuple[str, int], Rate]]:
    for row in tables.evaluations:
        if row.method == TEACHER and row.goal_set == tables.goal_set:
            yield (row.task, row.seed), Rate.of(row.total, row.episodes)


def _teacher_curves(tables: Tables) -> Iterable[TeacherCurve]:
    path = tables.folder / "teacher_curves.csv"
    if not find_table(path):
        return
    records = read_rows(path, TrainingRow, is_open=True)
    foreign = {(r.task, r.seed) for r in records} - {(t.task, t.seed) for t in tables.teachers}
    for task, seed in sorted(foreign):
        raise DamagedFileError(f"{path} has rows of {task} seed {seed}, which teachers.csv lacks: restore it")
    for teacher in tables.teachers:
        rows = [r for r in records if (r.task, r.seed) == (teacher.task, teacher.seed) and r.env_steps is not None]
        validated = [r for r in rows if r.validation_success is not None]
        if rows:
            yield TeacherCurve(
                teacher.task,
                teacher.seed,
                teacher.state,
                _numbers(rows, "env_steps"),
                _numbers(validated, "env_steps"),
                _numbers(validated, "validation_success"),
                _numbers(rows, "train_success"),
            )


def _numbers(rows: Sequence[TrainingRow], column: str) -> tuple[float, ...]:
    return tuple(np.nan if (value := getattr(row, column)) is None else float(value) for row in rows)


def _timings(tables: Tables) -> list[Timing]:
    timings = read_for_display(tables.folder / "timings.json", list[Timing], [])
    # The report writes timings.json before it ends, so its own spans are only in its status.
    report = read_status(tables.folder / "status.json")
    return [*timings, Timing(role="report", spans=report.spans)] if report.spans else timings


def mean_matrix(students: Sequence[StudentResults]) -> Floats:
    """Return the (K+1, J) success matrix, averaged over the seeds that measured a cell; NaN where none did."""
    rates = np.stack([student.matrix.rates for student in students])
    measured = ~np.isnan(rates)
    with np.errstate(invalid="ignore"):
        mean: Floats = np.where(measured, rates, 0.0).sum(axis=0) / measured.sum(axis=0)
    return mean
