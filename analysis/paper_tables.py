"""Tables for papers and for further work: CSV with exact numbers, LaTeX (booktabs) with rounded ones."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from analysis.captions import look_alikes
from analysis.dataset import Dataset, mean_matrix, short
from cpd.evaluation.intervals import Aggregate, Floats, probability_of_improvement
from cpd.evaluation.student_measures import Estimate, Rate, StudentMeasures, TaskMeasures
from cpd.evaluation.summary import MethodMeasures, finals, interval, shares
from cpd.run.files import write_text

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """One table in both forms."""

    stem: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    """Exact values, for the CSV file."""
    tex_columns: tuple[str, ...]
    tex_rows: tuple[tuple[str, ...], ...]
    caption: str


def write_tables(folder: Path, data: Dataset, notes: str) -> list[Path]:
    """Write all tables; the conditions stand in every row of a CSV file and under every LaTeX table."""
    written = []
    starts = start_table(data)
    tables = (task_table(data), seed_table(data), method_table(data), *([starts] if starts else []))
    for table in (*tables, *matrix_tables(data)):
        written += [_write_csv(folder, table, data.labels)]
        if table.tex_rows:
            written += [_write_tex(folder, table, notes), _write_markdown(folder, table, notes)]
    return written


def task_table(data: Dataset) -> Table:
    """One line per method, seed and task."""
    rates = ("teacher", "before", "own_stage", "final", "final_training_goals")
    counts = [f"{name}_{part}" for name in rates for part in ("successes", "episodes", "success", "low", "high")]
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
        f"Success in per cent by task on {data.name}: teachers, the student after the task's own stage and at the "
        "end of the stream. Brackets: Wilson 95 % intervals of single runs; parentheses: the range of several. "
        "The recovery of a task may exceed 100 here; it counts as 100 in means.",
    )


def _task_tex(data: Dataset) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = []
    methods = list(dict.fromkeys(student.method for student in data.students))
    for method in methods:
        students = data.of_method(method)
        if len(methods) > 1:
            lines.append((r"\emph{" + _escape(method) + "}", "", "", "", "", ""))
        for row, task in enumerate(data.tasks):
            measured = [student.measures.tasks[row] for student in students]
            lines.append((_escape(short(task)), *task_cells(data, task, measured)))
    return lines


def task_cells(data: Dataset, task: str, measured: Sequence[TaskMeasures]) -> tuple[str, str, str, str, str]:
    """Teacher, own stage, final, forgetting and recovery of one task, in per cent, over the seeds of a method."""
    rejected = any(m.teacher_state == "rejected" for m in measured)
    teacher = rate_text(data.teachers_of(task)) + (" rejected" if rejected else "")
    own, final = rate_text([m.own for m in measured]), rate_text([m.final for m in measured])
    return (
        teacher,
        own,
        final,
        _mean_text([m.forgetting for m in measured]),
        _mean_text([m.recovery for m in measured]),
    )


def rate_text(rates: Sequence[Rate | None]) -> str:
    """`96 [87, 99]`: per cent with one run's Wilson interval; `96 (90 to 99)` with the range of several; `–`."""
    found = [rate for rate in rates if rate is not None]
    if not found:
        return "–"
    values = [rate.rate for rate in found]
    if len(found) > 1:
        return f"{percent(sum(values) / len(values))} ({percent(min(values))} to {percent(max(values))})"
    return f"{percent(found[0].rate)} [{percent(found[0].low)}, {percent(found[0].high)}]"


def percent(value: float, digits: int = 0) -> str:
    """A share in per cent, without a minus before zero."""
    return f"{round(100 * value, digits) + 0.0:.{digits}f}"


def _mean_text(values: Sequence[float | None]) -> str:
    found = [value for value in values if value is not None]
    return percent(sum(found) / len(found)) if found else "–"


