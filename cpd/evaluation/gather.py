"""Gathers the files of a run's elements into its results folder, which can be read without the run.

results/
  config.json           the frozen configuration
  evaluations.csv       success of teachers and students, one line per cell of the success matrix
  episodes.csv          one line per episode of these cells
  curves.csv            success on the current task within each stage
  teachers.csv          outcome of every teacher
  teacher_curves.csv    training records of the teachers
  losses.csv            losses of the students within every stage
  stages.csv            experts, parameters, memory and masks of the students after every stage
  plans.csv             success of plans on tasks that a student's belief confuses
  usage.csv             how often each expert is used on each task, at the end of the stream
  retrieval.csv         how often students infer the right task, at the end of the stream
  starts.csv            which tasks have episodes that begin nearest to one of another task
  timings.json          start and end of every phase of every element (Unix time), and its processor seconds
  metrics.json          the measures, computed from the tables above
"""

from __future__ import annotations

import csv
import io
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from cpd.config.types import Positive, Role
from cpd.evaluation.look_alikes import start_rows
from cpd.evaluation.results_folder import TEACHER, read_tables
from cpd.evaluation.summary import summarize
from cpd.reading import DamagedFileError, read_for_display, read_json
from cpd.run.claim import check_none_lost
from cpd.run.descriptions import StudentSize, check_identity
from cpd.run.directory import Element, Run, RunError, StudentElement, TeacherElement, identity
from cpd.run.files import remove, write_json, write_text
from cpd.run.folders import KIND_KEY, collected, kind_of
from cpd.run.progress import read_metrics, read_status
from cpd.run.table_files import find_table
from cpd.run.tables import (
    CurveRow,
    EpisodeRow,
    EvaluationRow,
    LossRow,
    PlanRow,
    RetrievalRow,
    Row,
    StageRow,
    TeacherRow,
    TeacherState,
    UsageRow,
    read_rows,
    write_rows,
)

#: Most points of a loss curve within a stage, which keeps published tables small.
LOSS_POINTS = 100


def gather(run: Run) -> dict[str, Any]:
    """Write `run.results` from the files that the run's elements have written so far.

    Returns:
        The contents of metrics.json; `missing` lists what is not measured yet.

    Raises:
        DamagedFileError: if a file is damaged, or a finished element lacks one.
        RunError: if the run has no elements yet, or if gathered results of students or teachers would be lost.
    """
    if not any((run.root / name).is_dir() for name in ("teachers", "students")):
        raise RunError(f"{run.root} has neither teachers nor students yet; start them with `cpd launch`")
    for element, path in _missing_files(run):
        raise DamagedFileError(
            f"{path} is missing, although {element.name} is finished; restore the file, or remove {element.path} "
            "and launch again to make it anew"
        )
    stages = range(-1, len(run.config.stream.tasks))
    rows_due = [(e, stage, _identity(e, stage=stage)) for e in run.evaluations() for stage in stages]
    files = [(t.evaluation, t.episodes, _identity(t)) for t in run.teachers() if t.finished]
    files += [(e.row_file(stage), e.row_episodes_file(stage), of) for e, stage, of in rows_due]
    # An evaluation that is still running, or was killed, may have written its episodes alone.
    files = [(table, details, of) for table, details, of in files if os.path.lexists(table)]
    evaluations = _existing_rows([(table, of) for table, _, of in files], EvaluationRow)
    # Checked before anything is written: a user may have removed a student's folder to save space.
    if (table := run.results / "evaluations.csv").exists():
        check_none_lost(
            run.results,
            evaluated(read_rows(table, EvaluationRow)),
            evaluated(evaluations),
            f"{run.root} no longer has them. `cpd build {run.results}` draws them; to gather "
            f"without them, remove {table} first",
        )
    _write_table(run.results / "evaluations.csv", evaluations)
    _write_table(run.results / "episodes.csv", _existing_rows([(d, of) for _, d, of in files], EpisodeRow))
    curves = [(student.curves, _identity(student)) for student in run.students()]
    _write_table(run.results / "curves.csv", _existing_rows(curves, CurveRow))
    trainings = [(t, read_metrics(t.metrics, is_finished=t.finished)) for t in run.teachers()]
    _write_table(run.results / "teachers.csv", [_teacher_row(t, metrics) for t, metrics in trainings])
    groups = [({"task": t.task, "seed": t.seed}, metrics) for t, metrics in trainings]
    _write_records(run.results / "teacher_curves.csv", groups)
    records = [(s, read_metrics(s.metrics, is_finished=s.finished)) for s in run.students()]
    _write_table(run.results / "losses.csv", [row for s, metrics in records for row in _losses(s, metrics)])
    _write_table(run.results / "stages.csv", [row for s, metrics in records for row in _stages(s, metrics)])
    _write_table(run.results / "plans.csv", [row for s, metrics in records for row in _plans(s, metrics)])
    usage = [(e.usage_file(stage), of) for e, stage, of in rows_due]
    _write_table(run.results / "usage.csv", _existing_rows(usage, UsageRow))
    retrieval = [(e.retrieval_file(stage), of) for e, stage, of in rows_due]
    _write_table(run.results / "retrieval.csv", _existing_rows(retrieval, RetrievalRow))
    # Rollouts are large and often removed; the table that was computed from them stays.
    if rows := start_rows(run):
        write_rows(run.results / "starts.csv", rows)
    # The report is the element that gathers: its own phase has not ended yet.
    elements = [element for element in run.elements() if element.role != "report"]
    requested = {role: _requested(run, role) for role in {element.role for element in elements}}
    write_json(run.results / "timings.json", [{**requested[e.role], **_timing(e)} for e in elements])
    # Copied as it is: a default must not be filled in for a setting that did not exist at the time.
    write_json(run.results / "config.json", read_json(run.config_path, dict[str, Any]))
    report = {KIND_KEY: "results", **summarize(read_tables(run.results)).to_json(), "provenance": _provenance(run)}
    write_json(run.results / "metrics.json", report)
    return report


