"""Taking over teachers that were trained before, so that many experiments share one set.

They come from another run's directory, or from a folder of published teachers, which holds `config.json` and
`policies/<task>-seed-<n>.safetensors` with a description beside each. Everything is checked by its hash, and the
run directory that takes them over stays self-contained: large files are linked (hard) or copied, and nothing
points outside.

What made the teachers must agree: the settings in `teacher` and `stream` except seeds, gate and tasks, and the
versions of the simulator. Settings that only come later may differ: then the policy is taken over, and the
teacher's own job evaluates it or collects its rollouts anew. A teacher that is not there is trained as usual. So
is, where the budget of environment steps is another one, a teacher whose training that budget ended or would end;
for all others it makes no difference.
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
from cpd.run.directory import Element, Run, TeacherElement, published_policy, teacher_element
from cpd.run.files import atomic_write, copy, read_json, sha256, write_json
from cpd.run.progress import State, StatusRecord
from cpd.run.provenance import labels
from cpd.run.shards.schema import INDEX_NAME, ShardIndex

#: Settings that make a teacher, but for those that do not change what a trained policy is.
MAKING = ("stream.", "teacher.")
LATER = ("stream.tasks", "teacher.seeds", "teacher.gate", "teacher.on_rejected", "teacher.max_env_steps:")


class ReuseError(ValueError):
    """Teachers that cannot be taken over; says why and what to do."""


@dataclass(frozen=True)
class Reuse:
    """What is taken over for one teacher of a run."""

    teacher: TeacherElement
    policy: Path | None = None
    """Its weights as they are there; None if it is not there and is trained as usual."""
    source: TeacherElement | None = None
    """The teacher in the other run; None for a published policy."""
    evaluation: bool = False
    rollouts: bool = False
    marker: str = ""
    """`COMPLETE` or `REJECTED` where nothing is left to do."""
    lacks_budget: bool = False
    """Whether it is there, but would have trained longer, or less, within the budget that this run has."""

    @property
    def summary(self) -> str:
        """One line on what becomes of the teacher."""
        if self.policy is None and self.teacher.policy.exists():
            return "not there, but taken over before from elsewhere"
        if self.policy is None:
            return (
                "trained anew, since the budget is another" if self.lacks_budget else "not there, trained as usual"
            )
        if self.marker:
            return f"taken over as it is ({'admitted' if self.marker == 'COMPLETE' else 'rejected'})"
        left = [] if self.evaluation else ["evaluated"]
        left += [] if self.rollouts else ["collects rollouts"]
        return f"policy taken over, {' and '.join(left) or 'judged by this gate'} here"


def find_reusable(run: Run, folder: Path) -> list[Reuse]:
    """What of the teachers in `folder` can be taken over for those of `run` on which no work has begun.

    Raises:
        ReuseError: if there are no teachers for this run in `folder`, settings or versions disagree, or a file
            is not the one that its record describes.
    """
    untouched = [t for t in run.teachers() if not (t.finished or (t.path / "attempts").exists())]
    if not untouched:
        return []
    if folder.resolve() == run.root.resolve():
        raise ReuseError(f"teachers_from = {str(folder)!r} is the run itself")
    changed = _changed_settings(folder, run.config)
    wrong = [f"  {line}" for line in changed if line.startswith(MAKING) and not line.startswith(LATER)]
    if wrong:
        raise ReuseError(
            f"the teachers in {folder} were made with other settings (theirs -> ours); copy theirs into the "
            "recipe, or train anew:\n" + "\n".join(wrong)
        )
    try:
        found = [_adoption(teacher, folder, changed, run.config) for teacher in untouched]
    except ReuseError:
        raise
    except ValueError as error:  # an index or a description that cannot be read
        raise ReuseError(str(error)) from None
    if all(adoption.policy is None for adoption in found) and len(untouched) == len(run.teachers()):
        names = ", ".join(f"{t.task} seed {t.seed}" for t in untouched)
        raise ReuseError(f"{folder} holds none of the finished teachers that are wanted: {names}")
    return found


def reuse(run: Run, folder: Path) -> list[Reuse]:
    """Take over what there is, enter it into provenance.json, and set the markers last; see `find_reusable`.

    Doing it again after it was interrupted completes it.
    """
    found = find_reusable(run, folder)
    taken = {}
    for adoption in found:
        if adoption.policy is not None:
            taken[adoption.teacher.name] = _take_over(adoption, adoption.policy, folder.resolve().name)
    if taken:
        path = run.root / "provenance.json"
        record = read_json(path) if path.exists() else {}
        before = record.get("teachers", {})
        write_json(path, {**record, "teachers": {**before, **taken}})
    for adoption in found:
        if adoption.source and adoption.marker:
            copy(adoption.source.path / adoption.marker, adoption.teacher.path / adoption.marker)
    return found


def _changed_settings(folder: Path, ours: Config) -> list[str]:
    """What made the teachers in `folder` and differs from `ours`, as `dotted.path: theirs -> ours`."""
    path = folder / "config.json"
    if not path.exists():
        raise ReuseError(
            f"teachers_from = {str(folder)!r}: no such run or folder of published teachers (it has no config.json)"
        )
    # Only what concerns teachers: what older code said of students may not load any more.
    tables = upgrade(read_json(path))
    found = []
    for name in ("stream", "teacher", "rollouts", "evaluation"):
        own = getattr(ours, name)
        theirs = load(type(own), tables.get(name, {}), f"{path}, in its part {name!r},")
        found += changes(to_dict(theirs), to_dict(own), name)
    return found


def _adoption(teacher: TeacherElement, folder: Path, changed: Sequence[str], ours: Config) -> Reuse:
    """What there is for one teacher, checked."""
    published = published_policy(folder, teacher.task, teacher.seed)
    if published.exists():
        _check_policy(published, teacher, ours)
        if _depends_on_budget(published, changed, ours):
            return Reuse(teacher, lacks_budget=True)
        return Reuse(teacher, published)
    source = teacher_element(folder, teacher.index, teacher.task, teacher.seed)
    if not source.finished:
        return Reuse(teacher)
    _check_policy(source.policy, teacher, ours)
    if _depends_on_budget(source.policy, changed, ours):
        return Reuse(teacher, lacks_budget=True)

    def same(settings: str) -> bool:
        return not any(line.startswith(settings) for line in changed)

    evaluation = source.evaluation.exists() and same("evaluation.num_episodes:") and same("evaluation.goal_set:")
    rollouts = (source.shards / INDEX_NAME).exists() and same("rollouts.")
    if rollouts:
        _check_shards(source)
    marker = "REJECTED" if source.rejected.exists() else "COMPLETE"
    is_whole = evaluation and (rollouts or marker == "REJECTED") and same("teacher.gate:")
    return Reuse(teacher, source.policy, source, evaluation, rollouts, marker if is_whole else "")


def _check_policy(policy: Path, teacher: TeacherElement, ours: Config) -> None:
    path = policy.with_suffix(".json")
    if not path.exists():
        raise ReuseError(f"{policy} has no description ({path.name}) beside it")
    description = read_json(path)
    if sha256(policy) != description.get("sha256"):
        raise ReuseError(f"{policy} is not the file that {path.name} describes: its hash differs")
    if (description.get("task"), description.get("seed")) != (teacher.task, teacher.seed):
        raise ReuseError(f"{path} describes another teacher than {teacher.task} seed {teacher.seed}")
    wanted = asdict(labels(ours))
    wrong = [
        f"{name} is {value!r} there, {wanted.get(name)!r} here"
        for name, value in description.get("labels", {}).items()
        if name != "task_identity" and wanted.get(name) != value
    ]
    if wrong:
        raise ReuseError(f"{policy} was made under other conditions: {'; '.join(wrong)}; train anew")


def _depends_on_budget(policy: Path, changed: Sequence[str], ours: Config) -> bool:
    """Whether budgets differ, and training ended with theirs, or would have ended before with ours."""
    training = read_json(policy.with_suffix(".json")).get("training", {})
    is_other = any(line.startswith("teacher.max_env_steps:") for line in changed)
    ended = training.get("stopped_by") == "budget" or training.get("env_steps", 0) > ours.teacher.max_env_steps
    return is_other and ended


def _check_shards(source: TeacherElement) -> None:
    path = source.shards / INDEX_NAME
    index = ShardIndex.from_dict(read_json(path), path)
    if index.attributes.policy_sha256 != sha256(source.policy):
        raise ReuseError(f"{path}: these rollouts are another policy's than {source.policy}")
    for entry in index.shards:
        file = source.shards / entry.file
        if not file.is_file() or sha256(file) != entry.sha256:
            raise ReuseError(f"{file} is missing, or not the file that {INDEX_NAME} describes")


def _take_over(adoption: Reuse, policy: Path, name: str) -> dict[str, Any]:
    """Link or copy one teacher's files; returns what provenance.json keeps of it."""
    teacher, source = adoption.teacher, adoption.source
    record: dict[str, Any] = {"from": name, "policy_sha256": sha256(policy)}
    if source and adoption.rollouts:
        path = source.shards / INDEX_NAME
        for entry in ShardIndex.from_dict(read_json(path), path).shards:
            _link(source.shards / entry.file, teacher.shards / entry.file)
        copy(path, teacher.shards / INDEX_NAME)
        record["rollouts_sha256"] = sha256(path)
    if source and adoption.evaluation:
        copy(source.episodes, teacher.episodes)
        copy(source.evaluation, teacher.evaluation)
        record["evaluation_sha256"] = sha256(source.evaluation)
    if source and source.metrics.exists():
        copy(source.metrics, teacher.metrics)
    _link(policy, teacher.policy)
    copy(policy.with_suffix(".json"), teacher.policy.with_suffix(".json"))
    success = read_json(policy.with_suffix(".json")).get("training", {}).get("validation_success")
    states: dict[str, State] = {"COMPLETE": "done", "REJECTED": "rejected"}
    state = states.get(adoption.marker, "waiting")
    status = StatusRecord(state=state, success=success, message=f"taken over from {name}")
    write_json(teacher.status, asdict(status))
    return record


def _link(source: Path, target: Path) -> None:
    """A hard link where there are such, else a copy: these files are replaced as wholes and never changed."""
    with atomic_write(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


class PlannedRun(Run):
    """A run directory that may not be there yet."""

    def __init__(self, root: Path, config: Config, reuses: Sequence[Reuse] = ()) -> None:
        """Nothing is read or written; teachers that would be taken over as they are count as finished."""
        self.root = root
        self.__dict__["config"] = config
        self._is_extended = self.config_path.exists() and Run(root).is_extended_by(config)
        self._policies = {a.teacher.name for a in reuses if a.policy}
        self._elsewhere = {a.teacher.name: a.source.path for a in reuses if a.source and a.marker}

    def teachers(self) -> list[TeacherElement]:
        """Those that would be taken over lie where they are now."""
        return [replace(t, path=self._elsewhere.get(t.name, t.path)) for t in super().teachers()]

    def report(self) -> Element:
        """One that has yet to tell of students that would be added lies where nothing is."""
        report = super().report()
        return replace(report, path=report.path / "anew") if self._is_extended else report

    def is_trained(self, teacher: TeacherElement) -> bool:
        """Also those whose policy would be taken over."""
        return teacher.name in self._policies or super().is_trained(teacher)
