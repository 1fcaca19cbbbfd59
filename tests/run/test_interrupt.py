"""Asking a process to stop: by one signal, by many at once, by the launcher's death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from cpd.run.interrupt import LAUNCHER_VARIABLE
from cpd.run.lease import start_ticks
from tests.conftest import ROOT

# Another signal comes at every call made while one is handled, which a lock in the handler would not survive.
SIGNALS_WITHIN_SIGNALS = """
import signal, sys
from cpd.run.interrupt import Interrupt

left = 100

def signal_again(frame, event, argument):
    global left
    if event == "call" and left:
        left -= 1
        signal.raise_signal(signal.SIGUSR1)

interrupt = Interrupt().install()
sys.setprofile(signal_again)
signal.raise_signal(signal.SIGTERM)
sys.setprofile(None)
print(interrupt.requested)
"""

WAITING = """
import time
from cpd.run.interrupt import Interrupt

interrupt = Interrupt().install()
print("ready", flush=True)
while not interrupt.requested:
    time.sleep(0.01)
print(interrupt.signal_number)
"""


def python(code: str, **env: str) -> subprocess.Popen[str]:
    environment = {**os.environ, **env}
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )


def test_signals_that_come_while_one_is_handled_do_no_harm() -> None:
    process = python(SIGNALS_WITHIN_SIGNALS)
    out, _ = process.communicate(timeout=60)
    assert out == "True\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_asks_to_stop_and_is_remembered(number: signal.Signals) -> None:
    process = python(WAITING)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert out == f"{number.value}\n" and process.returncode == 0


def test_the_launchers_death_asks_to_stop() -> None:
    launcher = subprocess.Popen(["sleep", "600"])
    process = python(WAITING, **{LAUNCHER_VARIABLE: f"{launcher.pid}:{start_ticks(launcher.pid)}"})
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(1.0)
    assert process.poll() is None
    launcher.kill()
    launcher.wait()
    out, _ = process.communicate(timeout=60)
    assert out == "0\n"
