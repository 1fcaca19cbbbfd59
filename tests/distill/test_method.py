"""Parts of the method in the trainer: groups of experts, masks, belief, rehearsal, growth on demand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cpd.distill.protection.importance import FISHER_WINDOWS, fisher
from cpd.distill.trainer import StudentTrainer
from cpd.student.actor import StudentActor
from tests.distill.synthetic import stage_data
from tests.distill.test_trainer import TASKS, make_trainer, mean_error, train

LONG = {"steps_per_stage": 120, "lr": 5e-3}


def outputs(trainer: StudentTrainer, task: int) -> torch.Tensor:
    """The student's Gaussian on a task's data, acting for that task."""
    data = stage_data(task)
    windows = np.stack([data.observations[i : i + 4] for i in range(100)])
    obs = torch.from_numpy(windows).to(trainer.learner.student.dtype)
    with torch.no_grad():
        out = trainer.learner.student(obs, task_B=torch.full((100,), task))
    return torch.cat([out.mean_BLA, out.log_std_BLA], -1)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_nothing_of_an_earlier_task_moves_under_momentum_and_weight_decay(precision):
    trainer = make_trainer(distill={"precision": precision, "weight_decay": 0.1, "steps_per_stage": 40})
    train(trainer, until=40)
    first = outputs(trainer, 0)
    train(trainer, until=80)
    assert torch.equal(outputs(trainer, 0), first)
    second = outputs(trainer, 1)
    train(trainer)
    assert torch.equal(outputs(trainer, 0), first) and torch.equal(outputs(trainer, 1), second)
    # Two of three groups, two of three task vectors, and all that is common, but not the encoder.
    assert trainer.protection.report()["masked_share"] == pytest.approx(masked_by_hand(trainer))


def masked_by_hand(trainer: StudentTrainer) -> float:
    """The share of parameters that the third of three stages must not move."""
    count = 0
    for name, parameter in trainer.learner.student.named_parameters():
        if name.endswith(".stack"):
            count += parameter[:4].numel()
        elif name == "task":
            count += parameter.numel() * 2 // 3
        elif not name.startswith("encoder."):
            count += parameter.numel()
    return count / trainer.learner.flat.size


def test_without_tasks_experts_belong_to_the_task_they_were_added_for():
    trainer = make_trainer(distill={"steps_per_stage": 40}, student={"task_identity": "none"})
    train(trainer, until=40)
    old_parameters = {name: p.detach().clone() for name, p in trainer.learner.student.named_parameters()}
    train(trainer, until=80)
    for name, parameter in trainer.learner.student.named_parameters():
        assert torch.equal(parameter[: len(old_parameters[name])], old_parameters[name]), name
    trainer.begin_stage(stage_data(2))
    assert not any(parameter.requires_grad for parameter in trainer.learner.student.parameters())
    for moe in trainer.learner.student.moes:
        for stack in (moe.up, moe.down, moe.router):
            first, leaf = stack.leaf()
            assert (first, len(leaf)) == (4, 2) and leaf.grad is not None
    moe = trainer.learner.student.moes[0]
    assert len(trainer.learner.flat.grads) == 2 * sum(stack[4:].numel() for stack in moe.parameters())


def test_new_experts_change_nothing_when_they_come_and_then_live():
    trainer = make_trainer(distill={"steps_per_stage": 40})
    train(trainer, until=40)
    old_outputs = outputs(trainer, 0)
    (decision,) = trainer.begin_stage(stage_data(1))
    assert torch.equal(outputs(trainer, 0), old_outputs)
    assert (decision.num_new, decision.nearest_task, decision.group) == (2, 0, 1)
    assert decision.sources == [sorted(layer, reverse=layer[0] > layer[1]) for layer in decision.sources]
    start = [[p[2].clone() for p in moe.parameters()] for moe in trainer.learner.student.moes]
    for _ in range(40):
        report = trainer.train_step(report=True)
    for shares in report.expert_shares:
        assert min(shares[2:]) > 0.05 and max(shares[:2]) == 0.0
    for layer, moe in enumerate(trainer.learner.student.moes):
        for old, new in zip(start[layer], moe.parameters(), strict=True):
            assert (new[2] - old).abs().max() > 1e-3


def test_learns_every_task_and_forgets_none_without_replay():
    trainer = make_trainer(distill=LONG, student={"width": 32})
    naive = [float(np.square(stage_data(task).teacher_mean).mean()) for task in range(3)]
    old_errors: list[float] = []
    for stage in range(3):
        train(trainer, until=120 * (stage + 1))
        errors = [mean_error(trainer.learner.student, task) for task in range(stage + 1)]
        assert errors[-1] < 0.15 * naive[stage]
        assert errors[:-1] == old_errors
        old_errors = errors


def test_a_frozen_head_expresses_what_the_first_task_had_no_use_for():
    """The head stays as after the first task; the second task still approaches its saturated actions."""
    trainer = make_trainer(distill=LONG)
    for stage in range(2):
        data = stage_data(stage)
        if stage == 0:
            data.teacher_mean[:, 3] = 0.0
        else:
            data.teacher_mean[:] = np.sign(data.teacher_mean)
        trainer.begin_stage(data)
        while trainer.learner.progress.step < trainer.config.distill.steps_per_stage:
            trainer.train_step()
        trainer.end_stage(data)
    means = outputs(trainer, 1)[..., :4].abs().mean((0, 1))
    assert (means > 0.5).all(), means


def test_with_experts_unmasked_those_of_earlier_tasks_move_and_what_is_shared_does_not():
    trainer = make_trainer(
        protection={"mask_experts": False},
        distill={"steps_per_stage": 40},
        student={"task_identity": "none"},
    )
    train(trainer, until=40)
    old_parameters = {name: p.detach().clone() for name, p in trainer.learner.student.named_parameters()}
    train(trainer, until=80)
    now = dict(trainer.learner.student.named_parameters())
    moved = {n for n, old in old_parameters.items() if not torch.equal(now[n][: len(old)], old)}
    assert moved == {name for name in old_parameters if name.endswith(".stack")}


@pytest.mark.parametrize("context", [1, 4])
def test_the_share_asked_for_is_masked_and_moves_not_at_all_or_less(context):
    for mode in ("hard", "scaled"):
        trainer = make_trainer(
            protection={"mask_fraction": 0.25, "mask_mode": mode},
            distill={"steps_per_stage": 30},
            student={"context": context},
        )
        train(trainer, until=30)
        trainer.begin_stage(stage_data(1))
        mask, flat = trainer.protection.update_mask(trainer.learner), trainer.learner.flat
        shared = shared_by_all(trainer)
        protected = shared[mask[shared] < 1.0]
        # A window of one step uses neither queries nor keys, so they are not divided.
        useful = trainer.protection._importance[shared] > 0
        unused = 2 * 2 * (16 * 16 + 16) if context == 1 else 0  # in two layers of width 16
        assert int((~useful).sum()) == unused
        assert len(protected) == pytest.approx(0.25 * int(useful.sum()), abs=2)
        kept = flat.values.clone()
        trainer.train_step()
        moved = (flat.values - kept).abs()
        if mode == "hard":
            assert not moved[protected].any()
        else:
            free = shared[(mask[shared] == 1.0) & useful]
            assert 0 < moved[protected].mean() < 0.7 * moved[free].mean()
        assert trainer.protection.report()["masked_share"] > 0


def is_shared(name: str) -> bool:
    return not (name.startswith("encoder.") or name == "task" or name.endswith(".stack"))


def shared_by_all(trainer: StudentTrainer) -> torch.Tensor:
    """Mask of the parameters that all tasks share."""
    slots = trainer.learner.flat.slots.items()
    return torch.cat([torch.arange(slot.start, slot.stop) for name, slot in slots if is_shared(name)])


def test_a_scaled_mask_is_the_least_protected_importance_by_each_one_s_own():
    trainer = make_trainer(
        protection={"mask_fraction": 0.25, "mask_mode": "scaled"},
        distill={"steps_per_stage": 10},
    )
    train(trainer, until=10)
    trainer.begin_stage(stage_data(1))
    shared = shared_by_all(trainer)
    importance = trainer.protection.state()["importance"][shared]
    num_protected = round(0.25 * int((importance > 0).sum()))
    least = importance.sort(descending=True).values[num_protected - 1]
    mask = trainer.protection.update_mask(trainer.learner)[shared]
    torch.testing.assert_close(mask, (least / importance).clamp(max=1.0))


def test_the_importance_of_a_parameter_adds_up_over_the_stages():
    trainer = make_trainer(protection={"mask_fraction": 0.5}, distill={"steps_per_stage": 10})
    importances, layouts = [], []
    for stage in range(2):
        train(trainer, until=10 * stage + 9)
        trainer.train_step()
        trainer.learner.flat.freeze(None)
        importances.append(fisher(trainer.learner, stage_data(stage), FISHER_WINDOWS))
        layouts.append(trainer.learner.flat)
        trainer.end_stage(stage_data(stage))
    first, total = importances
    total += layouts[1].carried(first, layouts[0])
    torch.testing.assert_close(trainer.protection.state()["importance"], total)


def test_a_task_that_comes_again_may_move_its_own_experts():
    trainer = make_trainer(tasks=[TASKS[0], TASKS[1], TASKS[0]], distill={"steps_per_stage": 20})
    train(trainer, until=40)
    other = outputs(trainer, 1)
    old_outputs = outputs(trainer, 0)
    train(trainer)
    assert torch.equal(outputs(trainer, 1), other)
    assert not torch.equal(outputs(trainer, 0), old_outputs)
    assert trainer.learner.student.num_experts == 4


def test_the_task_is_recognised_from_few_stored_steps():
    """One step in fifty is stored; held-out episodes of every task are recognised at their first observation."""
    trainer = make_trainer(distill={"steps_per_stage": 60}, memory={"share": 0.04})
    train(trainer)
    assert 0 < trainer.memory.num_steps <= 34
    right = 0
    for task in range(3):
        data = stage_data(task, num_episodes=40)
        opening = data.observations[data.offsets[12:-1]]
        actor = StudentActor(trainer.learner.student, TASKS)
        actor.reset([""] * len(opening))
        actor.act(opening)
        right += sum(belief.believed == TASKS[task] for belief in actor.beliefs)
    assert right > 0.9 * 3 * 28


@pytest.mark.parametrize("threshold, experts", [(1e-6, 6), (1e6, 2)])
def test_on_demand_grows_where_the_experts_of_no_task_serve(threshold, experts):
    trainer = make_trainer(
        student={"expansion": "on_demand", "demand_threshold": threshold}, distill={"steps_per_stage": 30}
    )
    train(trainer)
    assert trainer.learner.student.num_experts == experts
    assert [decision.num_new for decision in trainer.learner.progress.growth] == [(experts - 2) // 2] * 2
    verdict = "exceeds" if experts > 2 else "is within"
    for decision in trainer.learner.progress.growth:
        assert f"{verdict} demand_threshold" in decision.reason and f"{decision.probe_loss:.3g}" in decision.reason
    groups = trainer.learner.student.group_K.tolist()
    assert groups == ([0, 1, 2] if experts > 2 else [0, 0, 0])


def test_experts_that_serve_another_task_too_do_not_move_for_it():
    """On demand, the second task shares the experts of the first, which then belong to both."""
    trainer = make_trainer(
        student={"expansion": "on_demand", "demand_threshold": 1e6}, distill={"steps_per_stage": 30}
    )
    train(trainer, until=30)
    first, second = outputs(trainer, 0), outputs(trainer, 1)
    train(trainer, until=60)
    assert trainer.learner.student.group_K.tolist()[:2] == [0, 0]
    assert torch.equal(outputs(trainer, 0), first)
    assert not torch.equal(outputs(trainer, 1), second)


def test_rehearsal_labels_mixtures_of_one_task_by_the_student_before():
    trainer = make_trainer(
        distill={"steps_per_stage": 30, "replay_share": 0.5, "rehearsal": True},
        protection={"kind": "none"},
    )
    train(trainer, until=30)
    old_outputs = outputs(trainer, 0)
    trainer.begin_stage(stage_data(1))
    for _ in range(10):
        trainer.train_step()
    batch = trainer.learner.source.batch(10)
    rows = batch.replayed_R.bool()
    assert int(rows.sum()) == 16 and set(batch.task_R[rows].tolist()) == {0}
    stored = torch.from_numpy(trainer.memory.segments.observations).double()
    gap = (batch.obs_RLO[rows][:, 0, None] - stored[None]).abs().amax(-1).amin(1)
    assert (gap > 1e-6).sum() > 8, "most are no stored observations, but mixtures"
    relabelled = trainer._rehearsal.relabel(batch)
    assert torch.equal(relabelled.teacher_mean_RLA[~rows], batch.teacher_mean_RLA[~rows])
    anchor = trainer._rehearsal._student
    with torch.no_grad():
        wanted = anchor(batch.obs_RLO[rows], task_B=batch.task_R[rows]).mean_BLA.clamp(-1, 1)
    assert torch.equal(relabelled.teacher_mean_RLA[rows], wanted)
    trainer.learner.flat.values.copy_(trainer._rehearsal.values)
    assert torch.equal(outputs(trainer, 0), old_outputs)
