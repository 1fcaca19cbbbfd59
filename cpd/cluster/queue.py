"""Queries Slurm for jobs: with squeue, and with sacct where a site has accounting."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cpd.cluster.ledger import LedgerEntry, user_name
from cpd.config.profile import SETUP_FAILED

#: The final states of a job, and what to do about its element.
REMEDIES = {
    "OUT_OF_MEMORY": "out of memory: raise memory_gb in the profile, then launch again",
    "TIMEOUT": "ran out of time without saving: raise minutes or signal_seconds in the profile, then launch again",
    "NODE_FAIL": "its node failed: launch again",
    "BOOT_FAIL": "its node did not start: launch again",
    "PREEMPTED": "preempted and not requeued: launch again",
    "CANCELLED": "cancelled: launch again to go on",
    "DEADLINE": "its deadline passed: launch again",
    "CONNECT": "its ranks did not find each other: srun_mpi in the profile must suit the MPI; then launch again",
    "SETUP": "correct modules or setup in the profile, then launch again",
    "FAILED": "killed, or ended with an error that its log shows: launch again",
    "COMPLETED": "ended before the element was finished: launch again",
    "REVOKED": "moved to another cluster: launch again here",
    "GONE": "Slurm has forgotten its job: launch again",
    "UNKNOWN": "Slurm does not say what became of its job: look again later",
}
#: Slurm's messages in a job's log, and the state that each means. The queue alone does not tell: without cgroups,
#: a job that exceeds its memory has the state FAILED, and a job that Slurm has forgotten has no state.
STATES_BY_MESSAGE = {
    SETUP_FAILED: "SETUP",
    "Timeout (0:05:00)!": "CONNECT",  # faulthandler's, after CONNECT_SECONDS
    "exceeded memory limit": "OUT_OF_MEMORY",
    "oom-kill": "OUT_OF_MEMORY",
    "oom_kill": "OUT_OF_MEMORY",
    "DUE TO TIME LIMIT": "TIMEOUT",
    "DUE TO NODE FAILURE": "NODE_FAIL",
    "DUE TO PREEMPTION": "PREEMPTED",
}
#: Variables that Slurm and MPI set for their own processes, and that Slurm's commands read as options.
FOREIGN_VARIABLES = re.compile("(SLURMD?|SBATCH|SQUEUE|SCANCEL|SACCT|SCONTROL|SALLOC|SRUN|SINFO|PMIX?)_")
#: Those of them that say where Slurm is and who asks.
KEPT_VARIABLES = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")
#: The cluster that Slurm's commands ask, if it is not the one of this machine: a profile's `clusters`.
CLUSTERS_VARIABLE = "CPD_CLUSTERS"
#: A line of squeue or sacct: number, SLURM_JOB_ID, state, nodes, reason, and the name, which may hold anything.
JOB_LINE = re.compile(r"([\d_+]+)\|(\d+)\|([A-Z_]+)[^|]*\|([^|]*)\|([^|]*)\|(.*)")


#: What Slurm's commands say if the controller does not answer, which may be temporary.
UNANSWERED = (
    *("Socket timed out", "Unable to contact slurm controller", "Unexpected message received"),
    *("Zero Bytes were transmitted", "standby mode", "Could not establish a configuration source"),
)


class SchedulerError(RuntimeError):
    """Slurm does not answer, or answers with an error."""


class NoAnswerError(SchedulerError):
    """Slurm's controller does not answer; it may later."""


class NoSchedulerError(SchedulerError):
    """Slurm is not installed on this machine."""


class SubmissionRefusedError(SchedulerError):
    """sbatch refuses a job."""


@dataclass(frozen=True)
class JobState:
    """One job, or one element of an array, as Slurm reports it."""

    job: str
    """`12`, or `12_3` for an element of an array."""
    name: str
    state: str
    """In full and upper case, e.g. `RUNNING`."""
    node: str = ""
    reason: str = ""
    """Why a pending job waits, e.g. `Dependency`."""
    number: str = ""
    """The job's SLURM_JOB_ID, which differs from `job` for an element of an array."""

    @property
    def is_active(self) -> bool:
        """Whether the job is pending or running, rather than over."""
        return self.state not in REMEDIES


