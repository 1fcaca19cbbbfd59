"""Stopping a job: a signal, or the end of its launcher, sets a flag and does nothing else.

The work loop checks the flag between steps, saves and returns. The handler may interrupt an MPI call or a
write, so it makes no MPI call and touches no file.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

from cpd.run.lease import is_alive, start_ticks

#: Names the launcher (`pid:start_ticks`) whose death ends its local children.
LAUNCHER_VARIABLE = "CPD_LAUNCHER"
#: Exit code of a job that saved because it was asked to stop (EX_TEMPFAIL of sysexits.h: try again).
EXIT_INTERRUPTED = 75
#: Seconds between two checks that the launcher is alive.
WATCH_SECONDS = 0.5


class InterruptedBySignal(RuntimeError):
    """The job was asked to stop and has saved its state; another launch resumes it."""


class Interrupt:
    """The stop flag of this process.

    A plain attribute, not a `threading.Event`: a second signal may interrupt the handler of the first, which holds
    the event's lock, and would deadlock.
    """

    #: Whether a newly installed Interrupt inherits a pending stop request from the one it replaces: in a job with
    #: several elements, a signal that arrives as one ends is meant for the next.
    inherits = False

    def __init__(self) -> None:
        self._requested = False
        self.signal_number = 0

    @property
    def requested(self) -> bool:
        """Whether the job should save and stop."""
        return self._requested

    def install(self) -> Interrupt:
        """Handle SIGTERM, SIGINT, SIGUSR1, SIGUSR2 and SIGXCPU, and watch the launcher, from the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU):
            replaced = getattr(signal.signal(number, self._handle), "__self__", None)
            if Interrupt.inherits and isinstance(replaced, Interrupt) and replaced.requested:
                self._requested, self.signal_number = True, replaced.signal_number
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        if launcher := os.environ.get(LAUNCHER_VARIABLE):
            threading.Thread(target=self._watch, args=(launcher,), daemon=True, name="launcher-watch").start()
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        self._requested = True

    def _watch(self, launcher: str) -> None:
        # With the start time, since the system may reuse the id of a launcher that has ended.
        process, ticks = map(int, launcher.split(":"))
        while is_alive(process, ticks) and not self.requested:
            time.sleep(WATCH_SECONDS)
        self._requested = True


def launcher_identity() -> str:
    """Return the value of `CPD_LAUNCHER` that names this process."""
    return f"{os.getpid()}:{start_ticks(os.getpid())}"
