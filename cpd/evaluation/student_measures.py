"""The measures of one student, from the tables of a results folder; `cpd.evaluation.measures` has the formulas."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpd.evaluation import intervals
from cpd.evaluation.intervals import Floats
from cpd.evaluation.measures import (
    Bools,
    Recovery,
    SuccessMatrix,
    area_under_curve,
    average_performance,
    final_stage,
    forgetting,
    own_stages,
    recovery,
    success_matrix,
)
from cpd.evaluation.results_folder import TEACHER, Tables
from cpd.run.tables import EvaluationRow


@dataclass(frozen=True)
class Rate:
    """A success rate, or a mean normalised return, with its Wilson 95 % interval.

    The variance of scores in [0, 1] is at most that of successes with the same mean, so the interval of a mean
    normalised return is rather too wide.
    """

    successes: int | float
    """Not an integer only for normalised returns, whose sum it is."""
    episodes: int
    rate: float
    low: float
    high: float

    @classmethod
    def of(cls, successes: float, episodes: float) -> Rate:
        """Compute the rate from counts; `episodes` must be at least 1."""
        low, high = intervals.wilson(successes, episodes)
        count = float(successes)
        number = int(count) if count.is_integer() else count
        return cls(number, int(episodes), count / float(episodes), float(low), float(high))


def _rate(successes: float, episodes: float) -> Rate | None:
    return Rate.of(successes, episodes) if episodes else None


@dataclass(frozen=True)
class Estimate:
    """A measure of one run with its 95 % interval from episode counts (MOVER); None where not measured."""

    value: float | None
    low: float | None = None
    high: float | None = None


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


@dataclass(frozen=True)
class TaskMeasures:
    """One task of one student, measured on the goals of `evaluation.goal_set` unless stated otherwise."""

    task: str
    stages: tuple[int, ...]
    """Its stages in the stream."""
    teacher_state: str
    teacher: Rate | None
    before: Rate | None
    """Before any training."""
    own: Rate | None
    """After the last of `stages`. None if the stage was skipped because the teacher was rejected, or if the
    student does not learn one task after another."""
    final: Rate | None
    final_last: Rate | None
    """Success at the last step of the episode, in the final row; None for a task without a success measure."""
    final_training: Rate | None
    """Success on training goals in the final row."""
    forgetting: float | None
    """None for students that do not learn one task after another (`distill.protocol`) and so cannot forget."""
    recovery: float | None
    """Not clipped at 1."""


@dataclass(frozen=True)
class StudentMeasures:
    """The measures of one student, defined in `cpd.evaluation.measures`."""

    method: str
    seed: int
    teacher_seed: int
    final_stage: int | None
    """None while the stream has not been evaluated to its end."""
    without_teacher: tuple[str, ...]
    """Tasks without an admitted teacher: 0 in the average performance, left out elsewhere."""
    average_performance: Estimate
    average_by_stage: tuple[float | None, ...]
    """Average performance over all tasks after stages -1 … K-1."""
    average_seen_by_stage: tuple[float | None, ...]
    """The same over the tasks whose stage has passed, with 0 for those without an admitted teacher."""
    forgetting: Estimate
    forgetting_over_all: float | None
    forgetting_max_based: float | None
    most_forgotten: str | None
    recovery: Estimate
    recovery_unclipped: float | None
    recovery_ratio_of_means: float | None
    least_recovered: str | None
    areas: tuple[float | None, ...]
    """Mean success on a stage's own task while it is distilled (area under the curve), by stage."""
    tasks: tuple[TaskMeasures, ...]


@dataclass(frozen=True)
class StudentResults:
    """One student: its success matrix, its measures, and further values that aggregates over students need."""

    method: str
    seed: int
    matrix: SuccessMatrix
    admitted: Bools
    """(J,) whether the task has an admitted teacher."""
    areas_at_most: tuple[float | None, ...]
    """By stage, what `measures.areas` would be if every episode within the stage succeeded."""
    measures: StudentMeasures


