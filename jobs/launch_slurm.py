"""Print, submit or cancel a run's chain of Slurm jobs, for `cpd launch` with a Slurm profile."""

from __future__ import annotations

from collections.abc import Sequence

from cpd.cluster.estimate import costs, disk, gigabytes, rank_lines, wall_hours
from cpd.cluster.ledger import ledger
from cpd.cluster.plan import Submission, plan, texts
from cpd.cluster.queue import SchedulerError
from cpd.cluster.reconcile import QueueState, read_queue, reconcile
from cpd.cluster.submit import cancel, submit, withdraw
from cpd.config.profile import Profile
from cpd.run.directory import Run
from cpd.run.progress import clock
from jobs.common import log

#: How often one launch resubmits jobs that started before their dependencies were resubmitted.
MAX_ROUNDS = 3


def dry_run(run: Run, profile: Profile, only: Sequence[str], retry_failed: bool) -> list[str]:
    """Return the sbatch text of every submission and the expected cost; change nothing.

    Raises:
        PlanError: if the chosen elements cannot be submitted.
    """
    try:
        queued, note = read_queue(run), ""
    except SchedulerError as error:
        queued, note = QueueState({}, {}, frozenset()), f"the queue is unknown ({error})"
    submissions = plan(run, profile, queued, only, retry_failed)
    lines = []
    for name, text in texts(run, profile, submissions, queued):
        lines += [f"{'─' * 30} {name}", text]
    return [*lines, "─" * 30, *cost_lines(run, profile, submissions, queued), *([note] if note else [])]


def cost_lines(run: Run, profile: Profile, submissions: Sequence[Submission], queued: QueueState) -> list[str]:
    """Return lines with the numbers of jobs, the hours and the disk space."""
    elements = list(dict.fromkeys(element for submission in submissions for element in submission.elements))
    total = len(run.elements())
    finished = sum(element.finished for element in run.elements())
    jobs = sum(len(submission.tasks) for submission in submissions)
    lines = [
        f"{len(submissions)} calls of sbatch, {jobs} jobs, {len(elements)} of {total} elements "
        f"({finished} finished, {len(queued.active)} in the queue)"
    ]
    expected = costs(run, profile, elements)
    for cost in expected:
        basis = "measured in this run" if cost.is_measured else "estimated"
        lines.append(
            f"  {cost.role:<11} {cost.count} x {cost.cores} core(s), about {clock(cost.seconds)} each ({basis}; "
            f"limit {clock(60 * cost.minutes_limit)}, then requeued)"
        )
    lines += [f"  {line}" for line in rank_lines(run, elements)]
    size, files = disk(run.config)
    lines.append(
        f"  about {sum(cost.count * cost.cores * cost.seconds for cost in expected) / 3600:.3g} core-hours, "
        f"{clock(3600 * wall_hours(expected, profile))} from start to end if no job has to wait for nodes, "
        f"{gigabytes(size)} in {files} files for the whole run"
    )
    return lines


def submit_chain(run: Run, profile: Profile, only: Sequence[str], retry_failed: bool) -> None:
    """Submit the missing jobs, and print the commands that show and cancel them.

    Raises:
        PlanError: if the chosen elements cannot be submitted.
        SchedulerError: if Slurm cannot be asked, or refuses.
    """
    queued = reconcile(run, profile)
    for name, holder in queued.held.items():
        log(f"{name} is skipped: {holder} is writing it")
    submissions = plan(run, profile, queued, only, retry_failed)
    if not submissions:
        log(f"{run.root}: nothing to submit ({len(queued.active)} elements in the queue)")
    for round_number in range(1, MAX_ROUNDS + 1):
        if not submissions:
            break
        numbers, late = submit(run, profile, submissions, queued)
        for submission in submissions:
            log(_submitted_line(submission, numbers[submission.name]))
        print("\n".join(cost_lines(run, profile, submissions, queued)))
        if not late:
            break
        if only or round_number == MAX_ROUNDS:
            names = ", ".join(element.name for element in late)
            log(f"these will exit, since their dependencies had just ended; launch again: {names}")
            break
        names = ", ".join(withdraw(run, late))
        log(f"cancelled to be resubmitted, since their dependencies had just ended: {names}")
        queued = reconcile(run, profile)
        submissions = plan(run, profile, queued, only, retry_failed)
    if all(element.finished for element in run.elements()):
        from analysis.terminal import print_summary

        print_summary(run.results)
    if queued.active or submissions:
        print(f"follow it:  cpd status {run.root} --watch")
        print("cancel it:  the same command with --cancel; without it, the command resumes the run")


def _submitted_line(submission: Submission, number: str) -> str:
    count = len(submission.elements)
    elements = submission.elements[0].name if count == 1 else f"{count} elements of role {submission.role}"
    condition = f", after {len(submission.needs)} others" if submission.needs else ""
    return f"submitted job {number} ({submission.name}): {elements}{condition}"


def cancel_chain(run: Run, profile: Profile, only: Sequence[str]) -> None:
    """Cancel the run's jobs and print their names.

    Raises:
        SchedulerError: if Slurm cannot be asked.
    """
    entries = ledger(run)
    names = cancel(run.select(only), reconcile(run, profile))
    for name in names:
        log(f"cancelled {name} (job {entries[name][-1].job})" if name in entries else f"cancelled {name}")
    log("running jobs save before they end: nothing is lost" if names else f"{run.root} has no jobs in the queue")
