"""Estimates the hours, disk space and files of a run from measured rates, and checks where it will be written.

The rates are for one core of a virtual machine with two cores of 2026, and are for planning only. Where a run has
finished elements of a role, their times replace the estimate.
"""

from __future__ import annotations

import math
import os
import re
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

#: Environment steps per second and core, including PPO's updates (tasks of the recipe `demo`).
TRAINING_RATE = 1_200.0
#: Core seconds of a step of an evaluation, the student's share included.
EPISODE_STEP_SECONDS = 7e-4
#: Seconds of a distillation step per layer, and core seconds per window and layer, at the default widths.
LAYER_SECONDS, WINDOW_SECONDS = 5.5e-3, 1.07e-5
#: Of a network: seconds per message, and bytes per second and rank.
MESSAGE_SECONDS, NETWORK_BYTES = 2e-6, 1e10
#: Share of the cores' time from which on more ranks are worth their cores.
WORTHWHILE = 0.8
#: Bytes of a time step in a shard or in the replay memory.
STEP_BYTES = 235
#: In a path: what would end a line of a batch script, what submitit replaces, and what Slurm does.
REWRITTEN = {"local": re.compile(r"[\x00-\x1f\x7f]|%[jtAa]"), "slurm": re.compile(r"[\x00-\x1f\x7f%\\]")}
#: Folders that are usually local to a node.
NODE_LOCAL = ("/tmp", "/var/tmp", "/dev/shm", "/run", "/scratch/local", "/local")


@dataclass(frozen=True)
class Cost:
    """The expected cost of all elements of a role."""

    role: Role
    count: int
    cores: int
    """Cores of one element."""
    seconds: float
    """Expected seconds of one element; for a teacher an upper bound, since training stops at success."""
    is_measured: bool
    """Whether `seconds` comes from this run's own elements."""
    minutes_limit: int
    """Time limit of one job."""


def costs(run: Run, profile: Profile, elements: Sequence[Element]) -> list[Cost]:
    """Return what the elements of each role will cost."""
    cost_list = []
    for role in dict.fromkeys(element.role for element in elements):
        resources = profile.resources(role)
        of_role = [element for element in elements if element.role == role]
        finished = [e for e in run.elements() if e.role == role and e.finished and e.status.exists()]
        measured = [seconds for e in finished if (seconds := sum(read_status(e.status).seconds.values())) > 0]
        expected = [
            _expected_core_seconds(run, element, resources.ranks) / resources.total_cpus for element in of_role
        ]
        seconds = statistics.mean(measured or expected)
        cost_list.append(
            Cost(role, len(of_role), resources.total_cpus, seconds, bool(measured), resources.minutes)
        )
    return cost_list


def _expected_core_seconds(run: Run, element: Element, ranks: int) -> float:
    # All methods share the teachers and the report, so the configuration of any method is correct.
    method = element.method if isinstance(element, StudentElement) else run.config.methods[0]
    config = run.method_configs[method]
    tasks, distinct = config.stream.tasks, len(config.stream.distinct_tasks)
    full, brief = config.evaluation.num_episodes, config.evaluation.num_episodes_brief
    rows = (sum(config.row_episodes(s, is_last=False).values()) for s in range(-1, len(tasks) - 1))
    cells = sum(rows) + 2 * distinct * full
    per_episode = EPISODE_STEP_SECONDS * config.stream.horizon
    steps = len(tasks) * config.distill.steps_per_stage
    curves = len(tasks) * config.evaluation.curve_points * brief
    # Scripted teachers need no training, and neither do trained or reused policies.
    is_trained = isinstance(element, TeacherElement) and run.is_trained(element)
    trained_steps = 0 if is_trained or config.teacher.recipe == "scripted" else config.teacher.max_env_steps
    core_seconds: dict[Role, float] = {
        "teacher": (trained_steps + config.rollouts.num_steps) / TRAINING_RATE + 2 * full * per_episode,
        "student": ranks * steps * step_seconds(config, config.distill.batch_size, ranks) + curves * per_episode,
        "evaluation": cells * per_episode,
        "report": 15.0,
    }
    return core_seconds[element.role]