def seed_table(data: Dataset) -> Table:
    """One line per method and seed: the headline measures with their variants."""
    rows: list[tuple[Cell, ...]] = []
    for student in data.students:
        m = student.measures
        rows.append(
            (
                m.method,
                m.seed,
                m.teacher_seed,
                m.final_stage,
                *_estimate_cells(m.average_performance),
                *_estimate_cells(m.recovery),
                m.recovery_unclipped,
                m.recovery_ratio_of_means,
                m.least_recovered,
                *_estimate_cells(m.forgetting),
                m.forgetting_over_all,
                m.forgetting_max_based,
                m.most_forgotten,
                " ".join(m.without_teacher),
            )
        )
    columns = (
        "method seed teacher_seed final_stage "
        "average_performance average_performance_low average_performance_high "
        "recovery recovery_low recovery_high recovery_unclipped recovery_ratio_of_means least_recovered "
        "forgetting forgetting_low forgetting_high forgetting_over_all_tasks forgetting_max_based "
        "most_forgotten tasks_without_teacher"
    )
    return Table("table_seeds", tuple(columns.split()), tuple(rows), (), (), "")


def method_table(data: Dataset) -> Table:
    """One line per method: measures over its seeds, the mean always with its worst task beside it."""
    names = ("average_performance", "recovery", "forgetting")
    statistics = ("mean", "interquartile_mean", "worst_task")
    rows: list[tuple[Cell, ...]] = []
    lines: list[tuple[str, ...]] = []
    for method in data.methods:
        measures = {"average_performance": method.average_performance, "recovery": method.recovery}
        measures["forgetting"] = method.forgetting
        cells: list[Cell] = []
        for name in names:
            for statistic in statistics:
                found = measures[name].get(statistic)
                cells += [found.estimate, found.low, found.high] if found else [None, None, None]
        transfer = method.forward_transfer.mean if method.forward_transfer else None
        cells += [transfer.estimate, transfer.low, transfer.high] if transfer else [None, None, None]
        cells.append(_improvement(data, method))
        rows.append((method.method, len(method.seeds), method.memory_steps, method.parameters, *cells))
        students = [s.measures for s in data.of_method(method.method) if s.seed in method.seeds]
        texts = [headline(measures[name], students, name) for name in names]
        worst = [worst_text(measures[name], method.worst_tasks.get(name)) for name in names]
        pairs = [text for pair in zip(texts, worst, strict=True) for text in pair]
        memory = "–" if method.memory_steps is None else f"{method.memory_steps:,}"
        lines.append((_escape(method.method), str(len(method.seeds)), memory, *pairs))
    measured = [f"{name}_{statistic}" for name in names for statistic in statistics]
    columns = [f"{name}{part}" for name in (*measured, "forward_transfer") for part in ("", "_low", "_high")]
    return Table(
        "table_methods",
        ("method", "seeds", "memory_steps", "parameters", *columns, "improvement_by_first_method"),
        tuple(rows),
        ("Method", "Seeds", "Memory", "AP", "worst task", "Recovery", "worst task", "Forgetting", "worst task"),
        tuple(lines),
        f"Average performance (AP), recovery of the teachers' success and forgetting on {data.name}, in per cent, "
        "each with its worst task. A task in which a student does better than its teacher counts as recovered to "
        "100. Memory: most time steps stored. Brackets: 95 % intervals, from episode counts for a single seed, by "
        "bootstrap over seeds from five on. Parentheses: the range of two to four seeds, in which the noise of "
        "episodes does not show. Students that do not learn one task after another cannot forget.",
    )


def _improvement(data: Dataset, method: MethodMeasures) -> float | None:
    """The probability that the first method succeeds more often on a task than `method`, ties counting half."""
    first = data.methods[0]
    ours, others = (
        [finals(s) for s in data.of_method(m.method) if s.measures.seed in m.seeds] for m in (first, method)
    )
    if method is first or not (ours and others):
        return None
    return probability_of_improvement(np.array(ours), np.array(others))


def headline(measure: dict[str, Aggregate], students: Sequence[StudentMeasures], name: str) -> str:
    """`93 [90, 95]`: a measure in per cent with its interval; `93 (90 to 95)` with the range of few seeds."""
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
    """`52 (hammer)`: the worst task's mean over seeds, in per cent; `0` where all tasks are alike."""
    if "worst_task" not in measure:
        return "–"
    return percent(measure["worst_task"].estimate) + (f" ({short(task)})" if task else "")


