"""Finds which elements of a run are in Slurm's queue, from the ledger, the queue and the leases."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from cpd.cluster.element_job import log_name
from cpd.cluster.ledger import LedgerEntry, append, ledger
from cpd.cluster.queue import JobState, accounting, queue
from cpd.cluster.sbatch import element_work, executor
from cpd.config.profile import Profile
from cpd.run.directory import Element, Run
from cpd.run.lease import current_holder

#: How long to wait for jobs that are just ending before deciding what is missing.
ENDING_SECONDS = 60.0


@dataclass(frozen=True)
class QueueState:
    """Which unfinished elements of a run have jobs or are being written."""

    active: dict[str, list[JobState]]
    """By element name: its pending and running jobs, in the order of submission."""
    held: dict[str, str]
    """By element name: the process that writes it without a job in the queue."""
    names: frozenset[str]
    """Names of all jobs in the queue's listing."""


def reconcile(run: Run, profile: Profile) -> QueueState:
    """Enter lost job numbers into the ledger; return which elements have jobs.

    Raises:
        SchedulerError: if Slurm cannot be asked; nothing may be submitted then.
    """
    entries = slurm_entries(run)
    jobs = _settled_queue({entry.job for found in entries.values() for entry in found})
    if _enter_lost(run, profile, {name: found[-1] for name, found in entries.items()}, jobs):
        entries = slurm_entries(run)
    return standing(run, entries, jobs)


def read_queue(run: Run) -> QueueState:
    """Return which elements have jobs, without writing to the ledger.

    Raises:
        SchedulerError: if Slurm cannot be asked.
    """
    return standing(run, slurm_entries(run), queue())


def slurm_entries(run: Run) -> dict[str, list[LedgerEntry]]:
    """The submissions to Slurm by element name, oldest first."""
    found = {name: [e for e in entries if e.cluster == "slurm"] for name, entries in ledger(run).items()}
    return {name: entries for name, entries in found.items() if entries}


def standing(run: Run, entries: dict[str, list[LedgerEntry]], jobs: dict[str, JobState]) -> QueueState:
    """Where the unfinished elements stand, given their submissions and the queue."""
    by_number = {job.number: job for job in jobs.values()}
    active: dict[str, list[JobState]] = {}
    held = {}
    for element in run.elements():
        if element.finished:
            continue
        numbers = [entry.job for entry in entries.get(element.name, [])]
        own = [jobs[number] for number in numbers if number in jobs and jobs[number].is_active]
        holder, _ = current_holder(element.path / "attempts")
        if not own and holder:
            # A job that was submitted by hand, or a process outside of the queue.
            job = by_number.get(holder.job) if holder.job else None
            own = [job] if job and job.is_active else []
            if job is None:
                held[element.name] = f"process {holder.process} on {holder.host}"
        if own:
            active[element.name] = own
    return QueueState(active, held, frozenset(job.name for job in jobs.values()))


def _settled_queue(own: set[str]) -> dict[str, JobState]:
    """Return the queue once none of our jobs is COMPLETING: it may be ending or being requeued."""
    deadline = time.monotonic() + ENDING_SECONDS
    while True:
        jobs = queue()
        ending = any(job.state == "COMPLETING" for job in jobs.values() if job.job in own)
        if not ending or time.monotonic() > deadline:
            return jobs
        time.sleep(1.0)


def _enter_lost(
    run: Run, profile: Profile, entries: dict[str, LedgerEntry], jobs: dict[str, JobState]
) -> dict[str, LedgerEntry]:
    """Find the job numbers of submissions that the ledger knows by name only, and enter them."""
    lost = {name: entry for name, entry in entries.items() if not entry.job}
    if not lost:
        return {}
    known = {**accounting(names={entry.name for entry in lost.values()}), **jobs}
    by_name = {(job.name, _place(job.job)): job for job in known.values()}
    found = {}
    for name, entry in lost.items():
        job = by_name.get((entry.name, entry.place))
        if job:
            found[name] = replace(entry, job=job.job, log=log_name(run, job.job), time=time.time())
    append(run, found.values())
    _supply_pickles(run, profile, found, jobs)
    return found


def _place(job: str) -> int | None:
    _, underscore, place = job.partition("_")
    return int(place) if underscore and place.isdigit() else None


def _supply_pickles(run: Run, profile: Profile, found: dict[str, LedgerEntry], jobs: dict[str, JobState]) -> None:
    """Write the pickles that the killed launcher did not write; the jobs wait a minute for them."""
    elements = {element.name: element for element in run.elements()}
    by_job: dict[str, list[Element]] = {}
    for name, entry in found.items():
        by_job.setdefault(entry.job, []).append(elements[name])
    for job, bundle in by_job.items():
        if job in jobs and jobs[job].is_active:
            role = bundle[0].role
            made = executor(run, profile, role, jobs[job].name)
            partial = found[bundle[0].name].partial
            made.dump(element_work(run, bundle, profile.resources(role), partial), job)
