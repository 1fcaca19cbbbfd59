"""PackNet: the weights of a task never change again, and every stage gets its share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cpd.config.load import ConfigError
from cpd.distill.protection.packnet import FREE
from cpd.distill.trainer import StudentTrainer
from cpd.run.provenance import labels
from cpd.student.actor import StudentActor, TaskwiseActor, make_actor
from cpd.student.network import Student, load_student, save_student
from tests.distill.synthetic import stage_data
from tests.distill.test_trainer import TASKS, make_config, make_trainer, mean_error, through_a_file, train

SETTINGS = {
    "student": {"num_experts": 4, "expansion": "none", "task_identity": "none", "width": 32},
    "memory": {"selection": "none"},
    "protection": {"kind": "packnet", "packnet_retrain_share": 0.3},
    # Weight decay and momentum, which move weights that have no gradient.
    "distill": {"steps_per_stage": 120, "lr": 5e-3, "weight_decay": 0.1},
}
SHORT = {**SETTINGS, "distill": {"steps_per_stage": 20, "weight_decay": 0.1}}


def viewed(trainer: StudentTrainer, task: int) -> Student:
    """The student as it acts for one task."""
    return trainer.learner.student.packing.view(trainer.learner.student, task)


def outputs(trainer: StudentTrainer, task: int) -> torch.Tensor:
    data = stage_data(task)
    obs = torch.from_numpy(np.stack([data.observations[i : i + 4] for i in range(100)])).double()
    with torch.no_grad():
        out = viewed(trainer, task)(obs)
    return torch.cat([out.mean_BLA, out.log_std_BLA])


@pytest.fixture(scope="module")
def stages() -> tuple[StudentTrainer, list[list[torch.Tensor]]]:
    """A trained stream, and the outputs of each task's student after its stage and all later ones."""
    trainer, said = make_trainer(**SETTINGS), []
    for stage in range(3):
        train(trainer, until=120 * (stage + 1) - 1)
        trainer.train_step()
        trainer.end_stage(stage_data(stage))
        said.append([outputs(trainer, task) for task in range(stage + 1)])
    return trainer, said


def test_earlier_tasks_are_unchanged_to_the_last_bit(stages):
    trainer, said = stages
    for task in range(3):
        for stage in range(task + 1, 3):
            assert torch.equal(said[stage][task], said[task][task])
    assert not torch.equal(outputs(trainer, 1), trainer_outputs_without_mask(trainer, 1))


def trainer_outputs_without_mask(trainer: StudentTrainer, task: int) -> torch.Tensor:
    data = stage_data(task)
    obs = torch.from_numpy(np.stack([data.observations[i : i + 4] for i in range(100)])).double()
    with torch.no_grad():
        out = trainer.learner.student(obs)
    return torch.cat([out.mean_BLA, out.log_std_BLA])


def test_every_task_is_learned_in_its_share(stages):
    trainer, _ = stages
    for task in range(3):
        assert mean_error(viewed(trainer, task), task) < 0.25 * float(
            np.square(stage_data(task).teacher_mean).mean()
        )


def test_every_stage_keeps_an_equal_share_of_every_matrix_and_the_first_the_rest(stages):
    trainer, _ = stages
    owner, flat = trainer.protection.state()["owner"], trainer.learner.flat
    for slot in flat.matrix_slots():
        counts = [int((owner[slot] == stage).sum()) for stage in range(3)]
        assert sum(counts) == slot.stop - slot.start and max(counts) - min(counts) <= 1, slot
    assert len(list(flat.matrix_slots())) == 2 + 2 * (2 + 2 * 4)
    is_matrix = torch.zeros(flat.size, dtype=torch.bool)
    for slot in flat.matrix_slots():
        is_matrix[slot] = True
    assert not owner[~is_matrix].any()
    assert trainer.protection.report() == {"free_share": 0.0}


