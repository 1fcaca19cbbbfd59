"""What a machine runs out of is told from the exceptions of all libraries."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from cpd.run.progress import StatusRecord, read_status, write_status
from cpd.run.shortage import describe_error, error_number, naming, shortage


def raised(action) -> BaseException:
    try:
        action()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_an_error_of_a_library_gets_its_number_and_path(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    with (
        pytest.raises(OSError) as caught,
        naming(path),
        Path("/dev/full").open("wb") as full,  # a disk that is always full
    ):
        torch.save({"weights": torch.zeros(100_000)}, full)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert "no space left" in shortage(caught.value, Path("/elsewhere"))
    assert str(path) in shortage(caught.value, Path("/elsewhere"))


@pytest.mark.parametrize(
    "action",
    [
        lambda: torch.empty(1 << 60),
        lambda: np.empty(1 << 50),
        lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")),
        lambda: (_ for _ in ()).throw(MemoryError()),
    ],
)
def test_memory_errors_are_out_of_memory(action) -> None:
    error = raised(action)
    assert error_number(error) == errno.ENOMEM
    assert "out of memory" in shortage(error, Path("run"))


def test_a_quota_is_named_and_other_errors_are_none() -> None:
    assert "quota" in shortage(OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "/a/b"), Path("run"))
    locked = BlockingIOError(
        errno.EAGAIN, "unable to lock file, error message = 'Resource temporarily unavailable'"
    )
    for other in (FileNotFoundError(errno.ENOENT, "no such file", "/a/b"), locked):
        assert shortage(other, Path("run")) == ""
    assert "processes" in shortage(OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)), Path("run"))
    assert describe_error(ValueError("a reason"), Path("run")) == "ValueError: a reason"


def test_a_status_is_written_over_the_old_one_where_there_is_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "status.json"
    write_status(path, StatusRecord(state="running", message="long " * 20))

    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    write_status(path, StatusRecord(state="failed", message="full"))
    assert (read_status(path).state, read_status(path).message) == ("failed", "full")