def evaluated(rows: Iterable[EvaluationRow]) -> set[str]:
    """Return the names of the teachers and students that have rows."""
    return {f"{row.task if row.method == TEACHER else row.method} (seed {row.seed})" for row in rows}


def _identity(element: TeacherElement | StudentElement, **further: Any) -> dict[str, Any]:
    """Return the values that the rows of an element's tables must have, by column."""
    if isinstance(element, TeacherElement):
        return {"method": TEACHER, "seed": element.seed, "task": element.task}
    return {"method": element.method, "seed": element.seed, **further}


def _existing_rows(files: Iterable[tuple[Path, Mapping[str, Any]]], kind: type[Row]) -> list[Row]:
    return [row for file, of in files if os.path.lexists(file) for row in read_rows(file, kind, **of)]


def _missing_files(run: Run) -> Iterator[tuple[Element, Path]]:
    """Yield the files that finished elements must have written, but lack."""
    # Neither experts nor teachers that were trained elsewhere have training records.
    trained = [t for t in run.teachers() if "train" in read_status(t.status).seconds]
    files: list[tuple[Element, Path]] = [
        (t, t.metrics) for t in trained if run.config.teacher.recipe != "scripted"
    ]
    for student in run.students():
        policies = [student.stage_policy(stage) for stage in range(len(student.config.stream.tasks))]
        trains = student.config.distill.protocol != "teachers"
        has_curves = trains and student.config.evaluation.curve_points and any(p.exists() for p in policies)
        files += [(student, student.metrics), *([(student, student.curves)] if has_curves else [])]
    return ((element, path) for element, path in files if element.finished and not os.path.lexists(path))


