"""What a run will cost: hours, disk and files, from rates measured on this suite, and checks before launching.

Rates are per core of a 2-core virtual machine of 2026 and are meant for planning only; where the run directory
holds finished elements of a role, their own times are taken instead.
"""

from __future__ import annotations

import os
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cpd.config import Config
from cpd.config.profile import Profile
from cpd.config.types import Role
from cpd.run.directory import Element, Run, StudentElement, TeacherElement
from cpd.run.progress import read_status

#: Environment steps a second and core, PPO's updates included (demo's three tasks).
TRAINING_RATE = 1_200.0
#: Seconds and core for an episode of 500 steps with a policy.
EPISODE_SECONDS = 0.35
#: Core seconds for a distillation step on one window at the default sizes, curves included.
WINDOW_SECONDS = 4.5e-4
#: Bytes of a time step in a shard, and of a step in the replay memory.
STEP_BYTES = 235
#: Folders that are usually local to a node.
NODE_LOCAL = ("/tmp", "/var/tmp", "/dev/shm", "/run", "/scratch/local", "/local")


@dataclass(frozen=True)
class Cost:
    """What all elements of a role will cost."""

    role: Role
    count: int
    cores: int
    """Of one element."""
    seconds: float
    """Expected for one element; for a teacher at most, since it ends once it succeeds."""
    is_measured: bool
    """Whether `seconds` comes from this run's own elements."""
    minutes_limit: int
    """Time limit of one job."""

    @property
    def core_hours(self) -> float:
        """Expected for all elements."""
        return self.count * self.cores * self.seconds / 3600


def costs(run: Run, profile: Profile, elements: Sequence[Element]) -> list[Cost]:
    """What the given elements will cost, role by role."""
    expected = {method: expected_core_seconds(own) for method, own in run.method_configs.items()}
    found = []
    for role in dict.fromkeys(element.role for element in elements):
        given = profile.resources(role)
        of_role = [element for element in elements if element.role == role]
        core_seconds = [expected[_method(run, element)][role] - _spared(run, element) for element in of_role]
        measured = _measured_seconds(run, role)
        seconds = statistics.mean(measured or [value / given.total_cpus for value in core_seconds])
        found.append(Cost(role, len(of_role), given.total_cpus, seconds, bool(measured), given.minutes))
    return found


def _spared(run: Run, element: Element) -> float:
    """Core seconds of training that need not be done, since the teacher's policy is there, or taken over."""
    is_trained = isinstance(element, TeacherElement) and run.is_trained(element)
    return _training_core_seconds(run.config) if is_trained else 0.0


def _training_core_seconds(config: Config) -> float:
    """Of one teacher, at most."""
    return config.teacher.max_env_steps / TRAINING_RATE if config.teacher.recipe != "scripted" else 0.0


def _method(run: Run, element: Element) -> str:
    """The method by which to judge an element: its own; any will do for what all methods share."""
    return element.method if isinstance(element, StudentElement) else run.config.methods[0]


def expected_core_seconds(config: Config) -> dict[Role, float]:
    """Core seconds of one element of each role."""
    tasks, distinct = config.stream.tasks, len(config.stream.distinct_tasks)
    full, brief = config.evaluation.num_episodes, config.evaluation.num_episodes_brief
    cells = len(tasks) * (distinct * brief + full) + 2 * distinct * full
    per_episode = EPISODE_SECONDS * config.stream.horizon / 500
    size = config.student.width * config.student.num_layers / 128
    steps = len(tasks) * config.distill.steps_per_stage * config.distill.batch_size * config.student.context / 4
    curves = len(tasks) * config.evaluation.curve_points * brief
    return {
        "teacher": _training_core_seconds(config)
        + 2 * full * per_episode
        + config.rollouts.num_steps / TRAINING_RATE,
        "student": steps * WINDOW_SECONDS * size + curves * per_episode,
        "evaluation": cells * per_episode,
        "report": 15.0,
    }


def _measured_seconds(run: Run, role: Role) -> list[float]:
    finished = [e for e in run.elements() if e.role == role and e.finished and e.status.exists()]
    return [seconds for e in finished if (seconds := sum(read_status(e.status).seconds.values())) > 0]


def wall_hours(found: Sequence[Cost], profile: Profile) -> float:
    """Expected from the first start to the end, if the queue is empty: the roles follow one another."""
    parallel = profile.array_parallelism
    return sum(c.seconds * (-(-c.count // parallel) if c.role == "teacher" else 1) for c in found) / 3600


def disk(config: Config) -> tuple[float, int]:
    """Bytes and files of the whole run."""
    teachers = len(config.stream.distinct_tasks) * len(config.teacher.seeds)
    shards = -(-config.rollouts.num_steps // config.rollouts.shard_steps)
    size = teachers * (config.rollouts.num_steps * STEP_BYTES + 600_000.0)
    size += len(config.seeds) * sum(_student_bytes(config.of_method(method)) for method in config.methods)
    students = len(config.seeds) * len(config.methods)
    files = teachers * (14 + shards) + students * (24 + 4 * len(config.stream.tasks)) + 60
    return size, files


def _student_bytes(config: Config) -> float:
    """What one student leaves behind."""
    distinct, num_stages = len(config.stream.distinct_tasks), len(config.stream.tasks)
    growth = config.student.experts_per_task if config.student.expansion == "per_task" else 0
    experts = [config.student.num_experts + growth * min(stage, distinct) for stage in range(num_stages + 1)]
    policies = [4.0 * _parameters(config, count) for count in experts]
    memory = config.memory_steps * STEP_BYTES
    # Two checkpoints, and a third while it is being written: weights and both of Adam's moments.
    return 3 * (3 * policies[-1] + memory) + sum(policies) + 300_000.0


def _parameters(config: Config, experts: int) -> int:
    student = config.student
    expert = 2 * student.width * student.expert_width + student.expert_width + student.width
    attention = 4 * student.width**2
    return student.num_layers * (attention + experts * (expert + student.width)) + 64 * student.width


def complaints(root: Path, config: Config, profile: Profile) -> list[str]:
    """Why a run in `root` could not be written, or seen by its jobs, or shared as told; empty if all is well."""
    folder = existing_parent(root)
    found = []
    try:
        config.teacher.check_ranks(profile.teacher.ranks)
    except ValueError as error:
        found.append(str(error))
    if not os.access(folder, os.W_OK | os.X_OK):
        found.append(f"{folder} is not writable; choose another --run-dir")
    size, _ = disk(config)
    free = shutil.disk_usage(folder).free
    # A run that has begun holds part of it already, and cannot go elsewhere.
    if free < size and not (root / "config.json").exists():
        found.append(
            f"the run will take about {gigabytes(size)}, but {folder} has {gigabytes(free)} left; choose another "
            "--run-dir"
        )
    local = [local for local in NODE_LOCAL if root.absolute().is_relative_to(local)]
    if profile.cluster == "slurm" and not profile.single_machine and local:
        found.append(
            f"{root.absolute()} lies in {local[0]}, which is usually local to a node, so that jobs would not see "
            "it; choose a --run-dir on a shared file system (single_machine = true in a profile allows any)"
        )
    return found


def existing_parent(path: Path) -> Path:
    """The nearest folder above `path`, or itself, that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def gigabytes(size: float) -> str:
    """A size in words."""
    return f"{size / 1e9:.2g} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"
