"""What sbatch would be told: everything about submission that needs no Slurm."""

from __future__ import annotations

import itertools
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from cpd.files import write_json
from cpd.lease import Lease
from cpd.ledger import LedgerEntry, append, ledger
from cpd.profile import Profile, load_profile
from cpd.record import Status
from cpd.runs import Run, RunError
from cpd.slurm.estimate import complaints, costs, disk
from cpd.slurm.executor import outside_of_jobs
from cpd.slurm.job import describe_unfinished, is_stuck, slurm_job, unfinished_dependencies
from cpd.slurm.plan import PlanError, Submission, plan, texts
from cpd.slurm.states import JobState
from cpd.slurm.survey import Survey, slurm_entries, standing
from cpd.strict_load import load
from jobs.launch import main

ROOT = Path(__file__).resolve().parent.parent
NOTHING = Survey({}, {}, frozenset())


def profile(**over: Any) -> Profile:
    return load(Profile, {"cluster": "slurm", "student": {"ranks": 4, "nodes": 2}, **over}, "test")


def options(text: str) -> dict[str, str]:
    """The #SBATCH options of a script."""
    lines = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, flags=re.MULTILINE)
    return {key: "".join(shlex.split(value)) for key, value in lines}


def srun(text: str) -> list[str]:
    """The words of a script's srun."""
    joined = text.replace("\\\n", " ")
    return shlex.split(next(line for line in joined.splitlines() if line.startswith("srun ")))


def tell(run: Run, given: Profile, found: Survey = NOTHING, **choice: Any) -> dict[str, str]:
    """Texts by role and number, e.g. `teacher-1`."""
    submissions = plan(run, given, found, **choice)
    return {re.sub(r"^.*?-(\w+)-[0-9a-f]{6}", r"\1", name): t for name, t in texts(run, given, submissions, found)}


def active(run: Run, *names: str, state: str = "RUNNING") -> Survey:
    """A queue in which the named elements are at work, as jobs 100, 101, ..."""
    return Survey({name: [JobState(str(100 + i), "x", state)] for i, name in enumerate(names)}, {}, frozenset())


def test_the_whole_chain(make_run) -> None:
    run: Run = make_run(seeds=[1, 2], teacher={"seeds": [1, 2]})
    chain = tell(run, profile())
    assert list(chain) == ["teacher-1", "student-2", "student-3", "evaluation-4", "evaluation-5", "report-6"]
    assert options(chain["teacher-1"])["array"] == "0-3%4"
    start = options(chain["teacher-1"])["job-name"].removesuffix("-1")
    # The first student learns from the first teacher of both tasks only.
    assert options(chain["student-2"])["dependency"] == f"afterany:<{start}-1>_0:<{start}-1>_2"
    first, second = (options(chain[f"student-{number}"])["job-name"] for number in (2, 3))
    rows = [options(chain[f"evaluation-{number}"]) for number in (4, 5)]
    assert [row["dependency"] for row in rows] == [f"afterany:<{first}>", f"afterany:<{second}>"]
    assert options(chain["report-6"])["dependency"] == f"afterany:<{rows[0]['job-name']}>:<{rows[1]['job-name']}>"
    for name, text in chain.items():
        assert options(text).get("kill-on-invalid-dep") == (None if name == "teacher-1" else "yes")


def test_one_student_waits_for_the_whole_array(make_run) -> None:
    chain = tell(make_run(), profile())
    name = options(chain["teacher-1"])["job-name"]
    assert options(chain["student-2"])["dependency"] == f"afterany:<{name}>"


def test_ranks_go_through_srun(make_run) -> None:
    chain = tell(make_run(), profile(srun_mpi="pmix", teacher={"cpus": 3, "gpus": 1}))
    student, teacher = chain["student-2"], chain["teacher-1"]
    assert {"--mpi=pmix", "--kill-on-bad-exit=1", "--cpus-per-task=1"} <= set(srun(student))
    assert "--cpus-per-task=3" in srun(teacher)
    assert not any("--mpi" in word for word in srun(teacher))
    given = options(student)
    assert (given["nodes"], given["ntasks-per-node"], given["mem"]) == ("2", "2", "8192M")
    assert options(teacher)["gpus-per-node"] == "1"


