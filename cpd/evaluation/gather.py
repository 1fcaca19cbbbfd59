"""Gathers a run's pieces into its results folder, which from then on can be read without the rest of the run.

results/
  config.json           the frozen configuration
  evaluations.csv       success of teachers and students, one line per cell
  episodes.csv          one line per episode of those
  curves.csv            success on the current task within each stage
  teachers.csv          outcome of every teacher
  teacher_curves.csv    training records of the teachers
  losses.csv            losses of the students within every stage
  stages.csv            experts, parameters, memory and masks of the students after every stage
  usage.csv             which experts act on which task, at the end of the stream
  retrieval.csv         which task is believed in over an episode, at the end of the stream
  starts.csv            which tasks look alike when an episode begins
  timings.json          when every element was in which phase (Unix time), its processor seconds
  metrics.json          the measures; every number in it derives from the tables above
"""

from __future__ import annotations

import csv
import io
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cpd.evaluation.look_alikes import start_rows
from cpd.evaluation.results_folder import TEACHER, read_tables
from cpd.evaluation.summary import summarize
from cpd.run.claim import check_none_lost, collected, kind_of
from cpd.run.directory import Element, Run, RunError, StudentElement, TeacherElement
from cpd.run.files import read_json, write_json, write_text
from cpd.run.progress import read_metrics, read_status
from cpd.run.tables import (
    CurveRow,
    EpisodeRow,
    EvaluationRow,
    LossRow,
    RetrievalRow,
    StageRow,
    TeacherRow,
    UsageRow,
    find_table,
    read_rows,
    write_rows,
)

#: Points of a loss curve within a stage, at most: enough to see it, few enough to be published.
LOSS_POINTS = 100


def gather(run: Run) -> dict[str, Any]:
    """Write `run.results` from what the run's elements have published so far.

    Returns:
        The contents of metrics.json; its `missing` says what is not there yet.

    Raises:
        RunError: if the run holds no element at all, so that there is nothing to gather; or if results of students
            or teachers that were gathered before would be lost.
    """
    if not any((run.root / part).is_dir() for part in ("teachers", "students")):
        raise RunError(f"{run.root} has neither teachers nor students yet; `jobs.launch` makes them")
    evaluations, episodes = _evaluations(run)
    if (table := run.results / "evaluations.csv").exists():
        check_none_lost(
            run.results,
            evaluated(read_rows(table, EvaluationRow)),
            evaluated(evaluations),
            f"{run.root} no longer has them. `python -m analysis.build {run.results}` draws them; to gather "
            f"without them, remove {table} first",
        )
    curves = [row for s in run.students() if s.curves.exists() for row in read_rows(s.curves, CurveRow)]
    _write_table(run.results / "evaluations.csv", evaluations)
    _write_table(run.results / "episodes.csv", episodes)
    _write_table(run.results / "curves.csv", curves)
    _write_table(run.results / "teachers.csv", [_teacher_row(t) for t in run.teachers()])
    _write_records(
        run.results / "teacher_curves.csv",
        [({"task": t.task, "seed": t.seed}, read_metrics(t.metrics)) for t in run.teachers()],
    )
    _write_students(run)
    # What can no longer be worked out is kept as it is.
    if rows := start_rows(run):
        write_rows(run.results / "starts.csv", rows)
    write_json(run.results / "timings.json", [_timing(e) for e in run.elements() if e.role != "report"])
    # As it was frozen: what was no setting then must not pass for today's default.
    write_json(run.results / "config.json", read_json(run.config_path))
    report = {**summarize(read_tables(run.results)).to_json(), "provenance": _provenance(run)}
    write_json(run.results / "metrics.json", report)
    return report


def evaluated(rows: Iterable[EvaluationRow]) -> set[str]:
    """Return the names of the teachers and students that have rows."""
    return {f"{row.task if row.method == TEACHER else row.method} (seed {row.seed})" for row in rows}


def _write_students(run: Run) -> None:
    """The tables of what students are and do beside their success."""
    losses: list[LossRow] = []
    stages: list[StageRow] = []
    for student in run.students():
        records = read_metrics(student.metrics)
        losses += _losses(student, records)
        stages += _stages(student, records)
    _write_table(run.results / "losses.csv", losses)
    _write_table(run.results / "stages.csv", stages)
    every = [(e, stage) for e in run.evaluations() for stage in range(-1, len(run.config.stream.tasks))]
    for name, kind, files in (
        ("usage.csv", UsageRow, [element.usage_file(stage) for element, stage in every]),
        ("retrieval.csv", RetrievalRow, [element.retrieval_file(stage) for element, stage in every]),
    ):
        _write_table(run.results / name, [row for file in files if file.exists() for row in read_rows(file, kind)])


