"""A test cluster with the suite's commands, for the tests."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpd.cluster.ledger import ledger
from cpd.run.directory import Run
from cpd.run.lease import current_holder
from cpd.run.progress import StatusRecord, read_status
from slurm.testbed.cluster import Testbed

ROOT = Path(__file__).resolve().parent.parent.parent
MINIATURE = ROOT / "tests" / "recipes" / "miniature.toml"
#: Long enough for a student to be disturbed several times, on a fast machine too.
LONG = ("--distill.steps_per_stage", "300")
#: Teachers that train for long enough to be met at work.
LASTING = ("--teacher.max_env_steps", "8000")
DRAWER, WINDOW = "teachers/drawer-close-v3/seed-1", "teachers/window-close-v3/seed-1"
STUDENT = "students/moe/seed-1"
EVALUATION = f"{STUDENT}/evaluation"
#: Called as `container exec IMAGE python ...`.
CONTAINER = """#!/bin/sh
echo "$SLURM_PROCID $*" >> "$(dirname "$0")/container-calls"
shift 3
exec {python} "$@"
"""
#: What a user's shell may hold: other defaults of Slurm's commands, and a step that the launcher is a task of.
SHELL = {
    "SQUEUE_FORMAT": "%u",
    "SQUEUE_PARTITION": "urgent",
    "SQUEUE_STATES": "FAILED",
    "SCANCEL_STATE": "SUSPENDED",
    "SBATCH_TIMELIMIT": "1",
    "SBATCH_PARTITION": "nowhere",
    "SBATCH_EXPORT": "NONE",
    "SBATCH_MEM_PER_NODE": "1",
    "SLURM_CLUSTERS": "nowhere",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_MPI_TYPE": "none",
    "PMI_SIZE": "4",
}


class Workbench:
    """A test cluster with the suite's commands run against it."""

    def __init__(self, testbed: Testbed) -> None:
        self.testbed = testbed
        # Students on two nodes, whose Python is a program that stands for a container.
        folder = testbed.state.parent
        (folder / "container").write_text(CONTAINER.format(python=sys.executable))
        (folder / "container").chmod(0o755)
        self.container_calls = folder / "container-calls"
        python = f'python = "{folder}/container exec cpd.sif python"'
        (folder / "two_ranks.toml").write_text(profile_text().replace("[student]\n", f"[student]\n{python}\n"))
        self.profile = str(folder / "two_ranks.toml")
        self.environment = testbed.environment | {"OMP_NUM_THREADS": "1", "CPD_STATUS_SECONDS": "1"}
        self._met: dict[Path, int] = {}

    def python(self, *arguments: str, code: int = 0, **environment: str) -> str:
        """Output of `python -m ...`, which must end with `code`."""
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            env=self.environment | SHELL | environment,
            umask=0o002,
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def launch(self, root: Path, *more: str, profile: str = "", code: int = 0, **environment: str) -> str:
        """`jobs.launch` of the miniature recipe."""
        command = (
            "jobs.launch",
            str(MINIATURE),
            "--profile",
            profile or self.profile,
            "--run-dir",
            str(root),
            *more,
        )
        return self.python(*command, code=code, **environment)

    def rows(self, root: Path) -> dict[str, dict[str, Any]]:
        """`jobs.status --json` by element."""
        return {row["element"]: row for row in json.loads(self.python("jobs.status", str(root), "--json"))}

    def assert_done(self, root: Path) -> None:
        """Assert that every element is done; a failure shows the status table."""
        states = {name: row["state"] for name, row in self.rows(root).items()}
        assert set(states.values()) == {"done"}, f"{states}\n{self.python('jobs.status', str(root))}"

    def slurm(self, *words: str) -> str:
        """Output of one of Slurm's commands."""
        return self.testbed.command(*words).strip()

    def job(self, root: Path, element: str) -> str:
        """Number of an element's job."""
        return str(self.rows(root)[element]["job"])

    def running_job(self, root: Path, element: str) -> str:
        """Number of the one of an element's jobs that runs."""
        numbers = {entry.job for entry in ledger(Run(root))[element]}
        running = self.slurm("squeue", "-h", "-r", "-t", "R", "-o", "%i").split()
        (number,) = numbers.intersection(running)
        return number

    def urgent_job(self) -> str:
        """Submit what preempts everything; returns its number."""
        whole = ("sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null")
        return self.slurm(*whole, "--wrap", "sleep 1")

    def bring_back(self, node: str) -> None:
        """Put a node that is down back into service, unless it comes back by itself meanwhile."""

        def is_back() -> bool:
            if "down" not in self.testbed.node_states()[node]:
                return True
            self.testbed.command("scontrol", "update", f"nodename={node}", "state=resume", check=False)
            return False

        self.wait(is_back, f"{node} back in service")

    def wait(self, ready: Callable[[], object], condition: str, seconds: float = 300) -> None:
        """Poll until `ready` returns something true; a failure names `condition` and shows the queue."""
        deadline = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > deadline:
                pytest.fail(
                    f"not within {seconds:.0f} s: {condition}\n{self.slurm('scontrol', 'show', 'job', '-o')}"
                )
            time.sleep(0.2)

    def drain(self, seconds: float = 600) -> None:
        """Wait until nothing is left in the queue."""
        self.wait(lambda: not self.slurm("squeue", "-h"), "an empty queue", seconds)

    @staticmethod
    def record(root: Path, element: str) -> StatusRecord:
        """The element's status.json."""
        return read_status(root / element / "status.json")

    def until(self, root: Path, element: str, done: int) -> None:
        """Wait until a later attempt than in the last call is running and past `done` steps.

        A later one, since an attempt that was asked to stop continues to run for a while.
        """
        attempts = root / element / "attempts"
        last = self._met.get(attempts, 0)

        def past() -> bool:
            record = self.record(root, element)
            if record.state in ("done", "failed"):
                pytest.fail(f"{element} is {record.state} at {record.done}: never met past {done}")
            return record.state == "running" and record.done > done and current_holder(attempts)[1] > last

        self.wait(past, f"{element} past {done} after attempt {last}")
        _, self._met[attempts] = current_holder(attempts)

    @staticmethod
    def kill(root: Path, element: str) -> None:
        """SIGKILL to the process that writes an element."""
        holder, _ = current_holder(root / element / "attempts")
        assert holder is not None
        os.kill(holder.process, signal.SIGKILL)


def profile_text() -> str:
    """The test cluster's profile with students on two nodes."""
    text = (ROOT / "slurm" / "profiles" / "testbed.toml").read_text()
    return text.replace("[student]\n", "[student]\nranks = 2\nnodes = 2\n")


def variation(folder: Path, **lines: str) -> str:
    """The test cluster's profile with texts in it replaced; returns its path."""
    text = profile_text()
    for old, new in lines.items():
        text, count = re.subn(rf"^{old} = .*$", new, text, count=1, flags=re.MULTILINE)
        assert count, old
    path = folder / "variation.toml"
    path.write_text(text)
    return str(path)


def stages(root: Path) -> dict[str, bytes]:
    """The student's weights after every stage."""
    return {path.name: path.read_bytes() for path in Run(root).students()[0].path.glob("stages/*.safetensors")}
