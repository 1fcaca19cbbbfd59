"""Prints the summary of a run's results, with colours only if the output is a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from rich.table import Table

from analysis.beliefs import beliefs
from analysis.captions import conditions, look_alikes
from analysis.dataset import Dataset, Timing, load_dataset, short
from analysis.paper_tables import headline, last_step, percent, task_cells, task_source, worst_text
from cpd.evaluation.student_measures import StudentMeasures
from cpd.evaluation.summary import MethodMeasures
from cpd.run.progress import clock
from cpd.terminal import plain_console

#: Columns of the console, whatever the terminal has: rich would cut numbers to fit, a terminal wraps the lines.
WIDTH = 140


def print_summary(folder: Path, file: TextIO | None = None) -> None:
    """Print the summary of a results folder.

    Args:
        folder: a folder of gathered or published results.
        file: where to print to; standard output by default.

    Raises:
        ValueError: if `folder` holds no gathered results.
    """
    show(load_dataset([folder]), file)


def show(data: Dataset, file: TextIO | None = None) -> None:
    """Print the summary of a data set to `file`, or to standard output."""
    console = plain_console(file=file, width=WIDTH)
    for method in data.methods:
        students = data.of_method(method.method)
        console.print(_title(data, method.method), style="bold", soft_wrap=True)
        console.print(_task_table(data, method.method))
        console.print()
        believed = [f"{label:21}{text}" for label, text in belief_texts(data, method.method)]
        for line in (*_headlines(method, [s.measures for s in students]), *believed):
            console.print(line, soft_wrap=True)
        console.print()
    if len(data.methods) > 1:
        console.print("methods side by side, in % [as above]", style="bold")
        console.print(_method_table(data))
        console.print()
    if data.timings:
        console.print("where the time went", style="bold")
        table = _table("phase", "stretches", "wall time")
        for row in time_rows(data.timings):
            table.add_row(*row)
        console.print(table)
        for line in usage_lines(data.timings):
            console.print(line, soft_wrap=True)
        console.print()
    if data.students or data.teacher_rates:
        console.print(conditions(data), style="dim", soft_wrap=True)
    if data.students and data.look_alikes:
        console.print(
            f"episodes that begin nearest to one of another task: {look_alikes(data)}", style="dim", soft_wrap=True
        )
    for line in data.missing:
        console.print(f"note: {line}", style="yellow", soft_wrap=True)


def _table(first: str, *others: str) -> Table:
    """Create a table without lines and padding, so that one of a stream with short names fits 80 columns."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _task_table(data: Dataset, method: str) -> Table:
    students = data.of_method(method)
    table = _table("task", "teacher", "own stage", "final", "forgotten", "recovered")
    for row, task in enumerate(data.tasks):
        cells = task_cells(data, task, [student.measures.tasks[row] for student in students])
        table.add_row(short(task), *cells)
    return table


def _method_table(data: Dataset) -> Table:
    """Return a table with one row per method, in the order of the recipe."""
    names = ("average_performance", "recovery", "forgetting")
    table = _table("method", "seeds", "memory", *(name.replace("_", " ") for name in names), "task")
    for method in data.methods:
        students = [s.measures for s in data.of_method(method.method) if s.seed in method.seeds]
        values = [headline(getattr(method, name), students, name) for name in names]
        memory = "–" if method.memory_steps is None else str(method.memory_steps)
        source = task_source(data, method.method)
        table.add_row(method.method, str(len(method.seeds)), memory, *values, source)
    return table


def _title(data: Dataset, method: str) -> str:
    seeds = [str(student.seed) for student in data.of_method(method)]
    several = len(seeds) > 1 or len({seed for _, seed in data.teacher_rates}) > 1
    brackets = "Wilson 95 % interval of one run, range of several" if several else "Wilson 95 % interval"
    seed = f"seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}"
    return f"{data.name} · {method} · {seed} · {data.measure} in % [{brackets}]"


def _headlines(method: MethodMeasures, students: Sequence[StudentMeasures]) -> list[str]:
    finished = [student for student in students if student.seed in method.seeds]
    if not finished:
        return ["the stream has not been evaluated to its end yet: no average performance, recovery or forgetting"]
    lines = []
    for name in ("average_performance", "recovery", "forgetting"):
        measure = getattr(method, name)
        worst = worst_text(measure, method.worst_tasks.get(name))
        lines.append(f"{name.replace('_', ' '):21}{headline(measure, finished, name):22}worst task {worst}")
    last = [value for value in map(last_step, finished) if value is not None]
    if last:
        lines.insert(1, f"{'  at the last step':21}{percent(sum(last) / len(last), 1)}")
    if len(finished) == 1:
        lines.append("in brackets: 95 % intervals from episode counts; one seed says nothing of other seeds")
    else:
        mean = method.average_performance["mean"]
        lines.append(f"in brackets: {mean.note if mean.low is not None else 'the range of the seeds'}")
    if any((task.recovery or 0.0) > 1.0 for student in finished for task in student.tasks):
        lines.append("recovery: a task in which a student does better than its teacher counts as 100")
    if method.unfinished_seeds:
        left_out = ", ".join(map(str, method.unfinished_seeds))
        lines.append(f"not counted, since their stream has not been evaluated to its end: seeds {left_out}")
    return lines


def belief_texts(data: Dataset, method: str) -> list[tuple[str, str]]:
    """Say how often the students inferred the right task, and how often they followed another plan, by label."""
    held = beliefs(data, method)
    if held is None:
        return []
    right, confidence = percent(held.right / held.episodes, 1), percent(held.mean_confidence, 1)
    return [
        ("task inferred", f"right in {right} % of {held.episodes:,} episodes, mean confidence {confidence} %"),
        (
            "plan under doubt",
            f"not only the most likely task's policy in {held.other_plans:,} episodes"
            + (f", {held.other_successes:,} of which succeed" if held.other_plans else ""),
        ),
    ]


def time_rows(timings: Sequence[Timing]) -> list[tuple[str, str, str]]:
    """Return phase, number of stretches and wall time, by role and phase and of all together.

    Time in which several elements worked at a phase counts once.
    """
    phases: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for entry in timings:
        for phase, start, end in entry["spans"]:
            phases.setdefault((entry["role"], phase), []).append((start, end))
    groups = {f"{role}: {phase}": spans for (role, phase), spans in phases.items()}
    groups["all"] = [span for spans in phases.values() for span in spans]
    return [(name, str(len(spans)), clock(_covered(spans))) for name, spans in groups.items()]


def usage_lines(timings: Sequence[Timing]) -> list[str]:
    """Return what every role was charged on Slurm, and which part of its cores' time it used."""
    lines = []
    for role in dict.fromkeys(entry["role"] for entry in timings):
        jobs = [entry for entry in timings if entry["role"] == role and "nodes" in entry and "cpus" in entry]
        seconds = [sum(end - start for _, start, end in job["spans"]) for job in jobs]
        if core_seconds := sum(job["cpus"] * wall for job, wall in zip(jobs, seconds, strict=True)):
            node_hours = sum(job["nodes"] * wall for job, wall in zip(jobs, seconds, strict=True)) / 3600
            used = sum(job.get("cpu_seconds") or 0.0 for job in jobs) / core_seconds
            lines.append(f"{role}: {node_hours:.3g} node-hours, {100 * used:.0f} % of the cores' time used")
    return lines


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