def step_seconds(config: Config, num_windows: int, ranks: int = 1) -> float:
    """Return the expected seconds of a distillation step: a model of what divides among ranks and what does not.

    Every rank spends `LAYER_SECONDS` per layer however few windows it has. The ranks divide the windows and sum
    the gradients of the trained experts, and before these the routers' statistics.
    """
    student = config.student
    work = WINDOW_SECONDS * student.num_layers * student.context * student.width * student.expert_width / 8192
    size = 4.0 * _parameters(config, student.experts_per_task)
    messages = 4 * math.ceil(math.log2(ranks)) * MESSAGE_SECONDS
    transfer = 2 * size * (1 - 1 / ranks) / NETWORK_BYTES
    return LAYER_SECONDS * student.num_layers + work * num_windows / ranks + messages + transfer


def paying_windows(config: Config, ranks: int = 2) -> int:
    """Return the windows per step, in powers of two, from which `ranks` ranks are worth their cores."""
    num_windows = ranks
    while step_seconds(config, num_windows) < WORTHWHILE * ranks * step_seconds(config, num_windows, ranks):
        num_windows *= 2
    return num_windows


def rank_lines(run: Run, elements: Sequence[Element]) -> list[str]:
    """Return a line for the students among `elements`: from which batch on more than one rank pays."""
    students = [e for e in elements if isinstance(e, StudentElement) and e.role == "student"]
    methods = {student.method for student in students}
    sizes = {(c.distill.batch_size, paying_windows(c)) for c in map(run.config.of_method, sorted(methods))}
    return [
        f"a student's step has {num_windows} windows; a second rank pays from about {paying} on (a model)"
        for num_windows, paying in sorted(sizes)
    ]


def wall_hours(cost_list: Sequence[Cost], profile: Profile) -> float:
    """Return the hours from start to end if the queue is empty; roles run one after another."""
    parallel = profile.array_parallelism
    return sum(c.seconds * (-(-c.count // parallel) if c.role == "teacher" else 1) for c in cost_list) / 3600


def disk(config: Config) -> tuple[float, int]:
    """Return the bytes and the number of files of the whole run."""
    teachers = len(config.stream.distinct_tasks) * len(config.teacher.seeds)
    shards = -(-config.rollouts.num_steps // config.rollouts.shard_steps)
    size = teachers * (config.rollouts.num_steps * STEP_BYTES + 600_000.0)
    size += len(config.seeds) * sum(_student_bytes(config.of_method(method)) for method in config.methods)
    students = len(config.seeds) * len(config.methods)
    files = teachers * (14 + shards) + students * (24 + 4 * len(config.stream.tasks)) + 60
    return size, files


def _student_bytes(config: Config) -> float:
    """Return the bytes of one student's folder."""
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


def launch_problems(root: Path, config: Config, profile: Profile) -> list[str]:
    """Return why a run in `root` cannot start: unsuitable ranks, or a small, read-only or node-local folder."""
    folder = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.is_dir())
    problems = []
    checks = [(config.teacher.check_ranks, profile.teacher.ranks)]
    checks += [(config.of_method(label).check_student_ranks, profile.student.ranks) for label in config.methods]
    for check, num_ranks in checks:
        try:
            check(num_ranks)
        except ValueError as error:
            problems.append(str(error))
    if rewritten := REWRITTEN[profile.cluster].search(str(root.absolute())):
        problems.append(
            f"{str(root)!r}: jobs cannot write to a path with {rewritten[0]!r}; choose another --run-dir"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        problems.append(f"{folder} is not writable; choose another --run-dir")
    size, _ = disk(config)
    free = shutil.disk_usage(folder).free
    # A run that has started has used part of this space already, and cannot move.
    if free < size and not (root / "config.json").exists():
        problems.append(
            f"the run will take about {gigabytes(size)}, but {folder} has {gigabytes(free)} left; choose another "
            "--run-dir"
        )
    local_folders = [local for local in NODE_LOCAL if root.absolute().is_relative_to(local)]
    if profile.cluster == "slurm" and not profile.single_machine and local_folders:
        problems.append(
            f"{root.absolute()} lies in {local_folders[0]}, which is usually local to a node, so that "
            "jobs would not see it; choose a --run-dir on a shared file system (single_machine = true in a "
            "profile allows any)"
        )
    return problems


def gigabytes(size: float) -> str:
    """Format a number of bytes."""
    return f"{size / 1e9:.2g} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"
