"""The submitit job of one element, and the process that it starts."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

from cpd.cluster.ledger import LedgerEntry, append
from cpd.cluster.pickles import PROGRAM, protect
from cpd.comm import RANKS_VARIABLE
from cpd.config.profile import Resources
from cpd.config.types import Role
from cpd.programs import load_program
from cpd.reading import number_in_environment
from cpd.run.attempt import mark
from cpd.run.directory import Element, Run
from cpd.run.interrupt import LAUNCHER_VARIABLE, launcher_identity
from cpd.run.lease import Holder, current_holder
from cpd.run.provenance import code_version
from cpd.run.shortage import naming

#: The program that does a role's work.
VERBS: Mapping[Role, str] = {
    "teacher": "jobs.teacher",
    "student": "jobs.distill",
    "evaluation": "jobs.evaluate",
    "report": "jobs.report",
}
#: The number of cores that a job may use.
CPUS_VARIABLE = "CPD_CPUS"
DEVICES_VARIABLE = "CUDA_VISIBLE_DEVICES"
#: Makes mpiexec start its ranks itself rather than through srun or ssh, and lets Open MPI do so as root and with
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
    """An element's job cannot start."""


def mpi_command(ranks: int, command: list[str]) -> list[str]:
    """Return the command that runs `command` on `ranks` local ranks.

    Raises:
        JobFailedError: if there is no mpiexec beside this Python or on the PATH.
    """
    # The one beside this Python belongs to the MPI wheel.
    mpiexec = shutil.which("mpiexec", path=Path(sys.executable).parent) or shutil.which("mpiexec")
    if not mpiexec:
        raise JobFailedError("no mpiexec found: load your cluster's MPI module, or `pip install mpich`")
    return [mpiexec, "-n", str(ranks), *command]


@dataclass
class ElementJob(submitit.helpers.Checkpointable):
    """The job of one element, as submitit pickles it; it reads everything else from the run."""

    root: str
    role: Role
    element: str
    """By name, since its number changes when a run gets more seeds."""
    resources: Resources
    partial: bool = False
    """Whether to process the finished dependencies only, and leave the rest to a later job."""
    visible_devices: str | None = None
    """Local jobs only: the launcher's CUDA_VISIBLE_DEVICES, which submitit's local executor overwrites."""

    @property
    def arguments(self) -> list[str]:
        """The command line of the verb."""
        return [self.root, self.element, *(["--partial"] if self.partial else [])]

    def __call__(self) -> None:
        """Run the element's program. Its ranks are started by srun, or by mpiexec on this machine."""
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
            verb = module.rpartition(".")[2]
            command = mpi_command(self.resources.ranks, [sys.executable, "-u", "-m", "cpd", verb, *self.arguments])
            # A new session, so that Ctrl-C at the terminal reaches the ranks through the stop flag only.
            code = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True, check=False
            ).returncode
        else:
            os.environ[RANKS_VARIABLE] = str(self.resources.ranks)
            code = load_program(module).main(self.arguments)
        if code:
            # Not an exception, since the log holds the error already. Not a return, which would mean success.
            raise SystemExit(code)


class LocalExecutor(submitit.LocalExecutor):
    """submitit's executor, whose jobs load and remove their pickles by `cpd.cluster.pickles`."""

    @property
    def _submitit_command_str(self) -> str:
        return f"{self.python} -u -m {PROGRAM} {shlex.quote(str(self.folder))}"


def submit_local(run: Run, element: Element, resources: Resources) -> Any:
    """Start the job of one element on this machine and enter it into the ledger; return submitit's job."""
    mark(element, "queued")  # an earlier attempt's "failed" would count as this job's
    devices = os.environ.get(DEVICES_VARIABLE)
    work = ElementJob(str(run.root.resolve()), element.role, element.name, resources, visible_devices=devices)
    executor = LocalExecutor(run.logs)
    executor.update_parameters(timeout_min=60 * 24 * 30, tasks_per_node=1, stderr_to_stdout=True)
    # The job's own signal handlers unblock it. Before that, Ctrl-C would end its parts with their own tracebacks.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with naming(run.logs):
            job = executor.submit(work)
            protect(job.paths.submitted_pickle)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    log = log_name(run, job.job_id)
    append(run, [LedgerEntry(element.name, element.role, job.job_id, log, time.time(), code=code_version())])
    return job


def log_name(run: Run, job_id: str) -> str:
    """Return the file of a job's output, relative to the run directory."""
    return f"{run.logs.relative_to(run.root)}/{job_id}_0_log.out"


def ask_to_stop(element: Element) -> bool:
    """Send SIGTERM to the process that writes `element`, unless another launcher started it.

    Returns:
        False if no process holds the element's lease yet.
    """
    holder, _ = current_holder(element.path / "attempts")
    if holder is None:
        return False
    if is_ours(holder):
        with contextlib.suppress(ProcessLookupError):  # the process has just ended
            os.kill(holder.process, signal.SIGTERM)
    return True


def is_ours(holder: Holder) -> bool:
    """Whether this launcher started the process that holds a lease.

    The environment decides, since the holder may be a rank of mpiexec and not the process that submitit started.
    """
    if not holder.is_visible:
        return False
    try:
        variables = Path(f"/proc/{holder.process}/environ").read_bytes().split(b"\0")
    except OSError:  # another user's process, or one that has just ended
        return False
    return f"{LAUNCHER_VARIABLE}={launcher_identity()}".encode() in variables


def available_cpus() -> int:
    """Return the number of cores of this rank: set by the launcher or Slurm, else its share of the machine's."""
    if cpus := int(number_in_environment(CPUS_VARIABLE, "SLURM_CPUS_PER_TASK")):
        return cpus
    # MPICH's and Open MPI's mpiexec set the number of ranks on this machine.
    local_size = int(number_in_environment("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE")) or 1
    return max(1, len(os.sched_getaffinity(0)) // local_size)
