"""Plans and sbatch texts: all of submission that needs no Slurm."""

from __future__ import annotations

import itertools
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cpd.cluster.ledger import LedgerEntry, append
from cpd.cluster.plan import PlanError, Submission, plan, texts
from cpd.cluster.queue import JobState
from cpd.cluster.reconcile import QueueState
from cpd.config.load import ConfigError, load
from cpd.config.profile import Profile, load_profile
from cpd.run.directory import Run, RunError
from cpd.run.progress import Status
from jobs.launch import main

ROOT = Path(__file__).resolve().parents[2]
NOTHING = QueueState({}, {}, frozenset())


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


def tell(run: Run, limits: Profile, queued: QueueState = NOTHING, **choice: Any) -> dict[str, str]:
    """Texts by role and number, e.g. `teacher-1`."""
    submissions = plan(run, limits, queued, **choice)
    return {
        re.sub(r"^.*?-(\w+)-[0-9a-f]{6}", r"\1", name): t for name, t in texts(run, limits, submissions, queued)
    }


def active(run: Run, *names: str, state: str = "RUNNING") -> QueueState:
    """A queue in which the named elements have jobs 100, 101, ..."""
    return QueueState(
        {name: [JobState(str(100 + i), "x", state)] for i, name in enumerate(names)}, {}, frozenset()
    )


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
    student_options = options(student)
    assert [student_options[key] for key in ("nodes", "ntasks-per-node", "mem")] == ["2", "2", "8192M"]
    assert options(teacher)["gpus-per-node"] == "1"


def test_gpus_are_per_rank(make_run) -> None:
    chain = tell(make_run(), profile(student={"ranks": 4, "nodes": 2, "gpus": 2}))
    assert options(chain["student-2"])["gpus-per-node"] == "4"
    assert not [key for key in options(chain["teacher-1"]) if key.startswith("g")]
    gres = tell(make_run("b"), profile(student={"sbatch": {"gres": "gpu:a100:1"}}))
    assert options(gres["student-2"])["gres"] == "gpu:a100:1"


def test_options_of_a_profile_replace_the_launchers(make_run) -> None:
    student_sbatch = {"gpus-per-node": "a100:1", "mem-per-cpu": "4G"}
    text = tell(make_run(), profile(student={"gpus": 1, "sbatch": student_sbatch}))["student-2"]
    assert re.findall(r"--gpus-per-node=(\S+)", text) == ["a100:1"]
    assert not re.findall(r"--mem=", text) and "--mem-per-cpu=4G" in text
    for key in ("cpus-per-task", "ntasks-per-node", "time"):
        with pytest.raises(ConfigError, match=f"sbatch: '{key}'"):
            profile(sbatch={key: 4})


def test_jobs_are_signalled_to_save_and_may_be_requeued(make_run) -> None:
    for text in tell(make_run(), profile(signal_seconds=77)).values():
        job_options = options(text)
        assert job_options["signal"] == "USR2@77"
        assert job_options["open-mode"] == "append"
        assert "requeue" in job_options
        assert "wckey" not in job_options
    for text in tell(make_run("other"), profile(requeue=False)).values():
        assert "no-requeue" in options(text)
        assert "requeue" not in options(text)


def test_options_of_a_site(make_run) -> None:
    site = profile(
        partition="cpu",
        account="phys",
        qos="long",
        constraint="avx512",
        modules=["gcc/13", "openmpi/5.0"],
        setup=["export A=1"],
        sbatch={"mail-type": "FAIL", "exclusive": True},
        report={"sbatch": {"partition": "", "qos": "short", "exclusive": False}},
    )
    chain = tell(make_run(), site)
    teacher_options = options(chain["teacher-1"])
    assert [teacher_options[key] for key in ("partition", "account", "qos", "constraint")] == [
        "cpu",
        "phys",
        "long",
        "avx512",
    ]
    assert (teacher_options["mail-type"], teacher_options["exclusive"]) == ("FAIL", "")
    assert re.search(r"\nmodule load gcc/13 openmpi/5.0 \|\|.*\nexport A=1\n(.*\n)*srun ", chain["teacher-1"])
    report = options(chain["report-4"])
    assert report["qos"] == "short"
    assert not {"partition", "exclusive"} & set(report)
    assert "memory" not in teacher_options
    assert "mem" not in options(tell(make_run("b"), profile(report={"memory_gb": 0}))["report-4"])