def measure_student(tables: Tables, method: str, seed: int) -> StudentResults:
    """Assemble the success matrix of one student and compute its measures.

    Raises:
        ValueError: if an evaluation is of no stage or task of the stream, or occurs twice.
    """
    rows = [r for r in tables.evaluations if r.method == method and r.seed == seed]
    matrix = success_matrix(rows, tables.stream, tables.goal_set)
    teacher_seed = tables.teacher_seed(seed)
    states = {t.task: t.state for t in tables.teachers if t.seed == teacher_seed}
    teachers = {
        r.task: (r.total, r.episodes)
        for r in tables.evaluations
        if r.method == TEACHER and r.seed == teacher_seed and r.goal_set == tables.goal_set
    }
    # A task without a row counts as admitted, because its teacher's folder may have been removed since training.
    # Only a recorded rejection shows that the student skipped the stage.
    admitted = np.array([states.get(task) != "rejected" for task in matrix.tasks])
    successes, episodes = np.array([teachers.get(task, (0, 0)) for task in matrix.tasks], float).T
    with np.errstate(invalid="ignore"):  # 0 / 0 of teachers that are not evaluated yet
        teacher_rates = successes / episodes
    # Joint and single-task students have no earlier success to lose: NaN makes every form of forgetting None.
    continual = tables.method_config(method)["distill"]["protocol"] in ("continual", "isolated", "teachers")
    final = final_stage(matrix.rates, matrix.stream, admitted)
    row = matrix.rates[final + 1] if final is not None else np.full(len(matrix.tasks), np.nan)
    # Until the stream is evaluated to its end, all of row K-1 is NaN, and so is every measure that needs it.
    forgotten = forgetting(
        matrix.rates if continual else np.full_like(matrix.rates, np.nan),
        matrix.stream,
        admitted,
        len(matrix.stream) - 1 if final is None else final,
    )
    last_stages = own_stages(matrix.stream)
    # Results may be gathered while teachers are not evaluated yet: recovery is of those that are.
    share = recovery(row, teacher_rates, admitted & (episodes > 0))
    reported = [row for row in rows if row.goal_set == tables.goal_set]
    training = success_matrix(rows, matrix.stream, "training")
    measures = StudentMeasures(
        method=method,
        seed=seed,
        teacher_seed=teacher_seed,
        final_stage=final,
        without_teacher=tuple(t for t, good in zip(matrix.tasks, admitted, strict=True) if not good),
        average_performance=_average_interval(matrix, final, admitted),
        average_by_stage=tuple(_number(average_performance(r, admitted)) for r in matrix.rates),
        average_seen_by_stage=_averages_over_seen_tasks(matrix, admitted),
        forgetting=_forgetting_interval(matrix, final, admitted, forgotten.mean),
        forgetting_over_all=_number(forgotten.over_all),
        forgetting_max_based=_number(forgotten.max_based),
        most_forgotten=None if forgotten.worst is None else matrix.tasks[forgotten.worst],
        recovery=_recovery_interval(matrix, final, successes, episodes, share),
        recovery_unclipped=_number(share.unclipped),
        recovery_ratio_of_means=_number(share.ratio_of_means),
        least_recovered=None if share.worst is None else matrix.tasks[share.worst],
        areas=tuple(_areas(tables, matrix, method, seed)),
        tasks=tuple(
            TaskMeasures(
                task=task,
                stages=tuple(k for k, name in enumerate(matrix.stream) if name == task),
                teacher_state=states.get(task, "waiting"),
                teacher=_rate(successes[j], episodes[j]),
                before=_cell(matrix, -1, j),
                own=_cell(matrix, int(last_stages[j]), j) if admitted[j] and continual else None,
                final=_cell(matrix, final, j),
                final_last=_last_step(reported, final, task),
                final_training=_cell(training, final, j),
                forgetting=_number(forgotten.per_task[j]),
                recovery=_number(share.per_task[j]),
            )
            for j, task in enumerate(matrix.tasks)
        ),
    )
    at_most = tuple(_areas(tables, matrix, method, seed, at_most=True))
    return StudentResults(method, seed, matrix, admitted, at_most, measures)


def rate_before(matrix: SuccessMatrix, stage: int, *, single_task: bool = False) -> float | None:
    """Return the success on a stage's own task just before that stage, None if not measured.

    A skipped stage has no row and does not change the student, so the row before it applies.

    Args:
        matrix: success matrix of one student.
        stage: from 0 on.
        single_task: whether every stage trains a separate student, starting from the untrained one.
    """
    measured = [k for k in range(1 if single_task else stage + 1) if matrix.episodes[k].any()]
    return _number(matrix.rates[measured[-1], matrix.tasks.index(matrix.stream[stage])]) if measured else None