def test_jobs_are_told_to_save_and_come_back(make_run) -> None:
    for text in tell(make_run(), profile(signal_seconds=77)).values():
        given = options(text)
        assert given["signal"] == "USR2@77"
        assert given["open-mode"] == "append"
        assert "requeue" in given
        assert "wckey" not in given
    for text in tell(make_run("other"), profile(requeue=False)).values():
        assert "no-requeue" in options(text)
        assert "requeue" not in options(text)


def test_what_a_site_asks_for(make_run) -> None:
    site = profile(
        partition="cpu",
        account="phys",
        qos="long",
        constraint="avx512",
        setup=["module load openmpi"],
        sbatch={"mail-type": "FAIL", "exclusive": True},
        report={"sbatch": {"partition": "", "qos": "short", "exclusive": False}},
    )
    chain = tell(make_run(), site)
    given = options(chain["teacher-1"])
    assert [given[key] for key in ("partition", "account", "qos", "constraint")] == [
        "cpu",
        "phys",
        "long",
        "avx512",
    ]
    assert (given["mail-type"], given["exclusive"]) == ("FAIL", "")
    assert "\nmodule load openmpi\n" in chain["teacher-1"]
    report = options(chain["report-4"])
    assert report["qos"] == "short"
    assert not {"partition", "exclusive"} & set(report)
    assert "memory" not in given
    assert "mem" not in options(tell(make_run("b"), profile(report={"memory_gb": 0}))["report-4"])


def test_only_what_is_missing(make_run) -> None:
    run: Run = make_run()
    drawer, window = run.teachers()
    drawer.path.mkdir(parents=True)
    drawer.complete.touch()
    chain = tell(run, profile())
    assert list(chain) == ["teacher-1", "student-2", "evaluation-3", "report-4"]
    # A single job is no array, and a finished element is never named.
    assert "array" not in options(chain["teacher-1"])
    assert options(chain["student-2"])["dependency"] == f"afterany:<{options(chain['teacher-1'])['job-name']}>"
    window.path.mkdir(parents=True)
    window.rejected.touch()
    assert "dependency" not in options(tell(run, profile())["student-1"])
    for element in run.elements():
        element.path.mkdir(parents=True, exist_ok=True)
        element.complete.touch()
    assert tell(run, profile()) == {}


def test_what_is_in_the_queue_is_not_submitted_again(make_run) -> None:
    run: Run = make_run()
    names = [element.name for element in run.elements()]
    chain = tell(run, profile(), active(run, *names[:2]))
    assert list(chain) == ["student-1", "evaluation-2", "report-3"]
    assert options(chain["student-1"])["dependency"] == "afterany:100:101"
    assert tell(run, profile(), active(run, *names)) == {}


def test_long_arrays_are_split(make_run) -> None:
    run: Run = make_run(stream={"tasks": "mt50"})
    chain = tell(run, profile(max_array_size=20, array_parallelism=7))
    assert [options(chain[f"teacher-{i}"])["array"] for i in (1, 2, 3)] == ["0-19%2", "0-19%2", "0-9%2"]
    names = [options(chain[f"teacher-{i}"])["job-name"] for i in (1, 2, 3)]
    assert options(chain["student-4"])["dependency"] == "afterany:" + ":".join(f"<{name}>" for name in names)


def test_several_teachers_share_a_job_where_jobs_are_few(make_run) -> None:
    run: Run = make_run(stream={"tasks": "mt50"})
    first, *others = plan(run, profile(max_submitted=20), NOTHING)
    # 17 jobs are left beside student, evaluation and report.
    assert sum(len(s.tasks) for s in (first, *others)) <= 20
    assert [len(task) for task in first.tasks] == [3] * 16 + [2]
    assert [element.name for element in first.elements] == [teacher.name for teacher in run.teachers()]
    with pytest.raises(PlanError, match=r"max_submitted \(3\) leaves no room"):
        plan(run, profile(max_submitted=3), NOTHING)