def test_only_unfinished_elements_are_submitted(make_run) -> None:
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
        if not element.finished:
            element.complete.touch()
    assert tell(run, profile()) == {}


def test_queued_elements_are_not_submitted_again(make_run) -> None:
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
    with pytest.raises(PlanError, match=r"max_submitted \(3\)"):
        plan(run, profile(max_submitted=3), NOTHING)
    for teacher in run.teachers():
        teacher.path.mkdir(parents=True)
        teacher.complete.touch()
    assert len(plan(run, profile(max_submitted=3), NOTHING)) == 3
    with pytest.raises(PlanError, match=r"max_submitted \(2\).* 3 "):
        plan(run, profile(max_submitted=2), NOTHING)


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
    # The stages of finished teachers are trained at once.
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


def test_students_of_the_same_teachers_form_an_array_and_their_evaluations_follow_one_by_one(make_run) -> None:
    run: Run = make_run(seeds=[1, 2], variants={"ewc": {"memory": {"selection": "none"}}})
    submissions = plan(run, profile(array_parallelism=1), NOTHING)
    assert [submission.elements for submission in submissions] == [
        run.teachers(),
        run.students(),
        run.evaluations(),
        [run.report()],
    ]
    chain = tell(run, profile(array_parallelism=1))
    teachers, students, evaluations, _ = (f"<{submission.name}>" for submission in submissions)
    waits = [options(text).get("dependency") for text in chain.values()]
    corresponding = f"aftercorr:{students}?afterany:{students}"
    assert waits == [None, f"afterany:{teachers}", corresponding, f"afterany:{evaluations}"]
    assert [options(text).get("array") for text in chain.values()] == ["0-1%1", "0-3%4", "0-3%4", None]
    assert "%A_%a_0_log.out" in options(chain["student-2"])["output"]
    first, second = plan(
        run, profile(), active(run, *(t.name for t in run.teachers())), only=["students/ewc/seed-2"]
    )
    assert (first.elements, second.needs) == ([run.students()[3]], (run.students()[3],))


def test_arrays_of_students_are_split_and_those_of_other_teachers_are_apart(make_run) -> None:
    run: Run = make_run(seeds=[1, 2, 3, 4], teacher={"seeds": [1, 2]}, variants={"a": {}})
    submissions = plan(run, profile(max_array_size=3), NOTHING)
    students = [[e.index for e in s.elements] for s in submissions if s.role == "student"]
    # Students 1 and 3 of each method learn from the first teachers.
    assert students == [[0, 2, 4], [6], [1, 3, 5], [7]]
    rows = [s for s in submissions if s.role == "evaluation"]
    assert sorted([[e.index for e in s.elements], s.is_paired] for s in rows) == [
        [[0, 2, 4], True],
        [[1, 3, 5], True],
        [[6], False],
        [[7], False],
    ]
    with pytest.raises(PlanError, match=r"max_submitted \(17\).* 17 other"):
        plan(run, profile(max_submitted=17), NOTHING)


