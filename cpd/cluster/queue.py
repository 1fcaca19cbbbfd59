"""What Slurm knows of jobs: squeue, and sacct where a site has it."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cpd.cluster.ledger import LedgerEntry

#: The states that a job does not leave by itself, and what to do about an element whose job is in one.
REMEDIES = {
    "OUT_OF_MEMORY": "out of memory: raise memory_gb in the profile, then launch again",
    "TIMEOUT": "ran out of time without saving: raise minutes or signal_seconds in the profile, then launch again",
    "NODE_FAIL": "its node failed: launch again",
    "BOOT_FAIL": "its node did not start: launch again",
    "PREEMPTED": "preempted and not requeued: launch again",
    "CANCELLED": "cancelled: launch again to go on",
    "DEADLINE": "its deadline passed: launch again",
    "FAILED": "killed, or ended with an error that its log tells: launch again",
    "COMPLETED": "ended before the element was finished: launch again",
    "REVOKED": "moved to another cluster: launch again here",
    "GONE": "Slurm has forgotten its job: launch again",
}
#: What Slurm writes into a job's log, and the state that it tells of. Without cgroups a job that exceeds its
#: memory has the state FAILED, and a forgotten job has none.
SIGNS = {
    "exceeded memory limit": "OUT_OF_MEMORY",
    "oom-kill": "OUT_OF_MEMORY",
    "oom_kill": "OUT_OF_MEMORY",
    "DUE TO TIME LIMIT": "TIMEOUT",
    "DUE TO NODE FAILURE": "NODE_FAIL",
    "DUE TO PREEMPTION": "PREEMPTED",
}
#: Seconds after which a command that does not answer is given up.
COMMAND_SECONDS = 30.0


class SchedulerError(RuntimeError):
    """Slurm cannot be asked."""


class NoSchedulerError(SchedulerError):
    """There is no Slurm here."""


class SubmissionRefusedError(SchedulerError):
    """sbatch does not take a job as it was asked for."""


@dataclass(frozen=True)
class JobState:
    """One job, or one element of an array, as Slurm tells."""

    job: str
    """`12`, or `12_3` for an element of an array."""
    name: str
    state: str
    """In full and upper case, e.g. `RUNNING`."""
    node: str = ""
    reason: str = ""
    """Why a pending job waits, e.g. `Dependency`."""
    number: str = ""
    """What the job itself finds in SLURM_JOB_ID: its own number even for an element of an array."""

    @property
    def is_active(self) -> bool:
        """Whether it will still work, or is about to."""
        return self.state not in REMEDIES

    @property
    def remedy(self) -> str:
        """What became of an ended job, and what to do."""
        return REMEDIES.get(self.state, "")


def state_told_by(log_lines: Iterable[str]) -> str:
    """The state that the end of a job's log tells of; empty if none."""
    found = [state for line in log_lines for sign, state in SIGNS.items() if sign in line]
    return found[-1] if found else ""


def run_command(words: Sequence[str], seconds: float = COMMAND_SECONDS) -> str:
    """Output of one of Slurm's commands.

    Raises:
        NoSchedulerError: if it is not installed.
        SchedulerError: if it fails, or does not answer in time.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=seconds)
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
    """All of this user's jobs that the controller remembers, by number.

    Raises:
        SchedulerError: if the controller cannot be asked.
    """
    text = run_command(["squeue", "--me", "-h", "-r", "-t", "all", "-o", "%i|%A|%j|%T|%N|%r"])
    return {state.job: state for state in map(_parse_queue, text.splitlines())}


def _parse_queue(line: str) -> JobState:
    job, number, name, state, node, reason = line.split("|", 5)
    return JobState(job, name, state, node, "" if reason == "None" else reason, number)


def accounting(jobs: Iterable[str] = (), names: Iterable[str] = ()) -> dict[str, JobState]:
    """What the accounting remembers of the given jobs, by number or by name; nothing where a site has none."""
    jobs, names = list(jobs), list(names)
    command = ["sacct", "-X", "-n", "-P", "-o", "JobID,JobIDRaw,JobName,State,NodeList"]
    # By default sacct tells of today only.
    command += ["-S", "now-90days", "-u", str(os.getuid())]
    if not (jobs or names) or shutil.which("sacct") is None:
        return {}
    command += [*(["-j", ",".join(jobs)] if jobs else ["--name", ",".join(names)])]
    try:
        text = run_command(command, seconds=10.0)
    except SchedulerError:
        return {}
    return {state.job: state for state in map(_parse_accounting, text.splitlines())}


def _parse_accounting(line: str) -> JobState:
    job, number, name, state, node = line.split("|", 4)
    # "CANCELLED by 1000"
    return JobState(job, name, state.split()[0], "" if node == "None assigned" else node, number=number)


#: Seconds for which an answer is kept; a site's controller has more to do than to feed our display.
QUEUE_SECONDS = 3.0
ACCOUNTING_SECONDS = 30.0
#: The state of a job of which neither the queue nor the accounting knows anything any more.
GONE = "GONE"


@dataclass
class QueueView:
    """What Slurm told last."""

    _jobs: dict[str, JobState] = field(default_factory=dict)
    _asked: float = -1e9
    _ended: dict[str, JobState] = field(default_factory=dict)
    _asked_accounting: float = -1e9
    _answers: bool = False

    def states(self, entries: Mapping[str, LedgerEntry]) -> dict[str, JobState]:
        """The job of each element, by element name, where Slurm can be asked.

        A job that Slurm has forgotten has the state `GONE`: it must be judged by its element's markers and
        heartbeat alone.
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
            self._ended |= {k: v for k, v in accounting(jobs=sorted(forgotten)).items() if not v.is_active}
        known = {**self._ended, **self._jobs}
        unknown = {job: JobState(job, "", GONE) for job in forgotten} if self._answers else {}
        found = {name: known.get(entry.job) or unknown.get(entry.job) for name, entry in submitted.items()}
        return {name: job for name, job in found.items() if job}
