"""The measures of every student and method in a results folder, and a list of what is missing there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cpd.evaluation import intervals, measures
from cpd.evaluation.intervals import Aggregate, Floats
from cpd.evaluation.measures import Bools
from cpd.evaluation.results_folder import TEACHER, Tables, labels_of
from cpd.evaluation.student_measures import Estimate, StudentMeasures, StudentResults, measure_student

#: Distillation settings that a method must share with the students of single tasks to measure its transfer.
SHARED_SETTINGS = ("steps_per_stage", "batch_size")


@dataclass(frozen=True)
class ForwardTransfer:
    """How much faster a method learns than students of single tasks; see `measures.forward_transfer`."""

    by_stage: tuple[float | None, ...]
    """Mean over seeds; None for stages that are left out or were not measured."""
    mean: Aggregate
    """Over the stages that were measured for every seed."""
    left_out: tuple[str, ...]
    """Tasks that the single-task student has learned by its first evaluation, so that no gain is possible."""


@dataclass(frozen=True)
class MethodMeasures:
    """The measures of a method over its seeds."""

    method: str
    seeds: tuple[int, ...]
    """Seeds whose student is evaluated to the end of the stream; the measures are over these."""
    unfinished_seeds: tuple[int, ...]
    average_performance: dict[str, Aggregate]
    """By statistic: mean, interquartile_mean, worst_task; empty without finished seeds, as the next two."""
    forgetting: dict[str, Aggregate]
    recovery: dict[str, Aggregate]
    worst_tasks: dict[str, str]
    """The task of `worst_task` by measure, the first of equal ones; absent if all tasks are equal."""
    memory_steps: int | None
    """Largest number of time steps stored after a stage; None without `stages.csv`."""
    parameters: int | None
    """Number of parameters of a student at the end; None without `stages.csv`."""
    forward_transfer: ForwardTransfer | None
    """None if the results lack single-task students (`distill.protocol`) with the same `SHARED_SETTINGS`."""


@dataclass(frozen=True)
class Summary:
    """Everything that is derived from a results folder."""

    name: str
    labels: dict[str, str]
    """Conditions of the results; different values are joined by a slash."""
    stream: tuple[str, ...]
    students: tuple[StudentResults, ...]
    methods: tuple[MethodMeasures, ...]
    missing: tuple[str, ...]
    """What has not been done or measured, one sentence each."""
    unevaluated: tuple[str, ...]
    """Methods without any evaluated student, listed in one sentence of `missing`."""

    def to_json(self) -> dict[str, Any]:
        """Return the measures as plain values for metrics.json."""
        return {
            "name": self.name,
            "labels": self.labels,
            "stream": list(self.stream),
            "missing": list(self.missing),
            "methods": [asdict(method) for method in self.methods],
            "students": [asdict(student.measures) for student in self.students],
        }


def summarize(tables: Tables) -> Summary:
    """Compute all measures from the tables."""
    keys = dict.fromkeys((r.method, r.seed) for r in tables.evaluations if r.method != TEACHER)
    students = tuple(measure_student(tables, method, seed) for method, seed in keys)
    methods = dict.fromkeys(student.method for student in students)
    unevaluated = tuple(method for method in tables.methods if method not in methods)
    return Summary(
        name=tables.config["name"],
        labels=labels_of(tables.evaluations),
        stream=tables.stream,
        students=students,
        methods=tuple(_method(method, students, tables) for method in methods),
        missing=tuple(_missing(tables, students, unevaluated)),
        unevaluated=unevaluated,
    )


def _reference(method: str, students: Sequence[StudentResults], tables: Tables) -> list[StudentResults]:
    """Return the students of single tasks that a method's forward transfer is relative to."""
    settings = {name: tables.method_config(name)["distill"] for name in {method, *(s.method for s in students)}}
    # Single-task students cannot gain from other tasks: their transfer would only show the noise of seeds.
    if settings[method]["protocol"] == "single_task":
        return []
    return [
        student
        for student in students
        if settings[student.method]["protocol"] == "single_task"
        and all(settings[student.method][key] == settings[method][key] for key in SHARED_SETTINGS)
    ]


def _method(method: str, all_students: Sequence[StudentResults], tables: Tables) -> MethodMeasures:
    students = [student for student in all_students if student.method == method]
    finished = [s for s in students if s.measures.average_performance.value is not None]
    stages = [row for row in tables.stages if row.method == method]
    scores = {
        "average_performance": [finals(s) for s in finished],
        "forgetting": [_drops(s) for s in finished],
        "recovery": [shares(s) for s in finished],
    }
    aggregates: dict[str, dict[str, Aggregate]] = {name: {} for name in scores}
    worst_tasks = {}
    for name, rows in scores.items():
        table = np.array(rows).reshape(len(rows), len(students[0].matrix.tasks))
        # Different seeds may have different admitted teachers: average over the tasks that all seeds have.
        columns = np.flatnonzero(~np.isnan(table).any(axis=0))
        if len(finished) and len(columns):
            # The worst task has the lowest mean, but of forgetting the highest.
            sign, worst = (-1, intervals.highest_task) if name == "forgetting" else (1, intervals.lowest_task)
            table = table[:, columns]
            aggregates[name] = {
                "mean": intervals.over_seeds(table, intervals.mean_score),
                "interquartile_mean": intervals.over_seeds(table, intervals.interquartile_mean),
                "worst_task": intervals.over_seeds(table, worst),
            }
            # If all tasks are equal, none of them is the worst.
            means = sign * table.mean(axis=0)
            if means.min() < means.max():
                worst_tasks[name] = finished[0].matrix.tasks[columns[int(means.argmin())]]
    return MethodMeasures(
        method,
        seeds=tuple(s.seed for s in finished),
        unfinished_seeds=tuple(s.seed for s in students if s not in finished),
        **aggregates,
        worst_tasks=worst_tasks,
        memory_steps=max((row.memory_steps for row in stages), default=None),
        parameters=stages[-1].parameters if stages else None,
        forward_transfer=_forward_transfer(students, _reference(method, all_students, tables)),
    )


