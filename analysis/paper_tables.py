"""Tables of results: CSV with exact numbers; LaTeX (booktabs) and Markdown with rounded ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, fields
from operator import attrgetter
from pathlib import Path

import numpy as np

from analysis.beliefs import Beliefs, beliefs
from analysis.captions import look_alikes
from analysis.dataset import LOOK_ALIKE_SHARE, Dataset, mean_matrix, short
from analysis.table_files import Cell, Table, escape, write_csv, write_markdown, write_tex
from cpd.evaluation.intervals import Aggregate, Floats, probability_of_improvement
from cpd.evaluation.student_measures import Rate, StudentMeasures, TaskMeasures
from cpd.evaluation.summary import MethodMeasures, finals, interval, shares

#: Columns of the table of seeds, and the values of `StudentMeasures` in them.
SEED_COLUMNS = {
    "method": "method",
    "seed": "seed",
    "teacher_seed": "teacher_seed",
    "final_stage": "final_stage",
    "average_performance": "average_performance.value",
    "average_performance_low": "average_performance.low",
    "average_performance_high": "average_performance.high",
    "recovery": "recovery.value",
    "recovery_low": "recovery.low",
    "recovery_high": "recovery.high",
    "recovery_unclipped": "recovery_unclipped",
    "recovery_ratio_of_means": "recovery_ratio_of_means",
    "least_recovered": "least_recovered",
    "forgetting": "forgetting.value",
    "forgetting_low": "forgetting.low",
    "forgetting_high": "forgetting.high",
    "forgetting_over_all_tasks": "forgetting_over_all",
    "forgetting_max_based": "forgetting_max_based",
    "most_forgotten": "most_forgotten",
}


def write_tables(folder: Path, data: Dataset, notes: str) -> list[Path]:
    """Write all tables, with the conditions in every CSV row and below every other table; return their paths."""
    written = []
    starts = start_table(data)
    tables = (task_table(data), seed_table(data), method_table(data), *([starts] if starts else []))
    for table in (*tables, *matrix_tables(data)):
        written += [write_csv(folder, table, data.labels)]
        if table.tex_rows:
            written += [write_tex(folder, table, notes), write_markdown(folder, table, notes)]
    return written


def task_table(data: Dataset) -> Table:
    """Return one row per method, seed and task."""
    rates = ("teacher", "before", "own_stage", "final", "final_training_goals")
    counts = [f"{name}_{count}" for name in rates for count in ("successes", "episodes", "success", "low", "high")]
    rows: list[tuple[Cell, ...]] = []
    for student in data.students:
        for task in student.measures.tasks:
            values = (task.teacher, task.before, task.own, task.final, task.final_training)
            cells = [cell for rate in values for cell in _rate_cells(rate)]
            last = task.final_last.successes if task.final_last else None
            key = (student.method, student.seed, task.task, task.teacher_state)
            rows.append((*key, *cells, last, task.forgetting, task.recovery))
    head = ("method", "seed", "task", "teacher_state")
    return Table(
        "table_tasks",
        (*head, *counts, "final_successes_last_step", "forgetting", "recovery"),
        tuple(rows),
        ("Task", "Teacher", "Own stage", "Final", "Forgetting", "Recovery"),
        tuple(_task_tex(data)),
        f"{data.measure.capitalize()} in per cent by task on {data.name}: teachers, the student after the task's "
        "own stage and at the end of the stream. Brackets: Wilson 95 % intervals of single runs; "
        "parentheses: the range of several. The recovery of a task may exceed 100 here; it counts as "
        "100 in means.",
    )


def _task_tex(data: Dataset) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = []
    for method in data.method_names:
        students = data.of_method(method)
        if len(data.method_names) > 1:
            lines.append((r"\emph{" + escape(method) + "}", "", "", "", "", ""))
        for row, task in enumerate(data.tasks):
            measured = [student.measures.tasks[row] for student in students]
            lines.append((escape(short(task)), *task_cells(data, task, measured)))
    return lines


def task_cells(data: Dataset, task: str, measured: Sequence[TaskMeasures]) -> tuple[str, str, str, str, str]:
    """Return teacher, own stage, final, forgetting and recovery of a task in per cent, over a method's seeds."""
    rejected = any(m.teacher_state == "rejected" for m in measured)
    return (
        rate_text(data.teachers_of(task)) + (" rejected" if rejected else ""),
        rate_text([m.own for m in measured]),
        rate_text([m.final for m in measured]),
        _mean_text([m.forgetting for m in measured]),
        _mean_text([m.recovery for m in measured]),
    )


