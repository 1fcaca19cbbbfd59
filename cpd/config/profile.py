"""Profiles: where and with what resources the elements of a run are executed. Nothing in them affects results."""

from __future__ import annotations

import os
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator
from pydantic.dataclasses import dataclass

from cpd.config.load import STRICT, ConfigError, load, read_toml, suggestion
from cpd.config.types import Count, NonNegativeFloat, Positive, Role

#: Options of sbatch on which the suite itself relies.
RESERVED = (
    *("array", "cpus-per-task", "dependency", "error", "job-name", "nodes", "ntasks", "ntasks-per-node"),
    *("open-mode", "output", "signal", "time"),
)


def _not_reserved(options: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
    for key in options:
        if key.startswith("-") or "_" in key:
            raise ValueError(f"{key!r}: write an option of sbatch in full and without dashes, e.g. 'mail-type'")
        if key in RESERVED:
            raise ValueError(f"{key!r} is set by the launcher, from a role's resources where there are such")
    return options


SbatchOptions = Annotated[dict[str, str | int | bool], AfterValidator(_not_reserved)]
#: Slurm may send a job's signal up to this many seconds before the time asked for.
SIGNAL_SLACK_SECONDS = 60
ROLES: tuple[Role, ...] = ("teacher", "student", "evaluation", "report")

PROFILES = Path(__file__).resolve().parents[2] / "slurm" / "profiles"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Resources:
    """What one element of a role gets."""

    ranks: Positive = 1
    """MPI ranks; of a teacher they share the environments (PPO only)."""
    nodes: Positive = 1
    """Nodes over which the ranks are spread evenly."""
    cpus: Positive = 1
    """Cores per rank; a teacher samples on all of them."""
    gpus: Count = 0
    """GPUs per rank."""
    memory_gb: NonNegativeFloat = 4.0
    """Memory per rank; 0: whatever the site gives."""
    minutes: Positive = 60
    """Time limit; work that takes longer saves, is requeued, and goes on."""
    sbatch: SbatchOptions = field(default_factory=dict)
    """Further options passed to sbatch as they are; they win over the profile's own."""

    def __post_init__(self) -> None:
        if self.ranks % self.nodes:
            raise ValueError(f"ranks ({self.ranks}) is not a multiple of nodes ({self.nodes})")

    @property
    def total_cpus(self) -> int:
        """Cores of the whole element."""
        return self.ranks * self.cpus

    @property
    def ranks_per_node(self) -> int:
        """Ranks on every node."""
        return self.ranks // self.nodes


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Profile:
    """A way to execute a run."""

    cluster: Literal["local", "slurm"]
    cores: Count = 0
    """Local only: cores to use at a time; 0: all that this process may use."""
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    order: Literal["after_all", "overlap"] = "after_all"
    """When students learn: after all of their teachers, or each stage as soon as its teacher is finished."""
    array_parallelism: Positive = 64
    """Elements of the array of teachers that run at a time."""
    max_array_size: Positive = 1000
    """Elements of one job array at most; see `scontrol show config | grep MaxArraySize`."""
    max_submitted: Count = 0
    """Jobs of one run in the queue at most, every element of an array counted; 0: no limit."""
    srun_mpi: str = "pmi2"
    """What `srun --mpi=` must say for this cluster's MPI; see `srun --mpi=list`."""
    modules: tuple[str, ...] = ()
    """Environment modules that a job loads first, e.g. `openmpi/5.0`, by `module load`."""
    setup: tuple[str, ...] = ()
    """Shell lines before the job, after the modules."""
    signal_seconds: Positive = 120
    """How long before its time limit a job is told to save."""
    requeue: bool = True
    """Whether jobs that were preempted or ran out of time go back into the queue by themselves."""
    max_timeouts: Positive = 20
    """Requeues in a row that brought a job no further, after which it is given up."""
    single_machine: bool = False
    """Whether all nodes are this machine (the test cluster), so that any folder is shared."""
    sbatch: SbatchOptions = field(default_factory=dict)
    """Further options passed to sbatch as they are."""
    teacher: Resources = field(default_factory=Resources)
    student: Resources = field(default_factory=Resources)
    evaluation: Resources = field(default_factory=Resources)
    report: Resources = field(default_factory=Resources)

    def __post_init__(self) -> None:
        if self.cluster == "local":
            return
        for role in ROLES:
            usable = 60 * self.resources(role).minutes - self.signal_seconds - SIGNAL_SLACK_SECONDS
            if usable <= 0:
                raise ValueError(
                    f"{role}.minutes ({self.resources(role).minutes}) leaves no time to work: Slurm may ask a job "
                    f"to save signal_seconds + {SIGNAL_SLACK_SECONDS} s = "
                    f"{self.signal_seconds + SIGNAL_SLACK_SECONDS} s before its limit"
                )

    def resources(self, role: Role) -> Resources:
        """What an element of `role` gets."""
        found: Resources = getattr(self, role)
        return found

    @property
    def setup_lines(self) -> list[str]:
        """Shell lines of a job before its program: the modules, then the set-up."""
        return [*([f"module load {' '.join(self.modules)}"] if self.modules else []), *self.setup]

    @property
    def usable_cores(self) -> int:
        """Cores that a local run may fill."""
        return self.cores or len(os.sched_getaffinity(0))

    def warnings(self) -> list[str]:
        """Settings that this machine does not bear out."""
        there = len(os.sched_getaffinity(0))
        if self.cluster == "slurm" or self.cores <= there:
            return []
        return [
            f"the profile's cores ({self.cores}) exceed the {there} that this process may use: they will be shared"
        ]


def load_profile(name: str) -> Profile:
    """The profile called `name` in slurm/profiles, or in the file `name` if it ends in .toml.

    Raises:
        ConfigError: if there is none of that name, or something in it is wrong.
    """
    path = Path(name) if name.endswith(".toml") else PROFILES / f"{name}.toml"
    if not path.exists():
        known = sorted(file.stem for file in PROFILES.glob("*.toml"))
        raise ConfigError([f"unknown profile {name!r}{suggestion(name, known)}"], "--profile")
    return load(Profile, read_toml(path, shipped=PROFILES), str(path))
