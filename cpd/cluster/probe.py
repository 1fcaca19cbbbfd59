"""Short jobs that check what a profile requests, one for each role, before teachers train for hours.

Every job loads the modules, connects its ranks, takes a lease, and writes an HDF5 file and a report in the run
directory.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from cpd.cluster.element_job import log_name
from cpd.cluster.queue import queue
from cpd.cluster.sbatch import executor
from cpd.cluster.submit import call_sbatch
from cpd.comm import RANKS_VARIABLE, connect, float_sum
from cpd.config.profile import ROLES, SETUP_FAILED, Profile, Resources
from cpd.config.types import Role
from cpd.reading import read_for_display
from cpd.run.directory import Run
from cpd.run.files import write_json
from cpd.run.lease import Lease
from cpd.run.provenance import provenance

#: Time limit of a probe, in minutes, and how early it is signalled, in seconds.
LIMIT_MINUTES, SIGNAL_SECONDS = 2, 10
#: Seconds between two looks at the queue.
POLL_SECONDS = 3.0


class RankReport(TypedDict):
    """What one rank found."""

    node: str
    cpus: int
    gpus: int


class ProbeReport(TypedDict):
    """What a job found."""

    ranks: list[RankReport]
    software: dict[str, Any]


@dataclass
class ProbeJob:
    """The job of one role, as submitit pickles it."""

    folder: str
    resources: Resources

    def __call__(self) -> None:
        """Check what can go wrong; a job that fails leaves no report."""
        os.environ[RANKS_VARIABLE] = str(self.resources.ranks)
        software = provenance()  # before MPI starts, since git is a process
        comm = connect()
        if float_sum(comm, comm.rank) != sum(range(comm.size)):
            raise RuntimeError("the ranks do not add up: MPI transfers wrong numbers")
        node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        ranks = comm.gather(RankReport(node=node, cpus=len(os.sched_getaffinity(0)), gpus=_gpus()))
        if comm.rank == 0:
            import h5py

            folder = Path(self.folder)
            with Lease(folder).acquire():
                with h5py.File(folder / "locked.h5", "w") as file:
                    file["x"] = 1
                write_json(folder / "report.json", ProbeReport(ranks=ranks, software=software))
        comm.barrier()


def _gpus() -> int:
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return len(devices.split(",")) if devices else 0


def probe_profile(run: Run, profile: Profile, log: Callable[[str], None]) -> bool:
    """Submit a probe for every role, wait for all, and log what each found; return whether all are well.

    Raises:
        SchedulerError: if Slurm cannot be asked, or refuses a job.
    """
    jobs: dict[Role, str] = {}
    for role in ROLES:
        folder = run.root / "probes" / role
        (folder / "report.json").unlink(missing_ok=True)
        name = f"{run.config.name}-probe-{role}"
        slurm_executor = executor(run, profile, role, name)
        slurm_executor.update_parameters(time=LIMIT_MINUTES, signal_delay_s=SIGNAL_SECONDS)
        work = ProbeJob(str(folder.absolute()), profile.resources(role))
        (jobs[role],) = call_sbatch(slurm_executor, name, [work])
        log(f"{role}: submitted job {jobs[role]}")
    waiting = dict(jobs)
    while waiting:
        time.sleep(POLL_SECONDS)
        states = queue(())
        waiting = {role: job for role, job in waiting.items() if job in states and states[job].is_active}
    well = True
    for role, job in jobs.items():
        report, has_own_python = run.root / "probes" / role / "report.json", bool(profile.of_role(role, "python"))
        problems, summary = _judge(report, profile.resources(role), has_own_python)
        if problems:
            log_file = run.root / log_name(run, job)
            lines = (
                log_file.read_text(encoding="utf-8", errors="replace").splitlines() if log_file.exists() else []
            )
            errors = [line for line in lines if "Error" in line or line.startswith(SETUP_FAILED)]
            summary, well = "; ".join([*problems, *errors[-1:], f"its log: {log_file}"]), False
        log(f"{role}: {summary}")
        for pickle in run.logs.glob(f"{job}_*.pkl"):
            pickle.unlink()
    return well


def _judge(path: Path, resources: Resources, has_own_python: bool) -> tuple[list[str], str]:
    """Return what is wrong with the report in `path`, and a summary of it.

    With a Python of its own, a job may differ from the launcher in versions.
    """
    report = read_for_display(path, ProbeReport, ProbeReport(ranks=[], software={}))
    ranks, software, own = report["ranks"], report["software"], provenance()
    if not ranks:
        return ["the job ended without a report"], ""
    nodes = sorted({rank["node"] for rank in ranks})
    cpus, gpus = (min(values) for values in zip(*((rank["cpus"], rank["gpus"]) for rank in ranks), strict=True))
    problems = []
    if cpus < resources.cpus:
        problems.append(f"a rank may use {cpus} cores of the {resources.cpus} that it requests")
    if gpus < resources.gpus:
        problems.append(f"a rank sees {gpus} GPUs of the {resources.gpus} that it requests")
    if len(nodes) != resources.nodes:
        problems.append(f"the ranks are on {', '.join(nodes)}, but the profile requests {resources.nodes} nodes")
    different = [key for key in ("code", "python", "packages") if software.get(key) != own[key]]
    differences = [f"its {key} is {software.get(key)}, but the launcher's is {own[key]}" for key in different]
    versions = f"Python {software.get('python')}, code {software.get('code')}"
    where = f"{len(ranks)} rank(s) on {', '.join(nodes)}, {cpus} cores and {gpus} GPUs each"
    if has_own_python:
        return problems, "; ".join([f"well, {where}, {versions}", *differences])
    return problems + differences, f"well, {where}, {versions}"