def rate_text(rates: Sequence[Rate | None]) -> str:
    """Format rates in per cent: `96 [87, 99]` with the Wilson interval of one run, `96 (90 to 99)` of several."""
    measured = [rate for rate in rates if rate is not None]
    if len(measured) == 1:
        (rate,) = measured
        return f"{percent(rate.rate)} [{percent(rate.low)}, {percent(rate.high)}]"
    return _range_text([rate.rate for rate in measured], digits=0)


def percent(value: float, digits: int = 0) -> str:
    """Format a share in per cent, without a minus sign before zero."""
    return f"{round(100 * value, digits) + 0.0:.{digits}f}"


def _mean_text(values: Sequence[float | None]) -> str:
    measured = [value for value in values if value is not None]
    return percent(sum(measured) / len(measured)) if measured else "–"


def seed_table(data: Dataset) -> Table:
    """Return one row per method and seed: the main measures and their variants."""
    values = attrgetter(*SEED_COLUMNS.values())
    rows = ((*values(s.measures), " ".join(s.measures.without_teacher)) for s in data.students)
    return Table("table_seeds", (*SEED_COLUMNS, "tasks_without_teacher"), tuple(rows))


def method_table(data: Dataset) -> Table:
    """Return one row per method: every measure over its seeds, with the worst task."""
    names = ("average_performance", "recovery", "forgetting")
    statistics = ("mean", "interquartile_mean", "worst_task")
    rows: list[tuple[Cell, ...]] = []
    lines: list[tuple[str, ...]] = []
    for method in data.methods:
        measures: dict[str, dict[str, Aggregate]] = {name: getattr(method, name) for name in names}
        aggregates = [measures[name].get(statistic) for name in names for statistic in statistics]
        aggregates.append(method.forward_transfer.mean if method.forward_transfer else None)
        cells = [cell for a in aggregates for cell in ((a.estimate, a.low, a.high) if a else (None,) * 3)]
        key = (method.method, len(method.seeds), method.memory_steps, method.parameters)
        students = [s.measures for s in data.of_method(method.method) if s.seed in method.seeds]
        last = [value for value in map(last_step, students) if value is not None]
        held = beliefs(data, method.method)
        rows.append(
            (
                *(*key, *cells, _improvement(data, method), data.task_identities[method.method]),
                _mean(np.array(last)),
                *(astuple(held) if held else (None,) * len(fields(Beliefs))),
            )
        )
        texts = [headline(measures[name], students, name) for name in names]
        worst = [worst_text(measures[name], method.worst_tasks.get(name)) for name in names]
        pairs = [text for pair in zip(texts, worst, strict=True) for text in pair]
        memory = "–" if method.memory_steps is None else f"{method.memory_steps:,}"
        size = "–" if method.parameters is None else f"{method.parameters / 1e6:.2f} M"
        head = (escape(method.method), task_source(data, method.method), str(len(method.seeds)), memory, size)
        lines.append((*head, pairs[0], _range_text(last), *pairs[1:]))
    measured = [f"{name}_{statistic}" for name in names for statistic in statistics]
    columns = [f"{name}{suffix}" for name in (*measured, "forward_transfer") for suffix in ("", "_low", "_high")]
    return Table(
        "table_methods",
        (
            *("method", "seeds", "memory_steps", "parameters", *columns, "improvement_by_first_method"),
            *("task_identity", "average_performance_last_step"),
            *(f"belief_{field.name}" for field in fields(Beliefs)),
        ),
        tuple(rows),
        (
            *("Method", "Task", "Seeds", "Memory", "Parameters", "AP", "at last step", "worst task"),
            *("Recovery", "worst task", "Forgetting", "worst task"),
        ),
        tuple(lines),
        f"Average performance (AP), recovery of the teachers' success and forgetting on {data.name}, in per cent, "
        "each with its worst task. A task in which a student does better than its teacher counts as recovered to "
        "100. Task: whether the student infers its task or is told it; – if it acts without. At last step: AP if "
        "only success at the last step counts. Memory: most time steps stored. Brackets: 95 % intervals, from "
        "episode counts for a single seed, by "
        "bootstrap over seeds from five on. Parentheses: the range of two to four seeds, in which the noise of "
        "episodes does not show. Students that do not learn one task after another cannot forget.",
    )


def task_source(data: Dataset, method: str) -> str:
    """Return how the students of a method know the task: `inferred`, `told`, or a dash."""
    return {"inferred": "inferred", "none": "–"}.get(data.task_identities[method], "told")


