"""Profiles: where, and with which resources, the elements of a run execute. They never affect results."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator
from pydantic.dataclasses import dataclass

from cpd.config.load import STRICT, ConfigError, load, read_toml, suggestion
from cpd.config.types import Count, NonNegativeFloat, Positive, Role, Tracker
from cpd.programs import ROOT
from cpd.reading import is_possible

#: Options of sbatch that the launcher sets.
RESERVED = (
    *("array", "cpus-per-task", "dependency", "error", "job-name", "nodes", "ntasks", "ntasks-per-node"),
    *("open-mode", "output", "signal", "time"),
)


def _one_line(text: str) -> str:
    # A newline would leave the line of the script that it stands in, and become a command.
    if not text.isprintable():
        raise ValueError(f"{text!r} has a newline or another control character; write one line per string")
    return text


def _command(text: str) -> str:
    shlex.split(text)  # raises ValueError for a quotation mark without its partner
    return text


Line = Annotated[str, AfterValidator(_one_line)]
Command = Annotated[Line, AfterValidator(_command)]


def _not_reserved(options: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
    for key in options:
        if not re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", key):
            raise ValueError(f"{key!r}: write the long name of an option without leading dashes, e.g. 'mail-type'")
        if key in RESERVED:
            raise ValueError(f"{key!r} is reserved for the launcher; set the resources of a role instead")
    return options


SbatchOptions = Annotated[dict[str, Line | int | bool], AfterValidator(_not_reserved)]
#: Slurm may send a signal up to this many seconds early.
SIGNAL_SLACK_SECONDS = 60
#: What a job prints before a setup line that fails.
SETUP_FAILED = "setup failed"
#: Shell lines around those of a profile. A trap, unlike `set -e`, leaves what happens inside of functions to them.
SETUP_BEGIN = f"trap 'echo \"{SETUP_FAILED}: $BASH_COMMAND\" >&2; exit 1' ERR"
SETUP_END = "trap - ERR"
ROLES: tuple[Role, ...] = ("teacher", "student", "evaluation", "report")

PROFILES = ROOT / "slurm" / "profiles"


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
    gpu_type: Line = ""
    """Type of the GPUs, e.g. `a100`; empty: any."""
    memory_gb: NonNegativeFloat = 4.0
    """Memory per rank; 0: the default of the site."""
    minutes: Positive = 60
    """Time limit; longer work is saved, requeued and resumed."""
    sbatch: SbatchOptions = field(default_factory=dict)
    """Further options of sbatch; they override those of the profile."""
    modules: tuple[Line, ...] | None = None
    """In place of the profile's."""
    setup: tuple[Line, ...] | None = None
    """In place of the profile's."""
    python: Command | None = None
    """In place of the profile's."""
    srun_args: tuple[Line, ...] | None = None
    """In place of the profile's."""

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
    clusters: Line = ""
    """Name of the cluster that jobs go to, if Slurm serves several; empty: the login node's."""
    partition: Line = ""
    account: Line = ""
    qos: Line = ""
    constraint: Line = ""
    order: Literal["after_all", "overlap"] = "after_all"
    """When students train: after all of their teachers, or each stage as soon as its teacher is finished."""
    array_parallelism: Positive = 64
    """Maximum number of teachers that run at the same time."""
    max_array_size: Positive = 1000
    """Maximum size of a job array; see `scontrol show config | grep MaxArraySize`."""
    max_submitted: Count = 0
    """Maximum number of queued jobs of a run, including every element of an array; 0: no limit."""
    srun_mpi: Line = "pmi2"
    """Value of `srun --mpi=` for the MPI of this cluster; see `srun --mpi=list`. Empty: the cluster's default."""
    modules: tuple[Line, ...] = ()
    """Environment modules that a job loads first, e.g. `openmpi/5.0`."""
    setup: tuple[Line, ...] = ()
    """Shell lines that a job runs after loading modules. A line that fails ends the job."""
    python: Command = ""
    """The command that runs Python in a job, e.g. `apptainer exec cpd.sif python`; empty: the launcher's."""
    srun_args: tuple[Line, ...] = ()
    """Further options of srun, e.g. `--cpu-bind=cores`."""
    signal_seconds: Positive = 120
    """Seconds before its time limit at which a job receives the signal to save."""
    requeue: bool = True
    """Whether to requeue preempted jobs and those that reached their time limit."""
    max_timeouts: Positive = 20
    """Number of successive requeues without progress after which a job fails."""
    code_changes: Literal["note", "refuse"] = "note"
    """What a job does if the commit differs from that of its submission: log a note, or fail."""
    track: Tracker = ""
    """Tool that shows learning curves while jobs run; empty: none."""
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

    def of_role(self, role: Role, key: str) -> Any:
        """Return the value of `key` for `role`: its own, or else the profile's."""
        own = getattr(self.resources(role), key)
        return getattr(self, key) if own is None else own

    def setup_lines(self, role: Role) -> list[str]:
        """Shell lines of a job before its program: modules, then `setup`. The first that fails ends the job."""
        lines = [*self.of_role(role, "setup")]
        if modules := self.of_role(role, "modules"):
            load_modules = f"module load {shlex.join(modules)}"
            # The trap would name the last command inside of the function `module`.
            failed = shlex.quote(f"{SETUP_FAILED}: {load_modules}")
            lines = [f"{load_modules} || {{ echo {failed} >&2; exit 1; }}", *lines]
        return [SETUP_BEGIN, *lines, SETUP_END] if lines else []

    @property
    def usable_cores(self) -> int:
        """Number of cores for a local run."""
        return self.cores or len(os.sched_getaffinity(0))

    def warnings(self) -> list[str]:
        """Check the settings against this machine."""
        available = len(os.sched_getaffinity(0))
        if self.cluster == "slurm":  # jobs run elsewhere, perhaps with another Python
            return []
        warnings = []
        if self.cores > available:
            warnings.append(f"the profile's cores ({self.cores}) exceed the {available} that this process may use")
        if self.track and find_spec(self.track) is None:
            warnings.append(f"{self.track} is not installed: jobs run without live curves")
        return warnings


def load_profile(name: str) -> Profile:
    """Load the profile `name` of slurm/profiles, or the file `name` if it ends in .toml.

    Raises:
        ConfigError: the profile does not exist or contains a mistake.
    """
    path = Path(name) if name.endswith(".toml") else PROFILES / f"{name}.toml"
    if not (is_possible(path) and path.exists()):
        names = sorted(file.stem for file in PROFILES.glob("*.toml"))
        raise ConfigError([f"unknown profile {name!r}{suggestion(name, names)}"], "--profile")
    return load(Profile, read_toml(path, shipped=PROFILES), str(path))
