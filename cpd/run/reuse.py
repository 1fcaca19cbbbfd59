"""Reusing trained teachers, so that many experiments share one set.

The source is another run directory or a folder of published teachers, which holds `config.json` and
`policies/<task>-seed-<n>.safetensors` with a description beside each policy. All files are checked by their
hashes. The new run directory stays self-contained: large files are hard-linked or copied.

The settings that determine a teacher must agree: those in `teacher` and `stream` except seeds, gate and tasks, and
the versions of the simulator. If only later settings differ, the policy is reused, and the teacher's job evaluates
it or collects its rollouts again. A teacher that the source lacks is trained as usual. If max_env_steps differs, a
teacher is retrained only if it stopped at the old budget or used more steps than the new one. If only this run has
a stay phase, that begins with the source's policy.

A run on several suites takes the policies of runs on one of them, whatever their settings: no table `teacher`
could agree with all. The settings that differ are recorded beside the hashes in provenance.json.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cpd.config import Config, changes
from cpd.config.load import load, to_dict
from cpd.config.retired import upgrade
from cpd.envs.suite import DEFAULT_SUITE, Suite
from cpd.reading import read_for_display, read_json
from cpd.run.descriptions import Policy, check_identity
from cpd.run.directory import Element, Run, TeacherElement, identity, published_policy, teacher_element
from cpd.run.files import atomic_write, copy, sha256, write_json
from cpd.run.folders import CONTENTS, kind_of
from cpd.run.progress import State, StatusRecord
from cpd.run.provenance import labels
from cpd.run.shards.schema import INDEX_NAME, read_index
from cpd.run.tables import EpisodeRow, EvaluationRow, read_rows

#: Settings that must agree with the source's, except those in `EXEMPT`, which do not change a trained policy.
DECISIVE = ("stream.", "teacher.")
EXEMPT = ("stream.tasks", "teacher.seeds", "teacher.gate", "teacher.on_rejected", "teacher.max_env_steps:")
#: Settings of the stay phase.
STAY = "teacher.stay."


class ReuseError(ValueError):
    """Teachers cannot be reused; the message says why and what to do."""


@dataclass(frozen=True)
class Reuse:
    """What one teacher of a run reuses."""

    teacher: TeacherElement
    policy: Path | None = None
    """The source's weights; None if the teacher is trained as usual."""
    source: TeacherElement | None = None
    """The teacher in the other run; None for a published policy."""
    evaluation: bool = False
    rollouts: bool = False
    marker: str = ""
    """`COMPLETE` or `REJECTED` where nothing is left to do."""
    lacks_budget: bool = False
    """Whether the source has the teacher, but its training depended on another max_env_steps."""
    folder: Path | None = None
    """Where the policy comes from."""
    begins_stay: bool = False
    """Whether the stay phase of this run begins with the policy."""
    other_settings: Sequence[str] = ()
    """Settings of a run on one of this run's suites that differ, as `dotted.path: theirs -> ours`."""

    @property
    def summary(self) -> str:
        """One line: what is reused, and what is done again."""
        if self.policy is None and self.teacher.policy.exists():
            return "not in the source, but reused from another one before"
        if self.policy is None:
            return (
                "trained again, since max_env_steps differs"
                if self.lacks_budget
                else "not in the source, trained as usual"
            )
        if self.marker:
            return f"reused ({'admitted' if self.marker == 'COMPLETE' else 'rejected'})"
        if self.begins_stay:
            return "policy reused, its stay phase is trained here"
        left = [] if self.evaluation else ["evaluated"]
        left += [] if self.rollouts else ["collects rollouts"]
        return f"policy reused, {' and '.join(left) or 'judged by this gate'} here"


