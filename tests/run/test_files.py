"""Files are published whole or not at all."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cpd.reading import DamagedFileError, read_json
from cpd.run.checkpoint import CheckpointError, latest, published, save
from cpd.run.files import atomic_write, copy, sha256, sweep_element, sweep_temporaries, write_json, write_text
from cpd.run.progress import (
    MetricsLog,
    Status,
    StatusRecord,
    clock,
    progress_line,
    read_metrics,
    read_status,
    write_status,
)
from cpd.seeding import derive, generator


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    write_json(path, {"old": 1})
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half of it")
        raise RuntimeError
    assert read_json(path, dict) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_write_leaves_the_old_file_and_a_temporary_to_sweep(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    write_json(path, {"old": 1})
    code = (
        "import os, signal, sys; from pathlib import Path; from cpd.run.files import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -signal.SIGKILL
    assert read_json(path, dict) == {"old": 1}
    assert len(list(tmp_path.iterdir())) == 2
    sweep_temporaries(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_published_files_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o002)
    try:
        write_json(tmp_path / "shared.json", {})
    finally:
        os.umask(old)
    assert (tmp_path / "shared.json").stat().st_mode & 0o777 == 0o664


def test_damaged_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text('{"state": ')
    with pytest.raises(ValueError, match=r"status\.json"):
        read_json(tmp_path / "status.json", dict)


def test_checkpoints_are_pruned_and_the_latest_is_found(tmp_path: Path) -> None:
    for step in (100, 200, 300):
        save(tmp_path, f"step-{step:06d}", {"weights": torch.full((3,), float(step))}, keep=2, step=step)
    assert [checkpoint.path.name for checkpoint in published(tmp_path)] == ["step-000200", "step-000300"]
    newest = latest(tmp_path)
    assert newest is not None and torch.equal(newest.load()["weights"], torch.full((3,), 300.0))


def test_checkpoints_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for stage, step in ((99, 1_000_000), (100, 200), (100, 1_200_000)):
        save(tmp_path, f"stage-{stage:02d}-step-{step:06d}", {"x": 1}, keep=2, step=step)
    assert [checkpoint.path.name for checkpoint in published(tmp_path)] == [
        "stage-100-step-000200",
        "stage-100-step-1200000",
    ]


def test_a_checkpoint_without_its_marker_does_not_exist(tmp_path: Path) -> None:
    save(tmp_path, "step-000001", {"x": 1}, step=1)
    save(tmp_path, "step-000002", {"x": 2}, step=2)
    (tmp_path / "step-000002" / "meta.json").unlink()
    newest = latest(tmp_path)
    assert newest is not None and newest.path.name == "step-000001"
    save(tmp_path, "step-000002", {"x": 2}, step=2)
    assert [checkpoint.path.name for checkpoint in published(tmp_path)] == ["step-000001", "step-000002"]


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, "step-000001", {"x": torch.zeros(8)})
    state = checkpoint.path / "state.pt"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step-000001"):
        checkpoint.load()


def test_metrics_are_cut_back_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.append(iteration=1, reward=0.123456789)
    checkpoint_size = log.size
    log.append(iteration=2, reward=0.1)
    log.close()
    path.open("a").write('{"iteration": 3, "re')  # cut off by a kill
    assert [row["iteration"] for row in read_metrics(path)] == [1, 2]
    log = MetricsLog(path, checkpoint_size)
    log.append(iteration=2, reward=0.2)
    assert read_metrics(path) == [{"iteration": 1, "reward": 0.123457}, {"iteration": 2, "reward": 0.2}]


def test_metrics_without_their_keys_and_links_to_nowhere_are_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "linked.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DamagedFileError, match=r"metrics\.jsonl, line 1: .*iteration"):
        read_metrics(tmp_path / "metrics.jsonl")
    with pytest.raises(DamagedFileError, match=r"linked\.jsonl"):
        read_metrics(tmp_path / "linked.jsonl")
    assert read_metrics(tmp_path / "missing.jsonl") == []


def test_what_is_no_file_is_refused_by_name(tmp_path: Path) -> None:
    file, folder, link = tmp_path / "file", tmp_path / "folder", tmp_path / "link"
    file.touch()
    folder.mkdir()
    link.symlink_to(tmp_path / "nowhere")
    for path in (folder, link):
        with pytest.raises(DamagedFileError, match=path.name):
            sha256(path)
        with pytest.raises(DamagedFileError, match=path.name):
            copy(path, file)
    with pytest.raises(DamagedFileError, match="folder"):
        copy(file, folder)
    write_status(folder, StatusRecord())  # a display that cannot be written never stops work
    assert sorted(tmp_path.iterdir()) == [file, folder, link]


def test_status_adds_up_seconds_over_attempts(tmp_path: Path) -> None:
    lines: list[str] = []
    for attempt in (1, 2):
        status = Status(tmp_path / "status.json", lines.append)
        status.begin("train", total=10, done=5 * (attempt - 1))
        status.record.spans[-1] = ("train", 0.0, 0.0)
        status.advance(5 * attempt, success=0.5, force=True)
        status.finish("stopped" if attempt == 1 else "done")
    record = read_status(tmp_path / "status.json")
    assert (record.state, record.done, record.success) == ("done", 10, 0.5)
    assert len(record.spans) == 2 and record.seconds["train"] > 0
    assert lines == ["stopped", "done"]


def test_a_line_of_progress(tmp_path: Path) -> None:
    record = read_status(tmp_path / "none")
    record.phase, record.done, record.total, record.rate, record.success = "train", 50, 200, 10.0, 0.84
    assert progress_line(record) == "train  25 % | 50/200 steps | 10 steps/s | eta 0:15 | success 0.84"
    assert clock(3723) == "1:02:03"


def test_random_streams_depend_on_their_names_only() -> None:
    draws = generator(1, "batch", 2, 3).random(4)
    assert (generator(1, "batch", 2, 3).random(4) == draws).all()
    for other in (generator(2, "batch", 2, 3), generator(1, "memory", 2, 3), generator(1, "batch", 3, 2)):
        assert not (other.random(4) == draws).any()
    assert 0 <= derive(1, "torch") < 2**63


def test_a_temporary_file_is_never_written_through_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda length: "known")
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / ".data.json.known.tmp").symlink_to(tmp_path / "theirs")
    with pytest.raises(FileExistsError):
        write_json(tmp_path / "data.json", {})
    assert (tmp_path / "theirs").read_text() == "theirs"


def test_an_attempt_sweeps_what_killed_ones_left_in_its_element_only(tmp_path: Path) -> None:
    left = [tmp_path / ".status.json.1.tmp", tmp_path / "stages" / ".stage-00.json.1.tmp"]
    others = [
        tmp_path / "evaluation" / ".status.json.1.tmp",
        tmp_path / "attempts" / ".0002.json.1.tmp",
        tmp_path / "notes.tmp",
    ]
    (tmp_path / "evaluation" / "attempts").mkdir(parents=True)
    for path in (*left, *others):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    sweep_element(tmp_path)
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in others)


def test_folders_that_cannot_be_synced_are_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    write_text(tmp_path / "a", "text")
    assert (tmp_path / "a").read_text() == "text"
