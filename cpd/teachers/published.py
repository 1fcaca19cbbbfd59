"""Teachers outside of their run: small results and policy files that can be kept, and that later runs start from.

A folder of published teachers holds the long-form tables of `cpd.results`, the frozen configuration, and
`policies/<task>-seed-<n>.safetensors` with its description beside it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from cpd.adoption import published_policy
from cpd.files import publish
from cpd.results import gather
from cpd.runs import Run

#: The tables that tell of teachers; the others are about students.
TABLES = (
    "config.json",
    "evaluations.csv",
    "episodes.csv",
    "teachers.csv",
    "teacher_curves.csv",
    "timings.json",
    "metrics.json",
)


def publish_teachers(run: Run, folder: Path) -> list[Path]:
    """Copy a run's tables and the policies of its finished teachers, admitted or rejected, to `folder`.

    Returns:
        The policy files.

    Raises:
        RunError: if the run holds no teacher at all.
        ValueError: if no teacher is finished, or not by held-out goals.
    """
    if run.config.evaluation.goal_set != "held_out":
        raise ValueError(
            f"{run.root} was evaluated on goals by which its teachers were chosen (evaluation.goal_set = "
            f"{run.config.evaluation.goal_set!r}); publish a run that reports on held-out ones"
        )
    finished = [teacher for teacher in run.teachers() if teacher.finished]
    if not finished:
        raise ValueError(f"{run.root} has no finished teacher yet; launch it again to go on")
    gather(run)
    for name in TABLES:
        source = run.results / name
        if source.exists():
            _copy(source, folder / name)
    published = []
    for teacher in finished:
        target = published_policy(folder, teacher.task, teacher.seed)
        _copy(teacher.policy, target)
        _copy(teacher.policy.with_suffix(".json"), target.with_suffix(".json"))
        published.append(target)
    return published


def _copy(source: Path, target: Path) -> None:
    with publish(target) as temporary:
        shutil.copyfile(source, temporary)
