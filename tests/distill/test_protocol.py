"""The two bounds: joint training, and one student per task."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from cpd.comm import SerialComm
from cpd.distill.run_student import run_student
from cpd.distill.stage_data import StageData
from cpd.distill.trainer import StudentTrainer
from cpd.envs.cells import Cell
from cpd.evaluation.gather import gather
from cpd.evaluation.run_evaluation import row_cells, run_evaluation
from cpd.run.directory import Run
from cpd.run.interrupt import Interrupt
from cpd.run.progress import read_metrics
from cpd.run.tables import EpisodeRow, EvaluationRow, read_rows
from cpd.student.network import load_student
from cpd.student.selected_policies import SelectedPolicies
from cpd.teachers.policy import GaussianPolicy, TeacherActor, save_policy
from cpd.teachers.run_teacher import load_teacher
from tests.distill.synthetic import stage_data, write_teachers
from tests.distill.test_trainer import TASKS, make_config, make_trainer, mean_error, through_a_file

LONG = {"steps_per_stage": 120, "lr": 5e-3}
SHORT = {"steps_per_stage": 20}


def of(protocol: str, **distill) -> StudentTrainer:
    return make_trainer(student={"task_identity": "none", "width": 32}, distill={**distill, "protocol": protocol})


def data_of(trainer: StudentTrainer, task: int) -> StageData:
    """The data of a stage of `task`."""
    joint = trainer.config.distill.protocol == "joint"
    return replace(
        stage_data(task), others=tuple(stage_data(other) for other in range(3) if other != task and joint)
    )


def train(trainer: StudentTrainer, until: int = 10**6) -> None:
    """Train over the stream, or up to a number of steps in all."""
    steps = trainer.config.distill.steps_per_stage
    for stage in range(trainer.learner.progress.stage, 3):
        if stage * steps == until:
            return
        trainer.begin_stage(data_of(trainer, stage))
        while trainer.learner.progress.step < steps:
            if stage * steps + trainer.learner.progress.step == until:
                return
            trainer.train_step()
        trainer.end_stage(data_of(trainer, stage))


class TestJoint:
    def test_every_batch_mixes_all_tasks_evenly(self):
        trainer = of("joint", batch_size=512)
        trainer.begin_stage(data_of(trainer, 1))
        batch = trainer.learner.source.batch(0)
        shares = torch.bincount(batch.task_R) / 512
        assert ((shares > 0.25) & (shares < 0.42)).all()
        assert not batch.replayed_R.any()
        for task in range(3):
            rows = {row.astype(np.float64).tobytes() for row in stage_data(task).observations}
            obs = batch.obs_RLO[batch.task_R == task].reshape(-1, 39)
            assert all(one.numpy().tobytes() in rows for one in obs)

    def test_tasks_with_more_data_come_no_more_often(self):
        trainer = of("joint", batch_size=3_000)
        trainer.begin_stage(replace(stage_data(0, 40), others=(stage_data(1, 4), stage_data(2, 12))))
        task_R = trainer.learner.source.batch(0).task_R
        assert torch.bincount(task_R).tolist() == pytest.approx([1_000] * 3, rel=0.1)

    def test_a_student_that_knows_of_tasks_does_not_grow_either(self):
        trainer = make_trainer(distill={**SHORT, "protocol": "joint"})
        assert trainer.begin_stage(data_of(trainer, 0)) == []
        trainer.train_step()
        assert trainer.learner.student.num_experts == trainer.config.student.num_experts

    def test_learns_all_tasks_without_growth_or_memory(self):
        trainer = of("joint", **LONG)
        train(trainer)
        student = trainer.learner.student
        for task in range(3):
            assert mean_error(student, task) < 0.1 * float(np.square(stage_data(task).teacher_mean).mean())
        assert student.num_experts == trainer.config.student.num_experts
        assert trainer.memory.num_steps == trainer.memory.budget == 0


class TestSingleTask:
    def test_every_stage_trains_a_fresh_student_as_if_there_were_no_other(self):
        trainer = of("single_task", **SHORT)
        first = trainer.learner.flat.values.clone()
        train(trainer, until=40)
        trainer.begin_stage(data_of(trainer, 2))
        assert torch.equal(trainer.learner.flat.values, first)
        train(trainer)
        alone = of("continual", **SHORT)
        for _ in range(2):
            alone.skip_stage()
        train(alone)
        assert torch.equal(trainer.learner.flat.values, alone.learner.flat.values)
        assert trainer.learner.student.num_experts == trainer.config.student.num_experts
        assert trainer.memory.num_steps == 0


@pytest.mark.parametrize("protocol", ["joint", "single_task", "isolated"])
@pytest.mark.parametrize("until", [20, 30])
def test_resuming_equals_going_on_bit_for_bit(protocol, until):
    straight, first, resumed = (of(protocol, **SHORT) for _ in range(3))
    train(straight)
    train(first, until=until)
    resumed.restore(through_a_file(first.state()))
    train(resumed)
    assert torch.equal(resumed.learner.flat.values, straight.learner.flat.values)
    density, expected = resumed.learner.student.density, straight.learner.student.density
    assert all(torch.equal(density.state_dict()[name], value) for name, value in expected.state_dict().items())
    assert torch.equal(resumed.learner.student.known_K, straight.learner.student.known_K)


def test_what_a_bound_does_not_look_at_is_warned_about():
    assert make_config(distill={"protocol": "joint"}, memory={"share": 0.5}).warnings() == [
        "memory.selection has no effect: distill.protocol is 'joint'"
    ]
    assert make_config(distill={"protocol": "single_task"}, protection={"kind": "ewc"}, memory={}).warnings() == [
        "memory.selection has no effect: distill.protocol is 'single_task'",
        "protection.kind has no effect: distill.protocol is 'single_task'",
    ]


#: Only the second is in an untrained hand's reach; the final row's episodes, and returns, go on after success.
FIRST, SECOND = "window-close-v3", "drawer-close-v3"


def distilled_and_evaluated(make_run, **over) -> dict[tuple[int, str], EvaluationRow]:
    """Held-out cells by row and task of a miniature run on real environments."""
    tables = {
        "stream": {"tasks": [FIRST, SECOND], "horizon": 20},
        "distill": {"batch_size": 16, **over.pop("distill", {})},
        "evaluation": {"num_episodes": 2, "curve_points": 1},
        **over,
    }
    run = make_run(**tables)
    write_teachers(run, run.students()[0])
    run_student(run, run.students()[0], SerialComm(), interrupt=Interrupt(), log=lambda line: None)
    element = run.evaluations()[0]
    run_evaluation(run, element, SerialComm(), interrupt=Interrupt(), log=lambda line: None)
    description = json.loads(run.students()[0].stage_policy(1).with_suffix(".json").read_text())
    assert description["protocol"] == element.config.distill.protocol
    rows = [row for stage in (-1, 0, 1) for row in read_rows(element.row_file(stage), EvaluationRow)]
    return {(row.stage, row.task): row for row in rows if row.goal_set == "held_out"}


def test_a_row_of_single_task_students_measures_each_task_with_its_own(make_run):
    cells = distilled_and_evaluated(make_run, distill={"protocol": "single_task"})
    returns = {place: row.mean_return for place, row in cells.items()}
    assert returns[0, SECOND] == returns[-1, SECOND] != returns[1, SECOND]
    assert returns[1, FIRST] == returns[0, FIRST] != returns[-1, FIRST]


def test_isolated_students_are_those_of_single_tasks_and_the_inferred_task_selects_one(make_run, tmp_path):
    dense = {"num_experts": 1, "top_k": 1, "expansion": "none", "task_identity": "none"}
    dense_tables = {"student": dense, "memory": {"selection": "none"}, "protection": {"kind": "none"}}
    cells = distilled_and_evaluated(make_run, distill={"protocol": "isolated"}, **dense_tables)
    single = distilled_and_evaluated(make_run, name="single", distill={"protocol": "single_task"}, **dense_tables)
    assert [cells[place].task_identity for place in cells] == ["inferred"] * 6
    # After the first stage its student acts in all episodes; products of other numbers of rows round differently.
    assert cells[0, FIRST].mean_return == pytest.approx(single[0, FIRST].mean_return, rel=1e-5)
    isolated, alone = (Run(tmp_path / name).students()[0].stage_policy(1) for name in ("run", "single"))
    assert all(map(torch.equal, load_student(isolated).parameters(), load_student(alone).parameters()))
    described = json.loads(isolated.with_suffix(".json").read_text())
    assert described["num_parameters"] == 2 * load_student(alone).num_parameters
    assert load_student(isolated).known_K.tolist() == [True, True]


def test_the_final_row_is_measured_on_no_more_training_goals_than_teachers_trained_on():
    for num_training_goals, measured in ((30, 30), (200, 50)):
        config = make_config(
            teacher={"num_training_goals": num_training_goals},
            evaluation={"num_episodes": 50, "num_episodes_brief": 10, "curve_points": 0},
        )
        assert row_cells(config, 2, 2) == [
            *(Cell(task, "held_out", 50, to_the_end=True, tasks_per_pass=1) for task in TASKS),
            *(Cell(task, "training", measured) for task in TASKS),
        ]
        assert row_cells(config, 1, 2) == [
            Cell(task, "held_out", 50 if task == TASKS[1] else 10) for task in TASKS
        ]


def test_packnet_and_joint_students_go_all_the_way(make_run):
    packnet = {
        "student": {"expansion": "none", "task_identity": "none"},
        "memory": {"selection": "none"},
        "protection": {"kind": "packnet"},
    }
    cells = distilled_and_evaluated(make_run, name="packnet", **packnet)
    assert cells[1, FIRST].mean_return == cells[0, FIRST].mean_return != cells[-1, FIRST].mean_return
    assert {row.task_identity for row in cells.values()} == {"given"}
    cells = distilled_and_evaluated(make_run, name="joint", distill={"protocol": "joint"})
    assert len(cells) == 6


TEACHERS = {
    "stream": {"tasks": [FIRST, SECOND], "horizon": 20},
    "distill": {"protocol": "teachers"},
    "memory": {"selection": "none"},
    "student": {"belief": "density", "act": "most_likely"},
    "evaluation": {"num_episodes": 2, "curve_points": 1},
}


def test_teachers_that_are_kept_are_evaluated_without_a_step_of_distillation(make_run):
    run = make_run(**TEACHERS)
    policy = GaussianPolicy((8,), -1.0)
    for teacher in run.teachers():
        save_policy(policy, teacher.policy, {})
    write_teachers(run, run.students()[0])
    quiet = {"interrupt": Interrupt(), "log": lambda line: None}
    run_student(run, run.students()[0], SerialComm(), **quiet)
    element = run.evaluations()[0]
    make_teacher = lambda teacher: TeacherActor(load_teacher(run.config, teacher))  # noqa: E731
    run_evaluation(run, element, SerialComm(), **quiet, make_teacher=make_teacher)
    student = run.students()[0]
    assert [record["task"] for record in read_metrics(student.metrics, is_finished=True)] == [FIRST, SECOND]
    num_each = sum(tensor.numel() for tensor in policy.state_dict().values())
    for stage in (-1, 0, 1):
        described = json.loads(student.stage_policy(stage).with_suffix(".json").read_text())
        assert described["num_parameters"] == num_each * (stage + 1)
    initial, final = load_student(student.stage_policy(-1)), load_student(student.stage_policy(1))
    assert all(map(torch.equal, initial.parameters(), final.parameters()))
    assert final.known_K.tolist() == [True, True] and (final.density.num_K > 0).all()
    rows = [read_rows(element.row_episodes_file(stage), EpisodeRow) for stage in (-1, 0, 1)]
    assert {row.believed for row in rows[0]} == {None}
    assert {row.believed for row in rows[1]} == {FIRST}
    assert all(row.plan_first == row.plan_second == row.believed for row in rows[2])
    student.complete.touch()
    gather(run)  # nothing is distilled, so no curve is missing
    assert not (run.results / "curves.csv").exists()


def test_each_episode_is_acted_by_the_teacher_of_the_task_it_begins_like():
    trainer = make_trainer(**{key: TEACHERS[key] for key in ("distill", "memory", "student")})
    for task in range(3):
        trainer.begin_stage(stage_data(task))
        trainer.end_stage(stage_data(task))

    class Constant:
        def __init__(self, task: str) -> None:
            self.value = TASKS.index(task) / 2

        def reset(self, tasks: list[str]) -> None:
            pass

        def act(self, obs_BO: np.ndarray) -> np.ndarray:
            return np.full((len(obs_BO), 4), self.value, np.float32)

    actor = SelectedPolicies(trainer.learner.student, TASKS, Constant)
    actor.reset([""] * 3)
    opening = np.stack([stage_data(task).observations[0] for task in (2, 0, 1)])
    for obs in (opening, opening[::-1]):  # later observations change nothing
        assert actor.act(obs)[:, 0].tolist() == [1.0, 0.0, 0.5]
    assert [belief.believed for belief in actor.beliefs] == [TASKS[2], TASKS[0], TASKS[1]]
