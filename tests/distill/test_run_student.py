"""Students: their files, resuming, and teachers that are missing, damaged or rejected."""

from __future__ import annotations

import json
import re
import shutil
from typing import TypeVar

import numpy as np
import pytest

from cpd.comm import Comm, SerialComm
from cpd.distill.run_student import run_student
from cpd.evaluation.gather import gather
from cpd.evaluation.run_evaluation import run_evaluation
from cpd.reading import DamagedFileError
from cpd.run.checkpoint import published
from cpd.run.interrupt import Interrupt, InterruptedBySignal
from cpd.run.shards.schema import ShardError
from cpd.run.tables import CurveRow, read_rows
from cpd.student.network import load_student
from tests.distill.synthetic import write_teachers

T = TypeVar("T")

NO_CURVES = {"stream": {"horizon": 60}, "evaluation": {"curve_points": 0}, "distill": {"batch_size": 16}}


def distil(run, interrupt: Interrupt | None = None, comm: Comm | None = None) -> list[str]:
    lines: list[str] = []
    run_student(run, run.students()[0], comm or SerialComm(), interrupt=interrupt or Interrupt(), log=lines.append)
    return lines


@pytest.fixture
def make_student_run(make_run):
    def make(name: str = "run", **over):
        run = make_run(name, **{**NO_CURVES, **over})
        write_teachers(run, run.students()[0])
        return run

    return make


def policy_bytes(run, stage: int) -> bytes:
    return run.students()[0].stage_policy(stage).read_bytes()


def test_leaves_policies_curves_metrics_and_status(make_run):
    """With real environments for the curves: two points a stage of two episodes of at most 20 steps."""
    run = make_run(stream={"horizon": 20}, distill={"batch_size": 16})
    element = run.students()[0]
    write_teachers(run, element)
    distil(run)

    assert element.complete.exists()
    students = [load_student(element.stage_policy(stage)) for stage in (-1, 0, 1)]
    assert [student.num_experts for student in students] == [2, 2, 4]
    description = json.loads(element.stage_policy(1).with_suffix(".json").read_text())
    assert description["task"] == "window-close-v3" and description["stage"] == 1
    assert description["labels"]["teacher_recipe"] == "rl" and description["labels"]["horizon"] == 20
    assert [(g["stage"], g["task"], g["num_new"]) for g in description["growth"]] == [(1, "window-close-v3", 2)]
    assert 0 < description["memory_steps"] <= description["memory_budget"] == 120
    assert description["memory_bytes"] > description["memory_steps"] * 47 * 4

    rows = read_rows(element.curves, CurveRow)
    assert [(row.stage, row.step, row.task, row.episodes) for row in rows] == [
        (0, 20, "drawer-close-v3", 2),
        (0, 40, "drawer-close-v3", 2),
        (1, 20, "window-close-v3", 2),
        (1, 40, "window-close-v3", 2),
    ]
    assert {row.goal_set for row in rows} == {"held_out"}

    lines = [json.loads(line) for line in element.metrics.open()]
    assert [line["stage"] for line in lines if line.get("event") == "growth"] == [1]
    steps = [line for line in lines if "step" in line]
    assert [line["global_step"] for line in steps] == [line["stage"] * 40 + line["step"] for line in steps]
    rates = [(line["global_step"], line["success"]) for line in lines if line.get("event") == "evaluation"]
    assert rates == [(row.stage * 40 + row.step, row.successes / 2) for row in rows]
    assert steps[0]["replay"] is steps[-1]["replay"] is None and steps[-1]["contrast"] > 0
    assert "imitation.window-close-v3" in steps[-1]
    assert sum(steps[-1][f"expert_share.1.{expert}"] for expert in range(4)) == pytest.approx(1, abs=1e-4)
    status = json.loads(element.status.read_text())
    assert (status["state"], status["phase"], status["done"], status["total"]) == ("done", "distill", 80, 80)

    published = policy_bytes(run, 1)
    distil(run)
    assert policy_bytes(run, 1) == published


