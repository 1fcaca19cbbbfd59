"""Plans the missing jobs of a run within a site's limits, and their sbatch texts.

Teachers form one array, or several where a site limits the length of arrays. Every student and every evaluation is
a separate job, since each depends on other elements; the report comes last. Dependencies are `afterany`, not
`afterok`: one failed job does not cancel the rest of the chain, and an element with an unfinished dependency exits
at once and names it.

In the order `overlap`, a student has one job for every unfinished teacher, in the order of the stream. Each job
trains the stages whose teachers are finished, and is followed by a job that evaluates the finished stages. Both
orders give the same students.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from cpd.cluster.ledger import ledger
from cpd.cluster.reconcile import QueueState
from cpd.cluster.sbatch import executor
from cpd.config.profile import Profile
from cpd.config.types import Role
from cpd.run.directory import Element, Run
from cpd.run.progress import read_status


class PlanError(ValueError):
    """The chosen elements cannot be submitted; the message says why."""


@dataclass(frozen=True)
class Submission:
    """One call of sbatch: a job, or an array of them."""

    name: str
    role: Role
    tasks: tuple[tuple[Element, ...], ...]
    """The elements of every job of the array; more than one per job where a site limits the number of jobs."""
    needs: tuple[Element, ...] = ()
    """The elements whose latest jobs must end first, in the queue or submitted earlier. The submission's own
    element stands for its previous job."""
    parallelism: int = 0
    """Jobs of the array that run at a time; 0: the profile's number."""
    partial: bool = False
    """Whether the job may start before all dependencies of its element are finished."""

    @property
    def elements(self) -> list[Element]:
        """The elements of all jobs."""
        return [element for task in self.tasks for element in task]


def plan(
    run: Run, profile: Profile, queued: QueueState, only: Sequence[str] = (), retry_failed: bool = False
) -> list[Submission]:
    """Return the missing submissions, in order.

    Args:
        run: the run.
        profile: limits of the site.
        queued: which elements have jobs already; they are not submitted again.
        only: names of elements, or of folders of them such as `teachers/push-v3`; empty: all.
        retry_failed: submit only failed elements and those that depend on them.

    Raises:
        RunError: if a name is unknown.
        PlanError: if a limit of the site is too low, or an element would wait for one that is neither finished nor
            in the queue.
    """
    wanted = [
        element
        for element in _chosen(run, queued, only, retry_failed)
        if not (element.finished or element.name in queued.active or element.name in queued.held)
    ]
    scheduled = {*queued.active, *(element.name for element in wanted)}
    needs = {element.name: [e for e in run.dependencies(element) if not e.finished] for element in wanted}
    for element in wanted:
        missing = [needed.name for needed in needs[element.name] if needed.name not in scheduled]
        if missing:
            raise PlanError(
                f"{element.name} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} neither "
                "finished nor in the queue"
                + "".join(
                    f"; {name} is worked on by {queued.held[name]}" for name in missing if name in queued.held
                )
            )
    teachers = [element for element in wanted if element.role == "teacher"]
    others = [element for element in wanted if element.role != "teacher"]
    following = _overlapping(run, others, needs) if profile.order == "overlap" else _sequential(others, needs)
    arrays = _arrays(teachers, profile, len(following) + sum(map(len, queued.active.values())))
    submissions = [Submission("", "teacher", tasks, parallelism=parallelism) for tasks, parallelism in arrays]
    names = _new_names(run, queued.names)
    return [
        replace(submission, name=name.format(submission.role))
        for submission, name in zip(submissions + following, names, strict=False)
    ]


def _sequential(wanted: Sequence[Element], needs: dict[str, list[Element]]) -> list[Submission]:
    """Return one job for every student, evaluation and report, after all its dependencies."""
    return [Submission("", element.role, ((element,),), tuple(needs[element.name])) for element in wanted]


def _overlapping(run: Run, wanted: Sequence[Element], needs: dict[str, list[Element]]) -> list[Submission]:
    """Return alternating jobs of each student and its evaluation, one pair for every unfinished teacher."""
    wanted_names = {element.name for element in wanted}
    submissions: list[Submission] = []
    for student, evaluation in zip(run.students(), run.evaluations(), strict=True):
        pair = [element for element in (student, evaluation) if element.name in wanted_names]
        # An evaluation alternates with its student's jobs, so without those it needs a single job.
        teachers = needs.get(student.name, []) if student in pair else []
        if teachers and run.teacher_of(run.config.stream.tasks[0], student.seed).finished:
            submissions += [Submission("", element.role, ((element,),), partial=True) for element in pair[:1]]
        for number, teacher in enumerate(teachers):
            for element in pair:
                has_job = element in [e for submission in submissions for e in submission.elements]
                first = teacher if element is student else student
                is_last = number == len(teachers) - 1
                after = (first, *([element] if has_job else []))
                # The last job is not partial, so that it reports missing dependencies.
                submissions.append(Submission("", element.role, ((element,),), after, partial=not is_last))
        if not teachers:
            submissions += _sequential(pair, needs)
    return submissions + _sequential([element for element in wanted if element.role == "report"], needs)


