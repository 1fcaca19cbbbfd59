"""Handing elements to submitit."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

from cpd.cluster.ledger import enter
from cpd.comm import RANKS_VARIABLE
from cpd.config.profile import Resources
from cpd.config.types import Role
from cpd.run.attempt import mark
from cpd.run.directory import Element, Run
from cpd.run.interrupt import (
    EXIT_INTERRUPTED,
    LAUNCHER_VARIABLE,
    launcher_identity,
)
from cpd.run.lease import Holder, current_holder

#: The verb that does a role's work.
VERBS: Mapping[Role, str] = {
    "teacher": "jobs.teacher",
    "student": "jobs.distill",
    "evaluation": "jobs.evaluate",
    "report": "jobs.report",
}
#: Tells a job how many cores it may fill.
CPUS_VARIABLE = "CPD_CPUS"
DEVICES_VARIABLE = "CUDA_VISIBLE_DEVICES"
#: mpiexec starts its ranks itself rather than through srun or ssh, and Open MPI agrees to do so as root and with
#: more ranks than cores.
MPIEXEC_ENVIRONMENT = {
    "HYDRA_LAUNCHER": "fork",
    "HYDRA_RMK": "user",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


class JobFailedError(RuntimeError):
    """An element's job ended with an error; its status and log tell which."""


def mpiexec() -> str:
    """The mpiexec beside this Python if there is one (it belongs to the MPI wheel), else the one on the PATH.

    Raises:
        JobFailedError: if there is none.
    """
    beside = Path(sys.executable).with_name("mpiexec")
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if not found:
        raise JobFailedError("no mpiexec found: load your cluster's MPI module, or `pip install mpich`")
    return found


def mpi_command(ranks: int, command: list[str]) -> list[str]:
    """`command` on `ranks` local ranks."""
    return [mpiexec(), "-n", str(ranks), *command]


@dataclass
class ElementJob(submitit.helpers.Checkpointable):
    """What submitit pickles: a job knows its run and element, and reads everything else from the run."""

    root: str
    role: Role
    element: str
    """By name, since its number changes when a run gets more seeds."""
    resources: Resources
    partial: bool = False
    """Whether to do what can be done while something that the element needs is not finished."""
    visible_devices: str | None = None
    """On this machine: the launcher's CUDA_VISIBLE_DEVICES, in whose place submitit's local executor hides all."""

    @property
    def arguments(self) -> list[str]:
        """The command line of the verb."""
        return [self.root, self.element, *(["--partial"] if self.partial else [])]

    def __call__(self) -> None:
        """Do the work; under srun every rank is started by Slurm, on one machine by mpiexec."""
        os.environ[CPUS_VARIABLE] = str(self.resources.cpus)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        module = VERBS[self.role]
        is_local = os.environ.get("SUBMITIT_EXECUTOR") == "local"
        if is_local:
            os.environ.pop(DEVICES_VARIABLE, None)
            if self.visible_devices is not None:
                os.environ[DEVICES_VARIABLE] = self.visible_devices
        if self.resources.ranks > 1 and is_local:
            environment = {**os.environ, **MPIEXEC_ENVIRONMENT, RANKS_VARIABLE: str(self.resources.ranks)}
            command = mpi_command(self.resources.ranks, [sys.executable, "-u", "-m", module, *self.arguments])
            # A session of its own, so that Ctrl-C at the terminal reaches the ranks by way of the stop flag only.
            code = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True, check=False
            ).returncode
        else:
            os.environ[RANKS_VARIABLE] = str(self.resources.ranks)
            code = importlib.import_module(module).main(self.arguments)
        if code and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
            # Not an exception: the log has said what there is to say. Nor a return: that would read as success.
            raise SystemExit(code)
        if code not in (0, EXIT_INTERRUPTED):
            raise JobFailedError(f"{module} {' '.join(self.arguments)} ended with code {code}")


def local_executor(run: Run) -> Any:
    """A submitit executor that starts jobs on this machine at once."""
    executor = submitit.LocalExecutor(run.logs)
    executor.update_parameters(timeout_min=60 * 24 * 30, tasks_per_node=1, stderr_to_stdout=True)
    return executor


def submit_local(run: Run, element: Element, resources: Resources) -> Any:
    """Start the job of one element here and enter it in the ledger; returns submitit's job."""
    mark_queued(element)
    devices = os.environ.get(DEVICES_VARIABLE)
    work = ElementJob(str(run.root.resolve()), element.role, element.name, resources, visible_devices=devices)
    job = local_executor(run).submit(work)
    enter(run, element, job.job_id, log_file(run, job.job_id))
    return job


def mark_queued(element: Element) -> None:
    """Let status.json tell of a new attempt, so that an earlier one's failure is not taken for its own."""
    mark(element, "queued")


def log_file(run: Run, job_id: str) -> Path:
    """Where a job's output goes."""
    return run.logs / f"{job_id}_0_log.out"


def log_name(run: Run, job_id: str) -> str:
    """The same, relative to the run directory."""
    return str(log_file(run, job_id).relative_to(run.root))


def ask_to_stop(element: Element) -> bool:
    """Ask the process that writes `element` for this launcher to save and stop; False if none writes it yet.

    Whoever writes it for somebody else is left alone.
    """
    holder, _ = current_holder(element.path / "attempts")
    if holder is None:
        return False
    if is_ours(holder):
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(holder.process, signal.SIGTERM)
    return True


def is_ours(holder: Holder) -> bool:
    """Whether a living holder is at work for this launcher: started on this machine, with its variable."""
    if holder.host != socket.gethostname():
        return False
    try:
        variables = Path(f"/proc/{holder.process}/environ").read_bytes().split(b"\0")
    except OSError:  # another user's, or just ended
        return False
    return f"{LAUNCHER_VARIABLE}={launcher_identity()}".encode() in variables


#: What an mpiexec tells its ranks about how many of them share this machine.
LOCAL_SIZE_VARIABLES = ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE")


def available_cpus() -> int:
    """Cores given to this rank: by its launcher, by Slurm, or its part of all that this process may use."""
    given = os.environ.get("CPD_CPUS") or os.environ.get("SLURM_CPUS_PER_TASK")
    if given:
        return int(given)
    neighbours = max(int(os.environ.get(name) or 1) for name in LOCAL_SIZE_VARIABLES)
    return max(1, len(os.sched_getaffinity(0)) // neighbours)