def test_curves_do_not_influence_training(make_student_run):
    run = make_student_run("without")
    distil(run)
    other = make_student_run("with", evaluation={"num_episodes_brief": 1, "curve_points": 1})
    distil(other)
    assert policy_bytes(run, 1) == policy_bytes(other, 1)


@pytest.mark.parametrize("count", [3, 40, 55])
def test_stopping_and_launching_again_equals_going_on(make_student_run, count, monkeypatch):
    monkeypatch.setattr("cpd.distill.run_student.AGREE_EVERY", 1)

    class AskedAfter(Interrupt):
        looks = 0

        @property
        def requested(self) -> bool:
            self.looks += 1
            return self.looks > count

    straight = make_student_run("straight")
    distil(straight)
    run = make_student_run("stopped")
    with pytest.raises(InterruptedBySignal, match=f"stage {count // 40}, step {count % 40 + 1}"):
        distil(run, AskedAfter())
    element = run.students()[0]
    assert json.loads(element.status.read_text())["state"] == "stopped"
    assert not element.complete.exists()
    with element.metrics.open("a") as file:
        file.write('{"step": 999}\n')  # written by an attempt after its last checkpoint
    distil(run)
    for stage in (-1, 0, 1):
        assert policy_bytes(run, stage) == policy_bytes(straight, stage)
    wanted = straight.students()[0].metrics.read_text().splitlines()
    lines = element.metrics.read_text().splitlines()
    without_rate = [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines]
    assert without_rate == [
        {k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in wanted
    ]
    assert len(published(element.checkpoints)) <= 2


class AnotherDiffersAt(SerialComm):
    """A second rank, which gathers the same as this one except in the `at`-th call."""

    def __init__(self, at: int) -> None:
        self._left = at

    def gather(self, value: T) -> list[T]:
        self._left -= 1
        return [value, value] if self._left else [value, type(value)()]


def test_ranks_whose_students_have_drifted_apart_are_refused(make_student_run):
    """Ranks first compare what they read, then their students at every checkpoint."""
    run = make_student_run()
    with pytest.raises(RuntimeError, match="ranks"):
        distil(run, comm=AnotherDiffersAt(3))
    element = run.students()[0]
    assert [checkpoint.path.name for checkpoint in published(element.checkpoints)] == ["stage-00-step-000010"]
    assert json.loads(element.status.read_text())["state"] == "failed"


class TestTeachers:
    def test_ranks_that_see_different_rollouts_are_refused(self, make_student_run):
        run = make_student_run()
        shards = run.teacher_of("drawer-close-v3", 1).shards
        with pytest.raises(ValueError, match=re.escape(str(shards))):
            distil(run, comm=AnotherDiffersAt(1))
        assert not published(run.students()[0].checkpoints)

    def test_one_that_is_not_finished_is_named(self, make_student_run):
        run = make_student_run()
        run.teacher_of("window-close-v3", 1).complete.unlink()
        with pytest.raises(ValueError, match="teachers/window-close-v3/seed-1"):
            distil(run)
        assert json.loads(run.students()[0].status.read_text())["state"] == "failed"

    def test_a_damaged_policy_is_told_from_stale_rollouts(self, make_student_run):
        run = make_student_run()
        policy = run.teacher_of("drawer-close-v3", 1).policy
        policy.write_bytes(b"half of it")
        policy.with_suffix(".json").write_text(json.dumps({"sha256": "of the whole"}))
        with pytest.raises(ValueError, match=r"policy\.safetensors .*policy\.json .*drawer-close"):
            distil(run)

    def test_a_rejected_one_is_skipped_and_recorded(self, make_student_run):
        run = make_student_run()
        reject(run, "drawer-close-v3")
        lines = distil(run)
        element = run.students()[0]
        assert element.complete.exists()
        assert not element.stage_policy(0).exists()
        description = json.loads(element.stage_policy(1).with_suffix(".json").read_text())
        assert description["skipped_stages"] == [0] and description["growth"] == []
        first = json.loads(element.metrics.open().readline())
        assert first == {"event": "skipped", "stage": 0, "task": "drawer-close-v3", "global_step": 0}
        assert any("skipped: drawer-close-v3" in line for line in lines)
        assert json.loads(element.status.read_text())["total"] == 40

    def test_a_rejected_one_stops_the_chain_if_so_wished(self, make_student_run):
        run = make_student_run(teacher={"on_rejected": "stop"})
        reject(run, "window-close-v3")
        with pytest.raises(ValueError, match=r"teachers/window-close-v3/seed-1.*teacher\.on_rejected"):
            distil(run)

    def test_nothing_but_rejected_ones_is_an_error(self, make_student_run):
        run = make_student_run()
        for task in run.config.stream.distinct_tasks:
            reject(run, task)
        with pytest.raises(ValueError, match=r"teachers/drawer-close.*teachers/window-close"):
            distil(run)

    def test_rollouts_of_another_horizon_are_refused(self, make_student_run, make_run):
        run = make_student_run()
        other = make_run("other", **{**NO_CURVES, "stream": {"horizon": 61}})
        for task in run.config.stream.distinct_tasks:
            teacher = other.teacher_of(task, 1)
            teacher.path.parent.mkdir(parents=True)
            teacher.path.symlink_to(run.teacher_of(task, 1).path)
        with pytest.raises(ShardError, match="horizon"):
            distil(other)


def reject(run, task: str) -> None:
    teacher = run.teacher_of(task, 1)
    teacher.complete.unlink()
    teacher.rejected.touch()


def test_batches_smaller_than_the_ranks_are_refused(make_config):
    import torch

    from cpd.distill.trainer import StudentTrainer

    comm = SerialComm()
    comm.size = 99
    with pytest.raises(ValueError, match=r"distill\.batch_size = 64 .*99"):
        StudentTrainer(make_config(), 1, comm, torch.device("cpu"))
    config = make_config(protection={"kind": "agem", "agem_windows": 7}, distill={"batch_size": 128})
    with pytest.raises(ValueError, match=r"protection\.agem_windows = 7 .*99"):
        StudentTrainer(config, 1, comm, torch.device("cpu"))


def test_onehot_is_told_the_task_of_every_row(make_student_run):
    run = make_student_run(student={"task_identity": "onehot"})
    distil(run)
    initial, final = (load_student(run.students()[0].stage_policy(stage)) for stage in (-1, 1))
    moved = (final.task - initial.task).abs().amax(1).detach().numpy()
    assert (moved > 1e-3).all()
    assert not np.allclose(moved[0], moved[1])


def test_a_stage_that_was_lost_is_not_passed_over_when_the_student_is_evaluated(make_student_run):
    run = make_student_run()
    distil(run)
    student, element = run.students()[0], run.evaluations()[0]
    student.stage_policy(0).unlink()
    with pytest.raises(ValueError, match=r"stage-00\.safetensors .*students/moe/seed-1"):
        run_evaluation(run, element, SerialComm(), interrupt=Interrupt(), log=lambda line: None)
    assert not element.complete.exists()


def test_the_policy_of_another_stage_is_not_evaluated(make_student_run):
    run = make_student_run()
    distil(run)
    student = run.students()[0]
    for suffix in (".safetensors", ".json"):
        shutil.copyfile(student.stage_policy(0).with_suffix(suffix), student.stage_policy(-1).with_suffix(suffix))
    with pytest.raises(DamagedFileError, match=r"initial\.json .*stage 0, not -1"):
        run_evaluation(run, run.evaluations()[0], SerialComm(), interrupt=Interrupt(), log=print)
    assert not run.evaluations()[0].row_file(-1).exists()
    with pytest.raises(DamagedFileError, match=r"initial\.json .*stage 0, not -1"):
        gather(run)


def test_the_checkpoint_of_another_student_is_not_resumed(make_student_run):
    run = make_student_run(seeds=[1, 2])
    distil(run)
    first, second = run.students()
    shutil.copytree(first.checkpoints, second.checkpoints)
    with pytest.raises(DamagedFileError, match=rf"{second.checkpoints}.*meta\.json .*seed 1, not 2"):
        run_student(run, second, SerialComm(), interrupt=Interrupt(), log=print)
