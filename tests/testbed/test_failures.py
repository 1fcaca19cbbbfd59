"""Failures on a cluster are shown with cause and remedy, and leave no job waiting."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from workbench import DRAWER, EVALUATION, LASTING, LONG, ROOT, STUDENT, WINDOW, Workbench, stages, variation

from cpd.cluster.ledger import ledger
from cpd.cluster.queue import REMEDIES
from cpd.run.directory import Run
from cpd.run.lease import current_holder

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

MURDEROUS_SBATCH = """#!/bin/bash
# As sbatch, but its caller is killed before it reads the job's number.
{sbatch} "$@"
kill -9 $PPID
"""


def test_a_launcher_may_die_between_sbatch_and_its_ledger_line(bench: Workbench, tmp_path: Path) -> None:
    root, folder = tmp_path / "run", tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(MURDEROUS_SBATCH.format(sbatch=shutil.which("sbatch")))
    (folder / "sbatch").chmod(0o755)
    path = f"{folder}:{bench.environment['PATH']}"
    # One more job every time: the teachers' array, the student, the evaluation, the report.
    for num_jobs in (2, 3, 4, 5):
        bench.launch(root, *LASTING, code=-9, PATH=path)
        assert len(bench.slurm("squeue", "-h", "-r", "-t", "all", "-n", names(root)).splitlines()) == num_jobs
    assert "nothing to submit" in bench.launch(root, *LASTING)
    assert [len(entries) for entries in ledger(Run(root)).values()] == [1] * 5
    # The recovered jobs are known by their numbers.
    bench.launch(root, *LASTING, "--cancel")
    bench.drain()


def names(root: Path) -> str:
    """The names of a run's jobs, as squeue takes them."""
    return ",".join({entry.name for entries in ledger(Run(root)).values() for entry in entries})


@pytest.mark.slow
def test_a_rejected_teacher_costs_its_stage(bench: Workbench, taught: Path) -> None:
    (taught / WINDOW / "COMPLETE").rename(taught / WINDOW / "REJECTED")
    bench.launch(taught, *LONG)
    bench.drain()
    rows = bench.rows(taught)
    assert rows.pop(WINDOW)["state"] == "rejected"
    assert {row["state"] for row in rows.values()} == {"done"}
    assert "skipped: window-close-v3" in rows[STUDENT]["message"]


@pytest.mark.slow
def test_rejected_teachers_stop_the_chain_if_the_recipe_says_so(bench: Workbench, tmp_path: Path) -> None:
    root = tmp_path / "run"
    bench.launch(root, "--teacher.gate", "0.9", "--teacher.on_rejected", "stop")
    bench.drain()
    rows = bench.rows(root)
    assert {rows[name]["state"] for name in (DRAWER, WINDOW)} == {"rejected"}
    # Slurm counts their jobs as successful.
    array = ledger(Run(root))[DRAWER][-1].job.partition("_")[0]
    assert set(bench.slurm("squeue", "-h", "-t", "all", "-j", array, "-o", "%T").split()) == {"COMPLETED"}
    assert rows[STUDENT]["state"] == "failed"
    assert "rejected teachers" in rows[STUDENT]["message"]
    assert {rows[name]["state"] for name in (EVALUATION, "results")} == {"waiting"}


@pytest.mark.slow
def test_jobs_that_started_too_early_are_resubmitted(bench: Workbench, tmp_path: Path) -> None:
    root = tmp_path / "run"
    bench.launch(root, *LASTING)
    student = bench.job(root, STUDENT)
    for teacher in (DRAWER, WINDOW):
        bench.until(root, teacher, 0)
        bench.kill(root, teacher)
    bench.wait(lambda: bench.slurm("squeue", "-h", "-j", student, "-o", "%T") == "RUNNING", "the student started")
    # It will exit on unfinished teachers, and so will the jobs that wait for it.
    output = bench.launch(root, *LASTING)
    assert f"{STUDENT}, {EVALUATION}, results" in output
    bench.drain()
    bench.assert_done(root)


def test_an_element_that_raises_is_shown_with_its_error(bench: Workbench, taught: Path) -> None:
    shard = next((taught / WINDOW / "shards").glob("*.h5"))
    shard.write_bytes(shard.read_bytes()[:-100])
    bench.launch(taught, *LONG)
    bench.drain()
    row = bench.rows(taught)[STUDENT]
    assert (row["state"], row["queue"].split()[0]) == ("failed", "FAILED")
    assert shard.name in row["message"]
    output = bench.python("jobs.status", str(taught))
    assert f"FAILED {STUDENT}: " in output


