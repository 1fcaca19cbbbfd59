"""Ledger, queue state, requeueing, costs and checks of a run on Slurm; all without Slurm."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from cpd.cluster.estimate import costs, disk, launch_problems
from cpd.cluster.ledger import LedgerEntry, append, ledger
from cpd.cluster.queue import JobState, state_in_log
from cpd.cluster.reconcile import queue_state, slurm_entries
from cpd.cluster.requeue import describe_unfinished, is_stuck, slurm_job, unfinished_dependencies
from cpd.cluster.sbatch import outside_of_jobs
from cpd.config.load import load
from cpd.config.profile import Profile, load_profile
from cpd.run.checkpoint import save
from cpd.run.directory import Run
from cpd.run.files import write_json
from cpd.run.lease import Lease, LeaseLostError
from cpd.run.progress import Status, read_status
from jobs.launch import prepare
from jobs.launch_options import load_recipe
from tests.conftest import MINIATURE

ROOT = Path(__file__).resolve().parents[2]


def profile(**over: Any) -> Profile:
    return load(Profile, {"cluster": "slurm", "student": {"ranks": 4, "nodes": 2}, **over}, "test")


def entry(run: Run, path: str, job: str, **more: Any) -> LedgerEntry:
    element = next(element for element in run.elements() if element.name == path)
    return LedgerEntry(path, element.role, job, "", 0.0, cluster="slurm", **more)


def test_the_second_line_of_a_submission_replaces_its_first(make_run) -> None:
    run: Run = make_run()
    append(run, [entry(run, "results", "", name="a-1")])
    append(run, [entry(run, "results", "12", name="a-1")])
    with run.ledger.open("a") as file:
        file.write('{"element": "results", "ro')  # killed here
    append(run, [entry(run, "results", "", name="a-2")])
    assert [(e.job, e.name) for e in ledger(run)["results"]] == [("12", "a-1"), ("", "a-2")]


def test_unknown_fields_of_a_ledger_are_ignored(make_run) -> None:
    run: Run = make_run()
    append(run, [entry(run, "results", "12")])
    line = json.loads(run.ledger.read_text())
    run.ledger.write_text(json.dumps({**line, "index": 4}) + "\n")
    assert ledger(run)["results"] == [entry(run, "results", "12")]


def test_the_queue_state_comes_from_ledger_queue_and_leases(make_run, monkeypatch: pytest.MonkeyPatch) -> None:
    run: Run = make_run()
    drawer, window = run.teachers()
    student = run.students()[0]
    append(run, [entry(run, drawer.name, "12_0"), entry(run, window.name, "12_1")])
    jobs = {
        "12_0": JobState("12_0", "a", "PENDING", number="12"),
        "12_1": JobState("12_1", "a", "FAILED", number="13"),
        "14": JobState("14", "by-hand", "RUNNING", number="14"),
    }
    monkeypatch.setenv("SLURM_JOB_ID", "14")
    with Lease(student.path).acquire():
        state = queue_state(run, slurm_entries(run), jobs)
        monkeypatch.setenv("SLURM_JOB_ID", "13")
        with Lease(window.path).acquire():
            # Its lease is alive, but Slurm has ended its job.
            assert window.name not in queue_state(run, slurm_entries(run), jobs).held
    jobs_of = {name: [job.job for job in jobs_of_element] for name, jobs_of_element in state.active.items()}
    assert jobs_of == {drawer.name: ["12_0"], student.name: ["14"]}
    monkeypatch.delenv("SLURM_JOB_ID")
    with Lease(window.path).acquire():
        assert f"process {os.getpid()}" in queue_state(run, slurm_entries(run), jobs).held[window.name]


def test_a_requeued_job_takes_over_its_own_lease_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    with Lease(tmp_path).acquire() as old_lease:
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        with Lease(tmp_path).acquire() as new_lease:
            assert (old_lease.number, new_lease.number) == (1, 2)
            with pytest.raises(LeaseLostError):
                old_lease.check()


def test_an_array_element_has_its_own_job_number(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"JOB_ID": "12", "ARRAY_JOB_ID": "12", "ARRAY_TASK_ID": "3"}.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    assert slurm_job() == "12_3"


def test_an_element_names_its_unfinished_dependencies(make_run, capsys: pytest.CaptureFixture[str]) -> None:
    from jobs import distill

    run: Run = make_run()
    student = run.students()[0]
    Status(run.teachers()[0].status).finish("failed", "ValueError: no luck")
    missing = unfinished_dependencies(run, student)
    assert [element.name for element in missing] == [teacher.name for teacher in run.teachers()]
    assert "drawer-close-v3/seed-1 (failed: ValueError: no luck), teachers/" in describe_unfinished(missing)
    assert distill.main([str(run.root)]) == 3
    assert "teachers/drawer-close-v3/seed-1 (failed" in capsys.readouterr().err
    assert "teachers/drawer-close-v3/seed-1 (failed" in read_status(student.status).message


def test_only_requeues_without_progress_count(make_run) -> None:
    run: Run = make_run()
    student = run.students()[0]
    write_json(run.root / "profile.json", {"max_timeouts": 2})
    status = Status(student.status)
    status.begin("distill", 100, 10)
    assert [is_stuck(run, student, "5") for _ in range(2)] == [False, False]
    status.advance(20, force=True)
    assert [is_stuck(run, student, "5") for _ in range(3)] == [False, False, True]
    # A new submission counts from zero.
    assert not is_stuck(run, student, "6")


def test_submitting_from_inside_a_job_leaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "100")
    monkeypatch.setenv("SLURM_CONF", "/etc/x.conf")
    with outside_of_jobs():
        assert {key for key in os.environ if key.startswith("SLURM_")} == {"SLURM_CONF"}
    assert os.environ["SLURM_MEM_PER_NODE"] == "100"


def test_costs_and_disk(make_run) -> None:
    run: Run = make_run()
    cost_of = {cost.role: cost for cost in costs(run, profile(), run.elements())}
    assert [cost_of[role].count for role in ("teacher", "student", "evaluation", "report")] == [2, 1, 1, 1]
    assert cost_of["student"].cores == 4
    assert not cost_of["teacher"].is_measured
    drawer = run.teachers()[0]
    write_json(drawer.status, {"state": "done", "seconds": {"train": 40.0, "rollouts": 2.0}})
    drawer.complete.touch()
    measured = costs(run, profile(), run.elements()[1:])[0]
    assert (measured.count, measured.seconds, measured.is_measured) == (1, 42.0, True)
    # A teacher with a policy needs no training.
    other: Run = make_run("trained")
    untrained, *_ = costs(other, profile(), other.teachers())
    for teacher in other.teachers():
        teacher.path.mkdir(parents=True)
        teacher.policy.touch()
    after, *_ = costs(other, profile(), other.teachers())
    assert 0 < after.seconds < untrained.seconds
    size, files = disk(run.config)
    bigger, more = disk(make_run("b", seeds=[1, 2], rollouts={"num_steps": 6000}).config)
    assert 1e6 < size < bigger < 1e8
    assert 50 < files < more


def test_a_disk_that_is_too_small_is_refused(make_run) -> None:
    config = make_run(rollouts={"num_steps": 10**13}).config
    text = "\n".join(launch_problems(ROOT / "runs" / "x", config, profile()))
    assert len(re.findall(r"[\d.e+]+ GB", text)) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(make_run) -> None:
    assert launch_problems(Path("/usr/runs/x"), make_run().config, profile())[0].startswith("/usr ")


def test_files_follow_the_umask(tmp_path: Path) -> None:
    old_umask = os.umask(0o002)
    try:
        run = prepare(tmp_path / "run", load_recipe(str(MINIATURE), ()), profile())
        student = run.students()[0]
        with Lease(student.path):
            Status(student.status).begin("distill", 100)
            save(student.checkpoints, "step-1", {"x": 1}, step=1)
        append(run, [entry(run, student.name, "1")])
    finally:
        os.umask(old_umask)
    assert {path.name for path in all_of(run.root)} >= {"config.json", "jobs.jsonl", "0001.json", "meta.json"}
    assert [path for path in all_of(run.root) if path.stat().st_mode & 0o060 != 0o060] == []


def all_of(folder: Path) -> list[Path]:
    return [folder, *folder.rglob("*")]


def test_causes_are_read_from_logs() -> None:
    requeue = "*** JOB 10 ON n1 CANCELLED AT 2026-11-22T21:03:14 DUE TO JOB REQUEUE ***"
    timeout = "slurmstepd: error: *** STEP 1.0 ON n1 CANCELLED AT 2026-11-22T21:03:14 DUE TO TIME LIMIT ***"
    out_of_memory = (
        "slurmstepd: error: Detected 1 oom_kill event in StepId=1.0. Some of the step tasks have been OOM Killed."
    )
    assert state_in_log([requeue, "Traceback"]) == ""
    assert state_in_log([requeue, timeout, "srun: error"]) == "TIMEOUT"
    assert state_in_log([timeout, out_of_memory]) == "OUT_OF_MEMORY"


def test_a_run_directory_that_jobs_cannot_see_is_refused(make_run) -> None:
    config = make_run().config
    (problem,) = launch_problems(Path("/tmp/x/run"), config, profile())
    assert "single_machine" in problem
    assert launch_problems(Path("/tmp/x/run"), config, profile(single_machine=True)) == []
    assert launch_problems(ROOT / "runs" / "x", config, load_profile("local")) == []


def test_ranks_that_cannot_share_a_teacher_are_refused_before_submission(make_run) -> None:
    config = make_run(teacher={"ppo": {"num_envs": 1, "minibatch_size": 50}}).config
    shared, alone = (profile(teacher={"ranks": ranks}, single_machine=True) for ranks in (2, 1))
    (problem,) = launch_problems(ROOT / "runs" / "x", config, shared)
    assert "teacher.ppo.num_envs = 1" in problem
    assert launch_problems(ROOT / "runs" / "x", config, alone) == []


def test_ranks_that_cannot_share_a_batch_are_told_before_anything_is_submitted(make_run) -> None:
    variants = {
        "small": {"distill": {"batch_size": 3}},
        "agem": {"protection": {"kind": "agem", "agem_windows": 2}},
    }
    config = make_run(variants=variants).config
    problems = launch_problems(ROOT / "runs" / "x", config, profile(student={"ranks": 4}))
    assert len(problems) == 2
    assert "distill.batch_size = 3" in problems[0] and "protection.agem_windows = 2" in problems[1]
    assert launch_problems(ROOT / "runs" / "x", config, profile(student={"ranks": 2})) == []
