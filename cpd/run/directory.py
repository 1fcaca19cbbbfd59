"""The run directory: the only module that knows its paths.

A run is a set of elements. An element is the work of one job and has its own folder:

    runs/<name>/
      config.json  provenance.json  profile.json  jobs.jsonl
      teachers/<task>/seed-1/      status.json metrics.jsonl policy.safetensors policy.json shards/ COMPLETE
      students/<method>/seed-1/    status.json metrics.jsonl checkpoints/ stages/ curves.csv COMPLETE
      students/<method>/seed-1/evaluation/    status.json stage-00.csv ... COMPLETE
      results/                     evaluations.csv curves.csv episodes.csv metrics.json status.json COMPLETE
      figures/
      tensorboard/ or wandb/       learning curves, if the launch asked for them
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from cpd.config import Config
from cpd.config.load import load, nearest
from cpd.config.types import Role
from cpd.reading import DamagedFileError, check_shape, read_for_display, read_json
from cpd.run.folders import CONTENTS, kind_of

T = TypeVar("T")


class RunError(ValueError):
    """A directory that is missing, or does not hold what a command needs."""


@dataclass(frozen=True)
class Element:
    """The work of one job: its role, its number within the role, and its folder."""

    role: Role
    index: int
    path: Path
    name: str
    """Path relative to the run directory, e.g. `teachers/push-v3/seed-1`; unique in the run."""

    @property
    def root(self) -> Path:
        """The run directory."""
        return self.path.parents[self.name.count("/")]

    @property
    def status(self) -> Path:
        """The element's state and progress."""
        return self.path / "status.json"

    @property
    def metrics(self) -> Path:
        """Learning curves."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of resume checkpoints."""
        return self.path / "checkpoints"

    @property
    def complete(self) -> Path:
        """Marker of success, written last: by `run_teacher`, `run_student`, `run_evaluation` or `cpd report`."""
        return self.path / "COMPLETE"

    @property
    def rejected(self) -> Path:
        """Marker of a teacher whose validation success is below the gate."""
        return self.path / "REJECTED"

    @property
    def marker(self) -> Path | None:
        """The marker that the element has ended with, None while it has not.

        Raises:
            RunError: if there are both.
        """
        markers = [marker for marker in (self.complete, self.rejected) if marker.exists()]
        if len(markers) > 1:
            raise RunError(
                f"{self.path} holds both COMPLETE and REJECTED, which contradict each other: remove the wrong "
                "one, or both, and launch again"
            )
        return markers[0] if markers else None

    @property
    def finished(self) -> bool:
        """Whether the element is complete or rejected."""
        return self.marker is not None

    @property
    def is_rejected(self) -> bool:
        """Whether it is a teacher whose validation success is below the gate."""
        return self.marker == self.rejected


@dataclass(frozen=True)
class TeacherElement(Element):
    """A teacher of one task."""

    task: str
    seed: int

    @property
    def policy(self) -> Path:
        """The final policy's weights; `policy.json` beside it describes them."""
        return self.path / "policy.safetensors"

    @property
    def trained_policy(self) -> Path:
        """The policy before the stay phase, if the run has one."""
        return self.path / "trained.safetensors"

    @property
    def stay_checkpoints(self) -> Path:
        """Folder of resume checkpoints of the stay phase."""
        return self.path / "stay"

    @property
    def shards(self) -> Path:
        """Folder of the rollout shards and their index.json."""
        return self.path / "shards"

    @property
    def evaluation(self) -> Path:
        """The teacher's own evaluation, long form."""
        return self.path / "evaluation.csv"

    @property
    def episodes(self) -> Path:
        """The episodes of that evaluation, one row each."""
        return self.path / "episodes.csv"


