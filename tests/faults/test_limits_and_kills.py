"""Whatever a process runs out of is named, and whenever it is killed, the next one ends with the same files."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from cpd.cluster.ledger import ledger
from cpd.run.directory import Element, Run
from cpd.run.progress import read_status
from tests.conftest import MINIATURE, ROOT
from tests.faults.forks import VERBS, Ended, Forks
from tests.faults.test_kill_and_resume import products

SEED = 20261130


@dataclass(frozen=True)
class Undisturbed:
    """A finished miniature run, and the changes to files that each of its elements made, without repetitions."""

    run: Run
    changes: dict[str, list[str]]


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with Forks(tmp_path_factory.mktemp("forks")) as made:
        yield made


def prepare(forks: Forks, root: Path) -> Run:
    assert forks.run("jobs.launch", [MINIATURE, "--run-dir", root, "--prepare"]).code == 0
    return Run(root)


def work(forks: Forks, run: Run, element: Element, **how: object) -> Ended:
    return forks.run(VERBS[element.role], [run.root, element.name], **how)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def undisturbed(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    run = prepare(forks, tmp_path_factory.mktemp("undisturbed") / "run")
    changes = {}
    for element in run.elements():
        ended = work(forks, run, element, record=run.root)
        assert ended.code == 0, ended.output
        changes[element.name] = list(dict.fromkeys(ended.changes))
    return Undisturbed(run, changes)


def unfinished_copy(source: Run, root: Path, role: str) -> tuple[Run, Element]:
    """Copy a finished run without the last element of `role` and what depends on it; return that element, too."""
    shutil.copytree(source.root, root)
    run = Run(root)
    elements = run.elements()
    last = max(place for place, element in enumerate(elements) if element.role == role)
    for element in elements[last:]:
        shutil.rmtree(element.path, ignore_errors=True)
    shutil.rmtree(run.figures)
    return run, elements[last]


@contextmanager
def small_file_system(folder: Path, *, size: str = "16m", inodes: int = 0) -> Iterator[Path]:
    folder.mkdir()
    options = f"size={size}" + (f",nr_inodes={inodes}" if inodes else "")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def leave(folder: Path, *, num_bytes: int | None = None, num_inodes: int | None = None) -> None:
    """Fill the file system of `folder` but for so much."""
    filler = folder / "filler"
    filler.mkdir()
    free = os.statvfs(folder)
    if num_inodes is not None:
        for number in range(free.f_favail - num_inodes):
            (filler / str(number)).touch()
    if num_bytes is not None:
        (filler / "bytes").write_bytes(bytes(free.f_bavail * free.f_frsize - num_bytes))


@pytest.mark.parametrize(
    ("role", "num_bytes"), [("teacher", 30_000), ("student", 60_000), ("evaluation", 16_000), ("report", 30_000)]
)
def test_a_full_disk_is_named_and_what_was_done_is_kept(
    role: str, num_bytes: int, forks: Forks, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    with small_file_system(tmp_path / "full") as folder:
        run, element = unfinished_copy(undisturbed.run, folder / "run", role)
        leave(folder, num_bytes=num_bytes)
        ended = work(forks, run, element)
        message = read_status(element.status).message
        assert ended.code == 1 and "Traceback" not in ended.output
        assert read_status(element.status).state == "failed"
        assert "no space left" in message and str(folder) in message and element.name in message
        shutil.rmtree(folder / "filler")
        assert work(forks, run, element).code == 0
        for name, digest in products(run).items():
            assert products(undisturbed.run)[name] == digest


def test_missing_inodes_are_named(forks: Forks, undisturbed: Undisturbed, tmp_path: Path) -> None:
    with small_file_system(tmp_path / "full", inodes=400) as folder:
        run, element = unfinished_copy(undisturbed.run, folder / "run", "report")
        leave(folder, num_inodes=8)
        ended = work(forks, run, element)
        assert ended.code == 1 and "Traceback" not in ended.output
        assert "no inodes left" in read_status(element.status).message
        ended = forks.run("jobs.publish", [run.root, folder / "published"])
        assert ended.code == 2 and "no inodes left" in ended.output and str(folder) in ended.output


@pytest.mark.parametrize(
    ("role", "limit", "value", "words"),
    [
        ("student", "RLIMIT_FSIZE", 20_000, ("file-size limit", "20000", "stages/initial.safetensors")),
        ("report", "RLIMIT_FSIZE", 2_000, ("file-size limit", "results/episodes.csv")),
        ("report", "RLIMIT_NOFILE", 6, ("too many open files", "limit: 6")),
    ],
)
def test_a_limit_of_the_process_is_named(
    role: str,
    limit: str,
    value: int,
    words: Sequence[str],
    forks: Forks,
    undisturbed: Undisturbed,
    tmp_path: Path,
) -> None:
    run, element = unfinished_copy(undisturbed.run, tmp_path / "run", role)
    ended = work(forks, run, element, limits={limit: value})
    record = read_status(element.status)
    assert ended.code == 1 and "Traceback" not in ended.output
    assert record.state == "failed" and all(word in record.message for word in words), record.message


def test_a_limit_of_cpu_time_saves_and_stops(forks: Forks, undisturbed: Undisturbed, tmp_path: Path) -> None:
    run, element = unfinished_copy(undisturbed.run, tmp_path / "run", "student")
    settings = json.loads(run.config_path.read_text())
    settings["distill"]["steps_per_stage"] = 1_000  # more than a second's
    run.config_path.write_text(json.dumps(settings))
    ended = work(forks, run, element, limits={"RLIMIT_CPU": 1})
    assert ended.code == 75 and "CPU time" in ended.output
    assert read_status(element.status).state == "stopped"
    assert list(element.checkpoints.glob("*/meta.json"))


@pytest.mark.parametrize("num_bytes", [100_000, 8_000])
def test_the_launcher_names_a_full_disk_and_does_not_try_again(
    num_bytes: int, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Little room: the element finds it full. Less: the launcher itself does."""
    with small_file_system(tmp_path / "full") as folder:
        run, report = unfinished_copy(undisturbed.run, folder / "run", "report")
        leave(folder, num_bytes=num_bytes)
        command = [sys.executable, "-m", "jobs.launch", str(MINIATURE), "--run-dir", str(run.root)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1
        assert "no space left" in done.stdout + done.stderr and str(folder) in done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        assert len(ledger(run).get(report.name, [])) <= 1


#: Of a path in a run, which phase of the work changes it; the first that matches.
PHASES = {
    "teacher: evaluate": r"teachers/.*/\.?(episodes|evaluation)\.csv",
    "teacher: rollouts": r"teachers/.*/shards",
    "teacher: train": r"teachers",
    "evaluation": r"students/.*/evaluation",
    "student: first stage": r"students/.*(initial|stage-00)",
    "student: later stages": r"students",
    "report: tables": r"results",
    "report: figures": r"figures|\.?report\.html|\.$",
}


def phase_of(change: str) -> str:
    path = change.split(maxsplit=1)[1]
    return next(phase for phase, pattern in PHASES.items() if re.match(pattern, path))


def kill_in_every_phase(
    forks: Forks, undisturbed: Undisturbed, root: Path, rng: random.Random, per_phase: int, figures: int
) -> Counter[str]:
    """Repeat the undisturbed run, with so many SIGKILLs in each phase; return their number by phase.

    A process is killed just before it changes a file that the rng draws, or up to 50 ms after that.
    """
    chosen: set[str] = set()
    changes = [change for of_element in undisturbed.changes.values() for change in of_element]
    changes = [
        change for change in changes if ".checked-" not in change
    ]  # depends on the time since the last write
    for phase in PHASES:
        number = figures if phase == "report: figures" else per_phase  # every kill there draws them all again
        chosen.update(rng.sample([change for change in changes if phase_of(change) == phase], number))
    kills: Counter[str] = Counter()
    run = prepare(forks, root)
    for element in run.elements():
        marks = [change for change in undisturbed.changes[element.name] if change in chosen]
        ended = None
        while ended is None or ended.code != 0:
            kill = (marks, rng.choice([0.0, rng.uniform(0.0, 0.05)])) if marks else None
            ended = work(forks, run, element, record=run.root, kill=kill)
            assert ended.code in (0, -signal.SIGKILL), ended.output
            if ended.code:
                kills[phase_of(next(change for change in ended.changes if change in marks))] += 1
            marks = [change for change in marks if change not in ended.changes]
    assert products(run) == products(undisturbed.run)
    return kills


def test_kills_in_every_phase_change_no_bit(forks: Forks, undisturbed: Undisturbed, tmp_path: Path) -> None:
    kills = kill_in_every_phase(forks, undisturbed, tmp_path / "run", random.Random(SEED), per_phase=2, figures=1)
    assert kills.total() >= 13 and kills.keys() == PHASES.keys(), kills


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_hundreds_of_kills_change_no_bit(forks: Forks, undisturbed: Undisturbed, tmp_path: Path) -> None:
    kills: Counter[str] = Counter()
    for number in itertools.count():
        rng = random.Random(SEED + 1 + number)
        kills += kill_in_every_phase(forks, undisturbed, tmp_path / str(number), rng, per_phase=4, figures=4)
        shutil.rmtree(tmp_path / str(number))
        if kills.total() >= 200:
            break
    assert min(kills.values()) >= 200 // len(PHASES) // 2, kills
