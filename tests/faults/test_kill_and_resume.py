"""Whatever is killed, the same command goes on and ends with the same student, bit for bit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cpd.cluster.ledger import ledger
from cpd.run.directory import Element, Run
from cpd.run.files import sha256
from cpd.run.lease import current_holder
from cpd.run.progress import read_status
from tests.conftest import MINIATURE, ROOT
from tests.faults.forks import VERBS, Forks

TIMEOUT = 240.0
pytestmark = pytest.mark.timeout(900)  # several of these waits, one after another


#: A distillation that is long enough to be met at work.
SETTINGS = ("--distill.steps_per_stage", "120", "--logging.checkpoint_every", "20")
PROFILE = MINIATURE.with_name("one_rank.toml")


def launch_arguments(root: Path) -> list[str]:
    return [str(MINIATURE), "--run-dir", str(root), "--profile", str(PROFILE), *SETTINGS]


def start(root: Path, *only: str) -> subprocess.Popen[str]:
    chosen = (word for name in only for word in ("--only", name))
    command = [sys.executable, "-m", "jobs.launch", *launch_arguments(root), *chosen]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(root: Path) -> str:
    process = start(root)
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    assert process.returncode == 0, output
    return output


def wait_for(condition: Callable[[], bool], launcher: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert launcher.poll() is None, launcher.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def products(run: Run) -> dict[str, str]:
    """Hashes of everything that counts."""
    files = [
        *(file for teacher in run.teachers() for file in [teacher.policy, teacher.evaluation]),
        *(file for teacher in run.teachers() for file in teacher.shards.glob("[!.]*")),
        *(file for student in run.students() for file in (student.path / "stages").glob("*.safetensors")),
        *(student.curves for student in run.students()),
        *run.results.glob("evaluations.csv"),
        *run.results.glob("episodes.csv"),
    ]
    return {str(file.relative_to(run.root)): sha256(file) for file in files if file.exists()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("undisturbed") / "run"
    with Forks(tmp_path_factory.mktemp("forks")) as forks:
        assert forks.run("jobs.launch", [*launch_arguments(root), "--prepare"]).code == 0
        run = Run(root)
        for element in run.elements():
            ended = forks.run(VERBS[element.role], [root, element.name])
            assert ended.code == 0, ended.output
    assert len(products(run)) >= 15
    return run


def holder_of(element: Element) -> int | None:
    holder, _ = current_holder(element.path / "attempts")
    return holder.process if holder else None


def kill_at_work(element: Element, launcher: subprocess.Popen[str], phase: str = "", share: float = 0.0) -> bool:
    """SIGKILL the process at work on `element`, once it is well inside `phase` if one is given.

    Returns False if the element was finished before it could be met there.
    """

    def is_inside() -> bool:
        record = read_status(element.status)
        inside = not phase or (record.phase == phase and record.total > 0 and record.done >= share * record.total)
        return inside and holder_of(element) is not None

    wait_for(lambda: element.finished or is_inside(), launcher)
    process = holder_of(element)
    if element.finished or process is None:
        return False
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:  # it has ended in between
        return False
    return True


@pytest.fixture
def launcher_guard() -> Iterator[list[subprocess.Popen[str]]]:
    launchers: list[subprocess.Popen[str]] = []
    yield launchers
    for launcher in launchers:
        if launcher.poll() is None:
            launcher.kill()


def unfinished_copy(undisturbed: Run, root: Path, *elements: str) -> Run:
    """Copy the undisturbed run without these elements, all students, and the report."""
    shutil.copytree(undisturbed.root, root)
    for name in (*elements, "students", "results"):
        shutil.rmtree(root / name)
    return Run(root)


@pytest.mark.slow
def test_killed_jobs_are_restarted_and_end_the_same(
    undisturbed: Run, tmp_path: Path, launcher_guard: list[subprocess.Popen[str]]
) -> None:
    teacher = undisturbed.teachers()[1].name
    run = unfinished_copy(undisturbed, tmp_path / "run", teacher)
    launcher = start(run.root)
    launcher_guard.append(launcher)
    killed = [
        kill_at_work(run.teachers()[1], launcher),
        kill_at_work(run.students()[0], launcher, "distill", 0.3),
        kill_at_work(run.evaluations()[0], launcher),
    ]
    output, _ = launcher.communicate(timeout=TIMEOUT)
    assert launcher.returncode == 0, output
    assert killed[1] and sum(killed) >= 2  # a quick element may end before it is met
    assert products(run) == products(undisturbed)


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_killed_job_is_restarted_and_those_of_a_killed_launcher_end_and_resume(
    number: int, undisturbed: Run, tmp_path: Path, launcher_guard: list[subprocess.Popen[str]]
) -> None:
    run = unfinished_copy(undisturbed, tmp_path / "run")
    student = run.students()[0]
    launcher = start(run.root, student.name)
    launcher_guard.append(launcher)
    assert kill_at_work(student, launcher, "distill", 0.1)
    wait_for(lambda: len(ledger(run)[student.name]) == 2 and read_status(student.status).done > 60, launcher)
    launcher.send_signal(number)
    launcher.communicate(timeout=TIMEOUT)
    assert launcher.returncode == (-number if number == signal.SIGKILL else 75)
    deadline = time.monotonic() + 30
    while holder_of(student) is not None:  # no orphan goes on writing
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not student.finished
    launchers = [start(run.root, student.name) for _ in range(2)]  # two launches at once do not write twice
    launcher_guard += launchers
    assert sorted(launcher.wait(TIMEOUT) for launcher in launchers) == [0, 2]
    assert products(run) == {n: h for n, h in products(undisturbed).items() if not n.startswith("results/")}


def test_a_finished_run_is_left_alone(undisturbed: Run) -> None:
    modified = {path: path.stat().st_mtime_ns for path in undisturbed.root.rglob("*.safetensors")}
    begun = time.monotonic()
    output = finish(undisturbed.root)
    assert time.monotonic() - begun < 60  # a hang, not slowness, is what this catches
    assert "elements to do" not in output
    assert {path: path.stat().st_mtime_ns for path in undisturbed.root.rglob("*.safetensors")} == modified


def test_a_failing_element_is_named_with_its_log_and_blocks_only_what_needs_it(
    undisturbed: Run, tmp_path: Path, launcher_guard: list[subprocess.Popen[str]]
) -> None:
    root = tmp_path / "run"
    shutil.copytree(undisturbed.root, root)
    run = Run(root)
    student, evaluation = run.students()[0], run.evaluations()[0]
    for element in (student, evaluation, run.report()):
        element.complete.unlink()
    shutil.rmtree(student.path / "checkpoints", ignore_errors=True)
    shard = next(run.teachers()[1].shards.glob("*.h5"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    process = start(root)
    launcher_guard.append(process)
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1
    assert f"FAILED {student.name}" in output
    assert shard.name in output, output
    assert not student.finished and not evaluation.finished
