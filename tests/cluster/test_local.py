"""Executing on this machine: elements that others write, jobs that die at once, visible devices."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cpd.cluster import local
from cpd.cluster.element_job import DEVICES_VARIABLE, VERBS, ElementJob, ask_to_stop, is_ours, submit_local
from cpd.cluster.local import MAX_RESTARTS, LocalQueue, _shortage_in_log
from cpd.cluster.queue import foreign_variables
from cpd.cluster.sbatch import BundleJob
from cpd.config.profile import Profile, Resources, load_profile
from cpd.envs.metaworld.tasks import STREAMS
from cpd.run.directory import Run
from cpd.run.interrupt import Interrupt
from cpd.run.lease import current_holder
from cpd.run.progress import read_status
from jobs.launch import execute
from jobs.status import failure_lines, run_status
from tests.conftest import ROOT
from tests.synthetic_run import write_run

HOLD = """
import signal, sys, time
from pathlib import Path
from cpd.run.lease import Lease
signal.signal(signal.SIGTERM, lambda *_: print("asked to stop", flush=True))
with Lease(Path(sys.argv[1])).acquire():
    print("held", flush=True)
    time.sleep(300)
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run of which the report alone is left to do."""
    tasks = STREAMS["demo"]
    synthetic = write_run(
        tmp_path / "run", stream=tasks, students={1: np.full((4, 3), 0.5)}, teachers=dict.fromkeys(tasks, 1.0)
    )
    synthetic.logs.mkdir()
    for element in synthetic.elements():
        if element.role != "report" and not element.finished:
            element.complete.touch()
    return synthetic


@contextmanager
def holder_of(folder: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_an_element_of_another_writer_is_reported_and_left_alone(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The job waits half a minute for the writer otherwise.
    (tmp_path / "sitecustomize.py").write_text("import cpd.run.attempt\ncpd.run.attempt.HANDOVER_SECONDS = 1.0\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    with holder_of(run.report().path) as process:
        assert not execute(run, Profile(cluster="local"), Interrupt(), [run.report()])
        assert f"process {process.pid} on " in capsys.readouterr().out
        holder, number = current_holder(run.report().path / "attempts")
        assert holder is not None and (holder.process, number) == (process.pid, 1)
        assert not is_ours(holder)
        assert ask_to_stop(run.report()), "it has a writer, which this launcher must not signal"
        time.sleep(0.5)
        process.kill()
        assert process.stdout is not None and process.stdout.read() == ""


def kill_jobs(stop: threading.Event, killed: list[int]) -> None:
    """Kill every job of this process at once, as a machine without memory does."""
    while not stop.wait(0.01):
        for path in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == os.getpid() and b"submitit" in (path / "cmdline").read_bytes():
                    os.kill(int(path.name), signal.SIGKILL)
                    killed.append(int(path.name))
            except (OSError, IndexError):
                continue


def test_jobs_that_are_killed_at_their_start_fail(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    # In an interactive step of Slurm; jobs inherit this process's environment.
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    stop, killed = threading.Event(), list[int]()
    thread = threading.Thread(target=kill_jobs, args=(stop, killed))
    thread.start()
    try:
        queue = LocalQueue(run, Profile(cluster="local"), Interrupt(), [run.report()])
        assert not queue.execute()
    finally:
        stop.set()
        thread.join()
    assert foreign_variables() == []
    assert len(set(killed)) == MAX_RESTARTS + 1
    assert queue.failed == [run.report()]
    assert read_status(run.report().status).state == "failed"
    lines = "\n".join(failure_lines(run, run_status(run)))
    assert "FAILED results: " in lines and f" {MAX_RESTARTS + 1} times" in lines


def test_students_run_side_by_side_on_the_cores_of_the_machine(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(seeds=[1, 2, 3, 4])
    for teacher in run.teachers():
        teacher.path.mkdir(parents=True)
        teacher.complete.touch()
    started: list[str] = []
    monkeypatch.setattr(local, "submit_local", lambda run, element, resources: started.append(element.name))
    shipped = replace(load_profile("local"), cores=3)
    waiting = LocalQueue(run, shipped, Interrupt(), run.elements())._start_ready(run.students())
    assert started == [student.name for student in run.students()[:3]]
    assert waiting == run.students()[3:]


def test_elements_queued_by_an_ended_launcher_are_waiting(run: Run) -> None:
    run.report().path.mkdir(exist_ok=True)
    run.report().status.write_text('{"state": "queued"}')
    assert [row.state for row in run_status(run) if row.role == "report"] == ["waiting"]
    with holder_of(run.root / "launcher"):
        assert [row.state for row in run_status(run) if row.role == "report"] == ["queued"]


@pytest.mark.parametrize("devices", ["3", "", None])
def test_local_jobs_see_the_devices_that_their_launcher_sees(
    devices: str | None, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """submitit's local executor hides them all."""
    visible: list[str | None] = []
    verb = types.ModuleType("a_verb")
    verb.main = lambda arguments: visible.append(os.environ.get(DEVICES_VARIABLE)) or 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_verb", verb)
    monkeypatch.setitem(VERBS, "report", "a_verb")  # type: ignore[arg-type]
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    monkeypatch.setenv(DEVICES_VARIABLE, "")
    monkeypatch.setenv("CPD_RANKS", "")
    monkeypatch.setenv("CPD_CPUS", "1")
    ElementJob(str(run.root), "report", "results", Resources(), visible_devices=devices)()
    assert visible == [devices]