def _chosen(run: Run, queued: QueueState, only: Sequence[str], retry_failed: bool) -> list[Element]:
    elements = run.select(only)
    if retry_failed:
        # An element has failed if it was submitted and is neither finished, waiting, queued nor being written.
        submitted = ledger(run).keys() - queued.active.keys() - queued.held.keys()
        retried: set[str] = set()
        for element in elements:
            failed = (
                element.name in submitted
                and not element.finished
                and read_status(element.status).state != "waiting"
            )
            if failed or any(needed.name in retried for needed in run.dependencies(element)):
                retried.add(element.name)
        elements = [element for element in elements if element.name in retried]
    return elements


def _arrays(
    teachers: list[Element], profile: Profile, num_others: int
) -> list[tuple[tuple[tuple[Element, ...], ...], int]]:
    """Return the teachers' arrays, each within the site's limits, and how many of its jobs may run at a time.

    Where `max_submitted` leaves fewer jobs than there are teachers, a job trains several, one after another.
    """
    max_jobs = profile.max_submitted - num_others if profile.max_submitted else len(teachers)
    if max_jobs < min(len(teachers), 1):
        shortage = "no room for teachers beside" if teachers else "too little room for"
        raise PlanError(
            f"max_submitted ({profile.max_submitted}) leaves {shortage} {num_others} other jobs; raise it, or "
            "submit part of the run by --only"
        )
    if not teachers:
        return []
    size = -(-len(teachers) // max_jobs)
    tasks = [tuple(teachers[i : i + size]) for i in range(0, len(teachers), size)]
    longest = profile.max_array_size
    chunks = [tuple(tasks[i : i + longest]) for i in range(0, len(tasks), longest)]
    parallelism = max(1, profile.array_parallelism // len(chunks))
    return [(chunk, parallelism) for chunk in chunks]


def _new_names(run: Run, taken: frozenset[str]) -> Iterator[str]:
    """Yield unique job names, `<run>-{}-<digest of its folder>-<number>`, without the role."""
    digest = hashlib.sha256(str(run.root.resolve()).encode()).hexdigest()[:6]
    used = taken | {entry.name for entries in ledger(run).values() for entry in entries}
    numbers = [name.rpartition("-")[2] for name in used if f"-{digest}-" in name]
    last = max((int(number) for number in numbers if number.isdigit()), default=0)
    return (f"{run.config.name}-{{}}-{digest}-{number}" for number in itertools.count(last + 1))


def submit_all(
    submissions: Sequence[Submission], queued: QueueState, submit: Callable[[Submission, str], str]
) -> dict[str, str]:
    """Submit in order, each after what it needs.

    Args:
        submissions: from `plan`.
        queued: the state of the queue that they were planned with.
        submit: submits one submission with its dependency in sbatch's syntax, and returns the job's number.

    Returns:
        The number of every element's latest job, by the element's name.
    """
    jobs = {name: states[-1].job for name, states in queued.active.items()}
    arrays: dict[str, list[str]] = {}
    for submission in submissions:
        job = submit(submission, _dependency(submission, jobs, arrays))
        is_array = len(submission.tasks) > 1
        numbers = [f"{job}_{place}" if is_array else job for place in range(len(submission.tasks))]
        for number, task in zip(numbers, submission.tasks, strict=True):
            jobs.update({element.name: number for element in task})
        if is_array:
            arrays[job] = numbers
    return jobs


def _dependency(submission: Submission, jobs: dict[str, str], arrays: dict[str, list[str]]) -> str:
    """Return the dependency in sbatch's syntax; `arrays` holds all job numbers of each array, by its number."""
    needed = {jobs[element.name] for element in submission.needs}
    # The number of a whole array keeps the option short.
    whole = [array for array, members in arrays.items() if needed.issuperset(members)]
    single = [job for job in needed if not any(job in arrays[array] for array in whole)]
    return "afterany:" + ":".join(sorted(whole + single, key=_numeric)) if needed else ""


def _numeric(job: str) -> list[tuple[int, str]]:
    return [(int(word) if word.isdigit() else 0, word) for word in job.split("_")]


def texts(
    run: Run, profile: Profile, submissions: Sequence[Submission], queued: QueueState
) -> list[tuple[str, str]]:
    """Return name and sbatch text of every submission, with names in place of the numbers that sbatch assigns."""
    result = []

    def add(submission: Submission, wait_for: str) -> str:
        job = executor(run, profile, submission.role, submission.name, wait_for, submission.parallelism)
        result.append((submission.name, job.text(len(submission.tasks))))
        return f"<{submission.name}>"

    submit_all(submissions, queued, add)
    return result
