"""Profiles: where and with what resources the elements of a run are executed. Nothing in them affects results."""

from __future__ import annotations

import os
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from cpd.config import Count, Positive
from cpd.runs import Role
from cpd.strict_load import STRICT, ConfigError, load, read_toml, suggestion

PROFILES = Path(__file__).resolve().parent.parent / "slurm" / "profiles"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Resources:
    """What one element of a role gets."""

    ranks: Positive = 1
    """MPI ranks (students and evaluations)."""
    cpus: Positive = 1
    """Cores per rank; a teacher samples on all of them."""
    gpus: Count = 0
    """GPUs per rank."""
    memory_gb: Annotated[float, Field(gt=0)] = 4.0
    """Memory per rank."""
    minutes: Positive = 60
    """Time limit; work that takes longer saves, is requeued, and goes on."""

    @property
    def total_cpus(self) -> int:
        """Cores of the whole element."""
        return self.ranks * self.cpus


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
    array_parallelism: Positive = 64
    """Elements of an array that run at a time."""
    srun_mpi: str = "pmi2"
    """What `srun --mpi=` must say for this cluster's MPI; see `srun --mpi=list`."""
    setup: tuple[str, ...] = ()
    """Shell lines before the job, e.g. `module load openmpi`."""
    max_timeouts: Positive = 1000
    """Time limits a job may run into before it is given up."""
    sbatch: dict[str, str | int | bool] = field(default_factory=dict)
    """Further options passed to sbatch as they are."""
    teacher: Resources = field(default_factory=Resources)
    student: Resources = field(default_factory=Resources)
    evaluation: Resources = field(default_factory=Resources)
    report: Resources = field(default_factory=Resources)

    def resources(self, role: Role) -> Resources:
        """What an element of `role` gets."""
        found: Resources = getattr(self, role)
        return found

    @property
    def usable_cores(self) -> int:
        """Cores that a local run may fill."""
        return self.cores or len(os.sched_getaffinity(0))


def load_profile(name: str) -> Profile:
    """The profile called `name` in slurm/profiles, or in the file `name` if it ends in .toml.

    Raises:
        ConfigError: if there is none of that name, or something in it is wrong.
    """
    path = Path(name) if name.endswith(".toml") else PROFILES / f"{name}.toml"
    if not path.exists():
        known = sorted(file.stem for file in PROFILES.glob("*.toml"))
        raise ConfigError([f"unknown profile {name!r}{suggestion(name, known)}"], "--profile")
    return load(Profile, read_toml(path), str(path))