def _cell(matrix: SuccessMatrix, stage: int | None, column: int) -> Rate | None:
    if stage is None:
        return None
    return _rate(matrix.successes[stage + 1, column], matrix.episodes[stage + 1, column])


def _last_step(rows: Sequence[EvaluationRow], final: int | None, task: str) -> Rate | None:
    row = next((row for row in rows if final is not None and (row.stage, row.task) == (final, task)), None)
    if row is None or row.successes_last is None or row.normalised_return is not None:
        return None
    return _rate(row.successes_last, row.episodes)


def _averages_over_seen_tasks(matrix: SuccessMatrix, admitted: Bools) -> tuple[float | None, ...]:
    averages: list[float | None] = [None]  # before training, no task has been seen
    for stage in range(len(matrix.stream)):
        seen = np.isin(matrix.tasks, matrix.stream[: stage + 1])
        averages.append(_number(average_performance(matrix.rates[stage + 1, seen], admitted[seen])))
    return tuple(averages)


def _row_rates(matrix: SuccessMatrix, rows: Any, columns: Any) -> tuple[Floats, Floats, Floats]:
    """Return (rate, low, high) of the given cells, each (J',)."""
    cells = rows, columns
    return matrix.rates[cells], *intervals.wilson(matrix.successes[cells], matrix.episodes[cells])


def _average_interval(matrix: SuccessMatrix, final: int | None, admitted: Bools) -> Estimate:
    if final is None:
        return Estimate(None)
    # The 0 of a task without a teacher is a convention, not an estimate: its interval has no width.
    rate, low, high = (np.where(admitted, values, 0.0) for values in _row_rates(matrix, final + 1, slice(None)))
    value = average_performance(rate, admitted)
    return Estimate(_number(value), *map(_number, intervals.mean_interval(rate, low, high)))


def _forgetting_interval(matrix: SuccessMatrix, final: int | None, admitted: Bools, value: float) -> Estimate:
    if final is None or np.isnan(value):
        return Estimate(None)
    last_stages = own_stages(matrix.stream)
    columns = np.flatnonzero(admitted & (last_stages < last_stages[admitted].max()))
    first, second = (_row_rates(matrix, rows, columns) for rows in (last_stages[columns] + 1, final + 1))
    low, high = intervals.difference_interval(first, second)
    return Estimate(value, *intervals.mean_interval(first[0] - second[0], low, high))


def _recovery_interval(
    matrix: SuccessMatrix, final: int | None, successes: Floats, episodes: Floats, share: Recovery
) -> Estimate:
    if final is None or np.isnan(share.mean):
        return Estimate(None)
    columns = np.flatnonzero(~np.isnan(share.per_task))
    teacher = successes[columns] / episodes[columns], *intervals.wilson(successes[columns], episodes[columns])
    low, high = intervals.ratio_interval(_row_rates(matrix, final + 1, columns), teacher)
    # The limits are clipped like the shares, so that the interval belongs to the clipped mean.
    clipped = (np.minimum(values, 1.0) for values in (share.per_task[columns], low, high))
    return Estimate(share.mean, *intervals.mean_interval(*clipped))


def _areas(
    tables: Tables, matrix: SuccessMatrix, method: str, seed: int, at_most: bool = False
) -> Iterable[float | None]:
    settings = tables.method_config(method)["distill"]
    length = settings["steps_per_stage"]
    for stage, task in enumerate(matrix.stream):
        # With `at_most`, step 0 keeps its value: no training can raise the success before the first step.
        points = sorted(
            (r.step, 1.0 if at_most and r.step else r.total / r.episodes)
            for r in tables.curves
            if (r.method, r.seed, r.stage, r.task) == (method, seed, stage, task)
        )
        if not points or points[-1][0] < length:  # the stage is still being distilled
            yield None
            continue
        start = rate_before(matrix, stage, single_task=settings["protocol"] in ("single_task", "isolated"))
        # Curves begin with the first evaluation within the stage; the row before the stage is their step 0.
        if points[0][0] > 0 and start is not None:
            points.insert(0, (0, start))
        yield area_under_curve([p[0] for p in points], [p[1] for p in points], length)