def test_evaluations_of_a_partly_finished_run(make_run) -> None:
    run: Run = make_run(seeds=[1, 2, 3, 4])
    for element in (*run.teachers(), *run.students()[:2]):
        element.path.mkdir(parents=True)
        element.complete.touch()
    _, _, third, fourth = run.students()
    rows = run.evaluations()
    # Nothing keeps two of the evaluations waiting; the others follow their students, which are an array of two.
    assert [([e.index for e in s.elements], s.needs) for s in plan(run, profile(), NOTHING)] == [
        ([2, 3], ()),
        ([2, 3], (third, fourth)),
        ([0, 1], ()),
        ([0], tuple(rows)),
    ]
    # The third student is in the queue: its evaluation has no place in the array of the others.
    alone = plan(run, profile(), active(run, third.name))
    assert [([e.index for e in s.elements], s.is_paired) for s in alone if s.role == "evaluation"] == [
        ([0, 1], False),
        ([2], False),
        ([3], False),
    ]
    # One evaluation is being written by hand.
    held = QueueState({}, {rows[3].name: "process 1"}, frozenset())
    others = plan(run, profile(), held, only=[e.name for e in (*run.students(), *rows)])
    assert [([e.index for e in s.elements], s.needs, s.is_paired) for s in others if s.role == "evaluation"] == [
        ([0, 1], (), False),
        ([2], (third,), False),
    ]


def test_students_learn_in_arrays_while_teachers_train(make_run) -> None:
    run: Run = make_run(seeds=[1, 2], variants={"a": {}})
    overlap = profile(order="overlap")
    submissions = plan(run, overlap, NOTHING)
    assert [(s.role, len(s.tasks)) for s in submissions] == [
        ("teacher", 2),
        *[("student", 4), ("evaluation", 4)] * 2,
        ("report", 1),
    ]
    teachers, *names = [submission.name for submission in submissions]
    waits = [options(text).get("dependency") for text in tell(run, overlap).values()]
    assert waits[1:] == [
        f"afterany:<{teachers}>_0",
        f"afterany:<{names[0]}>",
        f"afterany:<{names[0]}>:<{teachers}>_1",
        f"afterany:<{names[1]}>:<{names[2]}>",
        f"afterany:<{names[3]}>",
    ]
    # Students in the queue stay there; their evaluations need no alternation.
    names = [e.name for e in (*run.teachers(), *run.students())]
    assert [(s.role, len(s.tasks)) for s in plan(run, overlap, active(run, *names))] == [
        *[("evaluation", 1)] * 4,
        ("report", 1),
    ]


def test_added_seeds_are_submitted_beside_queued_jobs(make_run) -> None:
    variants = {"ewc": {"memory": {"selection": "none"}}}
    queued = active(begun := make_run(variants=variants), *(element.name for element in begun.elements()))
    run: Run = make_run("grown", seeds=[1, 2], variants=variants)
    students, evaluations = plan(run, profile(), queued)
    assert [element.name for element in (*students.elements, *evaluations.elements)] == [
        "students/moe/seed-2",
        "students/ewc/seed-2",
        "students/moe/seed-2/evaluation",
        "students/ewc/seed-2/evaluation",
    ]
    assert (students.needs, evaluations.is_paired) == (tuple(run.teachers()), True)


def test_only_some_elements(make_run) -> None:
    run: Run = make_run()
    drawer = run.teachers()[0].name
    assert [s.elements[0].name for s in plan(run, profile(), NOTHING, only=["teachers/drawer-close-v3"])] == [
        drawer
    ]
    assert len(plan(run, profile(), NOTHING, only=["teachers/"])) == 1
    with pytest.raises(RunError, match=r"teachers/drawer: (.*\n)*.*'teachers/drawer-close-v3'"):
        plan(run, profile(), NOTHING, only=["teachers/drawer"])
    with pytest.raises(PlanError, match=r"students/moe/seed-1 .*teachers/window-close-v3/seed-1"):
        plan(run, profile(), active(run, drawer), only=["students/moe/seed-1"])


def test_only_failed_elements_and_their_dependents_are_retried(make_run) -> None:
    run: Run = make_run()
    drawer, window = run.teachers()
    assert plan(run, profile(), NOTHING, retry_failed=True) == []
    append(run, [entry(run, drawer.name, "1"), entry(run, "students/moe/seed-1", "2")])
    Status(drawer.status).finish("failed", "ValueError: x")
    window.path.mkdir(parents=True)
    window.complete.touch()
    assert plan(run, profile(), NOTHING, ["teachers/window-close-v3"], retry_failed=True) == []
    again = plan(run, profile(), NOTHING, retry_failed=True)
    assert [s.elements[0].name for s in again] == [
        drawer.name,
        "students/moe/seed-1",
        "students/moe/seed-1/evaluation",
        "results",
    ]