@dataclass(frozen=True)
class StudentElement(Element):
    """A student (role `student`), or its evaluation (role `evaluation`)."""

    method: str
    seed: int
    config: Config = field(repr=False, compare=False)
    """The configuration of its method alone."""

    @property
    def curves(self) -> Path:
        """Success of the current task within each stage, long form."""
        return self.path / "curves.csv"

    def stage_policy(self, stage: int) -> Path:
        """The weights after `stage` (-1: before training), kept for good, with a description beside them.

        A file may hold only what changed since an earlier stage: see `cpd.run.weights`.
        """
        return self.path / "stages" / f"{'initial' if stage < 0 else f'stage-{stage:02d}'}.safetensors"

    @property
    def final_policy(self) -> Path | None:
        """The weights after the last stage so far; None before the first."""
        return self.policy_before(len(self.config.stream.tasks))

    def policy_before(self, stage: int) -> Path | None:
        """The weights after the last stage before `stage` that was not skipped; None if there is none."""
        paths = map(self.stage_policy, reversed(range(stage)))
        return next((path for path in paths if path.exists()), None)

    def row_file(self, stage: int) -> Path:
        """Row `stage` of the success matrix."""
        return self.path / f"{'initial' if stage < 0 else f'stage-{stage:02d}'}.csv"

    def row_episodes_file(self, stage: int) -> Path:
        """The episodes of that row, one line each."""
        return self.row_file(stage).with_suffix(".episodes.csv")

    def usage_file(self, stage: int) -> Path:
        """How often the router chose each expert; written for mixtures of experts only."""
        return self.row_file(stage).with_suffix(".usage.csv")

    def retrieval_file(self, stage: int) -> Path:
        """How often the student inferred the right task; written for students that infer it only."""
        return self.row_file(stage).with_suffix(".retrieval.csv")


def identity(config: Config, element: TeacherElement | StudentElement, stage: int | None = None) -> dict[str, Any]:
    """Return what the files of an element state about themselves; `stage` is that of a student's policy."""
    if isinstance(element, TeacherElement):
        return {"experiment": config.name, "task": element.task, "seed": element.seed}
    own = {"experiment": config.name, "method": element.method, "seed": element.seed}
    if stage is None:
        return own
    return {**own, "stage": stage, "task": config.stream.tasks[stage] if stage >= 0 else None}


