"""Finds which elements of a run are in Slurm's queue, from the ledger, the queue and the leases.

None of the three is enough: the ledger lacks the number of a job if its launcher died, the queue forgets jobs that
have ended, and only a lease shows a process that was started by hand.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cpd.cluster.element_job import log_name
from cpd.cluster.ledger import LedgerEntry, append, ledger
from cpd.cluster.queue import UNKNOWN, JobState, accounting, queue
from cpd.cluster.sbatch import element_work, executor
from cpd.config.profile import Profile
from cpd.run.directory import Run
from cpd.run.lease import current_holder
from cpd.run.progress import read_status

#: How long `reconcile` waits for jobs that are just ending: until then, they may be requeued.
ENDING_SECONDS = 60.0


@dataclass(frozen=True)
class QueueState:
    """Which unfinished elements of a run have jobs or are being written."""

    active: dict[str, list[JobState]]
    """By element name: its pending and running jobs, in the order of submission."""
    held: dict[str, str]
    """By element name: the process that writes it without a job in the queue, or the hidden job that waits."""
    names: frozenset[str]
    """Names of all jobs in the queue's listing."""


def reconcile(run: Run, profile: Profile) -> QueueState:
    """Enter lost job numbers into the ledger; return which elements have jobs.

    Raises:
        SchedulerError: if Slurm cannot be asked; nothing may be submitted then.
    """
    entries = slurm_entries(run)
    jobs = _settled_queue([entry for submissions in entries.values() for entry in submissions])
    if _enter_lost(run, profile, {name: submissions[-1] for name, submissions in entries.items()}, jobs):
        entries = slurm_entries(run)
    return queue_state(run, entries, jobs)


def read_queue(run: Run) -> QueueState:
    """Return which elements have jobs, without writing to the ledger.

    Raises:
        SchedulerError: if Slurm cannot be asked.
    """
    entries = slurm_entries(run)
    return queue_state(run, entries, queue(itertools.chain.from_iterable(entries.values())))


def slurm_entries(run: Run) -> dict[str, list[LedgerEntry]]:
    """Return the submissions to Slurm by element name, oldest first."""
    by_name = {name: [e for e in entries if e.cluster == "slurm"] for name, entries in ledger(run).items()}
    return {name: entries for name, entries in by_name.items() if entries}


def queue_state(run: Run, entries: dict[str, list[LedgerEntry]], jobs: dict[str, JobState]) -> QueueState:
    """Return which unfinished elements have jobs or writers, from their submissions and the queue's jobs."""
    by_number = {job.number: job for job in jobs.values()}
    active: dict[str, list[JobState]] = {}
    held = {}
    for element in run.elements():
        if element.finished:
            continue
        numbers = [entry.job for entry in entries.get(element.name, [])]
        active_jobs = [jobs[number] for number in numbers if number in jobs and jobs[number].is_active]
        holder, _ = current_holder(element.path / "attempts")
        hidden = next(
            (jobs[number] for number in numbers if number in jobs and jobs[number].state == UNKNOWN), None
        )
        if hidden and not holder and read_status(element.status).state == "queued":
            held[element.name] = f"the {hidden.reason}, {hidden.job},"
        if not active_jobs and holder:
            # The writer is a job that was submitted by hand, or a process outside the queue.
            job = by_number.get(holder.job) if holder.job else None
            active_jobs = [job] if job and job.is_active else []
            if job is None:
                held[element.name] = f"process {holder.process} on {holder.host}"
        if active_jobs:
            active[element.name] = active_jobs
    return QueueState(active, held, frozenset(job.name for job in jobs.values()))


def _settled_queue(entries: Sequence[LedgerEntry]) -> dict[str, JobState]:
    """Return the queue once none of these jobs is COMPLETING, a state in which a job ends or is requeued."""
    deadline = time.monotonic() + ENDING_SECONDS
    numbers = {entry.job for entry in entries}
    while True:
        jobs = queue(entries)
        ending = any(job.state == "COMPLETING" for job in jobs.values() if job.job in numbers)
        if not ending or time.monotonic() > deadline:
            return jobs
        time.sleep(1.0)


def _enter_lost(run: Run, profile: Profile, entries: dict[str, LedgerEntry], jobs: dict[str, JobState]) -> bool:
    """Enter the job numbers of submissions that the ledger has by name only; return whether any was found."""
    lost = [entry for entry in entries.values() if not entry.job]
    if not lost:
        return False
    remembered = {**accounting("--name", {entry.name for entry in lost}), **jobs}
    by_name = {(job.name, job.job.partition("_")[2]): job.job for job in remembered.values()}
    by_job: dict[str, list[LedgerEntry]] = {}
    for entry in lost:
        if job := by_name.get((entry.name, "" if entry.place is None else str(entry.place))):
            recovered = replace(entry, job=job, log=log_name(run, job), time=time.time())
            by_job.setdefault(job, []).append(recovered)
    append(run, itertools.chain.from_iterable(by_job.values()))
    # The killed launcher did not write the jobs' pickles. submitit's jobs wait a minute for them.
    elements = {element.name: element for element in run.elements()}
    for job, task in by_job.items():
        if job in jobs and jobs[job].is_active:
            work = element_work(
                run, [elements[e.element] for e in task], profile.resources(task[0].role), task[0].partial
            )
            executor(run, profile, task[0].role, task[0].name).dump(work, job)
    return bool(by_job)
