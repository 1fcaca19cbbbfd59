"""What there is to export: finished policies, rollouts of teachers, learning curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired

from typing_extensions import TypedDict

from cpd.config import Config
from cpd.config.load import first_few
from cpd.reading import read_json
from cpd.run.directory import Element, Run, RunError, TeacherElement
from cpd.run.folders import CONTENTS, kind_of
from cpd.run.shards.schema import INDEX_NAME


class _Description(TypedDict):
    task: str | None
    seed: int
    method: NotRequired[str]
    """Of a student."""


@dataclass(frozen=True)
class PolicyFile:
    """The weights of a finished policy; a description lies beside them."""

    name: str
    """`students/<method>/seed-<n>` or `teachers/<task>/seed-<n>`, as in the run directory that it is from."""
    path: Path

    @property
    def is_student(self) -> bool:
        """Whether it is a student; otherwise a teacher."""
        return self.name.startswith("students/")


def policy_files(source: Path, only: Sequence[str] = ()) -> list[PolicyFile]:
    """List the finished policies of `source`: its students after their last stage, and its teachers.

    Args:
        source: a run directory, or a folder of published teachers, students, or one policy.
        only: names of policies, or of folders of policies, such as `students`; default: all.

    Raises:
        RunError: if there is no finished policy, or none with such a name.
    """
    files = _of_run(Run(source)) if (kind := kind_of(source)) == "run" else _published(source)
    if not files:
        raise RunError(
            f"{source} has no finished policy: it holds {CONTENTS[kind]}; name a run or published teachers"
        )
    chosen = [f for f in files if not only or any(f"{f.name}/".startswith(f"{n.rstrip('/')}/") for n in only)]
    if not chosen:
        raise RunError(f"{source} has no {first_few(only)}; choose among {', '.join(file.name for file in files)}")
    return chosen


def _of_run(run: Run) -> list[PolicyFile]:
    students = [(s.name, s.final_policy) for s in run.students() if s.finished and _is_one_network(s.config)]
    teachers = [(t.name, t.policy) for t in run.teachers() if t.finished and t.policy.exists()]
    return [PolicyFile(name, path) for name, path in [*students, *teachers] if path]


def _is_one_network(config: Config) -> bool:
    """Whether a student of this method acts with the network of its last stage alone."""
    protocol = config.distill.protocol
    return protocol == "joint" or (protocol == "continual" and not config.protection.needs_task)


def _published(folder: Path) -> list[PolicyFile]:
    files = []
    for path in sorted(folder.glob("policies/*.safetensors")):
        task, _, seed = path.stem.rpartition("-seed-")
        files.append(PolicyFile(f"teachers/{task}/seed-{seed}", path))
    for path in sorted(folder.glob("students/*/policy.safetensors")):
        method, _, seed = path.parent.name.rpartition("-seed-")
        files.append(PolicyFile(f"students/{method}/seed-{seed}", path))
    if kind_of(folder) == "policy":
        described = read_json(folder / "policy.json", _Description)
        role = f"students/{described['method']}" if "method" in described else f"teachers/{described['task']}"
        files.append(PolicyFile(f"{role}/seed-{described['seed']}", folder / "policy.safetensors"))
    return files


def teachers_with_rollouts(source: Path, only: Sequence[str] = ()) -> list[TeacherElement]:
    """List the teachers of a run that are finished and have rollouts, as `only` chooses.

    Raises:
        RunError: if `source` is no run directory, or there is no such teacher.
    """
    elements = [e for e in Run(source).select(only) if isinstance(e, TeacherElement)]
    teachers = [e for e in elements if e.complete.exists() and (e.shards / INDEX_NAME).exists()]
    if not teachers:
        raise RunError(f"{source} has no rollouts of finished teachers; launch it, or choose others by --only")
    return teachers


def elements_with_metrics(source: Path, only: Sequence[str] = ()) -> list[Element]:
    """List the teachers and students of a run that have begun to train, as `only` chooses.

    Raises:
        RunError: if `source` is no run directory, or there is no such element.
    """
    elements = [e for e in Run(source).select(only) if e.metrics.exists()]
    if not elements:
        raise RunError(f"{source} has no learning curves; launch it, or choose others by --only")
    return elements