def find_reusable(run: Run, *folders: Path) -> list[Reuse]:
    """Return what the teachers of `run` without work of their own reuse: each from the first folder that has it.

    Raises:
        ReuseError: if a folder has no teachers for this run, settings or versions disagree, or a file does not
            match its record.
    """
    chosen: dict[str, Reuse] = {}
    for folder in folders:
        for item in _find_in(run, folder):
            if item.teacher.name not in chosen or (item.policy and not chosen[item.teacher.name].policy):
                chosen[item.teacher.name] = item
    return list(chosen.values())


def _find_in(run: Run, folder: Path) -> list[Reuse]:
    untouched = [t for t in run.teachers() if not (t.finished or (t.path / "attempts").exists())]
    if not untouched:
        return []
    if folder.resolve() == run.root.resolve():
        raise ReuseError(f"teachers_from = {str(folder)!r} is the run itself")
    changed, suite = _changed_settings(folder, run.config)
    exempt = (*EXEMPT, STAY) if _begins_stay(changed) else EXEMPT
    decisive = [line for line in changed if line.startswith(DECISIVE) and not line.startswith(exempt)]
    is_part = suite in (of_task.name for of_task in _suites(run.config)) and suite != run.config.stream.suite
    wrong = [f"  {line}" for line in decisive if not is_part or line.startswith("stream.horizon:")]
    if wrong:
        raise ReuseError(
            f"the teachers in {folder} were trained with other settings (theirs -> ours); copy theirs into the "
            "recipe, or train new teachers:\n" + "\n".join(wrong)
        )
    try:
        other = decisive if is_part else None
        reuses = [
            replace(_reuse_of(teacher, folder, changed, run.config, other), folder=folder) for teacher in untouched
        ]
    except ValueError as error:  # also an index or a description that cannot be read
        raise ReuseError(str(error)) from None
    if all(item.policy is None for item in reuses) and len(untouched) == len(run.teachers()):
        names = ", ".join(f"{t.task} seed {t.seed}" for t in untouched)
        raise ReuseError(f"{folder} has no finished teacher that this run needs: {names}")
    return reuses


def reuse(run: Run, *folders: Path) -> list[Reuse]:
    """Copy what `find_reusable` returns into `run`, record it in provenance.json, and set the markers last.

    After an interruption, calling it again completes the work.
    """
    reuses = find_reusable(run, *folders)
    records = {item.teacher.name: _copy_files(item, item.policy, run.config) for item in reuses if item.policy}
    if records:
        path = run.root / "provenance.json"
        provenance = read_for_display(path, dict[str, Any], {})
        earlier = provenance.get("teachers")
        write_json(path, {**provenance, "teachers": {**(earlier if isinstance(earlier, dict) else {}), **records}})
    for item in reuses:
        if item.source and item.marker:
            copy(item.source.path / item.marker, item.teacher.path / item.marker)
    return reuses


def _suites(config: Config) -> list[Suite]:
    """Return the suites that the tasks of a run come from."""
    return [config.stream.suite_object.of(task) for task in config.stream.distinct_tasks]


def _changed_settings(folder: Path, ours: Config) -> tuple[list[str], str]:
    """Return the settings of the teachers in `folder` that are not `ours`, and the name of their suite.

    Settings are `dotted.path: theirs -> ours`.
    """
    path = folder / "config.json"
    if (held := kind_of(folder)) not in ("run", "teachers"):
        raise ReuseError(
            f"teachers_from = {str(folder)!r} holds {CONTENTS[held]}, neither a run nor published teachers"
        )
    # Only the tables that concern teachers: student tables of older code may no longer load.
    tables = upgrade(read_json(path, dict[str, Any]))
    lines = []
    for name in ("stream", "teacher", "rollouts", "evaluation"):
        table = getattr(ours, name)
        source_table = load(type(table), tables.get(name, {}), f"{path}, in its part {name!r},")
        lines += changes(to_dict(source_table), to_dict(table), name)
    return lines, tables.get("stream", {}).get("suite", DEFAULT_SUITE)


def _begins_stay(changed: Sequence[str]) -> bool:
    """Whether this run has a stay phase and the source has none."""
    return any(line.startswith(f"{STAY}max_env_steps: 0 ->") for line in changed)