def test_the_launchers_visible_devices_are_submitted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEVICES_VARIABLE, "3")
    run.report().path.mkdir(exist_ok=True)
    run.report().complete.touch()  # the job has nothing to do
    job = submit_local(run, run.report(), Resources())
    assert job.submission().function.visible_devices == "3"
    job.wait()


def test_a_signal_at_the_end_of_an_element_stops_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch system sends it once, to a job that may do several elements."""
    requested: list[bool] = []

    def main(arguments: list[str]) -> int:
        interrupt = Interrupt().install()
        requested.append(interrupt.requested)
        if len(requested) == 2:
            os.kill(os.getpid(), signal.SIGUSR2)
        return 0

    verb = types.ModuleType("a_verb")
    verb.main = main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_verb", verb)
    monkeypatch.setitem(VERBS, "teacher", "a_verb")  # type: ignore[arg-type]
    monkeypatch.setattr(Interrupt, "inherits", False)
    monkeypatch.setenv("CPD_RANKS", "")
    monkeypatch.setenv("CPD_CPUS", "")
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)}
    try:
        BundleJob(tuple(ElementJob(str(tmp_path), "teacher", name, Resources()) for name in "abcd"))()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert requested == [False, False, True, True]


def test_a_kill_for_lack_of_memory_is_told(run: Run) -> None:
    group = Path("/sys/fs/cgroup/memory") / f"test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text("40M")
    except OSError:
        pytest.skip("may not limit the memory of a process")
    queue = LocalQueue(run, Profile(cluster="local"), Interrupt(), [run.report()])
    code = f"open('{group}/cgroup.procs', 'w').write('0'); bytearray(b'1' * (200 << 20))"
    try:
        assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    finally:
        group.rmdir()
    assert "out of memory" in queue._cause(read_status(run.report().status))


def test_what_a_job_ran_out_of_is_read_from_its_log(run: Run, tmp_path: Path) -> None:
    """A C++ library that finds no memory ends the process before it can record anything."""
    log = tmp_path / "log"
    log.write_text("[12:00:00] step 1\nterminate called after throwing an instance of 'std::bad_alloc'\naborted\n")
    assert "out of memory" in _shortage_in_log(log, run.report())
    log.write_text("[12:00:00] step 1\n")
    assert _shortage_in_log(log, run.report()) == "" == _shortage_in_log(tmp_path / "missing", run.report())