def test_students_learn_while_teachers_train(make_run) -> None:
    run: Run = make_run(stream={"tasks": ["drawer-close-v3", "window-close-v3", "drawer-close-v3", "push-v3"]})
    overlap = profile(order="overlap")
    submissions = plan(run, overlap, NOTHING)
    chain = tell(run, overlap)
    assert [s.role for s in submissions] == ["teacher", *["student", "evaluation"] * 3, "report"]
    assert [s.partial for s in submissions] == [False, True, True, True, True, False, False, False]
    teachers, *names = [submission.name for submission in submissions]
    waits = [options(text).get("dependency", "").removeprefix("afterany:") for text in chain.values()]
    assert waits == [
        "",
        f"<{teachers}>_0",
        f"<{names[0]}>",
        f"<{names[0]}>:<{teachers}>_1",
        f"<{names[1]}>:<{names[2]}>",
        f"<{names[2]}>:<{teachers}>_2",
        f"<{names[3]}>:<{names[4]}>",
        f"<{names[5]}>",
    ]
    drawer, *others = run.teachers()
    drawer.path.mkdir(parents=True)
    drawer.complete.touch()
    # What can be learnt already is learnt at once.
    first = plan(run, overlap, NOTHING)[1]
    assert (first.role, first.partial, first.needs) == ("student", True, ())
    for teacher in others:
        teacher.path.mkdir(parents=True)
        teacher.complete.touch()
    assert [(s.role, s.partial) for s in plan(run, overlap, NOTHING)] == [
        ("student", False),
        ("evaluation", False),
        ("report", False),
    ]


def test_every_method_has_a_chain_of_its_own_over_the_same_teachers(make_run) -> None:
    run: Run = make_run(seeds=[1, 2], variants={"ewc": {"memory": {"selection": "none"}}})
    submissions = plan(run, profile(), NOTHING)
    names = [[element.name for element in submission.elements] for submission in submissions]
    assert names[0] == [teacher.name for teacher in run.teachers()]
    assert names[1:5] == [[s.name] for s in run.students()]
    assert names[5:9] == [[e.name] for e in run.evaluations()]
    assert names[9:] == [["results"]]
    assert all(submission.needs == tuple(run.teachers()) for submission in submissions[1:5])
    first, second = plan(run, profile(), active(run, *names[0]), only=["students/ewc/seed-2"])
    assert (first.elements, second.needs) == ([run.students()[3]], (run.students()[3],))


def test_only_some_elements(make_run) -> None:
    run: Run = make_run()
    drawer = run.teachers()[0].name
    assert [s.elements[0].name for s in plan(run, profile(), NOTHING, only=["teachers/drawer-close-v3"])] == [
        drawer
    ]
    assert len(plan(run, profile(), NOTHING, only=["teachers/"])) == 1
    with pytest.raises(RunError, match=r"--only teachers/drawer: .* has no such element; it has\n  teachers/draw"):
        plan(run, profile(), NOTHING, only=["teachers/drawer"])
    with pytest.raises(
        PlanError, match=r"seed-1 needs teachers/window-close-v3/seed-1, which is neither finished"
    ):
        plan(run, profile(), active(run, drawer), only=["students/moe/seed-1"])


def test_only_what_failed(make_run) -> None:
    run: Run = make_run()
    drawer, window = run.teachers()
    assert plan(run, profile(), NOTHING, retry_failed=True) == []
    append(run, [entry(run, drawer.name, "1"), entry(run, "students/moe/seed-1", "2")])
    Status(drawer.status).finish("failed", "ValueError: x")
    window.path.mkdir(parents=True)
    window.complete.touch()
    again = plan(run, profile(), NOTHING, retry_failed=True)
    assert [s.elements[0].name for s in again] == [
        drawer.name,
        "students/moe/seed-1",
        "students/moe/seed-1/evaluation",
        "results",
    ]