def _reuse_of(
    teacher: TeacherElement, folder: Path, changed: Sequence[str], ours: Config, of_part: Sequence[str] | None
) -> Reuse:
    """Check what `folder` holds of one teacher, and return what can be reused.

    `of_part` holds the settings that differ if it is of a run on one of our suites; then only the policy can be.
    """
    published = published_policy(folder, teacher.task, teacher.seed)
    source = teacher_element(folder, teacher.index, teacher.task, teacher.seed)
    files = (published, published.with_suffix(".json"), *source.path.glob("*"), *source.shards.glob("*"))
    for path in files:
        # A link of somebody else could name any file of this user's.
        target = Path(os.path.realpath(path))  # unlike `resolve`, accepts a link to itself
        if not target.is_relative_to(folder.resolve()):
            raise ReuseError(f"{path} leads to {target}, outside of {folder}: copy that into the folder first")
    if published.with_suffix(".json").exists() and not published.exists():
        raise ReuseError(f"{published} is missing, but its description is there: restore it, or publish again")
    if not published.exists() and not source.finished:
        return Reuse(teacher)
    policy = published if published.exists() else source.policy
    _check_policy(policy, teacher, ours, of_part is not None)
    if of_part is not None:
        return Reuse(teacher, policy, other_settings=of_part)
    if _depends_on_budget(policy, changed, ours):
        return Reuse(teacher, lacks_budget=True)
    if _begins_stay(changed) and ours.teacher.stays:
        return Reuse(teacher, policy, source if policy == source.policy else None, begins_stay=True)
    if policy == published:  # a published folder has neither rollouts nor markers
        return Reuse(teacher, policy)

    def same(settings: str) -> bool:
        return not any(line.startswith(settings) for line in changed)

    tables = source.evaluation.exists() and source.episodes.exists()
    evaluation = tables and same("evaluation.num_episodes:") and same("evaluation.goal_set:")
    if evaluation:  # what is damaged there is refused here
        read_rows(source.evaluation, EvaluationRow)
        read_rows(source.episodes, EpisodeRow)
    rollouts = (source.shards / INDEX_NAME).exists() and same("rollouts.")
    if rollouts:
        _check_shards(source)
    marker = "REJECTED" if source.is_rejected else "COMPLETE"
    is_whole = evaluation and (rollouts or marker == "REJECTED") and same("teacher.gate:")
    return Reuse(teacher, source.policy, source, evaluation, rollouts, marker if is_whole else "")


def _check_policy(policy: Path, teacher: TeacherElement, ours: Config, is_part: bool) -> None:
    path = policy.with_suffix(".json")
    if not path.exists():
        raise ReuseError(f"{policy} has no description ({path.name}) beside it")
    description = read_json(path, Policy)
    if sha256(policy) != description["sha256"]:
        raise ReuseError(f"{policy} is damaged: its hash differs from the one in {path.name}")
    check_identity(path, task=teacher.task, seed=teacher.seed)
    wanted = asdict(labels(ours, ours.stream.suite_object.of(teacher.task) if is_part else None))
    wrong = [
        f"{name} is {value!r} there, {wanted.get(name)!r} here"
        for name, value in asdict(description["labels"]).items()
        if name != "task_identity" and wanted.get(name) != value
    ]
    if wrong:
        raise ReuseError(f"{policy} was trained under other conditions: {'; '.join(wrong)}; train a new teacher")


def _depends_on_budget(policy: Path, changed: Sequence[str], ours: Config) -> bool:
    """Whether budgets differ, and training stopped at theirs or used more steps than ours."""
    training = read_json(policy.with_suffix(".json"), Policy)["training"]
    is_other = any(line.startswith("teacher.max_env_steps:") for line in changed)
    ended = training.get("stopped_by") == "budget" or training.get("env_steps", 0) > ours.teacher.max_env_steps
    return is_other and ended