def _forward_transfer(
    students: Sequence[StudentResults], reference: Sequence[StudentResults]
) -> ForwardTransfer | None:
    if not reference:
        return None
    # The baseline is the mean over the reference's seeds, so that each seed of the method is compared with it.
    alone = [student.measures.areas for student in reference]
    at_most = [student.areas_at_most for student in reference]
    areas = np.array([student.measures.areas for student in students], float)
    gains, left_out = measures.forward_transfer(areas, _mean(alone), _mean(at_most))
    # Only stages that every seed has: otherwise seeds would be averaged over different tasks.
    measured: Bools = np.array(~np.isnan(gains).any(axis=0))
    if not measured.any():
        return None
    return ForwardTransfer(
        by_stage=tuple(
            float(gain) if is_measured else None for gain, is_measured in zip(gains.mean(0), measured, strict=True)
        ),
        mean=intervals.over_seeds(gains[:, measured], intervals.mean_score),
        left_out=tuple(
            dict.fromkeys(task for task, out in zip(students[0].matrix.stream, left_out, strict=True) if out)
        ),
    )


def _mean(rows: Sequence[Sequence[float | None]]) -> Floats:
    """Return (K,) means over the rows that were measured, NaN where none was."""
    table = np.array(rows, float)  # None becomes NaN
    with np.errstate(invalid="ignore"):  # not np.nanmean, which warns of columns without values
        mean: Floats = np.nansum(table, axis=0) / (~np.isnan(table)).sum(axis=0)
    return mean


def interval(
    mean: Aggregate, students: Sequence[StudentMeasures], measure: str
) -> tuple[float | None, float | None]:
    """Return the 95 % interval of a method's mean over seeds: None and None for two to four seeds.

    For a single seed it is the interval from episode counts, the only one that is defined.
    """
    if len(students) == 1:
        estimate: Estimate = getattr(students[0], measure)
        return estimate.low, estimate.high
    return mean.low, mean.high


def finals(student: StudentResults) -> Floats:
    """Return (J,) success at the end of the stream, 0 for tasks without an admitted teacher."""
    assert student.measures.final_stage is not None
    return np.where(student.admitted, student.matrix.rates[student.measures.final_stage + 1], 0.0)


def _drops(student: StudentResults) -> Floats:
    """Return (J,) forgetting, NaN for the last task and for tasks without an admitted teacher."""
    last_stages = measures.own_stages(student.matrix.stream)
    last = max(last_stages[student.admitted], default=-1)
    drops = np.array([task.forgetting for task in student.measures.tasks], float)
    return np.where(last_stages < last, drops, np.nan)


def shares(student: StudentResults) -> Floats:
    """Return (J,) recovery, clipped at 1 as in its mean, NaN where it is undefined."""
    shares: Floats = np.array([task.recovery for task in student.measures.tasks], float).clip(max=1.0)
    return shares


def without_students(methods: Sequence[str]) -> list[str]:
    """Return a sentence about methods without any evaluated student, if there are any."""
    return [f"no student of {', '.join(methods)} has been evaluated"] if methods else []


def _missing(tables: Tables, students: Sequence[StudentResults], unevaluated: Sequence[str]) -> Iterable[str]:
    for teacher in tables.teachers:
        who = f"teacher {teacher.task} (seed {teacher.seed})"
        if teacher.state == "rejected":
            yield f"{who} missed its gate: 0 in the average performance, left out of forgetting and recovery"
        elif teacher.state != "admitted":
            yield f"{who} is not finished ({teacher.state})"
    evaluated = {(student.method, student.seed) for student in students}
    yield from without_students(unevaluated)
    yield from (
        f"student {method} (seed {seed}) has not been evaluated"
        for method in tables.methods
        for seed in tables.config["seeds"]
        if method not in unevaluated and (method, seed) not in evaluated
    )
    for student in students:
        who = f"student {student.method} (seed {student.seed})"
        admitted = dict(zip(student.matrix.tasks, student.admitted, strict=True))
        # The untrained student is stage -1; stages of rejected teachers are skipped and have no row.
        distilled = [-1, *(k for k, task in enumerate(student.matrix.stream) if admitted[task])]
        lacking = [str(k) for k in distilled if not student.matrix.episodes[k + 1].any()]
        if lacking:
            yield f"{who} has not been evaluated after stages {', '.join(lacking)}"
        for task in student.measures.tasks:
            if task.teacher_state == "admitted" and task.teacher is None:
                yield f"{who}: the teacher of {task.task} has not been evaluated"
            elif task.teacher_state == "admitted" and task.teacher and not task.teacher.successes:
                yield f"{who}: the teacher of {task.task} never succeeds; the task is left out of recovery"