def last_step(student: StudentMeasures) -> float | None:
    """Return the average performance if only success at the last step counts; None where not measured."""
    rates = [task.final_last.rate if task.final_last else None for task in student.tasks]
    rates = [
        0.0 if task.task in student.without_teacher else rate
        for task, rate in zip(student.tasks, rates, strict=True)
    ]
    measured = [rate for rate in rates if rate is not None]
    return sum(measured) / len(rates) if len(measured) == len(rates) else None


def _improvement(data: Dataset, method: MethodMeasures) -> float | None:
    """Return the probability that the first method beats `method` on a task; ties count half."""
    first = data.methods[0]
    ours, others = (
        [finals(s) for s in data.of_method(m.method) if s.measures.seed in m.seeds] for m in (first, method)
    )
    if method is first or not (ours and others):
        return None
    return probability_of_improvement(np.array(ours), np.array(others))


def headline(measure: dict[str, Aggregate], students: Sequence[StudentMeasures], name: str) -> str:
    """Format a measure in per cent: `93.1 [90.2, 95.0]` with its interval, `93.1 (90.2 to 95.0)` with a range."""
    if "mean" not in measure:
        return "–"
    mean = measure["mean"]
    low, high = interval(mean, students, name)
    if low is None and len(students) > 1:
        return _range_text(mean.per_seed)
    if low is None or high is None:
        return percent(mean.estimate, 1)
    return f"{percent(mean.estimate, 1)} [{percent(low, 1)}, {percent(high, 1)}]"


def worst_text(measure: dict[str, Aggregate], task: str | None) -> str:
    """Format the worst task's mean over seeds in per cent: `52 (hammer)`, or `52` if all tasks are equal."""
    if "worst_task" not in measure:
        return "–"
    return percent(measure["worst_task"].estimate) + (f" ({short(task)})" if task else "")


def start_table(data: Dataset) -> Table | None:
    """Return results by whether episodes of a task begin nearest to another's; None if those of no task do."""
    alike = data.look_alikes
    groups = {"apart": [task for task in data.tasks if task not in alike], "alike": list(alike)}
    if not alike:
        return None
    rows: list[tuple[Cell, ...]] = []
    lines: list[tuple[str, ...]] = []
    for method in data.methods:
        students = [s for s in data.of_method(method.method) if s.seed in method.seeds]
        texts: list[str] = []
        for group, tasks in groups.items():
            columns = [data.tasks.index(task) for task in tasks]
            performance, recovery = ([_mean(of(s)[columns]) for s in students] for of in (finals, shares))
            rows += [
                (method.method, student.seed, group, len(tasks), *values)
                for student, *values in zip(students, performance, recovery, strict=True)
            ]
            texts += [_range_text(performance), _range_text(recovery)]
        lines.append((escape(method.method), str(len(students)), *texts))
    return Table(
        "table_look_alikes",
        ("method", "seed", "group", "tasks", "average_performance", "recovery"),
        tuple(rows),
        ("Method", "Seeds", "AP apart", "Recovery apart", "AP alike", "Recovery alike"),
        tuple(lines),
        f"Average performance (AP) and recovery on {data.name}, in per cent, by how episodes begin. Alike are "
        f"tasks of which more than {100 * LOOK_ALIKE_SHARE:.0f} % of the episodes begin nearest, in Euclidean "
        f"distance, to one of another task: {look_alikes(data)}. Parentheses: range of seeds.",
    )


def _mean(values: Floats) -> float | None:
    """Return the mean of the defined values."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else None


def _range_text(values: Sequence[float | None], digits: int = 1) -> str:
    """Format the mean and range over seeds in per cent: `93.1 (90.0 to 95.2)`."""
    measured = [value for value in values if value is not None]
    if len(measured) < 2:
        return percent(measured[0], digits) if measured else "–"
    low, high = percent(min(measured), digits), percent(max(measured), digits)
    return f"{percent(sum(measured) / len(measured), digits)} ({low} to {high})"


def matrix_tables(data: Dataset) -> list[Table]:
    """Return the success matrix of every method, averaged over seeds."""
    tables = []
    for method in data.method_names:
        rates = mean_matrix(data.of_method(method))
        stages = [("", -1), *((task, stage) for stage, task in enumerate(data.stream))]
        rows = [
            (method, stage, task, *(None if np.isnan(value) else float(value) for value in rates[stage + 1]))
            for task, stage in stages
        ]
        stem = "success_matrix" if len(data.method_names) == 1 else f"success_matrix_{method}"
        tables.append(Table(stem, ("method", "stage", "stage_task", *data.tasks), tuple(rows)))
    return tables


def _rate_cells(rate: Rate | None) -> tuple[Cell, ...]:
    return (rate.successes, rate.episodes, rate.rate, rate.low, rate.high) if rate else (None,) * 5
