"""The chain on a real Slurm: arrays, MPI over two nodes, disturbances, failures."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from workbench import DRAWER, EVALUATION, LASTING, LONG, ROOT, STUDENT, WINDOW, Workbench, stages, variation

from cpd.cluster.ledger import ledger, user_name
from cpd.config.profile import ROLES
from cpd.run.directory import Run

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


def test_the_chain_ends_as_it_does_on_this_machine(finished: Path, taught: Path, bench: Workbench, mpi) -> None:
    rows = bench.rows(finished)
    assert {row["state"] for row in rows.values()} == {"done"}
    jobs = {name: entries[-1].job for name, entries in ledger(Run(finished)).items()}
    assert jobs[WINDOW] == jobs[DRAWER].replace("_0", "_1")
    assert "Starting with JobEnvironment" in (finished / rows[STUDENT]["log"]).read_text()
    calls = {call.partition(" -m ")[0] for call in bench.container_calls.read_text().splitlines()}
    assert calls == {f"{rank} exec cpd.sif python -u" for rank in range(2)}
    done = mpi(2, "-m", "jobs.distill", str(taught))
    assert done.returncode == 0, done.stdout + done.stderr
    assert stages(taught) == stages(finished)


def test_a_group_can_resume_the_run(finished: Path) -> None:
    # Launched with umask 002: whatever the launcher, submitit and the jobs wrote may be written by the group.
    private = [path for path in finished.rglob("*") if path.stat().st_mode & 0o060 != 0o060]
    assert private == []


def test_launching_again_submits_nothing(finished: Path, bench: Workbench) -> None:
    ledger_text = (finished / "jobs.jsonl").read_text()
    assert "nothing to submit (0 elements in the queue)" in bench.launch(finished, *LONG)
    assert (finished / "jobs.jsonl").read_text() == ledger_text


def test_a_disturbed_student_is_the_undisturbed_one(finished: Path, taught: Path, bench: Workbench) -> None:
    bench.launch(taught, *LONG)
    job = bench.job(taught, STUDENT)
    bench.until(taught, STUDENT, 30)
    bench.slurm("scontrol", "requeue", job)
    bench.until(taught, STUDENT, 90)
    bench.slurm("scancel", "--signal=USR1", job)
    bench.until(taught, STUDENT, 150)
    bench.urgent_job()
    bench.until(taught, STUDENT, 210)
    bench.slurm("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    bench.wait(lambda: bench.slurm("squeue", "-h", "-j", job, "-o", "%T") != "RUNNING", "the job off its node")
    bench.bring_back("n2")
    bench.drain()
    row = bench.rows(taught)[STUDENT]
    assert (row["state"], row["attempts"]) == ("done", 5)
    assert bench.job(taught, STUDENT) == ""
    assert [entry.job for entry in ledger(Run(taught))[STUDENT]] == [job]
    assert stages(taught) == stages(finished)
    bench.assert_done(taught)


@pytest.mark.slow
def test_a_killed_student_of_an_array_costs_its_own_evaluation_and_a_retry_finishes_both(
    finished: Path, taught: Path, bench: Workbench
) -> None:
    bench.launch(taught, *LONG, "--seeds", "[1, 2]")
    other = "students/moe/seed-2"
    jobs = {name: entries[-1].job for name, entries in ledger(Run(taught)).items()}
    for suffix in ("", "/evaluation"):
        assert jobs[other + suffix] == jobs[STUDENT + suffix].replace("_0", "_1")
    bench.until(taught, STUDENT, 0)
    bench.kill(taught, STUDENT)
    bench.drain()
    rows = bench.rows(taught)
    assert (rows[STUDENT]["state"], rows[STUDENT]["queue"].split()[0]) == ("killed", "FAILED")
    assert {rows[name]["state"] for name in (other, f"{other}/evaluation")} == {"done"}
    assert {rows[name]["state"] for name in (EVALUATION, "results")} == {"waiting"}
    assert f"{STUDENT} (" in rows[EVALUATION]["message"]
    assert f"{EVALUATION} (waiting: " in rows["results"]["message"]
    output = bench.python("jobs.status", str(taught))
    assert f"KILLED {STUDENT}" in output
    again = bench.launch(taught, *LONG, "--seeds", "[1, 2]", "--retry-failed")
    assert "3 of 7 elements (4 finished, 0 in the queue)" in again
    bench.drain()
    bench.assert_done(taught)
    assert stages(taught) == stages(finished)


@pytest.mark.slow
def test_a_pending_student_waits_for_a_retried_teacher(bench: Workbench, tmp_path: Path) -> None:
    root = tmp_path / "run"
    bench.launch(root, *LASTING)
    bench.until(root, DRAWER, 0)
    bench.kill(root, DRAWER)
    bench.wait(lambda: bench.rows(root)[DRAWER]["state"] == "killed", "the killed teacher is seen")
    output = bench.launch(root, *LASTING)
    # The student is still pending, for the other teacher; now it waits for the new job, too.
    assert "1 jobs, 1 of 5 elements (0 finished, 4 in the queue)" in output
    bench.drain()
    bench.assert_done(root)


@pytest.mark.slow
def test_learning_while_teachers_train_gives_the_same_student(
    finished: Path, bench: Workbench, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    # One teacher after the other, so that the first stage is learnt before there is a second teacher.
    profile = variation(tmp_path, array_parallelism='order = "overlap"\narray_parallelism = 1')
    bench.launch(root, *LONG, profile=profile)
    bench.wait(lambda: (root / WINDOW / "attempts").exists(), "the second teacher")
    (holder,) = (
        entry for entry in bench.slurm("squeue", "-h", "-r", "-t", "R", "-o", "%i").split() if "_" in entry
    )
    bench.slurm("scancel", "--signal=STOP", holder)
    bench.until(root, STUDENT, 0)
    bench.wait(
        lambda: not bench.slurm("squeue", "-h", "-t", "R,CG", "-n", names(root, STUDENT)[0]), "the first stage"
    )
    assert bench.rows(root)[STUDENT]["state"] == "queued"
    assert len(stages(root)) == 2  # before training, and after the first stage
    bench.slurm("scancel", "--signal=CONT", holder)
    bench.drain()
    bench.assert_done(root)
    assert stages(root) == stages(finished)
    assert len(ledger(Run(root))[STUDENT]) == 2
    for table in ("evaluations.csv", "curves.csv", "episodes.csv"):
        assert (root / "results" / table).read_bytes() == (finished / "results" / table).read_bytes()


def names(root: Path, element: str) -> list[str]:
    """The names of an element's jobs."""
    return [entry.name for entry in ledger(Run(root))[element]]