def compact(jobs: Iterable[str]) -> list[str]:
    """Return job numbers as Slurm's commands take them, the elements of an array as one: `12`, `13_[0-5,7]`."""
    places: dict[str, list[int]] = {}
    for job in jobs:
        number, _, place = job.partition("_")
        places.setdefault(number, []).extend([int(place)] if place else [])
    return [f"{number}_[{_ranges(set(p))}]" if p else number for number, p in places.items()]


def _ranges(numbers: set[int]) -> str:
    """Return numbers in short: `0-5,7`."""
    starts = sorted(n for n in numbers if n - 1 not in numbers)
    ends = sorted(n for n in numbers if n + 1 not in numbers)
    return ",".join(
        f"{start}-{end}" if start < end else str(start) for start, end in zip(starts, ends, strict=True)
    )


def state_in_log(log_lines: Iterable[str]) -> str:
    """Return the state that the last of Slurm's messages in a job's log means; empty if there is none."""
    states = [state for line in log_lines for message, state in STATES_BY_MESSAGE.items() if message in line]
    return states[-1] if states else ""


def foreign_variables() -> list[str]:
    """Return the variables of this process that would change what Slurm's commands, jobs and ranks do."""
    return [key for key in os.environ if FOREIGN_VARIABLES.match(key) and key not in KEPT_VARIABLES]


@contextlib.contextmanager
def outside_of_jobs() -> Iterator[None]:
    """Hide this process's `foreign_variables`, which sbatch would obey or pass on to the job."""
    values = {key: os.environ.pop(key) for key in foreign_variables()}
    if clusters := os.environ.get(CLUSTERS_VARIABLE):
        os.environ["SLURM_CLUSTERS"] = clusters
    try:
        yield
    finally:
        os.environ.pop("SLURM_CLUSTERS", None)
        os.environ.update(values)


def run_command(words: Sequence[str], seconds: float = 30.0) -> str:
    """Run one of Slurm's commands without `foreign_variables` and return its output.

    Raises:
        NoSchedulerError: if it is not installed.
        NoAnswerError: if it finds no controller, or takes longer than `seconds`.
        SchedulerError: if it fails.
    """
    try:
        with outside_of_jobs():
            done = subprocess.run(
                words, capture_output=True, encoding="utf-8", errors="replace", check=False, timeout=seconds
            )
    except FileNotFoundError:
        raise NoSchedulerError(
            f"{words[0]} not found: this machine is no login node of a Slurm cluster. `--profile local` needs "
            "none; `python -m slurm.testbed up` starts one on this machine"
        ) from None
    except subprocess.TimeoutExpired:
        raise NoAnswerError(f"{words[0]} did not answer within {seconds:.0f} s; try again later") from None
    if done.returncode:
        kind = NoAnswerError if any(sign in done.stderr for sign in UNANSWERED) else SchedulerError
        raise kind(f"`{' '.join(words)}` failed: {done.stderr.strip() or f'exit {done.returncode}'}")
    return done.stdout


def queue(entries: Iterable[LedgerEntry]) -> dict[str, JobState]:
    """Return this user's jobs that Slurm's controller still has in memory, and those of `entries` by others.

    They are in a dictionary by number. Another user's job that the cluster hides has the state `UNKNOWN`.

    Raises:
        SchedulerError: if the controller cannot be asked.
    """
    command = ["squeue", "-h", "-r", "-t", "all", "-o", "%i|%A|%T|%N|%r|%j"]
    jobs = _parse(run_command([*command, "--me"]))
    users = {entry.job: entry.user for entry in entries if entry.job and entry.is_foreign}
    if not users:
        return jobs
    numbers = sorted({job.partition("_")[0] for job in users})
    # Twice, since a single number that Slurm has forgotten would be an error.
    jobs |= _parse(run_command([*command, "-j", ",".join([*numbers, numbers[0]])]))
    if users.keys() - jobs and hides_jobs(run_command(["scontrol", "show", "config"])):
        jobs |= {
            job: JobState(job, "", UNKNOWN, reason=f"hidden job of {user}")
            for job, user in users.items()
            if job not in jobs
        }
    return jobs