def _losses(student: StudentElement, records: Sequence[Mapping[str, Any]]) -> Iterable[LossRow]:
    """Yield at most `LOSS_POINTS` rows per stage, each the mean over equally many records."""
    steps = [record for record in records if record.get("loss") is not None]
    for stage in dict.fromkeys(record["stage"] for record in steps):
        in_stage = [record for record in steps if record["stage"] == stage]
        size = -(-len(in_stage) // LOSS_POINTS)  # rounded up
        for group in (in_stage[start : start + size] for start in range(0, len(in_stage), size)):
            means = {name: _mean(group, name) for name in ("current", "replay")}
            loss = _mean(group, "loss")
            assert loss is not None
            last = group[-1]
            yield LossRow(student.method, student.seed, stage, last["step"], last["task"], loss, **means)


def _mean(records: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Return the mean to six significant digits, as in the records; None if no record has a value."""
    values = [record[name] for record in records if record.get(name) is not None]
    return float(f"{statistics.fmean(values):.6g}") if values else None


def _stages(student: StudentElement, records: Sequence[Mapping[str, Any]]) -> Iterable[StageRow]:
    masked = {record["stage"]: record["masked_share"] for record in records if "masked_share" in record}
    for stage in range(-1, len(student.config.stream.tasks)):
        policy = student.stage_policy(stage)
        path = policy.with_suffix(".json")
        if os.path.lexists(path) or policy.exists():
            check_identity(path, **identity(student.config, student, stage))
            description = read_json(path, StudentSize)
            yield StageRow(
                method=student.method,
                seed=student.seed,
                stage=stage,
                task=description["task"],
                experts=description["num_experts"],
                parameters=description["num_parameters"],
                memory_steps=description["memory_steps"],
                memory_bytes=description["memory_bytes"],
                masked_share=masked.get(stage),
                **asdict(description["labels"]),
            )


def _plans(student: StudentElement, records: Sequence[Mapping[str, Any]]) -> Iterable[PlanRow]:
    for record in records:
        if record.get("event") == "plan" and "env_steps" in record:
            values = {field.name: record[field.name] for field in fields(PlanRow) if field.name in record}
            yield PlanRow(**{"method": student.method, "seed": student.seed, **values})


def _teacher_row(teacher: TeacherElement, records: Sequence[Mapping[str, Any]]) -> TeacherRow:
    state: TeacherState = read_status(teacher.status).state
    if teacher.finished:
        state = "rejected" if teacher.is_rejected else "admitted"
    elif state in ("done", "rejected"):
        state = "running"  # between its last status and its marker
    validated = [r["validation_success"] for r in records if r.get("validation_success") is not None]
    last = records[-1] if records else {}
    env_steps, iterations = (
        None if last.get(name) is None else int(last[name]) for name in ("env_steps", "iteration")
    )
    success = validated[-1] if validated else None
    return TeacherRow(teacher.task, teacher.seed, state, env_steps, iterations, success)


def _requested(run: Run, role: Role) -> dict[str, int]:
    """Return what a job of this role requests of Slurm, which charges it whether it is used or not."""
    # Cores are those of one rank, as is the processor time.
    keys = ("nodes", "cpus") if run.launched_with(str, "", "cluster") == "slurm" else ()
    requested = {key: run.launched_with(Positive, 0, role, key) for key in keys}
    return {key: value for key, value in requested.items() if value}


def _timing(element: Element) -> dict[str, Any]:
    record = read_status(element.status)
    return {
        "element": element.name,
        "role": element.role,
        "state": record.state,
        "cpu_seconds": round(record.cpu_seconds, 1) or None,  # 0 in the status means that it was not measured
        "spans": [[phase, round(start, 1), round(end, 1)] for phase, start, end in record.spans],
    }


def _provenance(run: Run) -> dict[str, Any]:
    """Return versions and machine without the command line, which may contain local paths."""
    provenance = read_for_display(run.root / "provenance.json", dict[str, Any], {})
    return {key: value for key, value in provenance.items() if key not in ("command", KIND_KEY)}


def _write_table(path: Path, rows: Sequence[Any]) -> None:
    """Write a table; without rows, remove it, since a stale table would belong to other results."""
    if rows:
        write_rows(path, rows)
    else:
        remove(path)


def _write_records(path: Path, groups: Iterable[tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]]) -> None:
    """Write metrics records as one table: the group's columns first, then every key of the records."""
    lines = [{**group, **record} for group, records in groups for record in records]
    if not lines:
        remove(path)
        return
    text = io.StringIO()
    columns = dict.fromkeys(key for line in lines for key in line)  # records of one teacher may lack some keys
    writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(path, text.getvalue())


#: Most folders that a message names.
MOST_NAMED = 12


def find_results(path: Path) -> Path:
    """Return the results folder that `path` is or holds; gather a run's results first, if it is writable.

    Raises:
        RunError: if `path` holds no results.
    """
    if not path.is_dir():
        raise RunError(f"{path} is not a directory; name a run directory or a results folder")
    if kind_of(path) == "run" and any((path / name).is_dir() for name in ("teachers", "students")):
        run = Run(path)
        if os.access(run.root, os.W_OK):  # a colleague's run can be drawn from what its owner gathered
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
            f"{path} is not a results folder, but these folders in it are: "
            f"{', '.join(folders[:MOST_NAMED])}{rest}; name one of them, e.g. {path / folders[0]}"
        )
    raise RunError(f"{path} is neither a run directory nor a results folder; name one of them")
