"""Sites differ in how long Slurm remembers a job: the run directory is what counts."""

from __future__ import annotations

from pathlib import Path

import pytest
from workbench import DRAWER, LASTING, LONG, STUDENT, WINDOW, Workbench, stages, variation

from cpd.cluster.queue import accounting

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


def wait_until_forgotten(bench: Workbench) -> None:
    bench.wait(lambda: not bench.slurm("squeue", "-h", "-t", "all"), "no job remembered", 90)


@pytest.mark.slow
def test_the_state_of_forgotten_jobs_comes_from_the_run_directory(forgetful: Workbench, tmp_path: Path) -> None:
    root = tmp_path / "run"
    forgetful.launch(root, *LASTING)
    forgetful.until(root, DRAWER, 0)
    forgetful.kill(root, DRAWER)
    forgetful.drain()
    wait_until_forgotten(forgetful)
    rows = forgetful.rows(root)
    assert (rows[DRAWER]["state"], rows[DRAWER]["queue"]) == ("killed", "GONE")
    assert (rows[WINDOW]["state"], rows[STUDENT]["state"]) == ("done", "waiting")
    assert "4 of 5 elements (1 finished, 0 in the queue)" in forgetful.launch(root, *LASTING, "--dry-run")


@pytest.mark.slow
def test_preemption_by_the_jobs_own_signal(finished: Path, taught: Path, forgetful: Workbench) -> None:
    forgetful.launch(taught, *LONG)
    forgetful.until(taught, STUDENT, 60)
    forgetful.urgent_job()
    forgetful.drain()
    row = forgetful.rows(taught)[STUDENT]
    assert (row["state"], row["attempts"]) == ("done", 2)
    assert stages(taught) == stages(finished)


@pytest.mark.slow
def test_the_accounting_is_queried_if_a_site_has_it(accounted: Workbench, tmp_path: Path, monkeypatch) -> None:
    for key in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(key, accounted.environment[key])
    root = tmp_path / "run"
    # With its name, as at a site with several clusters; the shell's SLURM_CLUSTERS names another.
    profile = variation(tmp_path, partition='partition = "main"\nclusters = "testbed"')
    accounted.launch(root, *LASTING, profile=profile)
    accounted.until(root, DRAWER, 0)
    job = accounted.job(root, DRAWER)
    accounted.slurm("scancel", job)
    accounted.drain()
    wait_until_forgotten(accounted)
    accounted.wait(lambda: job in accounting("-j", [job]), "sacct knows the job", 30)
    row = accounted.rows(root)[DRAWER]
    assert (row["state"], row["queue"]) == ("stopped", "CANCELLED")
    assert row["node"] in ("n1", "n2")
    names = {state.name for state in accounting("-j", [job]).values()}
    assert accounting("--name", names)[job].state == row["queue"]
    assert "4 of 5 elements (1 finished, 0 in the queue)" in accounted.launch(
        root, *LASTING, "--dry-run", profile=profile
    )


@pytest.mark.slow
def test_a_time_limit_shorter_than_the_work(
    bench: Workbench, finished: Path, taught: Path, tmp_path: Path
) -> None:
    profile = tmp_path / "short.toml"
    profile.write_text(
        'cluster = "slurm"\nsingle_machine = true\nsignal_seconds = 45\n'
        'setup = ["export MPIR_CVAR_CH4_NETMOD=ofi"]\n'
        "[student]\nranks = 2\nnodes = 2\nminutes = 2\nmemory_gb = 1.0\n[teacher]\nmemory_gb = 1.0\n"
        "[evaluation]\nmemory_gb = 1.0\n[report]\nmemory_gb = 1.0\n"
    )
    bench.launch(taught, *LONG, profile=str(profile))
    bench.until(taught, STUDENT, 20)
    # Held up rather than busy: Slurm wakes a job before it tells it to save.
    bench.slurm("scancel", "--signal=STOP", bench.job(taught, STUDENT))
    bench.drain()
    row = bench.rows(taught)[STUDENT]
    assert row["state"] == "done"
    assert row["attempts"] >= 2  # a busy machine meets the limit more often
    assert stages(taught) == stages(finished)
