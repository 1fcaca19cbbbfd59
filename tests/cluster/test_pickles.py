"""Pickles of another user are never loaded, and none outlives the work that it is for."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path

import pytest

from cpd.cluster.element_job import submit_local
from cpd.cluster.ledger import LedgerEntry, append
from cpd.cluster.pickles import load_own, sweep_pickles
from cpd.config.profile import Resources
from cpd.run.directory import Run


def test_a_link_is_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "own.pkl").write_bytes(pickle.dumps([1]))
    assert load_own(tmp_path / "own.pkl") == [1]
    (tmp_path / "link.pkl").symlink_to(tmp_path / "own.pkl")
    with pytest.raises(OSError, match=r"link\.pkl"):
        load_own(tmp_path / "link.pkl")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_another_user_s_pickle_is_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "theirs.pkl"
    path.write_bytes(pickle.dumps([1]))
    os.chown(path, 65534, -1)
    with pytest.raises(PermissionError, match=r"theirs\.pkl"):
        load_own(path)


def test_pickles_of_slurm_jobs_stay_while_their_elements_are_unfinished(make_run) -> None:
    run: Run = make_run()
    first, second = run.teachers()
    append(
        run, [LedgerEntry(e.name, "teacher", f"51_{i}", "", 0.0, "slurm") for i, e in enumerate((first, second))]
    )
    append(run, [LedgerEntry(second.name, "teacher", "7", "", 0.0)])
    first.path.mkdir(parents=True)
    first.complete.touch()
    names = ("51_0_submitted.pkl", "51_0_0_result.pkl", "7_submitted.pkl", "8_0_result.pkl", f"{'a' * 32}.pkl")
    kept = ("51_1_submitted.pkl", "51_1_0_log.out", "notes.pkl")
    for name in (*names, *kept):
        (run.logs / name).touch()
    sweep_pickles(run)
    assert {path.name for path in run.logs.iterdir()} == set(kept)


def test_a_local_job_removes_its_pickles(make_run) -> None:
    run: Run = make_run()
    job = submit_local(run, run.students()[0], Resources())
    while not job.done():
        assert all(path.stat().st_mode & 0o77 == 0 for path in run.logs.glob("*_submitted.pkl"))
        time.sleep(0.05)
    names = [path.name for path in run.logs.iterdir()]
    assert names == [f"{job.job_id}_0_log.out"]
    assert "not started, since it needs" in (run.logs / names[0]).read_text()