def entry(run: Run, path: str, job: str, **more: Any) -> LedgerEntry:
    element = next(element for element in run.elements() if element.name == path)
    return LedgerEntry(path, element.role, element.index, job, "", 0.0, cluster="slurm", **more)


def test_names_are_unique_in_ledger_and_queue(make_run) -> None:
    run: Run = make_run()
    first = plan(run, profile(), NOTHING)
    append(run, [entry(run, "results", "", name=first[-1].name)])
    taken = Survey({}, {}, frozenset({first[-1].name.rpartition("-")[0] + "-9", "else-teacher-abcdef-40"}))
    names = [submission.name for found in (NOTHING, taken) for submission in plan(run, profile(), found)]
    assert [int(name.rpartition("-")[2]) for name in names] == [5, 6, 7, 8, 10, 11, 12, 13]
    assert len(set(names)) == len(names)


def test_the_second_line_of_a_submission_replaces_its_first(make_run) -> None:
    run: Run = make_run()
    append(run, [entry(run, "results", "", name="a-1")])
    append(run, [entry(run, "results", "12", name="a-1")])
    with run.ledger.open("a") as file:
        file.write('{"element": "results", "ro')  # killed here
    append(run, [entry(run, "results", "", name="a-2")])
    assert [(e.job, e.name) for e in ledger(run)["results"]] == [("12", "a-1"), ("", "a-2")]


def test_where_elements_stand(make_run, monkeypatch: pytest.MonkeyPatch) -> None:
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
        found = standing(run, slurm_entries(run), jobs)
        monkeypatch.setenv("SLURM_JOB_ID", "13")
        with Lease(window.path).acquire():
            # Its heart still beats, but Slurm has ended it.
            assert window.name not in standing(run, slurm_entries(run), jobs).held
    jobs_of = {name: [job.job for job in own] for name, own in found.active.items()}
    assert jobs_of == {drawer.name: ["12_0"], student.name: ["14"]}
    monkeypatch.delenv("SLURM_JOB_ID")
    with Lease(window.path).acquire():
        assert f"process {os.getpid()}" in standing(run, slurm_entries(run), jobs).held[window.name]


def test_a_requeued_job_takes_its_own_lease_over_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    with Lease(tmp_path).acquire() as before:
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        with Lease(tmp_path).acquire() as after:
            assert (before.number, after.number) == (1, 2)
            with pytest.raises(RuntimeError, match="taken over"):
                before.check()


def test_an_array_element_is_never_taken_for_its_array(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"JOB_ID": "12", "ARRAY_JOB_ID": "12", "ARRAY_TASK_ID": "3"}.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    assert slurm_job() == "12_3"


def test_an_element_names_what_it_lacks(make_run, capsys: pytest.CaptureFixture[str]) -> None:
    from jobs import distill

    run: Run = make_run()
    student = run.students()[0]
    Status(run.teachers()[0].status).finish("failed", "ValueError: no luck")
    lacking = unfinished_dependencies(run, student)
    assert [element.name for element in lacking] == [teacher.name for teacher in run.teachers()]
    assert "drawer-close-v3/seed-1 (failed: ValueError: no luck), teachers/" in describe_unfinished(lacking)
    assert distill.main([str(run.root)]) == 3
    assert "not started, since it needs teachers/drawer-close-v3/seed-1 (failed" in capsys.readouterr().err
    assert "since it needs teachers/drawer" in student.status.read_text()


def test_only_requeues_without_progress_count(make_run) -> None:
    run: Run = make_run()
    student = run.students()[0]
    write_json(run.root / "profile.json", {"max_timeouts": 2})
    status = Status(student.status)
    status.begin("distill", 100, 10)
    assert [is_stuck(run, student, "5") for _ in range(2)] == [False, False]
    status.advance(20, force=True)
    assert [is_stuck(run, student, "5") for _ in range(3)] == [False, False, True]
    # A new submission starts anew.
    assert not is_stuck(run, student, "6")


