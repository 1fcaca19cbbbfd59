"""The cost of launching and of the status on a real Slurm: submit fifty elements, show the status of a hundred.

    python -m tests.bench.bench_slurm [--repeats 5] [--json PATH]

Starts a test cluster of its own, with every job held, so that nothing runs beside the measurement. Wall seconds of
whole commands, Python's start and imports included; in brackets the processor seconds of the command and its
children, which do not suffer from a busy machine. `sbatch alone` is the same array submitted by hand, the floor.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from cpd.run.directory import Run
from cpd.run.progress import Status
from slurm.testbed.cluster import Testbed, missing_packages
from slurm.testbed.conf import Settings

ROOT = Path(__file__).resolve().parent.parent.parent
PROFILE = 'cluster = "slurm"\nsingle_machine = true\nsbatch = { hold = true }\n'


@dataclass(frozen=True)
class Seconds:
    """The cost of a command."""

    wall: float
    processor: float


def seconds(call: Callable[[], object]) -> Seconds:
    """Measure a call that runs a command and waits for it."""
    start, earlier = time.perf_counter(), os.times()
    call()
    later = os.times()
    spent = later.children_user + later.children_system - earlier.children_user - earlier.children_system
    return Seconds(time.perf_counter() - start, spent)


class Measurement:
    """A test cluster with room for many held jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.testbed = Testbed(folder / "s")
        self.profile = folder / "held.toml"
        self.profile.write_text(PROFILE)

    def python(self, *words: str) -> None:
        command = [sys.executable, "-m", *words]
        subprocess.run(command, cwd=ROOT, env=self.testbed.environment, check=True, capture_output=True)

    def launch(self, root: Path, *more: str) -> None:
        self.python("jobs.launch", "mt50", "--profile", str(self.profile), "--run-dir", str(root), *more)

    def submit_fifty(self, number: int) -> Seconds:
        return seconds(lambda: self.launch(self.folder / f"fifty-{number}", "--only", "teachers"))

    def sbatch_alone(self) -> Seconds:
        words = ("sbatch", "--array=0-49", "--hold", "--output=/dev/null", "--wrap", "true")
        return seconds(lambda: self.testbed.command(*words))

    def hundred(self) -> Path:
        """Make a run with a hundred teachers, half of which have begun to train."""
        root = self.folder / "hundred"
        self.launch(root, "--teacher.seeds", "[1, 2]")
        teachers = Run(root).teachers()
        assert len(teachers) == 100
        for teacher in teachers[::2]:
            Status(teacher.status).begin("train", 100_000, 50_000)
        return root


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the seconds of every repeat there")
    arguments = parser.parse_args()
    complaint = missing_packages()
    if complaint:
        raise SystemExit(complaint)
    folder = Path(tempfile.mkdtemp(prefix="cpdb", dir="/tmp"))
    bench = Measurement(folder)
    bench.testbed.up(Settings(state=bench.testbed.state))
    try:
        results: dict[str, list[Seconds]] = {
            "array of fifty: jobs.launch": [bench.submit_fifty(i) for i in range(arguments.repeats)],
            "array of fifty: sbatch alone": [bench.sbatch_alone() for _ in range(arguments.repeats)],
        }
        root = bench.hundred()
        results["hundred elements: jobs.status"] = [
            seconds(lambda: bench.python("jobs.status", str(root))) for _ in range(arguments.repeats)
        ]
        results["Python's start alone"] = [
            seconds(lambda: bench.python("timeit", "-n1", "-r1", "pass")) for _ in range(arguments.repeats)
        ]
    finally:
        bench.testbed.down()
        shutil.rmtree(folder, ignore_errors=True)
    for name, values in results.items():
        walls, processors = [v.wall for v in values], [v.processor for v in values]
        print(
            f"{name:<30} fastest {min(walls):5.2f} s ({min(processors):.2f})  "
            f"median {statistics.median(walls):5.2f} s ({statistics.median(processors):.2f})"
        )
    if arguments.json:
        arguments.json.write_text(
            json.dumps({name: [asdict(v) for v in values] for name, values in results.items()}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