def test_a_job_that_exceeds_its_memory_is_reported(strict: Workbench, tmp_path: Path) -> None:
    root, profile = tmp_path / "run", tmp_path / "small.toml"
    profile.write_text('cluster = "slurm"\nsingle_machine = true\n[teacher]\nmemory_gb = 0.1\n')
    strict.launch(root, "--only", DRAWER, profile=str(profile))
    strict.drain()
    row = strict.rows(root)[DRAWER]
    assert row["state"] == "killed"
    assert "memory_gb" in row["message"]
    output = strict.python("jobs.status", str(root))
    assert f"KILLED {DRAWER}: " in output
    assert "exceeded memory limit" in output
    strict.launch(root, "--only", DRAWER)
    strict.drain()
    assert strict.rows(root)[DRAWER]["state"] == "done"


def test_a_module_that_does_not_load_is_told(bench: Workbench, tmp_path: Path) -> None:
    root, profile = tmp_path / "run", tmp_path / "modules.toml"
    profile.write_text('cluster = "slurm"\nsingle_machine = true\nmodules = ["gcc/13", "no such"]\n')
    bench.launch(root, "--only", DRAWER, profile=str(profile))
    bench.drain()
    row = bench.rows(root)[DRAWER]
    assert row["state"] == "killed"
    assert row["message"].startswith("setup failed: module load gcc/13 'no such': ")


@pytest.mark.slow
def test_a_controller_that_is_away_is_waited_for(finished: Path, taught: Path, bench: Workbench) -> None:
    bench.launch(taught, *LONG)
    bench.until(taught, STUDENT, 60)
    log = taught / bench.rows(taught)[STUDENT]["log"]
    holder, _ = current_holder(taught / STUDENT / "attempts")
    assert holder is not None
    os.kill(bench.testbed.daemons()["slurmctld"], signal.SIGTERM)
    os.kill(holder.process, signal.SIGUSR1)
    row = bench.rows(taught)[EVALUATION]
    assert (row["state"], row["queue"]) == ("queued", "UNKNOWN (Slurm does not answer)")
    bench.wait(lambda: "asking again" in log.read_text(), "the job misses the controller")
    bench.testbed.start_daemon("slurmctld", "slurmctld", "-D")
    bench.drain()
    assert bench.rows(taught)[STUDENT]["attempts"] == 2
    assert stages(taught) == stages(finished)
    bench.assert_done(taught)


def test_gpus_are_requested(strict: Workbench, taught: Path, tmp_path: Path) -> None:
    """The GPUs of the test cluster can be counted, and nothing else."""
    profile = tmp_path / "gpus.toml"
    text = Path(variation(tmp_path)).read_text()
    profile.write_text(text.replace("[student]", "[student]\ngpus = 3"))
    output = strict.launch(taught, *LONG, profile=str(profile), code=2)
    assert "Requested node configuration is not available" in output
    profile.write_text(text.replace("[student]", "[student]\ngpus = 2\nsbatch = { hold = true }"))
    strict.launch(taught, *LONG, profile=str(profile))
    job = strict.job(taught, STUDENT)
    assert "TresPerNode=gres:gpu:2" in strict.slurm("scontrol", "show", "job", job)
    strict.launch(taught, *LONG, "--cancel")
    strict.drain()


@pytest.mark.slow
def test_a_dependency_that_can_never_be_met_ends_its_dependent(bench: Workbench, tmp_path: Path) -> None:
    root = tmp_path / "run"
    bench.launch(root, *LASTING)
    bench.until(root, DRAWER, 0)
    student, teacher = bench.job(root, STUDENT), bench.job(root, DRAWER)
    # The chain has `afterany`; a user may change it.
    bench.slurm("scontrol", "update", f"JobId={student}", f"Dependency=afterok:{teacher}")
    bench.kill(root, DRAWER)
    bench.drain()
    rows = bench.rows(root)
    assert rows[STUDENT]["queue"].startswith("CANCELLED")
    assert (rows[STUDENT]["state"], rows[STUDENT]["message"]) == ("killed", REMEDIES["CANCELLED"])
    assert {rows[name]["state"] for name in (EVALUATION, "results")} == {"waiting"}


@pytest.mark.slow
def test_a_time_out_without_saving_is_reported(bench: Workbench, tmp_path: Path) -> None:
    root, folder = tmp_path / "run", tmp_path / "python"
    # A student that never checks the stop flag.
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "from cpd.distill import run_student\nrun_student.AGREE_EVERY = 10**6\n"
    )
    setup = f'setup = ["export MPIR_CVAR_CH4_NETMOD=ofi FI_TCP_IFACE=lo PYTHONPATH={folder}:{ROOT}"]'
    profile = variation(tmp_path, setup=setup)
    bench.launch(root, "--distill.steps_per_stage", "1000000", profile=profile)
    bench.until(root, STUDENT, 0)
    bench.slurm("scontrol", "update", f"JobId={bench.job(root, STUDENT)}", "TimeLimit=1")
    bench.drain()
    row = bench.rows(root)[STUDENT]
    assert (row["state"], row["queue"].split()[0]) == ("killed", "TIMEOUT")
    assert row["message"].startswith(REMEDIES["TIMEOUT"])
