"""Teachers outside of their run: small results and policy files that can be kept for good, and taken up again.

A folder of published teachers holds the long-form tables of `cpd.results`, the frozen configuration, and
`policies/<task>-seed-<n>.safetensors` with its description beside it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from cpd.config import Config, differences
from cpd.files import publish, read_json, sha256, sync_folder
from cpd.results import gather
from cpd.runs import Run, TeacherElement
from cpd.strict_load import load

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


def policy_file(folder: Path, task: str, seed: int) -> Path:
    """Where a folder of published teachers keeps a policy's weights; the description ends in .json."""
    return folder / "policies" / f"{task}-seed-{seed}.safetensors"


def publish_teachers(run: Run, folder: Path) -> list[Path]:
    """Copy a run's tables and the policies of its finished teachers, admitted or rejected, to `folder`.

    Returns:
        The policy files.

    Raises:
        RunError: if the run holds no teacher at all.
        ValueError: if no teacher is finished.
    """
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
        target = policy_file(folder, teacher.task, teacher.seed)
        _copy(teacher.policy, target)
        _copy(teacher.policy.with_suffix(".json"), target.with_suffix(".json"))
        published.append(target)
    return published


def adopt_teachers(run: Run, folder: Path) -> list[TeacherElement]:
    """Give the policies in `folder` to the teachers of `run` that have none: they need no training any more.

    They are evaluated and collect rollouts of their own when the run is launched.

    Returns:
        The teachers that were given a policy.

    Raises:
        ValueError: if the policies were trained with settings that differ from the run's, or a file is damaged.
    """
    theirs = load(Config, _teacher_part(read_json(folder / "config.json")), str(folder / "config.json"))
    ours = load(Config, _teacher_part(read_json(run.config_path)), str(run.config_path))
    changed = [line for line in differences(theirs, ours) if not line.startswith(("name", "stream.tasks"))]
    if changed:
        raise ValueError(
            f"the teachers in {folder} were trained with other settings than those of {run.root}:\n  "
            + "\n  ".join(changed)
        )
    adopted = []
    for teacher in run.teachers():
        source = policy_file(folder, teacher.task, teacher.seed)
        if teacher.policy.with_suffix(".json").exists() or not source.exists():
            continue
        if sha256(source) != read_json(source.with_suffix(".json"))["sha256"]:
            raise ValueError(f"{source} is not the file that its description names: their hashes differ")
        _copy(source, teacher.policy)
        _copy(source.with_suffix(".json"), teacher.policy.with_suffix(".json"))  # last: it marks the phase as done
        adopted.append(teacher)
    return adopted


def _teacher_part(tables: dict[str, object]) -> dict[str, object]:
    """What a configuration says of how teachers come to be."""
    return {name: tables[name] for name in ("name", "torch_threads", "stream", "teacher") if name in tables}


def _copy(source: Path, target: Path) -> None:
    with publish(target) as temporary:
        shutil.copyfile(source, temporary)
    sync_folder(target.parent)
