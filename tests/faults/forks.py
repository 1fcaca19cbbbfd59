"""Runs commands in forks of a process that has imported everything, so that each costs its own work only.

A fork may have limits, and may be killed before it changes a certain file: deterministically, since Python
announces such changes to audit hooks.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from cpd.cluster.element_job import CPUS_VARIABLE
from cpd.run.command import exit_quietly
from tests.conftest import ROOT

MODULES = ("jobs.teacher", "jobs.distill", "jobs.evaluate", "jobs.report", "jobs.publish", "jobs.launch")
#: The module of every role.
VERBS = {
    "teacher": "jobs.teacher",
    "student": "jobs.distill",
    "evaluation": "jobs.evaluate",
    "report": "jobs.report",
}
HEAVY = (
    *("cpd.teachers.run_teacher", "cpd.distill.run_student", "cpd.evaluation.run_evaluation"),
    *("cpd.evaluation.publish", "analysis.build", "metaworld"),
)
#: Audit events of changes to files, and which of their arguments is the file.
CHANGES = {"os.rename": 1, "os.remove": 0, "os.mkdir": 0, "os.link": 1, "os.rmdir": 0, "os.truncate": 0}


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    """Exit code, or minus the signal that killed it."""
    output: str
    changes: list[str]
    """If recorded: the changes to files below its run directory, such as `os.rename results/COMPLETE`."""


class Forks:
    """The process that forks; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.forks"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", CPUS_VARIABLE: "1"},
        )

    def run(
        self,
        module: str,
        arguments: Sequence[object],
        *,
        limits: Mapping[str, int] | None = None,
        kill: tuple[Sequence[str], float] | None = None,
        record: Path | None = None,
    ) -> Ended:
        """Run `python -m module arguments`.

        Args:
            module: one of `MODULES`.
            arguments: its command line.
            limits: soft limits by their names in `resource`, such as `RLIMIT_FSIZE`.
            kill: changes as `Ended.changes` has them: the process is killed so many seconds after the first.
            record: the run directory whose changes are recorded, and where `kill` is looked for.
        """
        output, changes = self._folder / "output", self._folder / "changes"
        order = {
            "module": module,
            "arguments": [str(argument) for argument in arguments],
            "limits": dict(limits or {}),
            "kill": kill,
            "record": str(record) if record else "",
            "output": str(output),
            "changes": str(changes),
        }
        assert self._server.stdin and self._server.stdout
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        code = int(self._server.stdout.readline())
        return Ended(code, output.read_text(), changes.read_text().splitlines() if record else [])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server.stdin
        self._server.stdin.close()
        self._server.wait(60)


def _watch(root: str, changes: int, kill: tuple[Sequence[str], float] | None) -> None:
    """Record changes below `root` in the file `changes`; kill this process at the first of certain ones."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not flags & (os.O_WRONLY | os.O_RDWR):
                return
        elif event in CHANGES:
            path = arguments[CHANGES[event]]
        else:
            return
        name = os.fspath(path) if not isinstance(path, int) else ""
        if not isinstance(name, str) or not name.startswith(root):
            return
        change = f"{event} {re.sub(r'[.][0-9a-f]{8}[.]tmp$', '', os.path.relpath(name, root))}"
        os.write(changes, f"{change}\n".encode())
        if kill and change in kill[0]:
            if kill[1] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            threading.Thread(target=_kill_soon, args=(kill[1],), daemon=True).start()

    sys.addaudithook(hook)


def _kill_soon(seconds: float) -> None:
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def _child(order: dict[str, Any]) -> NoReturn:
    descriptor = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    changes = os.open(order["changes"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    for target in (1, 2):
        os.dup2(descriptor, target)
    os.close(descriptor)
    main = importlib.import_module(order["module"]).main
    if order["record"]:
        _watch(order["record"], changes, order["kill"])
    for name, value in order["limits"].items():
        kind = getattr(resource, name)
        resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))
    code = 1
    try:
        exit_quietly(lambda: main(order["arguments"]))
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        try:
            sys.stdout.flush()
        finally:
            os._exit(code)


def serve() -> None:
    """Obey orders on standard input until it closes."""
    for name in (*MODULES, *HEAVY):
        importlib.import_module(name)
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            _child(json.loads(line))
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