def _losses(student: StudentElement, records: Sequence[Mapping[str, Any]]) -> Iterable[LossRow]:
    """At most `LOSS_POINTS` rows a stage, each the mean over as many records."""
    steps = [record for record in records if record.get("loss") is not None]
    for stage in dict.fromkeys(record["stage"] for record in steps):
        own = [record for record in steps if record["stage"] == stage]
        size = -(-len(own) // LOSS_POINTS)
        for group in (own[start : start + size] for start in range(0, len(own), size)):
            means = {name: _mean(group, name) for name in ("current", "replay")}
            loss = _mean(group, "loss")
            assert loss is not None
            last = group[-1]
            yield LossRow(student.method, student.seed, stage, last["step"], last["task"], loss, **means)


def _mean(records: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """To six significant digits, as records have them; None if none has it."""
    values = [record[name] for record in records if record.get(name) is not None]
    return float(f"{statistics.fmean(values):.6g}") if values else None


def _stages(student: StudentElement, records: Sequence[Mapping[str, Any]]) -> Iterable[StageRow]:
    masked = {record["stage"]: record["masked_share"] for record in records if "masked_share" in record}
    for stage in range(-1, len(student.config.stream.tasks)):
        path = student.stage_policy(stage).with_suffix(".json")
        if path.exists():
            found = read_json(path)
            yield StageRow(
                method=student.method,
                seed=student.seed,
                stage=stage,
                task=found["task"],
                experts=found["num_experts"],
                parameters=found["num_parameters"],
                memory_steps=found["memory_steps"],
                memory_bytes=found["memory_bytes"],
                masked_share=masked.get(stage),
                **found["labels"],
            )


def _evaluations(run: Run) -> tuple[list[EvaluationRow], list[EpisodeRow]]:
    """Rows of all finished teachers, and of every student's stages that have been evaluated."""
    files = [(t.evaluation, t.episodes) for t in run.teachers() if t.finished]
    for element in run.evaluations():
        stages = range(-1, len(run.config.stream.tasks))
        files += [(element.row_file(stage), element.row_episodes_file(stage)) for stage in stages]
    rows: list[EvaluationRow] = []
    episodes: list[EpisodeRow] = []
    for table, details in files:
        rows += read_rows(table, EvaluationRow) if table.exists() else []
        episodes += read_rows(details, EpisodeRow) if details.exists() else []
    return rows, episodes


def _teacher_row(teacher: TeacherElement) -> TeacherRow:
    state: str = read_status(teacher.status).state
    if teacher.finished:
        state = "rejected" if teacher.rejected.exists() else "admitted"
    elif state in ("done", "rejected"):
        state = "running"  # between its last status and its marker
    records = read_metrics(teacher.metrics)
    validated = [r["validation_success"] for r in records if r.get("validation_success") is not None]
    last = records[-1] if records else {}
    return TeacherRow(
        teacher.task,
        teacher.seed,
        state,
        _count(last.get("env_steps")),
        _count(last.get("iteration")),
        validated[-1] if validated else None,
    )


def _count(value: float | None) -> int | None:
    return None if value is None else int(value)


def _timing(element: Element) -> dict[str, Any]:
    record = read_status(element.status)
    return {
        "element": element.name,
        "role": element.role,
        "state": record.state,
        "cpu_seconds": round(record.cpu_seconds, 1) or None,
        "spans": [[phase, round(start, 1), round(end, 1)] for phase, start, end in record.spans],
    }


def _provenance(run: Run) -> dict[str, Any]:
    """Versions and machine, without the command line, which may hold paths of that machine."""
    path = run.root / "provenance.json"
    found = read_json(path) if path.exists() else {}
    return {key: value for key, value in found.items() if key != "command"}


def _write_table(path: Path, rows: Sequence[Any]) -> None:
    if rows:
        write_rows(path, rows)
    else:
        path.unlink(missing_ok=True)


def _write_records(path: Path, groups: Iterable[tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]]) -> None:
    """Write metrics records as one table: the columns of the group first, then every key that occurs."""
    lines = [{**group, **record} for group, records in groups for record in records]
    if not lines:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO()
    columns = dict.fromkeys(key for line in lines for key in line)
    writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(path, text.getvalue())


#: Folders that a message names, at most.
MOST_NAMED = 12


def find_results(path: Path) -> Path:
    """Return the results folder that `path` is or holds; gather a run's results first, if it is writable.

    Raises:
        RunError: if there is none.
    """
    if not path.is_dir():
        raise RunError(f"{path} is not a directory; name a run directory or a folder of results")
    if kind_of(path) == "run" and any((path / part).is_dir() for part in ("teachers", "students")):
        run = Run(path)
        if os.access(run.root, os.W_OK):
            gather(run)
        elif not (run.results / "teachers.csv").exists():
            raise RunError(f"{path} is read-only and has no gathered results; ask its owner to gather them")
        return run.results
    for folder in (path / "results", path):
        if (folder / "config.json").exists() and find_table(folder / "teachers.csv"):
            return folder
    if folders := collected(path):
        rest = f" and {len(folders) - MOST_NAMED} more" if len(folders) > MOST_NAMED else ""
        raise RunError(
            f"{path} is no results folder, but these folders in it are: {', '.join(folders[:MOST_NAMED])}{rest}; "
            f"name one of them, e.g. {path / folders[0]}"
        )
    raise RunError(f"{path} is neither a run directory nor a folder of results; name one")