def test_prunes_the_smallest_in_time_and_goes_on_with_the_rest():
    trainer = make_trainer(**SHORT)
    train(trainer, until=14)  # 20 steps, of which the last six retrain
    old_values = trainer.learner.flat.values.clone()
    assert not (trainer.protection.state()["owner"] == FREE).any()
    trainer.train_step()
    slot = trainer.learner.flat.slots["blocks.0.attention.qkv.weight"]
    free = trainer.protection.state()["owner"][slot] == FREE
    assert int(free.sum()) == len(free) - round(len(free) / 3)
    assert old_values[slot][free].abs().max() <= old_values[slot][~free].abs().min()
    for _ in range(5):
        trainer.train_step()
        assert not trainer.learner.flat.values[slot][free].any()
    assert (trainer.learner.flat.values[slot][~free] != old_values[slot][~free]).all()
    trainer.end_stage(stage_data(0))
    train(trainer, until=40)
    assert (trainer.learner.flat.values[slot][free] != 0).any()


def test_without_steps_to_retrain_it_prunes_at_the_stages_end():
    trainer = make_trainer(**{**SHORT, "protection": {"kind": "packnet", "packnet_retrain_share": 0.0}})
    train(trainer, until=19)
    trainer.train_step()
    assert trainer.protection.report() == {"free_share": 0.0}
    trainer.end_stage(stage_data(0))
    assert 0.5 < trainer.protection.report()["free_share"] < 0.67


def test_a_task_that_comes_again_gets_another_share_and_acts_with_it():
    trainer = make_trainer(tasks=[TASKS[0], TASKS[1], TASKS[0]], **SHORT)
    train(trainer, until=40)
    other = outputs(trainer, 1)
    assert trainer.learner.student.packing.latest_stage.tolist() == [0, 1]
    train(trainer)
    assert trainer.learner.student.packing.latest_stage.tolist() == [2, 1]
    assert torch.equal(outputs(trainer, 1), other)
    assert torch.equal(outputs(trainer, 0), trainer_outputs_without_mask(trainer, 0))


def test_the_file_tells_who_owns_what(tmp_path):
    trainer = make_trainer(**SHORT)
    train(trainer, until=40)
    path = tmp_path / "student.safetensors"
    save_student(path, trainer.learner.student, {})
    loaded = load_student(path)
    actor, wanted = make_actor(loaded, TASKS), make_actor(trainer.learner.student, TASKS)
    assert isinstance(actor, TaskwiseActor)
    assert loaded.packing.owners.keys() == trainer.learner.flat.slots.keys()
    obs = stage_data(0).observations[:5]
    said = []
    for task in range(3):
        task_actor = StudentActor(viewed(trainer, task), TASKS)
        for one in (actor, wanted, task_actor):
            one.reset([TASKS[task]] * 5)
        actions = actor.act(obs)
        np.testing.assert_array_equal(actions, wanted.act(obs))
        np.testing.assert_array_equal(actions, task_actor.act(obs))
        said.append(actions)
    assert not np.array_equal(said[0], said[1])
    np.testing.assert_array_equal(said[1], said[2])  # the third has had no stage: it uses all weights
    with pytest.raises(ValueError, match="reach-v3"):
        actor.reset(["reach-v3"])


@pytest.mark.parametrize("until", [10, 16, 20, 36])
def test_resuming_equals_going_on_bit_for_bit(until):
    """Before and after pruning, and between stages."""
    straight, first, resumed = (make_trainer(**SHORT) for _ in range(3))
    train(straight)
    train(first, until=until)
    resumed.restore(through_a_file(first.state()))
    train(resumed)
    assert torch.equal(resumed.learner.flat.values, straight.learner.flat.values)
    assert torch.equal(resumed.protection.state()["owner"], straight.protection.state()["owner"])


def test_results_are_labelled_as_told():
    assert labels(make_config(**SETTINGS)).task_identity == "given"


@pytest.mark.parametrize(
    "section, over", [("memory", {"selection": "reservoir"}), ("student", {"expansion": "per_task"})]
)
def test_refuses_what_it_cannot_work_with(section, over):
    with pytest.raises(ConfigError, match=f"{section}.{next(iter(over))}: .*packnet"):
        make_config(**{**SETTINGS, section: {**SETTINGS[section], **over}})