def hides_jobs(configuration: str) -> bool:
    """Whether the cluster with this configuration shows users their own jobs only."""
    return bool(re.search(r"^PrivateData\s*=.*\bjobs\b", configuration, flags=re.MULTILINE))


def _parse(text: str) -> dict[str, JobState]:
    """Return the jobs in squeue's or sacct's output; lines that belong to a name with newlines are none."""
    states = {}
    for match in filter(None, map(JOB_LINE.fullmatch, text.split("\n"))):
        job, number, state, node, reason, name = match.groups()
        node, reason = ("" if value in ("None", "None assigned") else value for value in (node, reason))
        states[job] = JobState(job, name, state, node, reason, number)
    return states


def accounting(option: str, values: Iterable[str], users: Iterable[str] = ()) -> dict[str, JobState]:
    """Return jobs from Slurm's accounting, by number; empty where a site has none.

    Args:
        option: `-j` for numbers, `--name` for names.
        values: numbers or names of jobs.
        users: whose jobs they may be, beside this user's.
    """
    # By default sacct reports today's jobs only.
    clusters = os.environ.get(CLUSTERS_VARIABLE)
    owners = ",".join([user_name(), *users])
    command = ["sacct", "-X", "-n", "-P", "-S", "now-90days", "-u", owners, option, ",".join(values)]
    command += ["-M", clusters] if clusters else []
    try:
        return _parse(run_command([*command, "-o", "JobID,JobIDRaw,State,NodeList,Reason,JobName"], seconds=10.0))
    except SchedulerError:
        return {}


#: Seconds for which an answer is reused, so that a display does not load a site's controller.
QUEUE_SECONDS = 3.0
ACCOUNTING_SECONDS = 30.0
#: The state of a job that is neither in the queue nor in the accounting.
GONE = "GONE"
#: The state of a job of which Slurm says nothing now.
UNKNOWN = "UNKNOWN"
NO_ANSWER = "Slurm does not answer"


@dataclass
class QueueView:
    """Slurm's latest answers, for a display that asks again and again."""

    _jobs: dict[str, JobState] = field(default_factory=dict)
    _asked: float = -1e9
    _ended: dict[str, JobState] = field(default_factory=dict)
    _asked_accounting: float = -1e9
    _failure: SchedulerError | None = None

    def states(self, entries: Mapping[str, LedgerEntry]) -> dict[str, JobState]:
        """Return the job of each element by the element's name; none where there is no Slurm.

        A job that Slurm has forgotten has the state `GONE`, and one of which it says nothing `UNKNOWN`; only its
        element's markers and heartbeat remain.
        """
        submitted = {name: entry for name, entry in entries.items() if entry.cluster == "slurm" and entry.job}
        if not submitted:
            return {}
        now = time.monotonic()
        if now - self._asked > QUEUE_SECONDS:
            self._asked = now
            try:
                self._jobs, self._failure = queue(submitted.values()), None
            except SchedulerError as error:
                self._jobs, self._failure = {}, error
        if isinstance(self._failure, NoSchedulerError):
            return {}
        forgotten = {entry.job for entry in submitted.values()} - set(self._jobs)
        if (
            not self._failure
            and forgotten - set(self._ended)
            and now - self._asked_accounting > ACCOUNTING_SECONDS
        ):
            self._asked_accounting = now
            users = {entry.user for entry in submitted.values() if entry.is_foreign}
            self._ended |= {k: v for k, v in accounting("-j", sorted(forgotten), users).items() if not v.is_active}
        state, reason = (UNKNOWN, NO_ANSWER) if self._failure else (GONE, "")
        gone = {job: JobState(job, "", state, reason=reason) for job in forgotten}
        jobs = {**gone, **self._ended, **self._jobs}
        return {name: jobs[entry.job] for name, entry in submitted.items() if entry.job in jobs}
