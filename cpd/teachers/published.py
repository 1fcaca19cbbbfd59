"""Teachers outside of their run: small results and policy files that can be kept, and that later runs start from.

A folder of published teachers holds the long-form tables of `cpd.results`, the frozen configuration, and
`policies/<task>-seed-<n>.safetensors` with its description beside it.
"""

from __future__ import annotations

from pathlib import Path

from cpd.adoption import published_policy
from cpd.files import copy, read_json, write_json
from cpd.result_tables import TEACHER, read_tables
from cpd.results import gather
from cpd.runs import Run
from cpd.summary import summarize
from cpd.tables import EpisodeRow, EvaluationRow, read_rows, write_rows

#: The tables that tell of teachers alone.
TABLES = ("config.json", "teachers.csv", "teacher_curves.csv")


def publish_teachers(run: Run, folder: Path) -> list[Path]:
    """Copy what a run tells of its finished teachers, admitted or rejected, and their policies to `folder`.

    Returns:
        The policy files.

    Raises:
        RunError: if the run holds no teacher at all.
        ValueError: if no teacher is finished, or not by held-out goals, or they are stand-ins.
    """
    if run.config.teacher.recipe == "scripted":
        raise ValueError(
            f"{run.root} has scripted stand-ins for teachers, which come with Meta-World: nothing to keep"
        )
    if run.config.evaluation.goal_set != "held_out":
        raise ValueError(
            f"{run.root} was evaluated on goals by which its teachers were chosen (evaluation.goal_set = "
            f"{run.config.evaluation.goal_set!r}); publish a run that reports on held-out ones"
        )
    finished = [teacher for teacher in run.teachers() if teacher.finished]
    if not finished:
        raise ValueError(f"{run.root} has no finished teacher yet; launch it again to go on")
    report = gather(run)
    for name in TABLES:
        if (run.results / name).exists():
            copy(run.results / name, folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
    evaluations = read_rows(run.results / "evaluations.csv", EvaluationRow)
    episodes = read_rows(run.results / "episodes.csv", EpisodeRow)
    write_rows(folder / "evaluations.csv", [row for row in evaluations if row.method == TEACHER])
    write_rows(folder / "episodes.csv", [row for row in episodes if row.method == TEACHER])
    timings = [entry for entry in read_json(run.results / "timings.json") if entry["role"] == "teacher"]
    write_json(folder / "timings.json", timings)
    measures = summarize(read_tables(folder)).to_json()
    write_json(folder / "metrics.json", {**measures, "provenance": report["provenance"]})
    published = []
    for teacher in finished:
        target = published_policy(folder, teacher.task, teacher.seed)
        copy(teacher.policy, target)
        copy(teacher.policy.with_suffix(".json"), target.with_suffix(".json"))
        published.append(target)
    # What an earlier publication left would pass for policies that this config.json made.
    for stale in set((folder / "policies").glob("*.safetensors")) - set(published):
        stale.unlink()
        stale.with_suffix(".json").unlink(missing_ok=True)
    return published
