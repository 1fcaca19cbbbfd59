"""The queue as seen by the status table: asked seldom, and only about elements that are not finished."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from cpd.ledger import LedgerEntry
from cpd.slurm.states import JobState, SchedulerError, accounting, queue

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
