"""Ledger, queue state, requeueing, costs and checks of a run on Slurm; all without Slurm."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from cpd.cluster.estimate import (
    WORTHWHILE,
    costs,
    disk,
    launch_problems,
    paying_windows,
    rank_lines,
    step_seconds,
)
from cpd.cluster.ledger import LedgerEntry, append, ledger
from cpd.cluster.queue import (
    UNKNOWN,
    JobState,
    _parse,
    compact,
    foreign_variables,
    hides_jobs,
    outside_of_jobs,
    state_in_log,
)
from cpd.cluster.reconcile import queue_state, slurm_entries
from cpd.cluster.requeue import (
    check_code,
    describe_unfinished,
    hand_back,
    is_stuck,
    slurm_job,
    unfinished_dependencies,
)
from cpd.comm import SerialComm
from cpd.config.load import load
from cpd.config.profile import PROFILES, Profile, load_profile
from cpd.run.checkpoint import save
from cpd.run.directory import Run
from cpd.run.files import write_json
from cpd.run.interrupt import LAUNCHER_VARIABLE
from cpd.run.lease import CODE_VARIABLE, Holder, Lease, LeaseLostError
from cpd.run.progress import Status, read_status
from cpd.run.provenance import code_version
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


def test_arrays_are_named_as_one() -> None:
    assert compact(["9", "7_3", "7_0", "7_1", "7_2", "5_4", "7_7", "7_3"]) == ["9", "7_[0-3,7]", "5_[4]"]


def test_a_job_that_the_cluster_hides_is_not_submitted_again(make_run) -> None:
    run: Run = make_run()
    drawer, window = run.teachers()
    append(run, [entry(run, drawer.name, "12_0", user="alice"), entry(run, window.name, "12_1", user="alice")])
    write_json(drawer.status, {"state": "queued"})
    write_json(window.status, {"state": "stopped"})
    jobs = {job: JobState(job, "", UNKNOWN, reason="hidden") for job in ("12_0", "12_1")}
    state = queue_state(run, slurm_entries(run), jobs)
    assert (list(state.held), state.active) == ([drawer.name], {})
    assert hides_jobs("Prio = x\nPrivateData             = accounts,jobs,usage\n")
    assert not hides_jobs("PrivateData             = none\nJobs = jobs\n")


@pytest.mark.parametrize("recovers", [True, False])
def test_a_controller_that_does_not_answer_is_asked_again_until_the_grace_time_is_over(
    make_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recovers: bool
) -> None:
    run: Run = make_run()
    student = run.students()[0]
    write_json(run.root / "profile.json", {"signal_seconds": 60 if recovers else 2})
    # The first answers are the controller's silence; the job is running.
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        f"#!/bin/sh\necho $* >> {tmp_path}/calls\n"
        f"[ $(wc -l < {tmp_path}/calls) -gt {1 if recovers else 99} ] || "
        "{ echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1; }\n"
        "echo JobId=5 JobState=RUNNING BatchFlag=1 Requeue=1\n"
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.delenv(LAUNCHER_VARIABLE, raising=False)
    lines: list[str] = []
    hand_back(run, student, SerialComm(), lines.append)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(lines) == 2
    record = read_status(student.status)
    if recovers:
        assert record.state == "queued"
        assert calls == ["show job -o 5"] * 2 + ["requeue 5"]
    else:
        assert record.state == "stopped" and "Unable to contact slurm controller" in record.message
        assert set(calls) == {"show job -o 5"}


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


def test_code_that_changed_since_submission_is_noted_or_refused(
    make_run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from jobs import teacher as command

    run: Run = make_run()
    drawer, window = run.teachers()
    append(run, [entry(run, drawer.name, "1", code="abc"), entry(run, window.name, "1", code=code_version())])
    monkeypatch.setenv(CODE_VARIABLE, "")
    lines: list[str] = []
    assert check_code(run, window, lines.append) == "" == check_code(run, drawer, lines.append)
    (note,) = lines
    assert "abc" in note and code_version() in note
    assert Holder.current().code == code_version()
    write_json(run.root / "profile.json", {"code_changes": "refuse"})
    assert command.main([str(run.root), drawer.name]) == 2
    assert "abc" in capsys.readouterr().err
    assert (read_status(drawer.status).state, check_code(run, window, lines.append)) == ("failed", "")


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


def test_variables_that_slurm_reads_as_options_reach_neither_its_commands_nor_jobs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ["SLURM_JOB_ID", "SLURM_CLUSTERS", "SBATCH_EXPORT", "SQUEUE_FORMAT", "SCANCEL_STATE", "SACCT_FORMAT"]
    options += ["SCONTROL_ALL", "SRUN_CPUS_PER_TASK", "PMI_SIZE", "PMIX_RANK", "SLURMD_NODENAME"]
    for key in (*options, "SLURM_CONF", "SLURM_JWT", "SLURMISH", "MY_SLURM_X"):
        monkeypatch.setenv(key, "x")
    assert set(options) <= set(foreign_variables())
    with outside_of_jobs():
        assert foreign_variables() == []
        assert {"SLURM_CONF", "SLURM_JWT", "SLURMISH", "MY_SLURM_X"} <= os.environ.keys()
    assert os.environ["SQUEUE_FORMAT"] == "x"


def test_jobs_are_read_from_squeue_whatever_their_names_hold() -> None:
    text = "12_0|12|PENDING||Priority|a|b\n13|13|RUNNING|n1|None|x\n14|y\n|\ufffd\n\n15|15|CANCELLED by 7|n2||z\n"
    assert list(_parse(text).values()) == [
        JobState("12_0", "a|b", "PENDING", "", "Priority", "12"),
        JobState("13", "x", "RUNNING", "n1", "", "13"),
        JobState("15", "z", "CANCELLED", "n2", "", "15"),
    ]


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


@pytest.mark.parametrize("name", ["a%jb", "100%", "a\nb", "a\\b", "\x1b[0m"])
def test_a_run_directory_that_slurm_would_rewrite_is_refused(make_run, name: str) -> None:
    config = make_run().config
    (problem,) = launch_problems(ROOT / "runs" / name, config, profile())
    assert repr(name)[1:-1] in problem
    assert len(launch_problems(ROOT / "runs" / name, config, load_profile("local"))) == (
        name not in ("100%", "a\\b")
    )


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


def test_more_ranks_pay_for_large_batches_as_the_documentation_says(make_run) -> None:
    run: Run = make_run(distill={"batch_size": 256})
    (line,) = rank_lines(run, run.elements())
    assert f" {run.config.distill.batch_size} windows" in line
    paying = paying_windows(run.config)
    assert f" {paying} " in line and paying > 256
    one, two = (step_seconds(run.config, paying, ranks) for ranks in (1, 2))
    assert (
        one / two
        >= 2 * WORTHWHILE
        > step_seconds(run.config, paying // 2) / step_seconds(run.config, paying // 2, 2)
    )
    default = load_recipe("cw10", [])
    page = (ROOT / "docs" / "slurm.md").read_text()
    rows = re.findall(r"^\| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    assert [int(row[0].replace(",", "")) for row in rows] == [2**power for power in range(11)]
    for row in rows:
        ranks = int(row[0].replace(",", ""))
        speeds = [step_seconds(default, size) / step_seconds(default, size, ranks) for size in (256, 4096, 65536)]
        assert list(row[1:]) == [f"{speed:.2f}" for speed in speeds]
    assert {load_profile(path.stem).student.ranks for path in PROFILES.glob("*.toml")} == {1}
