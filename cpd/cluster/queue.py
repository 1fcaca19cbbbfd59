"""Queries Slurm for jobs: with squeue, and with sacct where a site has accounting."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cpd.cluster.ledger import LedgerEntry

#: The final states of a job, and what to do about its element.
REMEDIES = {
    "OUT_OF_MEMORY": "out of memory: raise memory_gb in the profile, then launch again",
    "TIMEOUT": "ran out of time without saving: raise minutes or signal_seconds in the profile, then launch again",
    "NODE_FAIL": "its node failed: launch again",
    "BOOT_FAIL": "its node did not start: launch again",
    "PREEMPTED": "preempted and not requeued: launch again",
    "CANCELLED": "cancelled: launch again to go on",
    "DEADLINE": "its deadline passed: launch again",
    "FAILED": "killed, or ended with an error that its log shows: launch again",
    "COMPLETED": "ended before the element was finished: launch again",
    "REVOKED": "moved to another cluster: launch again here",
    "GONE": "Slurm has forgotten its job: launch again",
}
#: Slurm's messages in a job's log, and the state that each means. The queue alone does not tell: without cgroups,
#: a job that exceeds its memory has the state FAILED, and a job that Slurm has forgotten has no state.
STATES_BY_MESSAGE = {
    "exceeded memory limit": "OUT_OF_MEMORY",
    "oom-kill": "OUT_OF_MEMORY",
    "oom_kill": "OUT_OF_MEMORY",
    "DUE TO TIME LIMIT": "TIMEOUT",
    "DUE TO NODE FAILURE": "NODE_FAIL",
    "DUE TO PREEMPTION": "PREEMPTED",
}


class SchedulerError(RuntimeError):
    """Slurm does not answer, or answers with an error."""


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


def state_in_log(log_lines: Iterable[str]) -> str:
    """Return the state that the last of Slurm's messages in a job's log means; empty if there is none."""
    states = [state for line in log_lines for message, state in STATES_BY_MESSAGE.items() if message in line]
    return states[-1] if states else ""


def run_command(words: Sequence[str], seconds: float = 30.0) -> str:
    """Run one of Slurm's commands and return its output.

    Raises:
        NoSchedulerError: if it is not installed.
        SchedulerError: if it fails, or does not answer within `seconds`.
    """
    try:
        done = subprocess.run(
            words, capture_output=True, encoding="utf-8", errors="replace", check=False, timeout=seconds
        )
    except FileNotFoundError:
        raise NoSchedulerError(
            f"{words[0]} not found: this machine is no login node of a Slurm cluster. `--profile local` needs "
            "none; `python -m slurm.testbed up` starts one on this machine"
        ) from None
    except subprocess.TimeoutExpired:
        raise SchedulerError(f"{words[0]} did not answer within {seconds:.0f} s; try again later") from None
    if done.returncode:
        raise SchedulerError(f"`{' '.join(words)}` failed: {done.stderr.strip() or f'exit {done.returncode}'}")
    return done.stdout


def queue() -> dict[str, JobState]:
    """Return all of this user's jobs that Slurm's controller still has in memory, by number.

    Raises:
        SchedulerError: if the controller cannot be asked.
    """
    states = {}
    for line in run_command(["squeue", "--me", "-h", "-r", "-t", "all", "-o", "%i|%A|%j|%T|%N|%r"]).splitlines():
        job, number, name, state, node, reason = line.split("|", 5)
        states[job] = JobState(job, name, state, node, "" if reason == "None" else reason, number)
    return states


def accounting(option: str, values: Iterable[str]) -> dict[str, JobState]:
    """Return jobs from Slurm's accounting, by number; empty where a site has none.

    Args:
        option: `-j` for numbers, `--name` for names.
        values: numbers or names of jobs.
    """
    # By default sacct reports today's jobs only.
    command = ["sacct", "-X", "-n", "-P", "-S", "now-90days", "-u", str(os.getuid()), option, ",".join(values)]
    try:
        text = run_command([*command, "-o", "JobID,JobIDRaw,JobName,State,NodeList"], seconds=10.0)
    except SchedulerError:
        return {}
    states = {}
    for line in text.splitlines():
        job, number, name, state, node = line.split("|", 4)
        # The state may be "CANCELLED by 1000".
        states[job] = JobState(job, name, state.split()[0], "" if node == "None assigned" else node, number=number)
    return states


#: Seconds for which an answer is reused, so that a display does not load a site's controller.
QUEUE_SECONDS = 3.0
ACCOUNTING_SECONDS = 30.0
#: The state of a job that is neither in the queue nor in the accounting.
GONE = "GONE"


@dataclass
class QueueView:
    """Slurm's latest answers, for a display that asks again and again."""

    _jobs: dict[str, JobState] = field(default_factory=dict)
    _asked: float = -1e9
    _ended: dict[str, JobState] = field(default_factory=dict)
    _asked_accounting: float = -1e9
    _answers: bool = False

    def states(self, entries: Mapping[str, LedgerEntry]) -> dict[str, JobState]:
        """Return the job of each element by the element's name, as far as Slurm answers.

        A job that Slurm has forgotten has the state `GONE`; only its element's markers and heartbeat remain.
        """
        submitted = {name: entry for name, entry in entries.items() if entry.cluster == "slurm" and entry.job}
        if not submitted:
            return {}
        now = time.monotonic()
        if now - self._asked > QUEUE_SECONDS:
            self._asked = now
            try:
                self._jobs, self._answers = queue(), True
            except SchedulerError:
                self._jobs, self._answers = {}, False
        forgotten = {entry.job for entry in submitted.values()} - set(self._jobs)
        if self._answers and forgotten - set(self._ended) and now - self._asked_accounting > ACCOUNTING_SECONDS:
            self._asked_accounting = now
            self._ended |= {k: v for k, v in accounting("-j", sorted(forgotten)).items() if not v.is_active}
        gone = {job: JobState(job, "", GONE) for job in forgotten} if self._answers else {}
        jobs = {**gone, **self._ended, **self._jobs}
        return {name: jobs[entry.job] for name, entry in submitted.items() if entry.job in jobs}
