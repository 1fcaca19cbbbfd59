"""Gathering of results, against measures computed by hand."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from analysis.dataset import load_dataset
from analysis.terminal import usage_lines
from cpd.evaluation.gather import gather
from cpd.evaluation.results_folder import read_tables
from cpd.evaluation.summary import summarize
from cpd.reading import DamagedFileError
from cpd.run.directory import Run, RunError
from cpd.run.files import write_json
from cpd.run.progress import MetricsLog
from cpd.run.tables import EpisodeRow, EvaluationRow, LossRow, PlanRow, StageRow, TeacherRow, read_rows
from tests.synthetic_run import write_run

STREAM = ("drawer-close-v3", "handle-press-side-v3", "window-close-v3")
RATES = np.array(
    [
        [0.1, 0.0, 0.0],
        [0.9, 0.1, 0.0],
        [0.7, 0.8, 0.2],
        [0.5, 0.9, 0.96],
    ]
)
MORE = "losses.csv stages.csv usage.csv retrieval.csv"
TEACHERS = dict(zip(STREAM, (1.0, 0.9, 0.8), strict=True))


def strip(report: dict) -> dict:
    return {
        key: value for key, value in json.loads(json.dumps(report)).items() if key not in ("kind", "provenance")
    }


def test_measures_by_hand(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", stream=STREAM, students={1: RATES}, teachers=TEACHERS)
    report = gather(run)
    (student,) = report["students"]
    assert student["final_stage"] == 2
    assert student["average_performance"]["value"] == pytest.approx((0.5 + 0.9 + 0.96) / 3)
    assert student["forgetting"]["value"] == pytest.approx((0.4 - 0.1) / 2)
    assert student["forgetting_over_all"] == pytest.approx(0.1)
    assert student["forgetting_max_based"] == pytest.approx((0.4 - 0.1) / 2)
    assert student["most_forgotten"] == "drawer-close-v3"
    assert student["recovery"]["value"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert student["recovery_unclipped"] == pytest.approx((0.5 + 1 + 1.2) / 3)
    assert student["recovery_ratio_of_means"] == pytest.approx(2.36 / 2.7)
    assert student["least_recovered"] == "drawer-close-v3"
    assert student["average_by_stage"] == pytest.approx([0.1 / 3, 1 / 3, 1.7 / 3, 2.36 / 3])
    assert student["average_seen_by_stage"][1:] == pytest.approx([0.9, 0.75, 2.36 / 3])
    task = student["tasks"][1]
    assert task["own"]["successes"] == 40
    assert task["own"]["episodes"] == 50
    assert task["final_training"]["rate"] == pytest.approx(0.9)
    assert task["before"] == {
        "successes": 0,
        "episodes": 10,
        "rate": 0.0,
        "low": 0.0,
        "high": task["before"]["high"],
    }
    # From .1 before the first stage to .9, reached at six tenths of it, counted in tenths of episodes.
    rises = [round(10 * (0.1 + 0.8 * min(1.0, point / 6))) / 10 for point in range(1, 11)]
    expected = (0.1 / 2 + sum(rises[:-1]) + rises[-1] / 2) / 10
    assert student["areas"][0] == pytest.approx(expected)
    for measure in ("average_performance", "forgetting", "recovery"):
        assert student[measure]["low"] <= student[measure]["value"] <= student[measure]["high"]
        assert report["methods"][0][measure]["mean"]["estimate"] == pytest.approx(student[measure]["value"])
        assert report["methods"][0][measure]["mean"]["low"] is None
    assert report["missing"] == []


def test_gathered_tables_hold_every_row_and_suffice_alone(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", stream=STREAM, students={1: RATES}, teachers=TEACHERS)
    report = gather(run)
    rows = read_rows(run.results / "evaluations.csv", EvaluationRow)
    assert len(rows) == 3 + 4 * 3 + 3
    episodes = read_rows(run.results / "episodes.csv", EpisodeRow)
    assert len(episodes) == sum(row.episodes for row in rows)
    assert sum(episode.success for episode in episodes) == sum(row.successes for row in rows)
    assert report["labels"]["metaworld"] == "3.1.1"
    assert "command" not in report["provenance"]

    copy = tmp_path / "elsewhere"
    shutil.copytree(run.results, copy)
    shutil.rmtree(run.root)
    kept = json.loads((copy / "metrics.json").read_text())
    assert strip(kept) == strip(summarize(read_tables(copy)).to_json())


def test_gathering_again_changes_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", stream=STREAM, students={1: RATES}, teachers=TEACHERS)
    student, spans = run.students()[0], [("distill", 0.0, 1800.0), ("distill", 5400.0, 7200.0)]
    write_json(student.status, {"state": "done", "cpu_seconds": 5400.0, "spans": spans})
    write_json(run.root / "profile.json", {"cluster": "slurm", "student": {"nodes": 4, "cpus": 2}})
    gather(run)
    timings = load_dataset([run.results]).timings
    assert usage_lines(timings) == ["student: 4 node-hours, 75 % of the cores' time used"]
    gathered = {path.name: path.read_bytes() for path in run.results.iterdir()}
    gather(Run(run.root))
    assert gathered == {path.name: path.read_bytes() for path in run.results.iterdir()}
    names = "config.json evaluations.csv episodes.csv curves.csv teachers.csv teacher_curves.csv"
    assert set(gathered) == {*names.split(), *MORE.split(), "timings.json", "metrics.json"}


def test_a_rejected_teacher_is_named_and_counts_as_zero(tmp_path: Path) -> None:
    rates = RATES.copy()
    rates[2] = np.nan  # its stage is skipped, and leaves no policy to evaluate
    rates[3] = [0.5, 0.2, 0.8]
    teachers = {task: rate for task, rate in TEACHERS.items() if task != STREAM[1]}
    report = gather(write_run(tmp_path / "run", stream=STREAM, students={1: rates}, teachers=teachers))
    (student,) = report["students"]
    assert student["without_teacher"] == (STREAM[1],)
    assert student["average_performance"]["value"] == pytest.approx((0.5 + 0.0 + 0.8) / 3)
    assert student["recovery"]["value"] == pytest.approx((0.5 + 1.0) / 2)
    assert student["forgetting"]["value"] == pytest.approx(0.4)
    assert student["tasks"][1]["own"] is None
    assert student["tasks"][1]["final"]["rate"] == pytest.approx(0.2)
    assert [line for line in report["missing"] if STREAM[1] in line and "gate" in line]
    assert len(report["missing"]) == 1


def test_a_last_stage_without_teacher_ends_the_stream_early(tmp_path: Path) -> None:
    rates = RATES.copy()
    rates[3] = np.nan
    teachers = {task: rate for task, rate in TEACHERS.items() if task != STREAM[2]}
    run = write_run(tmp_path / "run", stream=STREAM, students={1: rates}, teachers=teachers, last_stage=1)
    (student,) = gather(run)["students"]
    assert student["final_stage"] == 1
    assert student["average_performance"]["value"] == pytest.approx((0.7 + 0.8) / 3)
    assert student["forgetting"]["value"] == pytest.approx(0.2)


def test_an_unfinished_run_says_what_is_missing(tmp_path: Path) -> None:
    rates = RATES.copy()
    rates[3] = np.nan
    run = write_run(tmp_path / "run", stream=STREAM, students={1: rates, 2: RATES}, teachers=TEACHERS)
    (run.teachers()[2].path / "COMPLETE").unlink()
    write_json(run.teachers()[2].status, {"state": "running"})
    report = gather(run)
    unfinished, finished = report["students"]
    assert unfinished["average_performance"]["value"] is None
    assert unfinished["forgetting"]["value"] is None
    assert unfinished["tasks"][0]["own"]["rate"] == pytest.approx(0.9)
    assert unfinished["tasks"][0]["final"] is None
    assert finished["average_performance"]["value"] is not None
    assert report["methods"][0]["seeds"] == (2,)
    assert report["methods"][0]["unfinished_seeds"] == (1,)
    assert f"teacher {STREAM[2]} (seed 1) is not finished (running)" in report["missing"]


def test_a_student_without_evaluation_is_missing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", stream=STREAM, students={1: RATES, 2: RATES}, teachers=TEACHERS)
    shutil.rmtree(run.evaluations()[1].path)
    (run.evaluations()[0].path / "stage-01.csv").unlink()
    missing = gather(run)["missing"]
    assert "student moe (seed 2) has not been evaluated" in missing
    assert "student moe (seed 1) has not been evaluated after stages 1" in missing


def test_students_are_measured_against_their_own_teachers(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        stream=STREAM,
        students={3: RATES, 5: RATES, 7: RATES},
        teachers=TEACHERS,
        teacher_seeds=(11, 12),
    )
    for teacher in run.teachers():
        if teacher.seed == 12:
            teacher.complete.unlink()
            teacher.rejected.touch()
    students = gather(run)["students"]
    assert [s["teacher_seed"] for s in students] == [11, 12, 11]
    assert [len(s["without_teacher"]) for s in students] == [0, 3, 0]


def test_five_seeds_get_an_interval_and_the_worst_task_a_name(tmp_path: Path) -> None:
    students = {seed: np.clip(RATES - 0.02 * (seed % 3), 0, 1) for seed in range(1, 6)}
    report = gather(write_run(tmp_path / "run", stream=STREAM, students=students, teachers=TEACHERS))
    (method,) = report["methods"]
    mean = method["average_performance"]["mean"]
    assert mean["low"] < mean["estimate"] < mean["high"]
    assert mean["estimate"] == pytest.approx(
        np.mean([s["average_performance"]["value"] for s in report["students"]])
    )
    assert len(mean["per_seed"]) == 5
    assert method["worst_tasks"] == {
        "average_performance": STREAM[0],
        "forgetting": STREAM[0],
        "recovery": STREAM[0],
    }
    # Its estimate is the lowest of the tasks' means over seeds, but the highest for forgetting.
    for measure, worst in {"average_performance": 0.476, "forgetting": 0.4, "recovery": 0.476}.items():
        assert method[measure]["worst_task"]["estimate"] == pytest.approx(worst)


def test_a_repeated_task_is_measured_after_its_last_stage(tmp_path: Path) -> None:
    rates = np.array([[0.0, 0.0], [1.0, 0.0], [0.4, 0.9], [0.8, 0.5], [0.6, 0.7]])
    stream = (*STREAM[:2], *STREAM[:2])
    teachers = dict.fromkeys(STREAM[:2], 1.0)
    (student,) = gather(write_run(tmp_path / "run", stream=stream, students={1: rates}, teachers=teachers))[
        "students"
    ]
    first = student["tasks"][0]
    assert tuple(first["stages"]) == (0, 2)
    assert first["own"]["rate"] == pytest.approx(0.8)
    assert student["forgetting"]["value"] == pytest.approx(0.2)


def test_a_teacher_that_never_succeeds_is_left_out_of_recovery_by_name(tmp_path: Path) -> None:
    teachers = {**TEACHERS, STREAM[0]: 0.0}
    report = gather(write_run(tmp_path / "run", stream=STREAM, students={1: RATES}, teachers=teachers))
    assert report["students"][0]["recovery"]["value"] == pytest.approx(1.0)
    assert [line for line in report["missing"] if "never succeeds" in line and STREAM[0] in line]


def test_a_task_whose_teacher_s_folder_is_gone_counts_as_it_was_measured(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", stream=STREAM, students={1: RATES}, teachers=TEACHERS)
    shutil.rmtree(run.teachers()[2].path)
    (student,) = gather(run)["students"]
    assert student["average_performance"]["value"] == pytest.approx((0.5 + 0.9 + 0.96) / 3)
    assert not student["without_teacher"]
    assert student["recovery"]["value"] == pytest.approx((0.5 + 1) / 2), "of the teachers that are there"
    shutil.rmtree(run.root / "teachers")
    (run.results / "evaluations.csv").unlink()
    (student,) = gather(run)["students"]
    assert student["average_performance"]["value"] == pytest.approx((0.5 + 0.9 + 0.96) / 3)
    assert student["recovery"]["value"] is None


def test_gathered_results_are_not_lost_with_the_run_s_own_files(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", stream=STREAM, students={1: RATES, 2: RATES}, teachers=TEACHERS)
    gather(run)
    gathered = {path: path.read_bytes() for path in run.results.iterdir()}
    shutil.rmtree(run.evaluations()[1].path)
    with pytest.raises(RunError, match=r"moe \(seed 2\)"):
        gather(run)
    shutil.rmtree(run.root / "students")
    with pytest.raises(RunError, match=r"moe \(seed 1\), moe \(seed 2\)"):
        gather(run)
    assert gathered == {path: path.read_bytes() for path in run.results.iterdir()}
    (run.results / "evaluations.csv").unlink()
    assert gather(run)["students"] == []


def test_a_setting_that_the_run_s_configuration_lacks_is_not_filled_in(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", stream=STREAM, students={1: RATES}, teachers=TEACHERS)
    config = json.loads(run.config_path.read_text())
    del config["distill"]["episodes"]
    write_json(run.config_path, config)
    gather(Run(run.root))
    assert json.loads((run.results / "config.json").read_text()) == config


def test_a_damaged_line_of_a_table_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", stream=STREAM, students={1: RATES}, teachers=TEACHERS)
    gather(run)
    table = run.results / "evaluations.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([*lines[:2], lines[2][:20], *lines[3:]]))
    with pytest.raises(ValueError, match=r"evaluations\.csv, line 3"):
        read_tables(run.results)


@pytest.mark.parametrize(("role", "name"), [("teacher", "metrics"), ("student", "metrics"), ("student", "curves")])
def test_records_that_a_finished_element_lacks_are_named(role: str, name: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", stream=STREAM, students={1: RATES}, teachers=TEACHERS)
    element = run.teachers()[1] if role == "teacher" else run.students()[0]
    run.students()[0].stage_policy(0).touch()
    path = getattr(element, name)
    path.unlink()
    with pytest.raises(DamagedFileError, match=str(path)):
        gather(run)
    if role == "teacher":  # a teacher that was trained elsewhere may lack them
        write_json(element.status, {"state": "done", "seconds": {"evaluate": 7.5}})
        gather(run)
        row = read_rows(run.results / "teachers.csv", TeacherRow)[1]
        assert (row.state, row.env_steps) == ("admitted", None)


def test_a_run_without_elements_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", stream=STREAM, students={1: RATES}, teachers=TEACHERS)
    for name in ("teachers", "students"):
        shutil.rmtree(run.root / name)
    with pytest.raises(RunError, match=str(run.root)):
        gather(run)


def test_gathering_needs_no_torch(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", stream=STREAM, students={1: RATES}, teachers=TEACHERS)
    code = (
        "import sys; from pathlib import Path; from cpd.evaluation.gather import gather; "
        "from cpd.run.directory import Run; "
        f"gather(Run(Path({str(run.root)!r}))); "
        "print([m for m in ('torch', 'mpi4py', 'mujoco', 'metaworld', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_losses_are_thinned_to_means_and_stages_have_their_masks(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", stream=STREAM, students={1: RATES}, teachers=TEACHERS)
    student = run.students()[0]
    log = MetricsLog(student.metrics)
    for step in range(1, 251):
        log.append(stage=0, step=step, task=STREAM[0], loss=float(step), current=2.0 * step, replay=None)
    log.append(stage=1, step=1, task=STREAM[1], loss=1.0, current=0.5, replay=1.5)
    log.append(event="protection", stage=1, masked_share=0.25)
    plan = {"plan_first": STREAM[1], "plan_second": STREAM[0], "task": STREAM[0]}
    log.append(event="plan", stage=1, **plan, episodes=20, successes=19, env_steps=700)
    log.close()
    gather(run)
    assert read_rows(run.results / "plans.csv", PlanRow) == [
        PlanRow("moe", 1, 1, **plan, episodes=20, successes=19, env_steps=700)
    ]
    rows = read_rows(run.results / "losses.csv", LossRow)
    first = [row for row in rows if row.stage == 0]
    assert len(first) == 84, "three records each, which is the least that gives no more than a hundred"
    assert (first[0].step, first[0].loss, first[0].current, first[0].replay) == (3, 2.0, 4.0, None)
    assert (first[-1].step, first[-1].loss) == (250, 250.0)
    assert rows[-1] == LossRow("moe", 1, 1, 1, STREAM[1], 1.0, 0.5, 1.5)
    stages = read_rows(run.results / "stages.csv", StageRow)
    assert [row.stage for row in stages] == [-1, 0, 1, 2]
    assert [row.masked_share for row in stages] == [None, None, 0.25, None]
    assert [row.memory_steps for row in stages] == [0, 80, 160, 240]
    assert (stages[0].task, stages[3].task, stages[3].teacher_recipe) == (None, STREAM[2], "rl")


def test_variants_are_measured_beside_their_base_and_named_if_missing(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        stream=STREAM,
        students={1: RATES, 2: RATES},
        teachers=TEACHERS,
        variants={"worse": {1: RATES / 2, 2: RATES / 2}, "other": {1: RATES, 2: RATES}},
    )
    shutil.rmtree(run.students()[5].path)
    report = gather(run)
    assert [(s["method"], s["seed"]) for s in report["students"]] == [
        *(("moe", 1), ("moe", 2), ("worse", 1), ("worse", 2), ("other", 1))
    ]
    assert "student other (seed 2) has not been evaluated" in report["missing"]
    values = {s["method"]: s["average_performance"]["value"] for s in report["students"]}
    assert values["worse"] == pytest.approx(values["moe"] / 2, abs=0.02)


@pytest.mark.parametrize("protocol", ["joint", "single_task"])
def test_joint_and_single_task_students_have_no_forgetting(protocol: str, tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        stream=STREAM,
        students={1: RATES},
        teachers=TEACHERS,
        variants={"bound": {1: RATES}},
        protocols={"bound": protocol},
    )
    report = gather(run)
    (ours, bound), (_, student) = report["methods"], report["students"]
    assert ours["forgetting"] and not bound["forgetting"] and "forgetting" not in bound["worst_tasks"]
    assert bound["average_performance"] == ours["average_performance"] and bound["recovery"] == ours["recovery"]
    assert student["forgetting"]["value"] is None and student["most_forgotten"] is None
    assert all(task["forgetting"] is None and task["own"] is None for task in student["tasks"])
