"""The worker process of a vector environment: `vector_env` starts it and writes one byte per order.

It reads orders from standard input and writes answers to standard output; the arrays lie in shared memory. The
process ends when its standard input closes, so it outlives neither `close()` nor a parent that was killed.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import struct
import sys
import traceback
from typing import Final

STEP: Final = b"s"
RESET: Final = b"r"
DONE: Final = b"k"
FAILED: Final = b"e"

#: Precedes the traceback of a failure: its length in bytes.
LENGTH: Final = struct.Struct("<Q")


def main(settings: str) -> None:
    """Serve orders until the parent closes the pipe or ends.

    Args:
        settings: JSON with the keys `suite`, a name for `load_suite`, `tasks`, `slots`, and `memory`, the
            inherited file descriptor of the shared arrays.
    """
    # A batch system signals every process of a job, a terminal the whole process group. Only the parent reacts.
    # This process ends when the pipe closes.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints must not look like an answer
    with contextlib.suppress(BrokenPipeError):
        _serve(**json.loads(settings), orders=sys.stdin.fileno(), answers=answers)
    # Nothing here needs finalizers, and tearing down the interpreter would delay the parent's close().
    os._exit(0)


def _serve(suite: str, tasks: list[str], slots: list[int], memory: int, orders: int, answers: int) -> None:
    try:
        from cpd.envs.slots import SlotArrays, SlotGroup
        from cpd.envs.suite import load_suite

        loaded = load_suite(suite)
        buffer = mmap.mmap(memory, SlotArrays.size(len(tasks), loaded.spaces))
        group = SlotGroup(loaded, tasks, slots, SlotArrays(len(tasks), loaded.spaces, buffer))
        handlers = {STEP: group.step, RESET: group.reset}
        os.write(answers, DONE)
        while order := os.read(orders, 1):
            handlers[order]()
            os.write(answers, DONE)
    except BrokenPipeError:
        raise
    except BaseException as error:
        text = (str(error) if type(error).__name__ == "SlotError" else traceback.format_exc()).encode()
        message = FAILED + LENGTH.pack(len(text)) + text
        while message:
            message = message[os.write(answers, message) :]
