"""One writer per element, whatever dies."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path

import pytest

from cpd.cluster.element_job import ask_to_stop
from cpd.run import lease as lease_module
from cpd.run.directory import Element
from cpd.run.lease import Lease, LeaseHeldError, LeaseLostError, current_holder

HOLD = (
    "import sys, time; from pathlib import Path; from cpd.run.lease import Lease\n"
    "lease = Lease(Path(sys.argv[1])).acquire(); print('held', flush=True); time.sleep(60)"
)


def hold_elsewhere(folder: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_is_refused_by_name(tmp_path: Path) -> None:
    process = hold_elsewhere(tmp_path)
    try:
        with pytest.raises(LeaseHeldError, match=f"process {process.pid} on {socket.gethostname()}"):
            Lease(tmp_path).acquire()
    finally:
        process.kill()


def test_a_killed_holders_lease_is_taken_over_at_once(tmp_path: Path) -> None:
    process = hold_elsewhere(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with Lease(tmp_path) as lease:
        assert lease.number == 2


def test_a_released_lease_is_free_and_attempts_are_counted(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        with Lease(tmp_path) as lease:
            assert lease.number == number
            lease.check()
    assert current_holder(tmp_path / "attempts") == (None, 3)


def test_waiting_for_a_holder_to_release_its_lease(tmp_path: Path) -> None:
    process = hold_elsewhere(tmp_path)
    begun = time.monotonic()
    os.kill(process.pid, signal.SIGSTOP)  # alive, so still the holder
    with pytest.raises(LeaseHeldError):
        Lease(tmp_path).acquire(wait_seconds=0.5)
    assert time.monotonic() - begun >= 0.5
    process.kill()
    process.wait()
    with Lease(tmp_path).acquire(wait_seconds=10):
        pass


def test_the_old_holder_notices_a_takeover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Lease(tmp_path).acquire()
    monkeypatch.setattr(lease_module, "is_alive", lambda process, ticks: False)
    second = Lease(tmp_path).acquire()
    with pytest.raises(LeaseLostError):
        first.check()
    second.check()
    first.release()  # must not release the successor's lease
    monkeypatch.undo()
    assert current_holder(tmp_path / "attempts")[0] is not None
    second.release()


def foreign_holder(folder: Path, age_seconds: float) -> None:
    path = folder / "attempts" / "0001.json"
    path.parent.mkdir(parents=True)
    path.write_text(
        json.dumps({"host": "elsewhere", "process": 1, "start_ticks": 1, "job": "7", "released": False})
    )
    moment = time.time() - age_seconds
    os.utime(path, (moment, moment))


def test_a_holder_on_another_host_is_alive_while_its_heartbeat_is_recent(tmp_path: Path) -> None:
    foreign_holder(tmp_path / "fresh", age_seconds=10)
    with pytest.raises(LeaseHeldError, match=r"job 7.* in (7\d|80) s"):
        Lease(tmp_path / "fresh").acquire()
    foreign_holder(tmp_path / "stale", age_seconds=lease_module.STALE_SECONDS + 10)
    with Lease(tmp_path / "stale") as lease:
        assert lease.number == 2


def test_an_empty_attempt_file_has_no_holder(tmp_path: Path) -> None:
    with Lease(tmp_path):
        pass
    (tmp_path / "attempts" / "0002.json").touch()
    with Lease(tmp_path) as lease:
        assert lease.number == 3


def test_an_attempt_file_that_links_to_nowhere_has_no_holder(tmp_path: Path) -> None:
    with Lease(tmp_path):
        pass
    (tmp_path / "attempts" / "0002.json").symlink_to(tmp_path / "nowhere")
    with Lease(tmp_path) as lease:
        assert lease.number == 3


def test_the_age_of_a_holder_is_known_on_a_read_only_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign_holder(tmp_path, age_seconds=10)

    def refuse(path: Path, *arguments: object) -> None:
        raise PermissionError(path)

    monkeypatch.setattr(Path, "touch", refuse)
    holder, number = current_holder(tmp_path / "attempts")
    assert holder is not None and number == 1


def test_a_writer_on_another_host_is_not_signalled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signalled: list[int] = []
    monkeypatch.setattr(os, "kill", lambda process, number: signalled.append(process))
    foreign_holder(tmp_path, age_seconds=10)
    assert ask_to_stop(Element("report", 0, tmp_path, "results"))
    assert not signalled


def contend(folder: Path, ready: Barrier, all_done: Event, results: multiprocessing.Queue) -> None:
    ready.wait()
    try:
        results.put(Lease(folder).acquire().number)
        all_done.wait(60)  # keep the lease until every process has tried
    except LeaseHeldError:
        results.put(0)


def test_of_many_processes_one_gets_the_lease(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    results: multiprocessing.Queue = context.Queue()
    ready, all_done = context.Barrier(6), context.Event()
    arguments = (tmp_path, ready, all_done, results)
    processes = [context.Process(target=contend, args=arguments) for _ in range(6)]
    for process in processes:
        process.start()
    numbers = sorted(results.get(timeout=60) for _ in processes)
    all_done.set()
    for process in processes:
        process.join()
    assert numbers == [0, 0, 0, 0, 0, 1]


def test_leases_work_where_files_cannot_be_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), source)

    monkeypatch.setattr(os, "link", refuse)
    with Lease(tmp_path) as lease:
        assert lease.number == 1
        with pytest.raises(LeaseHeldError):
            Lease(tmp_path).acquire()
        with pytest.raises(FileExistsError):  # another process was first with this number
            lease._create()
    with Lease(tmp_path) as lease:
        assert lease.number == 2
    assert [path.name for path in sorted((tmp_path / "attempts").iterdir())] == ["0001.json", "0002.json"]


def test_an_attempt_that_is_still_being_written_is_waited_for(tmp_path: Path) -> None:
    with Lease(tmp_path):
        path = tmp_path / "attempts" / "0001.json"
        content = path.read_text()
        path.write_text("")
        threading.Timer(0.2, path.write_text, [content]).start()
        holder, number = current_holder(tmp_path / "attempts")
        assert holder is not None and holder.process == os.getpid() and number == 1


def test_a_holder_in_another_container_of_the_same_host_name_lives_by_its_heartbeat(tmp_path: Path) -> None:
    unshare = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("may not make a process namespace")
    command = [*unshare, sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout and process.stdout.readline() == "held\n"
        with pytest.raises(LeaseHeldError, match="lapses"):
            Lease(tmp_path).acquire()
    finally:
        process.kill()
        process.wait()


def test_a_release_that_fails_hides_no_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Lease(tmp_path):
        shutil.rmtree(tmp_path / "attempts")
        (tmp_path / "attempts").touch()
        raise ZeroDivisionError


def test_a_release_over_a_directory_hides_no_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Lease(tmp_path):
        (tmp_path / "attempts" / "0001.json").unlink()
        (tmp_path / "attempts" / "0001.json").mkdir()
        raise ZeroDivisionError
