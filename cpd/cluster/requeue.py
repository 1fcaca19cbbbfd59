"""What an element's job does at its start and end: check its dependencies, and requeue itself after a stop."""

from __future__ import annotations

import os
import textwrap
import time
from collections.abc import Callable
from typing import Any

from typing_extensions import TypedDict

from cpd.cluster.ledger import ledger
from cpd.cluster.queue import CLUSTERS_VARIABLE, NO_ANSWER, NoAnswerError, SchedulerError, run_command
from cpd.comm import Comm
from cpd.config.profile import Profile
from cpd.config.types import Positive
from cpd.reading import read_for_display
from cpd.run.attempt import mark
from cpd.run.directory import Element, Run
from cpd.run.files import write_json
from cpd.run.interrupt import LAUNCHER_VARIABLE
from cpd.run.lease import CODE_VARIABLE
from cpd.run.progress import read_status
from cpd.run.provenance import code_version

#: How long a shared file system may take to show what a job on another node wrote last.
VISIBILITY_SECONDS = 5.0
#: The longest pause between two questions to a Slurm that does not answer.
MAX_PAUSE_SECONDS = 30.0


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


def check_code(run: Run, element: Element, log: Callable[[str], None]) -> str:
    """Record the commit for this process's attempt; return why the element must not start with it, or nothing.

    Call before MPI starts, since git is a process.
    """
    refuses = run.launched_with(str, "", "code_changes") == "refuse"
    if not (refuses or is_first_rank()):
        return ""
    code = os.environ[CODE_VARIABLE] = code_version()
    submissions = ledger(run).get(element.name)
    submitted = submissions[-1].code if submissions else ""
    if submitted in ("", code):
        return ""
    change = f"it was submitted with code {submitted}, but the code is now {code}"
    if refuses:
        return f"not started: {change}; restore the code, or launch again with the new one"
    log(f"note: {change}")
    return ""


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
    os.environ.pop(CLUSTERS_VARIABLE, None)  # a job runs where its own controller is
    comm.barrier()
    if comm.rank == 0:
        log(_requeue(run, element, job, log))
    comm.barrier()


def _requeue(run: Run, element: Element, job: str, log: Callable[[str], None]) -> str:
    """Requeue the job unless it is ending or stuck; return what happened."""
    deadline = time.monotonic() + run.launched_with(Positive, Profile.signal_seconds, "signal_seconds")
    try:
        # Words of the form `Key=Value`.
        words = _run_patiently(["scontrol", "show", "job", "-o", job], deadline, log).split()
        if "JobState=RUNNING" not in words:
            # Requeueing a job that is being cancelled would revive it.
            return f"Slurm is ending job {job} already"
        if not {"BatchFlag=1", "Requeue=1"} <= set(words):
            return f"job {job} may not be requeued; launch again to resume"
        if is_stuck(run, element, job):
            reason = "given up: no progress since the last requeues; raise minutes or max_timeouts"
            mark(element, "failed", reason)
            return reason
        _run_patiently(["scontrol", "requeue", job], deadline, log)
    except (SchedulerError, OSError, ValueError) as error:  # whatever it is, the other ranks wait for this one
        reason = f"saved, but job {job} could not be requeued ({error}); launch again to resume"
        mark(element, "stopped", reason)
        return reason
    mark(element, "queued", "saved and requeued")
    return f"job {job} is back in the queue"


class _Requeues(TypedDict):
    """How often in a row a job was requeued with the same progress."""

    progress: list[Any]
    count: int


def _run_patiently(words: list[str], deadline: float, log: Callable[[str], None]) -> str:
    """Like `run_command`, but ask again until `deadline` if Slurm does not answer."""
    pause = 1.0
    while True:
        try:
            return run_command(words)
        except NoAnswerError as error:
            if time.monotonic() + pause > deadline:
                raise
            log(f"{NO_ANSWER} ({error}): asking again in {pause:.0f} s")
        time.sleep(pause)
        pause = min(2 * pause, MAX_PAUSE_SECONDS)


def is_stuck(run: Run, element: Element, job: str) -> bool:
    """Whether this job has been requeued too often in a row without progress."""
    record = read_status(element.status)
    checkpoints = sorted(path.name for path in element.checkpoints.glob("*/meta.json"))
    progress = [element.name, record.phase, record.done, *checkpoints]
    path = run.logs / f"{job}_requeues.json"
    last = read_for_display(path, _Requeues, _Requeues(progress=[], count=0))
    count = last["count"] + 1 if last["progress"] == progress else 0
    write_json(path, {"progress": progress, "count": count})
    return count >= run.launched_with(Positive, Profile.max_timeouts, "max_timeouts")