def test_submitting_from_inside_a_job_leaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "100")
    monkeypatch.setenv("SLURM_CONF", "/etc/x.conf")
    with outside_of_jobs():
        assert {key for key in os.environ if key.startswith("SLURM_")} == {"SLURM_CONF"}
    assert os.environ["SLURM_MEM_PER_NODE"] == "100"


def test_dry_run_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    recipe, root = str(ROOT / "tests" / "recipes" / "miniature.toml"), tmp_path / "run"
    assert main([recipe, "--profile", "testbed", "--run-dir", str(root), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert not root.exists()
    assert text.count("#!/bin/bash") == 4
    assert "4 calls of sbatch, 5 jobs, 5 of 5 elements (0 finished, 0 in the queue)" in text
    assert "core-hours" in text
    assert "squeue not found: this machine is no login node" in text


def test_launching_without_slurm_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    recipe = str(ROOT / "tests" / "recipes" / "miniature.toml")
    assert main([recipe, "--profile", "testbed", "--run-dir", str(tmp_path / "run")]) == 2
    assert "squeue not found" in capsys.readouterr().err
    assert main([recipe, "--profile", "local", "--run-dir", str(tmp_path / "run"), "--cancel"]) == 2


def test_costs_and_disk(make_run) -> None:
    run: Run = make_run()
    found = {cost.role: cost for cost in costs(run, profile(), run.elements())}
    assert [found[role].count for role in ("teacher", "student", "evaluation", "report")] == [2, 1, 1, 1]
    assert found["student"].cores == 4
    assert not found["teacher"].is_measured
    drawer = run.teachers()[0]
    write_json(drawer.status, {"state": "done", "seconds": {"train": 40.0, "rollouts": 2.0}})
    drawer.complete.touch()
    measured = costs(run, profile(), run.elements()[1:])[0]
    assert (measured.count, measured.seconds, measured.is_measured) == (1, 42.0, True)
    size, files = disk(run.config)
    bigger, more = disk(make_run("b", seeds=[1, 2], rollouts={"num_steps": 6000}).config)
    assert 1e6 < size < bigger < 1e8
    assert 50 < files < more


def test_a_run_directory_that_jobs_cannot_see_is_refused(make_run) -> None:
    config = make_run().config
    assert "usually local to a node" in complaints(Path("/tmp/x/run"), config, profile())[0]
    assert complaints(Path("/tmp/x/run"), config, profile(single_machine=True)) == []
    assert complaints(ROOT / "runs" / "x", config, load_profile("local")) == []


SCRIPTS = {"teacher": "teachers", "student": "distill", "evaluation": "evaluate", "report": "report"}
VARYING = {"array", "dependency", "job-name", "kill-on-invalid-dep", "output"}


def test_plain_scripts_ask_for_what_the_launcher_asks_for(make_run) -> None:
    chain = {name.partition("-")[0]: text for name, text in tell(make_run(), load_profile("generic")).items()}
    assert set(chain) == set(SCRIPTS)
    for role, script in SCRIPTS.items():
        plain = (ROOT / "slurm" / f"{script}.sbatch").read_text()
        launched = chain[role]
        kept = [{k: v for k, v in options(text).items() if k not in VARYING} for text in (plain, launched)]
        assert kept[0] == kept[1], script
        # Up to the program, srun is told the same; the logs go to the same place.
        words = [itertools.takewhile(lambda word: "python" not in word, srun(text)) for text in (plain, launched)]
        values = {"$SLURM_CPUS_PER_TASK": kept[0]["cpus-per-task"], "${SRUN_MPI:-pmi2}": "pmi2"}
        substituted = []
        for word in words[0]:
            for variable, value in values.items():
                word = word.replace(variable, value)
            substituted.append(re.sub(r"^.*/logs/", "logs/", word))
        launched_words = [re.sub(r"^.*/logs/", "logs/", word) for word in words[1]]
        assert [word for word in substituted if "PYTHON" not in word] == launched_words, script


def test_submissions_know_their_elements(make_run) -> None:
    teachers = tuple(make_run().teachers())
    assert Submission("a", "teacher", ((teachers[0],), (teachers[1],))).elements == list(teachers)