class Run:
    """A run directory with the configuration that its first launch stored."""

    def __init__(self, root: Path, config: Config | None = None) -> None:
        """Open an existing run; with `config`, a run that need not exist yet.

        Raises:
            RunError: if `root` is not a run directory and `config` is None.
        """
        self.root = root
        self._planned_config = config
        if config is None and (held := kind_of(root)) != "run":
            raise RunError(f"{root} is not a run directory: it holds {CONTENTS[held]}; `cpd launch` makes one")
        if config is None and not self.config_path.exists():
            raise RunError(f"{root} is not a run directory: it has no config.json; `cpd launch` makes one")

    @property
    def config_path(self) -> Path:
        """The file of the stored configuration."""
        return self.root / "config.json"

    @cached_property
    def config(self) -> Config:
        """The stored configuration, checked on load."""
        if self._planned_config:
            return self._planned_config
        return load(Config, read_json(self.config_path, dict[str, Any]), str(self.config_path))

    @cached_property
    def method_configs(self) -> dict[str, Config]:
        """The configuration of every method alone, by its label."""
        return {label: self.config.of_method(label) for label in self.config.methods}

    def launched_with(self, shape: Any, default: T, *keys: str) -> T:
        """Return an entry of the last launch's profile.

        Args:
            shape: of the entry, as in `cpd.reading`.
            default: in place of an entry that is missing or damaged.
            keys: of the table, if it lies in one, and of the entry.
        """
        entry: Any = read_for_display(self.root / "profile.json", dict[str, Any], {})
        for key in keys:
            entry = entry.get(key) if isinstance(entry, dict) else None
        try:
            value: T = check_shape(entry, shape, keys[-1])
        except DamagedFileError:
            return default
        return value

    @property
    def digest(self) -> str:
        """Tells runs of one name apart that lie in different folders."""
        return hashlib.sha256(str(self.root.resolve()).encode()).hexdigest()[:6]

    @property
    def ledger(self) -> Path:
        """One line per submitted job."""
        return self.root / "jobs.jsonl"

    @property
    def logs(self) -> Path:
        """Output of the jobs."""
        return self.root / "logs"

    @property
    def results(self) -> Path:
        """Long-form tables."""
        return self.root / "results"

    @property
    def figures(self) -> Path:
        """Figures and tables made from `results`."""
        return self.root / "figures"

    def teachers(self) -> list[TeacherElement]:
        """Return all teachers, ordered by task, then seed."""
        pairs = [(t, s) for t in self.config.stream.distinct_tasks for s in self.config.teacher.seeds]
        return [teacher_element(self.root, index, task, seed) for index, (task, seed) in enumerate(pairs)]

    def teacher_of(self, task: str, student_seed: int) -> TeacherElement:
        """Return the teacher of `task` that the student with `student_seed` learns from.

        Students take the teacher seeds in turn.
        """
        seeds = self.config.teacher.seeds
        position = self.config.seeds.index(student_seed) % len(seeds)
        index = self.config.stream.distinct_tasks.index(task) * len(seeds) + position
        return teacher_element(self.root, index, task, seeds[position])

    def students(self) -> list[StudentElement]:
        """Return all students, ordered by method, then seed."""
        pairs = [(method, seed) for method in self.config.methods for seed in self.config.seeds]
        names = [f"students/{method}/seed-{seed}" for method, seed in pairs]
        configs = self.method_configs
        return [
            StudentElement("student", i, self.root / name, name, method, seed, configs[method])
            for i, ((method, seed), name) in enumerate(zip(pairs, names, strict=True))
        ]

    def evaluations(self) -> list[StudentElement]:
        """Return the evaluations, one per student."""
        return [
            replace(s, role="evaluation", path=s.path / "evaluation", name=f"{s.name}/evaluation")
            for s in self.students()
        ]

    def report(self) -> Element:
        """Return the element that gathers results and draws figures."""
        return Element("report", 0, self.results, "results")

    def is_trained(self, teacher: TeacherElement) -> bool:
        """Whether the teacher's final policy exists, perhaps without its evaluation and rollouts."""
        return teacher.policy.exists()

    def dependencies(self, element: Element) -> list[Element]:
        """Return the elements that must be finished before `element` can start."""
        if isinstance(element, StudentElement) and element.role == "student":
            return [self.teacher_of(task, element.seed) for task in self.config.stream.distinct_tasks]
        if element.role == "evaluation":
            return [self.students()[element.index]]
        return [*self.evaluations()] if element.role == "report" else []

    def elements(self) -> list[Element]:
        """Return all elements; each comes after its dependencies."""
        return [*self.teachers(), *self.students(), *self.evaluations(), self.report()]

    def is_extended_by(self, config: Config) -> bool:
        """Whether `config`, which differs from this run's in methods and seeds only, adds students."""
        return len(config.methods) * len(config.seeds) > len(self.students())

    def select(self, names: Sequence[str]) -> list[Element]:
        """Return the elements with these names, or in these folders, such as `students/ewc`; all without names.

        Raises:
            RunError: if a name fits no element; the message lists the folders of elements.
        """
        elements = self.elements()
        for name in names:
            if not any(matches(element, name) for element in elements):
                folders = dict.fromkeys("/".join(element.name.split("/")[:2]) for element in elements)
                candidates = folders if name.count("/") < 2 else [element.name for element in elements]
                likely = nearest(name.rstrip("/"), candidates) or "."
                listing = "\n".join(f"  {folder}" for folder in folders)
                raise RunError(f"--only {name}: {self.root} has no such element{likely} It has\n{listing}")
        return [e for e in elements if not names or any(matches(e, name) for name in names)]


def teacher_element(root: Path, index: int, task: str, seed: int) -> TeacherElement:
    """Return a teacher of the run directory `root`."""
    name = f"teachers/{task}/seed-{seed}"
    return TeacherElement("teacher", index, root / name, name, task, seed)


def matches(element: Element, name: str) -> bool:
    """Whether `name` is the element's name or that of a folder that holds it."""
    name = name.rstrip("/")
    return element.name == name or element.name.startswith(f"{name}/")


def published_policy(folder: Path, task: str, seed: int) -> Path:
    """Return the file of a policy's weights in a folder of published teachers; its description ends in .json."""
    return folder / "policies" / f"{task}-seed-{seed}.safetensors"


def published_student(folder: Path, method: str, seed: int) -> Path:
    """Return the file of a student's weights in a folder of published results; its description ends in .json."""
    return folder / "students" / f"{method}-seed-{seed}" / "policy.safetensors"