def test_elements_that_were_never_submitted_have_not_failed(make_run) -> None:
    run: Run = make_run()
    for number, teacher in enumerate(run.teachers()):
        append(run, [entry(run, teacher.name, str(number))])
        teacher.path.mkdir(parents=True)
        Status(teacher.status).finish("done")
        teacher.complete.touch()
    assert plan(run, profile(), NOTHING, retry_failed=True) == []
    append(run, [entry(run, "students/moe/seed-1", "7")])
    Status(run.students()[0].status).finish("failed", "killed")
    running = active(run, "students/moe/seed-1")
    assert plan(run, profile(), running, retry_failed=True) == []


def entry(run: Run, path: str, job: str, **more: Any) -> LedgerEntry:
    element = next(element for element in run.elements() if element.name == path)
    return LedgerEntry(path, element.role, job, "", 0.0, cluster="slurm", **more)


def test_names_are_unique_in_ledger_and_queue(make_run) -> None:
    run: Run = make_run()
    first = plan(run, profile(), NOTHING)
    append(run, [entry(run, "results", "", name=first[-1].name)])
    with_names = QueueState(
        {}, {}, frozenset({first[-1].name.rpartition("-")[0] + "-9", "else-teacher-abcdef-40"})
    )
    names = [submission.name for queued in (NOTHING, with_names) for submission in plan(run, profile(), queued)]
    assert [int(name.rpartition("-")[2]) for name in names] == [5, 6, 7, 8, 10, 11, 12, 13]
    assert len(set(names)) == len(names)


def test_dry_run_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    recipe, root = str(ROOT / "tests" / "recipes" / "miniature.toml"), tmp_path / "run"
    assert main([recipe, "--profile", "testbed", "--run-dir", str(root), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert not root.exists()
    assert text.count("#!/bin/bash") == 4
    assert "4 calls of sbatch, 5 jobs, 5 of 5 elements (0 finished, 0 in the queue)" in text
    assert "core-hours" in text
    assert "squeue" in text


def test_launching_without_slurm_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    recipe = str(ROOT / "tests" / "recipes" / "miniature.toml")
    assert main([recipe, "--profile", "testbed", "--run-dir", str(tmp_path / "run")]) == 2
    assert "squeue" in capsys.readouterr().err
    assert main([recipe, "--profile", "local", "--run-dir", str(tmp_path / "run"), "--cancel"]) == 2


SCRIPTS = {"teacher": "teachers", "student": "distill", "evaluation": "evaluate", "report": "report"}
VARYING = {"array", "dependency", "job-name", "kill-on-invalid-dep", "output"}


def test_plain_scripts_have_the_launchers_options(make_run) -> None:
    generic = load_profile("generic")
    # The scripts also run on several ranks, whose options of srun the launcher leaves out for one.
    several = replace(generic, student=replace(generic.student, ranks=2))
    chain, of_several = (
        {name.partition("-")[0]: text for name, text in tell(make_run(name), site).items()}
        for name, site in (("one", generic), ("several", several))
    )
    assert set(chain) == set(SCRIPTS)
    for role, script in SCRIPTS.items():
        plain = (ROOT / "slurm" / f"{script}.sbatch").read_text()
        launched = chain[role]
        kept = [{k: v for k, v in options(text).items() if k not in VARYING} for text in (plain, launched)]
        assert kept[0] == kept[1], script
        # Up to the program, both pass srun the same options; logs have the same names.
        words = [
            itertools.takewhile(lambda word: "python" not in word, srun(text))
            for text in (plain, of_several[role])
        ]
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
