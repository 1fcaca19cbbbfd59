"""Profiles: where, and with which resources, the elements of a run execute. They never affect results."""

from __future__ import annotations

import os
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator
from pydantic.dataclasses import dataclass

from cpd.config.load import STRICT, ConfigError, load, read_toml, suggestion
from cpd.config.types import Count, NonNegativeFloat, Positive, Role

#: Options of sbatch that the launcher sets.
RESERVED = (
    *("array", "cpus-per-task", "dependency", "error", "job-name", "nodes", "ntasks", "ntasks-per-node"),
    *("open-mode", "output", "signal", "time"),
)


def _not_reserved(options: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
    for key in options:
        if key.startswith("-") or "_" in key:
            raise ValueError(f"{key!r}: write the long name of an option without leading dashes, e.g. 'mail-type'")
        if key in RESERVED:
            raise ValueError(f"{key!r} is reserved for the launcher; set the resources of a role instead")
    return options


SbatchOptions = Annotated[dict[str, str | int | bool], AfterValidator(_not_reserved)]
#: Slurm may send a signal up to this many seconds early.
SIGNAL_SLACK_SECONDS = 60
ROLES: tuple[Role, ...] = ("teacher", "student", "evaluation", "report")

PROFILES = Path(__file__).resolve().parents[2] / "slurm" / "profiles"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Resources:
    """Resources of one element of a role."""

    ranks: Positive = 1
    """MPI ranks; the ranks of a teacher share its environments."""
    nodes: Positive = 1
    """Nodes, each with the same number of ranks."""
    cpus: Positive = 1
    """Cores per rank; teachers sample on all of them."""
    gpus: Count = 0
    """GPUs per rank."""
    memory_gb: NonNegativeFloat = 4.0
    """Memory per rank; 0: the default of the site."""
    minutes: Positive = 60
    """Time limit; longer work is saved, requeued and resumed."""
    sbatch: SbatchOptions = field(default_factory=dict)
    """Further options of sbatch; they override those of the profile."""

    def __post_init__(self) -> None:
        if self.ranks % self.nodes:
            raise ValueError(f"ranks ({self.ranks}) is not a multiple of nodes ({self.nodes})")

    @property
    def total_cpus(self) -> int:
        """Cores of all ranks together."""
        return self.ranks * self.cpus

    @property
    def ranks_per_node(self) -> int:
        """Ranks on every node."""
        return self.ranks // self.nodes


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Profile:
    """Settings of the machine or cluster that executes a run."""

    cluster: Literal["local", "slurm"]
    cores: Count = 0
    """Local only: number of cores to use; 0: all that this process may use."""
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    order: Literal["after_all", "overlap"] = "after_all"
    """When students train: after all of their teachers, or each stage as soon as its teacher is finished."""
    array_parallelism: Positive = 64
    """Maximum number of teachers that run at the same time."""
    max_array_size: Positive = 1000
    """Maximum size of a job array; see `scontrol show config | grep MaxArraySize`."""
    max_submitted: Count = 0
    """Maximum number of queued jobs of a run, including every element of an array; 0: no limit."""
    srun_mpi: str = "pmi2"
    """Value of `srun --mpi=` for the MPI of this cluster; see `srun --mpi=list`."""
    modules: tuple[str, ...] = ()
    """Environment modules that a job loads first, e.g. `openmpi/5.0`."""
    setup: tuple[str, ...] = ()
    """Shell lines that a job runs after loading modules."""
    signal_seconds: Positive = 120
    """Seconds before its time limit at which a job receives the signal to save."""
    requeue: bool = True
    """Whether to requeue preempted jobs and those that reached their time limit."""
    max_timeouts: Positive = 20
    """Number of successive requeues without progress after which a job fails."""
    single_machine: bool = False
    """Whether all nodes are on this machine (test cluster), so that they share every folder."""
    sbatch: SbatchOptions = field(default_factory=dict)
    """Further options of sbatch."""
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
                    f"{role}.minutes ({self.resources(role).minutes}) leaves no time to work: Slurm may signal a "
                    f"job signal_seconds + {SIGNAL_SLACK_SECONDS} s = "
                    f"{self.signal_seconds + SIGNAL_SLACK_SECONDS} s before its limit"
                )

    def resources(self, role: Role) -> Resources:
        """Resources of an element of `role`."""
        resources: Resources = getattr(self, role)
        return resources

    @property
    def setup_lines(self) -> list[str]:
        """Shell lines of a job before its program: modules, then `setup`."""
        return [*([f"module load {' '.join(self.modules)}"] if self.modules else []), *self.setup]

    @property
    def usable_cores(self) -> int:
        """Number of cores for a local run."""
        return self.cores or len(os.sched_getaffinity(0))

    def warnings(self) -> list[str]:
        """Check the settings against this machine."""
        available = len(os.sched_getaffinity(0))
        if self.cluster == "slurm" or self.cores <= available:
            return []
        return [f"the profile's cores ({self.cores}) exceed the {available} that this process may use"]


def load_profile(name: str) -> Profile:
    """Load the profile `name` of slurm/profiles, or the file `name` if it ends in .toml.

    Raises:
        ConfigError: the profile does not exist or contains a mistake.
    """
    path = Path(name) if name.endswith(".toml") else PROFILES / f"{name}.toml"
    if not path.exists():
        names = sorted(file.stem for file in PROFILES.glob("*.toml"))
        raise ConfigError([f"unknown profile {name!r}{suggestion(name, names)}"], "--profile")
    return load(Profile, read_toml(path, shipped=PROFILES), str(path))
