"""Executes a run on this machine with a queue of its own.

submitit's local executor starts all jobs at once: it has neither a limit on cores nor dependencies.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpd.cluster.element_job import ask_to_stop, is_ours, submit_local
from cpd.cluster.queue import foreign_variables
from cpd.config.profile import Profile
from cpd.run.attempt import mark
from cpd.run.directory import Element, Run
from cpd.run.interrupt import LAUNCHER_VARIABLE, Interrupt, launcher_identity
from cpd.run.lease import Holder, current_holder
from cpd.run.progress import StatusRecord, read_status
from cpd.run.shortage import shortage

POLL_SECONDS = 0.2
#: Seconds between refreshes of the display, which read a file per element.
REFRESH_SECONDS = 1.0
#: How often one launch restarts a killed job. A job that runs out of memory would otherwise be restarted for ever.
MAX_RESTARTS = 3
#: Bytes of the end of a log that are searched for the cause of a job's end.
TAIL_BYTES = 4096
#: Seconds that running jobs have to save when the launcher is asked to stop.
STOP_SECONDS = 120.0


def oom_kills() -> int:
    """Return how many processes this machine's kernel has killed since boot because memory ran out."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text(encoding="utf-8").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _shortage_in_log(log: Path, element: Element) -> str:
    """Return what a job ran out of that could not record it, by the last lines of its log; empty if nothing."""
    with contextlib.suppress(OSError):
        errors = [OSError(line) for line in log.read_bytes()[-TAIL_BYTES:].decode(errors="replace").splitlines()]
        return next(filter(None, (shortage(error, element.path) for error in reversed(errors))), "")
    return ""


@dataclass
class LocalQueue:
    """Runs elements on this machine, as many at a time as its cores allow."""

    run: Run
    profile: Profile
    interrupt: Interrupt
    elements: Sequence[Element]
    """The elements to run; their dependencies must be finished or among them."""
    refresh: Callable[[], None] = lambda: None
    """Called about once a second, to redraw a display."""
    failed: list[Element] = field(default_factory=list)
    held: dict[str, Holder] = field(default_factory=dict)
    """By element name: the other process that is writing the element."""
    _running: dict[str, tuple[Element, Any, int]] = field(default_factory=dict)
    _restarts: dict[str, int] = field(default_factory=dict)
    _refreshed: float = -math.inf
    _oom_kills: int = field(default_factory=oom_kills)

    def execute(self) -> bool:
        """Run the unfinished elements; return whether all of them finished.

        An element that fails does not stop those that do not depend on it.
        """
        # Jobs poll this process and stop when it has ended, so that a killed launcher leaves no jobs behind.
        os.environ[LAUNCHER_VARIABLE] = launcher_identity()
        # In an interactive step of Slurm, the jobs would take its size and its number for their own.
        for variable in foreign_variables():
            del os.environ[variable]
        try:
            pending = self._start_ready([element for element in self.elements if not element.finished])
            while self._running and not self.interrupt.requested:
                time.sleep(POLL_SECONDS)
                # Only the end of a job frees cores or finishes a dependency.
                ended = self._reap(pending)
                if ended:
                    pending = self._start_ready(pending)
                self._refresh(at_once=ended)
        finally:
            self._stop_all()
        return not pending and not self.failed and not self.held

    def _start_ready(self, pending: list[Element]) -> list[Element]:
        """Start the elements that can start; return those that still wait."""
        waiting = []
        free = self.profile.usable_cores - sum(cpus for _, _, cpus in self._running.values())
        for element in pending:
            resources = self.profile.resources(element.role)
            # An element that needs more cores than the machine has could never start: it runs alone.
            cpus = min(resources.total_cpus, self.profile.usable_cores)
            ready = all(needed.finished for needed in self.run.dependencies(element))
            if ready and cpus <= free:
                job = submit_local(self.run, element, resources)
                self._running[element.name] = (element, job, cpus)
                free -= cpus
            else:
                waiting.append(element)
        return waiting

    def _refresh(self, at_once: bool = False) -> None:
        """Redraw the display, at most once in `REFRESH_SECONDS` unless `at_once`."""
        if at_once or time.monotonic() - self._refreshed >= REFRESH_SECONDS:
            self.refresh()
            self._refreshed = time.monotonic()

    def _reap(self, pending: list[Element]) -> bool:
        """Handle jobs that ended, and queue killed elements again; return whether any job ended."""
        ended = False
        for name, (element, job, _) in list(self._running.items()):
            if not job.done():
                continue
            del self._running[name]
            ended = True
            if element.finished:
                continue
            holder, _ = current_holder(element.path / "attempts")
            if holder and not is_ours(holder):
                self.held[name] = holder
                continue
            self._restarts[name] = restarts = self._restarts.get(name, 0) + 1
            record = read_status(element.status)
            if record.state != "failed" and (cause := _shortage_in_log(job.paths.stdout, element)):
                mark(element, "failed", cause)
                self.failed.append(element)
            elif record.state == "failed":
                self.failed.append(element)
            elif restarts > MAX_RESTARTS:
                mark(element, "failed", f"its job ended {restarts} times without an error: {self._cause(record)}")
                self.failed.append(element)
            else:
                pending.append(element)
        return ended

    def _cause(self, record: StatusRecord) -> str:
        """Return why a job ended that recorded no failure, as far as this process can know."""
        if killed := oom_kills() - self._oom_kills:
            return f"this machine ran out of memory, and its kernel killed {killed} processes; use fewer cores"
        seconds = resource.getrlimit(resource.RLIMIT_CPU)[0]
        limit = "" if seconds == resource.RLIM_INFINITY else "; its CPU time is limited: raise `ulimit -t`"
        return f"{record.message if record.state == 'stopped' else 'killed by a signal'}{limit}"

    def _stop_all(self) -> None:
        deadline = time.monotonic() + STOP_SECONDS
        signalled: set[str] = set()
        while self._running and time.monotonic() < deadline:
            for name, (element, job, _) in list(self._running.items()):
                if job.done():
                    del self._running[name]
                elif name not in signalled:
                    # A job that does not hold its lease yet is asked at the next poll.
                    signalled |= {name} if ask_to_stop(element) else set()
            self._refresh()
            time.sleep(POLL_SECONDS)
