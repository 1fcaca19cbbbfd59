"""Publishing of results and of teachers, which later runs can reuse.

A folder of published teachers holds the long-form tables of `cpd.evaluation.gather`, the frozen configuration, and
`policies/<task>-seed-<n>.safetensors` with its description beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpd.config.load import to_dict
from cpd.evaluation.gather import evaluated, find_results, gather
from cpd.evaluation.publish_students import publish_students
from cpd.evaluation.results_folder import TEACHER, labels_of, read_tables
from cpd.evaluation.summary import summarize
from cpd.reading import DamagedFileError, read_for_display, read_json
from cpd.run.claim import RESULT_FILES, check_none_lost, check_repository_place, claim
from cpd.run.descriptions import Policy, check_identity
from cpd.run.directory import Run, TeacherElement, identity, published_policy
from cpd.run.files import copy, remove, sha256, write_json
from cpd.run.folders import KIND_KEY, kind_of
from cpd.run.table_files import compress_tables, find_table
from cpd.run.tables import EpisodeRow, EvaluationRow, read_rows, write_rows

#: The files that are copied as they are, since they hold no results of students.
TABLES = ("config.json", "teachers.csv", "teacher_curves.csv")


def publish_teachers(run: Run, folder: Path) -> list[Path]:
    """Copy the results and policies of a run's finished teachers, admitted or rejected, to `folder`.

    Returns:
        The policy files.

    Raises:
        RunError: if `folder` holds anything but teachers of this experiment, or a teacher that would be lost.
        ValueError: if no teacher is finished, if they were not evaluated on held-out goals, or if they are
            scripted stand-ins.
        DamagedFileError: if a policy does not have the checksum in its description.
    """
    if run.config.teacher.recipe == "scripted":
        raise ValueError(
            f"{run.root} has scripted stand-ins for teachers, which are never published; publish a run with "
            "trained teachers"
        )
    if run.config.evaluation.goal_set != "held_out":
        raise ValueError(
            f"{run.root} was evaluated on the goals that its teachers were selected by (evaluation.goal_set = "
            f"{run.config.evaluation.goal_set!r}); publish a run that is evaluated on held-out goals"
        )
    finished = [teacher for teacher in run.teachers() if teacher.finished]
    if not finished:
        raise ValueError(f"{run.root} has no finished teacher yet; launch it again to finish them")
    claim(folder, "teachers", to_dict(run.config))
    unfinished = [teacher for teacher in run.teachers() if not teacher.finished]
    published = [t.name for t in unfinished if published_policy(folder, t.task, t.seed).exists()]
    check_none_lost(folder, published, (), f"launch {run.root} again to finish them, or choose another folder")
    # All policies are checked before the first file is copied: a failure leaves the folder as it was.
    for teacher in finished:
        _check_whole(run, teacher)
    report = gather(run)
    for name in TABLES:
        if (run.results / name).exists():
            copy(run.results / name, folder / name)
        else:
            _remove(folder, name)
    evaluations = read_rows(run.results / "evaluations.csv", EvaluationRow)
    episodes = read_rows(run.results / "episodes.csv", EpisodeRow)
    # Results of students are published into folders of their own, by `publish_results`.
    write_rows(folder / "evaluations.csv", [row for row in evaluations if row.method == TEACHER])
    write_rows(folder / "episodes.csv", [row for row in episodes if row.method == TEACHER])
    timings = read_for_display(run.results / "timings.json", list[dict[str, Any]], [])
    timings = [entry for entry in timings if entry.get("role") == "teacher"]
    write_json(folder / "timings.json", timings)
    # Not the run's own metrics.json, which also has its students.
    measures = summarize(read_tables(folder)).to_json()
    write_json(folder / "metrics.json", {KIND_KEY: "teachers", **measures, "provenance": report["provenance"]})
    compress_tables(folder)  # published tables are made to be committed
    policies = []
    for teacher in finished:
        target = published_policy(folder, teacher.task, teacher.seed)
        copy(teacher.policy, target)
        copy(teacher.policy.with_suffix(".json"), target.with_suffix(".json"))
        policies.append(target)
    # Remove policies of an earlier publication, which this config.json does not describe.
    for stale in set((folder / "policies").glob("*.safetensors")) - set(policies):
        remove(stale)
        remove(stale.with_suffix(".json"))
    return policies


def publish_results(path: Path, folder: Path, students: Sequence[str] = ()) -> Path:
    """Copy the results of a run, which is gathered first, or gathered results to `folder`.

    With those of a run, its students are published; `students` are those of `publish_students`.

    Returns:
        `folder`, from which all figures and tables can be rebuilt.

    Raises:
        RunError: if there are no results, if `folder` is the wrong place for them, or if it holds results of
            another experiment or of students that these results lack.
    """
    results = find_results(path)
    tables = read_tables(results)
    claim(folder, "results", tables.config)
    if find_table(table := folder / "evaluations.csv"):
        published = [row for row in read_rows(table, EvaluationRow) if row.method != TEACHER]
        missing = "; ".join(summarize(tables).missing[-3:])
        check_none_lost(
            folder,
            evaluated(published),
            evaluated(tables.evaluations),
            f"{results} lacks them{f' ({missing})' if missing else ''}. Finish the run, or choose another "
            "folder (`cpd build DIR DIR --out FIGURES` draws several side by side)",
        )
    recipe = labels_of(tables.evaluations)["teacher_recipe"] or tables.config["teacher"]["recipe"]
    check_repository_place(folder, recipe, tables.goal_set)
    publish_students(Run(path) if kind_of(path) == "run" else None, tables, folder, students)
    for name in sorted(RESULT_FILES):
        file = find_table(results / name)
        # A stale table would be drawn with the new ones; of a plain and a compressed one, only one may stay.
        if file is None or file.name != name:
            _remove(folder, name)
        if file is not None:
            copy(file, folder / file.name)
    compress_tables(folder)
    return folder


def _check_whole(run: Run, teacher: TeacherElement) -> None:
    """Raise DamagedFileError unless the description is of this teacher and this policy."""
    path = teacher.policy.with_suffix(".json")
    check_identity(path, **identity(run.config, teacher))
    if read_json(path, Policy)["sha256"] != sha256(teacher.policy):
        raise DamagedFileError(
            f"{teacher.policy} is damaged: its checksum differs from that in {path.name}; remove {teacher.path} "
            "and launch again to train this teacher again"
        )


def _remove(folder: Path, name: str) -> None:
    """Remove a published file, plain and compressed."""
    while file := find_table(folder / name):
        remove(file)
