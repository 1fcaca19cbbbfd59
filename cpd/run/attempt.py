"""One attempt at an element: its lease, its status, and how its end is recorded."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from cpd.comm import Comm, float_sum
from cpd.config.types import Tracker
from cpd.run.directory import Element, Run
from cpd.run.files import sweep_element
from cpd.run.interrupt import InterruptedBySignal
from cpd.run.lease import STALE_SECONDS, Lease, LeaseHeldError, LeaseLostError, current_holder
from cpd.run.progress import MetricsLog, State, Status, cpu_seconds, read_status, write_status
from cpd.run.shortage import describe_error, shortage, spare_files
from cpd.run.tracking import TrackedMetricsLog

#: How long an attempt waits for the previous one, which is ending, to save and release its lease.
HANDOVER_SECONDS = 30.0
#: How long a failing rank waits before it aborts, so that mpiexec can forward its output.
FORWARDING_SECONDS = 0.5


@dataclass
class Attempt:
    """The right to work on an element, held by rank 0; other ranks call the same methods, which write nothing."""

    _element: Element
    _comm: Comm
    _lease: Lease | None
    _status: Status | None
    _log: Callable[[str], None]

    @property
    def is_writer(self) -> bool:
        """Whether this rank is the one that writes."""
        return self._lease is not None

    def check(self) -> None:
        """Raise LeaseLostError if another process took over; call before publishing anything."""
        if self._lease:
            self._lease.check()

    def open_metrics(self, size: int) -> MetricsLog | None:
        """Open the element's metrics.jsonl and keep its first `size` bytes; None on ranks other than 0.

        If the launch asked for live curves, the records go to these, too.
        """
        if not self.is_writer:
            return None
        tracker: Tracker = Run(self._element.root).launched_with(Tracker, "", "track")
        if tracker:
            return TrackedMetricsLog(self._element, size, tracker, self._log)
        return MetricsLog(self._element.metrics, size)

    def begin(self, phase: str, total: int, done: int = 0, unit: str = "steps") -> None:
        """Enter a phase; see `Status.begin`."""
        if self._status:
            self._status.begin(phase, total, done, unit)

    def advance(self, done: int, **values: Any) -> None:
        """Record progress; see `Status.advance`."""
        if self._status:
            self._status.advance(done, **values)

    def finish(self, state: Any, message: str = "", **values: float | None) -> None:
        """Leave the element in `state`; see `Status.finish`. A collective, except after a failure."""
        others = 0.0 if state == "failed" else float_sum(self._comm, 0.0 if self._status else cpu_seconds())
        if self._status:
            self._status.finish(state, message, others, **values)


@contextlib.contextmanager
def begin_attempt(
    element: Element, comm: Comm, log: Callable[[str], None], measure: str = "success"
) -> Iterator[Attempt]:
    """Work on `element` as its single writer; a collective. The caller writes its marker and calls `finish`.

    `measure` is the name of what progress reports as `success`.

    An exception in the block is recorded in status.json (`stopped` if the job was asked to stop, else `failed`)
    and raised again.

    Raises:
        LeaseHeldError: on every rank, if another process is the writer and does not release the lease in time.
    """
    lease, refusal = None, ""
    if comm.rank == 0:
        # A requeued Slurm job's last node may have died without a word: then the lease must become stale first.
        stale_seconds = STALE_SECONDS if "SLURM_JOB_ID" in os.environ else 0.0
        try:
            lease = Lease(element.path).acquire(stale_seconds + HANDOVER_SECONDS)
            sweep_element(element.path)
        except LeaseHeldError as error:
            refusal = str(error)
    refusal = comm.broadcast(refusal)
    if refusal:
        raise LeaseHeldError(refusal)
    attempt = Attempt(element, comm, lease, Status(element.status, log, measure) if lease else None, log)
    with lease or contextlib.nullcontext():
        try:
            yield attempt
        except InterruptedBySignal as stop:
            attempt.finish("stopped", str(stop))
            raise
        except LeaseLostError:
            raise  # status.json is the successor's now
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # which hold files and memory: writing needs some, too
            message = describe_error(error, element.path)
            with spare_files():
                attempt.finish("failed", message)
            raise


@contextlib.contextmanager
def mpi_guard(element: Element, comm: Comm) -> Iterator[None]:
    """End all ranks if this one fails; the others would wait for it in a collective for ever."""
    try:
        yield
    except (InterruptedBySignal, LeaseHeldError):
        raise  # on all ranks
    except BaseException as error:
        if comm.size > 1:
            # If all ranks meet the same error, rank 0, which writes the status, reports it first.
            time.sleep(5.0 if comm.rank else 0.0)
            print(f"rank {comm.rank} of {comm.size} failed:", file=sys.stderr)
            print(shortage(error, element.path) or traceback.format_exc(), file=sys.stderr, flush=True)
            if comm.rank and not element.finished and read_status(element.status).state != "failed":
                force_status(element, "failed", f"rank {comm.rank}: {describe_error(error, element.path)}")
            # An abort ends mpiexec at once and loses output that is not forwarded yet.
            time.sleep(FORWARDING_SECONDS)
            comm.abort(1)
        raise


def mark(element: Element, state: State, message: str = "") -> None:
    """Write `state` to the status.json of an element unless a process is at work on it."""
    if current_holder(element.path / "attempts")[0] is None:
        force_status(element, state, message)


def force_status(element: Element, state: State, message: str) -> None:
    """Like `mark`, but even while another process holds the lease: for a rank that is about to end the writer."""
    record = read_status(element.status)
    record.state, record.message = state, message
    # Nothing but a display depends on it, and a launch marks many elements.
    write_status(element.status, record, sync=False)
