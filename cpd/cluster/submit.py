"""Submits and cancels the jobs of a run on Slurm."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from cpd.cluster.element_job import log_name
from cpd.cluster.ledger import LedgerEntry, append, user_name
from cpd.cluster.pickles import protect
from cpd.cluster.plan import Submission, submit_all
from cpd.cluster.queue import (
    UNANSWERED,
    NoAnswerError,
    SchedulerError,
    SubmissionRefusedError,
    compact,
    outside_of_jobs,
    run_command,
)
from cpd.cluster.reconcile import QueueState, read_queue
from cpd.cluster.sbatch import element_work, executor
from cpd.config.profile import Profile
from cpd.run.attempt import mark
from cpd.run.directory import Element, Run
from cpd.run.lease import current_holder
from cpd.run.provenance import code_version


def submit(
    run: Run, profile: Profile, submissions: Sequence[Submission], queued: QueueState
) -> tuple[dict[str, str], list[Element]]:
    """Submit in order, then make jobs that were already pending wait for their resubmitted dependencies.

    Returns:
        The job number of each submission, by its name; and the elements whose jobs had already started before
        their dependencies were resubmitted: these jobs will exit without doing anything.

    Raises:
        SchedulerError: if Slurm cannot be asked.
        SubmissionRefusedError: if sbatch refuses; earlier submissions stay, and another launch submits the rest.
    """
    numbers = {}

    def submit_one(submission: Submission, wait_for: str) -> str:
        numbers[submission.name] = _submit_one(run, profile, submission, wait_for)
        return numbers[submission.name]

    jobs = submit_all(submissions, queued, submit_one)
    # submitit and refused submissions leave these files among the logs.
    for path in [*run.logs.glob(".submission_file_*.sh"), *run.logs.glob(f"{'[0-9a-f]' * 32}.pkl")]:
        path.unlink(missing_ok=True)
    return numbers, _retarget(run, queued, jobs, {element.name for s in submissions for element in s.elements})


def _submit_one(run: Run, profile: Profile, submission: Submission, wait_for: str) -> str:
    resources = profile.resources(submission.role)
    slurm_executor = executor(run, profile, submission.role, submission.name, wait_for, submission.parallelism)
    append(run, _entries(run, submission))
    for element in submission.elements:
        mark(element, "queued")
    work = [element_work(run, task, resources, submission.partial) for task in submission.tasks]
    try:
        numbers = call_sbatch(slurm_executor, submission.name, work)
    except SchedulerError:
        for element in submission.elements:
            mark(element, "waiting", "sbatch refused it")
        raise
    append(run, _entries(run, submission, numbers))
    return str(numbers[0]).partition("_")[0]


def call_sbatch(slurm_executor: Any, name: str, work: Sequence[Any]) -> list[str]:
    """Submit a job, or an array if there are several pieces of work; return their numbers.

    Raises:
        NoAnswerError: if Slurm does not answer.
        SubmissionRefusedError: if sbatch refuses.
    """
    try:
        with outside_of_jobs():
            handles = slurm_executor.submit_array(work)
    except Exception as error:
        # submitit surrounds sbatch's messages with its own; users need to see sbatch's only.
        lines = [line.partition("error: ")[2] for line in str(error).splitlines() if "sbatch: error: " in line]
        message = "; ".join(lines) or str(error)
        if any(text in message for text in UNANSWERED):
            raise NoAnswerError(f"sbatch got no answer ({message}); launch again later") from error
        raise SubmissionRefusedError(f"sbatch refused {name}: {message}") from error
    for handle in handles:
        protect(handle.paths.submitted_pickle)
    return [str(handle.job_id) for handle in handles]


def _entries(run: Run, submission: Submission, numbers: Sequence[str] = ()) -> list[LedgerEntry]:
    """Return the ledger's entries, with the numbers of the jobs once they are known."""
    return [
        LedgerEntry(
            element=element.name,
            role=element.role,
            job=numbers[place] if numbers else "",
            log=log_name(run, numbers[place]) if numbers else "",
            time=time.time(),
            cluster="slurm",
            name=submission.name,
            place=place if len(submission.tasks) > 1 else None,
            partial=submission.partial,
            user=user_name(),
            code=code_version(),
        )
        for place, task in enumerate(submission.tasks)
        for element in task
    ]


def _retarget(run: Run, queued: QueueState, jobs: dict[str, str], submitted: set[str]) -> list[Element]:
    """Make pending jobs wait for their resubmitted dependencies; return the elements whose jobs have started."""
    late = []
    for element in run.elements():
        active_jobs = queued.active.get(element.name, [])
        needed = [needed.name for needed in run.dependencies(element) if not needed.finished]
        if not active_jobs or not any(name in submitted for name in needed):
            continue
        numbers = [jobs[name] for name in needed if name in jobs] + [job.job for job in active_jobs[:-1]]
        wait_for = f"afterany:{':'.join(dict.fromkeys(numbers))}"
        try:
            run_command(["scontrol", "update", f"JobId={active_jobs[-1].job}", f"Dependency={wait_for}"])
        except SchedulerError:
            # The job has started. If it does not hold the lease yet, it will find its dependencies unfinished.
            if current_holder(element.path / "attempts")[0] is None:
                late.append(element)
    return late


def withdraw(run: Run, late: Sequence[Element]) -> list[str]:
    """Cancel the jobs of elements that started too early and of their dependents; return the elements' names.

    Raises:
        SchedulerError: if Slurm cannot be asked.
    """
    affected: dict[str, Element] = {}
    for element in run.elements():
        if element in late or any(needed.name in affected for needed in run.dependencies(element)):
            affected[element.name] = element
    return cancel(list(affected.values()), read_queue(run))


def cancel(elements: Sequence[Element], queued: QueueState) -> list[str]:
    """Cancel the jobs of elements; return the names of those that had jobs.

    Raises:
        SchedulerError: if Slurm cannot be asked.
    """
    elements = [element for element in elements if element.name in queued.active]
    # In reverse: `afterany` starts a job as soon as its dependency is cancelled.
    numbers = [job.job for element in elements for job in queued.active[element.name]]
    # An array is one call to the controller.
    if numbers:
        run_command(["scancel", *compact(reversed(numbers))])
    for element in elements:
        if all(job.state == "PENDING" for job in queued.active[element.name]):
            mark(element, "waiting", "cancelled before it started")
    return [element.name for element in elements]
