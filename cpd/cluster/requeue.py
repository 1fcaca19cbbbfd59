"""What an element's job does at its start and end: check its dependencies, and requeue itself after a stop."""

from __future__ import annotations

import os
import textwrap
import time
from collections.abc import Callable
from typing import Any

from typing_extensions import TypedDict

from cpd.cluster.queue import SchedulerError, run_command
from cpd.comm import Comm
from cpd.config.profile import Profile
from cpd.config.types import Positive
from cpd.reading import read_for_display
from cpd.run.attempt import mark
from cpd.run.directory import Element, Run
from cpd.run.files import write_json
from cpd.run.interrupt import LAUNCHER_VARIABLE
from cpd.run.progress import read_status

#: How long a shared file system may take to show what a job on another node wrote last.
VISIBILITY_SECONDS = 5.0


def slurm_job() -> str:
    """Return the number of this process's Slurm job, `12` or `12_3`; empty outside Slurm."""
    # The array's number alone would name all of its jobs, and the last job's SLURM_JOB_ID is that number.
    array, place = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{place}" if array and place else os.environ.get("SLURM_JOB_ID", "")


def is_first_rank() -> bool:
    """Whether this process is rank 0 of its step, by the variables of Slurm and MPI."""
    names = ("SLURM_PROCID", "PMI_RANK", "OMPI_COMM_WORLD_RANK")
    return all(os.environ.get(name, "0") == "0" for name in names)


def unfinished_dependencies(run: Run, element: Element) -> list[Element]:
    """Return the unfinished dependencies of `element`; in a Slurm job, wait some seconds for them."""
    deadline = time.monotonic() + (VISIBILITY_SECONDS if slurm_job() else 0.0)
    while True:
        missing = []
        for needed in run.dependencies(element):
            if needed.path.exists():
                # Listing a folder makes NFS ask the server; a lookup of one name may be answered from its cache.
                list(needed.path.iterdir())
            if not needed.finished:
                missing.append(needed)
        if not missing or time.monotonic() >= deadline:
            return missing
        time.sleep(1.0)


def describe_unfinished(missing: list[Element]) -> str:
    """Return a message that lists the unfinished dependencies of an element, with the state of each."""
    descriptions = []
    for element in missing:
        record = read_status(element.status)
        # Shortened, since its message may list dependencies as well.
        message = textwrap.shorten(record.message, 100, placeholder=" ...")
        descriptions.append(f"{element.name} ({record.state}{f': {message}' if message else ''})")
    return f"not started, since it needs {', '.join(descriptions)}"


def hand_back(run: Run, element: Element, comm: Comm, log: Callable[[str], None]) -> None:
    """Requeue this job once all ranks have saved; a collective.

    submitit's own requeue is not used: it counts a preemption as a time-out if the limit is short or mostly used
    up, and ends rank 0 while the other ranks continue. All ranks wait until the job is requeued, since srun ends
    the others when the first one exits.
    """
    job = slurm_job()
    # Children of a local launcher that runs inside a job must not requeue that job.
    if not job or LAUNCHER_VARIABLE in os.environ:
        return
    comm.barrier()
    if comm.rank == 0:
        log(_requeue(run, element, job))
    comm.barrier()


def _requeue(run: Run, element: Element, job: str) -> str:
    """Requeue the job unless it is ending or stuck; return what happened."""
    try:
        # Words of the form `Key=Value`.
        words = run_command(["scontrol", "show", "job", "-o", job]).split()
        if "JobState=RUNNING" not in words:
            # Requeueing a job that is being cancelled would revive it.
            return f"Slurm is ending job {job} already"
        if not {"BatchFlag=1", "Requeue=1"} <= set(words):
            return f"job {job} may not be requeued; launch again to resume"
        if is_stuck(run, element, job):
            reason = "given up: no progress since the last requeues; raise minutes or max_timeouts"
            mark(element, "failed", reason)
            return reason
        run_command(["scontrol", "requeue", job])
    except (SchedulerError, OSError, ValueError) as error:  # whatever it is, the other ranks wait for this one
        return f"job {job} could not be requeued ({error}); launch again to resume"
    mark(element, "queued", "saved and requeued")
    return f"job {job} is back in the queue"


class _Requeues(TypedDict):
    """How often in a row a job was requeued with the same progress."""

    progress: list[Any]
    count: int


class _Limit(TypedDict):
    max_timeouts: Positive


def is_stuck(run: Run, element: Element, job: str) -> bool:
    """Whether this job has been requeued too often in a row without progress."""
    record = read_status(element.status)
    checkpoints = sorted(path.name for path in element.checkpoints.glob("*/meta.json"))
    progress = [element.name, record.phase, record.done, *checkpoints]
    path = run.logs / f"{job}_requeues.json"
    last = read_for_display(path, _Requeues, _Requeues(progress=[], count=0))
    count = last["count"] + 1 if last["progress"] == progress else 0
    write_json(path, {"progress": progress, "count": count})
    # The profile of the last launch.
    default = _Limit(max_timeouts=Profile(cluster="local").max_timeouts)
    return count >= read_for_display(run.root / "profile.json", _Limit, default)["max_timeouts"]
