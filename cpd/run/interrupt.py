"""Asking a job to stop: a signal, or the death of its launcher, sets a flag and nothing else.

The work loop looks at the flag between steps, saves, and leaves; no MPI call or file is touched in a handler.
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
#: What a job exits with after saving because it was asked to stop (EX_TEMPFAIL: try again).
EXIT_INTERRUPTED = 75
#: Between two looks at whether the launcher lives.
WATCH_SECONDS = 0.5


class InterruptedBySignal(RuntimeError):
    """The job saved its state and stops because it was asked to; launching again resumes it."""


class Interrupt:
    """The stop flag of this process.

    A plain attribute, and no `threading.Event`: a second signal may come while the first is handled, and an
    event's lock, which the first then holds, would never be given.
    """

    #: Whether one that is installed in the place of another takes over that one's request: in a job that does
    #: several elements, a signal that comes as one ends is meant for the next.
    inherits = False

    def __init__(self) -> None:
        self._requested = False
        self.signal_number = 0

    @property
    def requested(self) -> bool:
        """Whether the job should save and stop."""
        return self._requested

    def request(self) -> None:
        """Ask to stop, as a signal would."""
        self._requested = True

    def install(self) -> Interrupt:
        """Handle SIGTERM, SIGINT, SIGUSR1 and SIGUSR2, and watch the launcher; call in the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            before = getattr(signal.signal(number, self._handle), "__self__", None)
            if Interrupt.inherits and isinstance(before, Interrupt) and before.requested:
                self._requested, self.signal_number = True, before.signal_number
        launcher = os.environ.get(LAUNCHER_VARIABLE, "")
        if launcher:
            threading.Thread(target=self._watch, args=(launcher,), daemon=True, name="launcher-watch").start()
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        self._requested = True

    def _watch(self, launcher: str) -> None:
        process, ticks = (int(part) for part in launcher.split(":"))
        while is_alive(process, ticks) and not self._requested:
            time.sleep(WATCH_SECONDS)
        self._requested = True


def launcher_identity() -> str:
    """This process as the value of `CPD_LAUNCHER`."""
    return f"{os.getpid()}:{start_ticks(os.getpid())}"