def submitted_texts(root: Path) -> list[str]:
    """What sbatch was given for every job, with names for the numbers of the jobs that it waits for."""
    entries = [entries[-1] for entries in ledger(Run(root)).values()]
    names = {entry.job.partition("_")[0]: entry.name for entry in entries}
    texts = []
    for path in (root / "logs").glob("*_submission.sh"):
        text = re.sub(r"afterany:(\d+)", lambda match: f"'afterany:<{names[match[1]]}>'", path.read_text())
        texts.append(text)
    assert len(texts) == 4
    return texts


@pytest.mark.slow
def test_nothing_is_submitted_twice(bench: Workbench, tmp_path: Path) -> None:
    # Jobs that wait until they are released.
    root, profile = tmp_path / "run", variation(tmp_path, signal_seconds="sbatch.hold = true\nsignal_seconds = 20")
    planned = bench.launch(root, "--dry-run", profile=profile)
    bench.launch(root, profile=profile)
    for text in submitted_texts(root):
        assert text in planned
    assert not list((root / "logs").glob(".submission_file*"))
    in_queue = bench.slurm("squeue", "-h", "-r", "-o", "%i %j")
    assert len(in_queue.splitlines()) == 5
    # Names and comments of other jobs hold anything.
    strange = ("-J", "a|b\nc\udcff", "--comment", "JobState=x\n\udcfe")
    stranger = bench.slurm("sbatch", "--parsable", "--hold", "-o", "/dev/null", *strange, "--wrap", "true")
    # As if a colleague had launched it: their jobs are asked for by number.
    mine = (root / "jobs.jsonl").read_text()
    (root / "jobs.jsonl").write_text(mine.replace(f'"user": "{user_name()}"', '"user": "alice"'))
    rows = bench.rows(root).values()
    assert {(row["state"], row["user"]) for row in rows} == {("queued", "alice")}
    assert {row["queue"] for row in rows} == {"PENDING (JobHeldUser)"}
    assert "nothing to submit (5 elements in the queue)" in bench.launch(root, profile=profile)
    (root / "jobs.jsonl").write_text(mine)
    # As if the launcher had died between sbatch and its ledger line, and before submitit's pickle was written.
    lines = [json.loads(line) for line in (root / "jobs.jsonl").read_text().splitlines()]
    announced = [line for line in lines if not line["job"]]
    (root / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in announced))
    for pickle in (root / "logs").glob("*_submitted.pkl"):
        pickle.unlink()
    assert "nothing to submit (5 elements in the queue)" in bench.launch(root, profile=profile)
    bench.slurm("scancel", stranger)
    assert bench.slurm("squeue", "-h", "-r", "-o", "%i %j") == in_queue
    assert {entries[-1].job for entries in ledger(Run(root)).values()} == {
        line.split()[0] for line in in_queue.splitlines()
    }
    # The recovered jobs work.
    jobs = sorted({line.split()[0].partition("_")[0] for line in in_queue.splitlines()})
    bench.slurm("scontrol", "release", ",".join(jobs))
    bench.drain()
    bench.assert_done(root)


