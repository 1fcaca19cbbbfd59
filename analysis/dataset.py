"""Reads one or more results folders into the data that figures and tables are made from."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpd.evaluation.intervals import Floats
from cpd.evaluation.results_folder import TEACHER, Tables, merge_tables, read_tables
from cpd.evaluation.student_measures import Rate, StudentResults
from cpd.evaluation.summary import MethodMeasures, Summary, summarize, without_students
from cpd.run.files import read_json
from cpd.run.progress import read_status
from cpd.run.tables import find_table, read_table

#: A task looks like others if more than this share of its episodes begin nearer to one of another task.
ALIKE = 0.05


def short(task: str) -> str:
    """A task's name without the version of Meta-World's task set."""
    return task.removesuffix("-v3")


@dataclass(frozen=True)
class TeacherCurve:
    """Training of one teacher; all tuples run along its records."""

    task: str
    seed: int
    state: str
    env_steps: tuple[float, ...]
    validation_steps: tuple[float, ...]
    """Steps at which it was validated, for `validation`."""
    validation: tuple[float, ...]
    training: tuple[float, ...]
    """Success rate of the episodes it trained on, NaN where none ended."""


@dataclass(frozen=True)
class Dataset:
    """Results of one stream under one set of conditions: students by method and seed, and their teachers."""

    name: str
    labels: dict[str, str]
    tables: Tables
    """The rows of all results folders, with the configuration of the first."""
    students: tuple[StudentResults, ...]
    methods: tuple[MethodMeasures, ...]
    distill: dict[str, dict[str, Any]]
    """The distillation settings of every method."""
    task_identities: dict[str, str]
    """How a method's students come to know the task."""
    teacher_rates: dict[tuple[str, int], Rate]
    """Teachers' success by task and teacher seed."""
    rejected: frozenset[tuple[str, int]]
    """Those of them that missed the gate."""
    teacher_curves: tuple[TeacherCurve, ...]
    timings: tuple[dict[str, Any], ...]
    missing: tuple[str, ...]

    @property
    def stream(self) -> tuple[str, ...]:
        """The task of every stage."""
        return self.tables.stream

    @property
    def goals(self) -> str:
        """What success was measured on: `held-out` or `validation` goals."""
        return self.tables.goal_set.replace("_", "-")

    @property
    def gate(self) -> float:
        """The success on validation goals that admits a teacher."""
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
        """The students of one method, seed by seed: those evaluated to the stream's end, or all while none is.

        So all of a method's numbers are of the same seeds, however far the others have come.
        """
        own = [student for student in self.students if student.method == method]
        return [student for student in own if student.measures.final_stage is not None] or own

    @property
    def look_alikes(self) -> dict[str, dict[str, float]]:
        """Tasks that the first observation does not tell from others: how often it is nearest to each other's."""
        found: dict[str, dict[str, float]] = {}
        for task in self.tasks:
            rows = [row for row in self.tables.starts if row.task == task]
            episodes = sum(row.episodes for row in rows if row.other == task)
            shares = {
                other: sum(row.nearest for row in rows if row.other == other) / episodes
                for other in self.tasks
                if episodes and other != task
            }
            if sum(shares.values()) > ALIKE:
                found[task] = {other: share for other, share in shares.items() if share}
        return found

    @property
    def teacher_scores(self) -> list[float]:
        """Success of every teacher, 0 for one that missed the gate, as students' tasks without a teacher count."""
        return [0.0 if key in self.rejected else rate.rate for key, rate in self.teacher_rates.items()]

    def teachers_of(self, task: str) -> list[Rate]:
        """Success of every teacher of a task, seed by seed."""
        return [rate for (name, _), rate in sorted(self.teacher_rates.items()) if name == task]


def mean_rate(rates: Sequence[Rate | None]) -> float:
    """Return the mean over seeds, NaN if nothing was measured."""
    measured = [rate.rate for rate in rates if rate is not None]
    return float(np.mean(measured)) if measured else np.nan


def load_dataset(folders: Sequence[Path]) -> Dataset:
    """Read results folders as one data set.

    Raises:
        ValueError: if they differ in their stream or conditions, or if a method and seed stands in two of them.
    """
    tables = [read_tables(folder) for folder in folders]
    summaries = [summarize(table) for table in tables]
    _check_alike(tables, summaries)
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
    """What is missing in all of them together: a method's students may be in one alone."""
    yield from dict.fromkeys(
        line for s in summaries for line in s.missing if line not in without_students(s.unseen)
    )
    seen = {method.method for s in summaries for method in s.methods}
    yield from without_students(
        [m for m in dict.fromkeys(m for s in summaries for m in s.unseen) if m not in seen]
    )


