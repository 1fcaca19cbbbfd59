"""Plans the missing jobs of a run within a site's limits, and their sbatch texts.

Teachers form one array, or several where a site limits the length of arrays. So do students that learn from the
same teachers, and the evaluations of such an array. The report comes last. Dependencies are `afterany`, not
`afterok`: one failed job does not cancel the rest of the chain, and an element with an unfinished dependency exits
at once and names it.

In the order `overlap`, a student has one job for every unfinished teacher, in the order of the stream. Each job
trains the stages whose teachers are finished, and is followed by a job that evaluates the finished stages. Both
orders give the same students.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from cpd.cluster.ledger import ledger
from cpd.cluster.reconcile import QueueState
from cpd.cluster.sbatch import executor
from cpd.config.profile import Profile
from cpd.config.types import Role
from cpd.run.directory import Element, Run
from cpd.run.progress import read_status

T = TypeVar("T")


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
    is_paired: bool = False
    """Whether `needs` are the elements of an array, and each job may start once the one at its place succeeded."""

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
    following = (
        _overlapping(run, others, needs, profile.max_array_size)
        if profile.order == "overlap"
        else _sequential(others, needs, profile.max_array_size)
    )
    num_others = sum(len(submission.tasks) for submission in following)
    arrays = _arrays(teachers, profile, num_others + sum(map(len, queued.active.values())))
    submissions = [Submission("", "teacher", tasks, parallelism=parallelism) for tasks, parallelism in arrays]
    names = _new_names(run, queued.names)
    return [
        replace(submission, name=name.format(submission.role))
        for submission, name in zip(submissions + following, names, strict=False)
    ]


def _sequential(
    wanted: Sequence[Element], needs: Mapping[str, Sequence[Element]], max_size: int
) -> list[Submission]:
    """Return the arrays of students, those of evaluations, and the report, each after all its dependencies."""
    students = [element for element in wanted if element.role == "student"]
    arrays = _equal(students, lambda student: tuple(needs[student.name]), max_size)
    submissions = [_array(array, needs[array[0].name]) for array in arrays]
    evaluation_of = {needed.name: e for e in wanted if e.role == "evaluation" for needed in needs[e.name]}
    for array in arrays:
        evaluations = [evaluation_of[student.name] for student in array if student.name in evaluation_of]
        if len(evaluations) == len(array) > 1:
            submissions.append(_array(evaluations, array, is_paired=True))
    planned = {element.name for submission in submissions for element in submission.elements}
    others = [element for element in wanted if element.name not in planned]
    arrays = _equal(others, lambda element: (element.role, *needs[element.name]), max_size)
    return submissions + [_array(array, needs[array[0].name]) for array in arrays]


def _overlapping(
    run: Run, wanted: Sequence[Element], needs: Mapping[str, Sequence[Element]], max_size: int
) -> list[Submission]:
    """Return alternating arrays of students and their evaluations, one pair for every unfinished teacher."""
    wanted_names = {element.name for element in wanted}
    # An evaluation alternates with its student's jobs, so without those it needs a single job.
    pairs = [pair for pair in zip(run.students(), run.evaluations(), strict=True) if needs.get(pair[0].name)]
    submissions: list[Submission] = []
    for array in _equal(pairs, lambda p: (p[1].name in wanted_names, *needs[p[0].name]), max_size):
        students, evaluations = zip(*array, strict=True)
        teachers = needs[students[0].name]
        can_begin = run.teacher_of(run.config.stream.tasks[0], students[0].seed).finished
        if can_begin:
            submissions.append(_array(students, (), partial=True))
        for number, teacher in enumerate(teachers):
            # The last job is not partial, so that it reports missing dependencies.
            partial = number < len(teachers) - 1
            earlier = students if number or can_begin else ()
            submissions.append(_array(students, (teacher, *earlier), partial=partial))
            if evaluations[0].name in wanted_names:
                earlier = evaluations if number else ()
                submissions.append(_array(evaluations, (*students, *earlier), partial=partial))
    planned = {element.name for submission in submissions for element in submission.elements}
    return submissions + _sequential([e for e in wanted if e.name not in planned], needs, max_size)


def _equal(items: Iterable[T], kind: Callable[[T], Hashable], max_size: int) -> list[list[T]]:
    """Return items of equal kind together, at most `max_size` of them, in the order in which kinds first occur."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(kind(item), []).append(item)
    return [group[i : i + max_size] for group in groups.values() for i in range(0, len(group), max_size)]


def _array(elements: Sequence[Element], needs: Sequence[Element], **more: bool) -> Submission:
    """Return an array of one job for each of the elements, which have the same role."""
    tasks = tuple((element,) for element in elements)
    return Submission("", elements[0].role, tasks, tuple(needs), parallelism=len(tasks), **more)


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
    digest = run.digest
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
    if submission.is_paired:
        # `aftercorr` waits for success alone. After a failure, a job starts when the whole array has ended.
        array = jobs[submission.needs[0].name].rpartition("_")[0]
        return f"aftercorr:{array}?afterany:{array}"
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