def test_cancel_and_launch_again(finished: Path, taught: Path, bench: Workbench) -> None:
    bench.launch(taught, *LONG)
    bench.until(taught, STUDENT, 30)
    output = bench.launch(taught, *LONG, "--cancel")
    assert f"cancelled {STUDENT}" in output
    # Launching waits until the cancelled job has saved and ended; it must not come back by itself.
    output = bench.launch(taught, *LONG)
    assert "3 jobs, 3 of 5 elements (2 finished, 0 in the queue)" in output
    bench.wait(lambda: bench.record(taught, STUDENT).state == "done", "the student")
    bench.launch(taught, *LONG, "--cancel")
    bench.drain()
    assert len(ledger(Run(taught))[STUDENT]) == 2
    assert bench.rows(taught)[STUDENT]["attempts"] == 2
    assert stages(taught) == stages(finished)


@pytest.mark.slow
def test_a_wrong_mpi_type_is_reported_and_trains_nothing(taught: Path, bench: Workbench, tmp_path: Path) -> None:
    profile = variation(tmp_path, srun_mpi='srun_mpi = "none"')
    lines = bench.launch(taught, *LONG, "--probe", profile=profile, code=1).splitlines()
    found = {role: line for line in lines for role in ROLES if f" {role}: " in line}  # the last of each
    assert ["well, 1 rank(s) on n" in found[role] for role in ROLES] == [True, False, False, True]
    assert all("this job was given 2 ranks, but MPI" in found[role] for role in ("student", "evaluation"))
    bench.launch(taught, *LONG, profile=profile)
    bench.drain()
    row = bench.rows(taught)[STUDENT]
    assert row["state"] == "failed"
    assert row["message"].startswith("CommSizeError: ") and "srun_mpi" in row["message"]
    assert stages(taught) == {}
    output = bench.python("jobs.status", str(taught))
    assert f"FAILED {STUDENT}: CommSizeError" in output


@pytest.mark.slow
def test_plain_scripts_do_the_same(finished: Path, bench: Workbench, tmp_path: Path) -> None:
    root = tmp_path / "run"
    bench.launch(root, *LONG, "--prepare")
    assert not (root / "jobs.jsonl").exists()
    small = ("--parsable", "--mem=500M", "--cpus-per-task=1", "--output=/dev/null", "--time=30")
    spread = ("--nodes=2", "--ntasks-per-node=1")
    scripts = ROOT / "slurm"
    python = f"--export=ALL,PYTHON={sys.executable},MPIR_CVAR_CH4_NETMOD=ofi,CPD_STATUS_SECONDS=1"

    def sbatch(script: str, *options: str, after: str = "") -> str:
        wait_for = [f"--dependency=afterany:{after}"] if after else []
        return bench.slurm(
            "sbatch", python, *small, *options, *wait_for, str(scripts / f"{script}.sbatch"), str(root)
        )

    teachers = sbatch("teachers", "--array=0-1")
    student = sbatch("distill", *spread, after=teachers)
    rows = sbatch("evaluate", *spread, after=student)
    sbatch("report", after=rows)
    bench.until(root, STUDENT, 60)
    # It requeues itself by the same code.
    bench.slurm("scancel", "--signal=USR2", student)
    bench.drain()
    assert bench.rows(root)[STUDENT]["attempts"] == 2
    bench.assert_done(root)
    assert stages(root) == stages(finished)