def _check_alike(tables: Sequence[Tables], summaries: Sequence[Summary]) -> None:
    seen: dict[str, Path] = {}
    for table, summary in zip(tables, summaries, strict=True):
        if table.stream != tables[0].stream:
            raise ValueError(
                f"{table.folder} and {tables[0].folder} have different streams: build them one by one"
            )
        if table.goal_set != tables[0].goal_set:
            raise ValueError(
                f"{table.folder} was evaluated on {table.goal_set} goals and {tables[0].folder} on "
                f"{tables[0].goal_set} ones, which must not stand in one figure: build them one by one"
            )
        differing = _differences(summary.labels, summaries[0].labels)
        if differing:
            raise ValueError(
                f"{table.folder} and {tables[0].folder} were made under different conditions, which must not "
                f"stand in one figure: {differing}; build them one by one"
            )
        for method in summary.methods:
            if method.method in seen:
                raise ValueError(
                    f"method {method.method!r} stands in both {seen[method.method]} and {table.folder}; "
                    "give one run of each method, with all its seeds"
                )
            seen[method.method] = table.folder
    _check_same_teachers(tables)


def _check_same_teachers(tables: Sequence[Tables]) -> None:
    """What is drawn together must have learned from the same teachers, admitted by the same gate."""
    known: dict[tuple[str, int], tuple[Path, Rate]] = {}
    for table in tables:
        gate, first = table.config["teacher"]["gate"], tables[0].config["teacher"]["gate"]
        if gate != first:
            raise ValueError(
                f"{table.folder} and {tables[0].folder} admitted teachers by different gates, {gate} and {first}: "
                "build them one by one"
            )
        for (task, seed), rate in _teacher_rates(table):
            folder, other = known.setdefault((task, seed), (table.folder, rate))
            if rate != other:
                raise ValueError(
                    f"{table.folder} and {folder} have different teachers of {task} (seed {seed}; successes "
                    f"{rate.successes}/{rate.episodes} and {other.successes}/{other.episodes}): build them one by "
                    "one"
                )


def _joined(labels: Sequence[dict[str, str]]) -> dict[str, str]:
    parts = {key: [part for label in labels for part in label[key].split("/")] for key in labels[0]}
    return {key: "/".join(dict.fromkeys(values)) for key, values in parts.items()}


def _differences(left: dict[str, str], right: dict[str, str]) -> str:
    """What differs; the student's task identity may, since that is a property of the method."""
    keys = [key for key in left if key != "task_identity" and left[key] != right[key]]
    return ", ".join(f"{key} {left[key]!r} and {right[key]!r}" for key in keys)


def _teacher_rates(tables: Tables) -> Iterable[tuple[tuple[str, int], Rate]]:
    for row in tables.evaluations:
        if row.method == TEACHER and row.goal_set == tables.goal_set:
            yield (row.task, row.seed), Rate.of(row.successes, row.episodes)


def _teacher_curves(tables: Tables) -> Iterable[TeacherCurve]:
    path = tables.folder / "teacher_curves.csv"
    if not find_table(path):
        return
    records = list(csv.DictReader(io.StringIO(read_table(path), newline="")))

    def numbers(rows: Sequence[dict[str, str]], key: str) -> tuple[float, ...]:
        return tuple(float(row.get(key) or "nan") for row in rows)

    for teacher in tables.teachers:
        rows = [r for r in records if (r["task"], int(r["seed"])) == (teacher.task, teacher.seed)]
        rows = [r for r in rows if r.get("env_steps")]
        validated = [r for r in rows if r.get("validation_success")]
        if rows:
            yield TeacherCurve(
                teacher.task,
                teacher.seed,
                teacher.state,
                numbers(rows, "env_steps"),
                numbers(validated, "env_steps"),
                numbers(validated, "validation_success"),
                numbers(rows, "train_success"),
            )


def _timings(tables: Tables) -> list[dict[str, Any]]:
    path = tables.folder / "timings.json"
    found: list[dict[str, Any]] = read_json(path) if path.exists() else []
    # The report cannot have counted itself; its own status lies beside what it gathered.
    report = read_status(tables.folder / "status.json")
    return [*found, {"role": "report", "spans": report.spans}] if report.spans else found


def mean_matrix(students: Sequence[StudentResults]) -> Floats:
    """(K+1, J) success matrix averaged over the seeds that measured a cell, NaN where none did."""
    rates = np.stack([student.matrix.rates for student in students])
    measured = ~np.isnan(rates)
    with np.errstate(invalid="ignore"):
        mean: Floats = np.where(measured, rates, 0.0).sum(axis=0) / measured.sum(axis=0)
    return mean