def _check_shards(source: TeacherElement) -> None:
    index = read_index(source.shards)
    if index.attributes.policy_sha256 != sha256(source.policy):
        raise ReuseError(f"{source.shards}: these rollouts were not collected by {source.policy}")
    for entry in index.shards:
        file = source.shards / entry.file
        if not file.is_file() or sha256(file) != entry.sha256:
            raise ReuseError(f"{file} is missing, or not the file that {INDEX_NAME} describes")


def _copy_files(item: Reuse, policy: Path, ours: Config) -> dict[str, Any]:
    """Link or copy one teacher's files; return its entry of provenance.json."""
    teacher, source = item.teacher, item.source
    assert item.folder is not None
    name = item.folder.resolve().name
    record: dict[str, Any] = {"from": name, "policy_sha256": sha256(policy)}
    if item.other_settings:
        record["other_settings"] = list(item.other_settings)
    if source and item.rollouts:
        index_path = source.shards / INDEX_NAME
        for entry in read_index(source.shards).shards:
            _link(source.shards / entry.file, teacher.shards / entry.file)
        copy(index_path, teacher.shards / INDEX_NAME)  # last: only what it lists counts
        record["rollouts_sha256"] = sha256(index_path)
    if source and item.evaluation:
        copy(source.episodes, teacher.episodes)
        copy(source.evaluation, teacher.evaluation)
        record["evaluation_sha256"] = sha256(source.evaluation)
    if source and os.path.lexists(source.metrics):
        copy(source.metrics, teacher.metrics)
    target = teacher.trained_policy if item.begins_stay else teacher.policy
    _link(policy, target)
    description = read_json(policy.with_suffix(".json"), dict[str, Any])
    write_json(target.with_suffix(".json"), {**description, **identity(ours, teacher)})
    success = description["training"]["validation_success"]
    states: dict[str, State] = {"COMPLETE": "done", "REJECTED": "rejected"}
    status = StatusRecord(states.get(item.marker, "waiting"), success=success, message=f"reused from {name}")
    write_json(teacher.status, asdict(status))
    return record


def _link(source: Path, target: Path) -> None:
    """Make a hard link, or a copy on another file system; linked files are replaced as a whole, never changed.

    Files of another user, who could change them, are copied.
    """
    source = source.resolve()
    is_own = source.stat().st_uid == os.getuid()
    with atomic_write(target) as temporary:
        temporary.unlink()  # a link needs a free name
        try:
            (os.link if is_own else shutil.copyfile)(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


class PlannedRun(Run):
    """A run directory that may not exist yet."""

    def __init__(self, root: Path, config: Config, reuses: Sequence[Reuse] = ()) -> None:
        """Plan a run without writing anything; teachers that are reused completely count as finished."""
        super().__init__(root, config)
        self._is_extended = self.config_path.exists() and Run(root).is_extended_by(config)
        self._policies = {item.teacher.name for item in reuses if item.policy and not item.begins_stay}
        complete = [item for item in reuses if item.marker]
        self._source_paths = {item.teacher.name: item.source.path for item in complete if item.source}

    def teachers(self) -> list[TeacherElement]:
        """Return the teachers; those that are reused completely have the paths of their source."""
        return [self._planned(teacher) for teacher in super().teachers()]

    def teacher_of(self, task: str, student_seed: int) -> TeacherElement:
        """Return the teacher of `task` that the student with `student_seed` learns from, like `teachers`."""
        return self._planned(super().teacher_of(task, student_seed))

    def _planned(self, teacher: TeacherElement) -> TeacherElement:
        return replace(teacher, path=self._source_paths.get(teacher.name, teacher.path))

    def report(self) -> Element:
        """Return the report. If students are added, its path does not exist, so that it counts as unfinished."""
        report = super().report()
        return replace(report, path=report.path / "again") if self._is_extended else report

    def is_trained(self, teacher: TeacherElement) -> bool:
        """Whether the policy exists or would be reused."""
        return teacher.name in self._policies or super().is_trained(teacher)