def start_table(data: Dataset) -> Table | None:
    """Every method on the tasks that the first observation tells apart, and on the others; None without others."""
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
        lines.append((_escape(method.method), str(len(students)), *texts))
    return Table(
        "table_look_alikes",
        ("method", "seed", "group", "tasks", "average_performance", "recovery"),
        tuple(rows),
        ("Method", "Seeds", "AP apart", "Recovery apart", "AP alike", "Recovery alike"),
        tuple(lines),
        f"Average performance (AP) and recovery on {data.name}, in per cent, by whether an episode's first "
        "observation tells its task apart from the others. Alike are tasks of which many episodes begin nearest "
        f"to one of another task: {look_alikes(data)}. Parentheses: range of seeds.",
    )


def _mean(values: Floats) -> float | None:
    """Over those that are defined."""
    found = values[~np.isnan(values)]
    return float(found.mean()) if len(found) else None


def _range_text(values: Sequence[float | None]) -> str:
    """`93.1 (90.0 to 95.2)`: mean and range over seeds, in per cent."""
    found = [value for value in values if value is not None]
    if not found:
        return "–"
    between = f" ({percent(min(found), 1)} to {percent(max(found), 1)})" if len(found) > 1 else ""
    return percent(sum(found) / len(found), 1) + between


def matrix_tables(data: Dataset) -> list[Table]:
    """The success matrix of every method, mean over seeds, wide."""
    found = []
    methods = list(dict.fromkeys(student.method for student in data.students))
    for method in methods:
        rates = mean_matrix(data.of_method(method))
        stages = [("", -1), *((task, stage) for stage, task in enumerate(data.stream))]
        rows = [
            (method, stage, task, *(None if np.isnan(value) else float(value) for value in rates[stage + 1]))
            for task, stage in stages
        ]
        stem = "success_matrix" if len(methods) == 1 else f"success_matrix_{method}"
        found.append(Table(stem, ("method", "stage", "stage_task", *data.tasks), tuple(rows), (), (), ""))
    return found


def _rate_cells(rate: Rate | None) -> tuple[Cell, ...]:
    return (rate.successes, rate.episodes, rate.rate, rate.low, rate.high) if rate else (None,) * 5


def _estimate_cells(estimate: Estimate) -> tuple[Cell, ...]:
    return estimate.value, estimate.low, estimate.high


def _write_csv(folder: Path, table: Table, labels: dict[str, str]) -> Path:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*table.columns, *labels])
    writer.writerows([*("" if cell is None else cell for cell in row), *labels.values()] for row in table.rows)
    path = folder / f"{table.stem}.csv"
    write_text(path, text.getvalue())
    return path


def _write_tex(folder: Path, table: Table, notes: str) -> Path:
    body = "\n".join("    " + " & ".join(map(_tex, row)) + r" \\" for row in table.tex_rows)
    # More columns than a column of text has room for: span the page.
    environment = "table*" if len(table.tex_columns) > 6 else "table"
    header = " & ".join(map(_tex, table.tex_columns))
    text = "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            rf"\begin{{{environment}}}",
            r"  \centering\small",
            rf"  \caption{{{_escape(table.caption)}}}",
            rf"  \begin{{tabular}}{{l{'r' * (len(table.tex_columns) - 1)}}}",
            r"    \toprule",
            rf"    {header} \\",
            r"    \midrule",
            body,
            r"    \bottomrule",
            r"  \end{tabular}",
            "",
            rf"  \footnotesize {_escape(notes)}",
            rf"\end{{{environment}}}",
            "",
        ]
    )
    path = folder / f"{table.stem}.tex"
    write_text(path, text)
    return path


def _write_markdown(folder: Path, table: Table, notes: str) -> Path:
    rows = [table.tex_columns, ("---", *["---:"] * (len(table.tex_columns) - 1)), *table.tex_rows]
    lines = ["| " + " | ".join(map(_plain, row)) + " |" for row in rows]
    path = folder / f"{table.stem}.md"
    write_text(path, "\n".join([*lines, "", f"{table.caption} {notes}", ""]))
    return path


def _plain(text: str) -> str:
    """A LaTeX cell as Markdown."""
    return re.sub(r"\\emph\{(.*)\}", r"*\1*", text).replace("\\", "")


def _tex(text: str) -> str:
    """En dashes and minus signs as LaTeX sets them; hyphens within names stay."""
    return re.sub(r"(?<!\w)-(?=\d)", "$-$", text).replace("–", "--")


def _escape(text: str) -> str:
    for character in "&%#_$":
        text = text.replace(character, "\\" + character)
    return text.replace("–", "--")
