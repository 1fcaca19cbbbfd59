"""DER++, cloning replay, LwF, LoRA and HAT by their formulas, on a small dense student."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from cpd.distill.losses import reverse_kl
from cpd.distill.trainer import StudentTrainer
from cpd.run.provenance import labels
from cpd.student.actor import make_actor
from cpd.student.network import load_student, save_student
from cpd.student.task_weights import GATE_SCALE
from tests.distill.synthetic import stage_data
from tests.distill.test_protection_penalties import DENSE, REPLAY
from tests.distill.test_trainer import TASKS, make_trainer, train

STEPS = 12


def make(kind: str, **over) -> StudentTrainer:
    tables = {**DENSE, **over, "protection": {"kind": kind, **over.get("protection", {})}}
    tables["distill"] = {**DENSE["distill"], **over.get("distill", {}), "steps_per_stage": STEPS}
    return make_trainer(**tables)


def at_the_end_of_the_first_stage(trainer: StudentTrainer) -> None:
    train(trainer, until=STEPS - 1)
    trainer.train_step()


def outputs(student, obs: np.ndarray, task: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Clipped mean and floored log deviation, [N, A]."""
    with torch.no_grad():
        out = student(torch.from_numpy(obs).double().unsqueeze(1), task_B=task)
    return out.mean_BLA[:, 0].clamp(-1, 1), out.log_std_BLA[:, 0].clamp(min=np.log(0.1))


@pytest.mark.parametrize("kind", ["bc", "derpp"])
def test_stored_steps_keep_the_outputs_of_their_own_stage(kind):
    trainer, data = make(kind, **REPLAY), stage_data(0)
    at_the_end_of_the_first_stage(trainer)
    mean, log_std = outputs(trainer.learner.student, data.observations)
    trainer.end_stage(data)
    train(trainer)
    held = trainer.memory.segments
    held = held.take(np.flatnonzero(held.task == 0))
    stored = np.hstack([held.teacher_mean, held.teacher_log_std]) if kind == "bc" else held.student_outputs
    np.testing.assert_allclose(stored, torch.cat([mean, log_std], 1).numpy()[held.first_step], rtol=1e-6)
    if kind == "derpp":
        np.testing.assert_array_equal(held.teacher_mean, data.teacher_mean[held.first_step])
        assert held.num_bytes == held.num_steps * 4 * (39 + 8 + 8) + len(held) * 25


def test_derpp_adds_the_distance_of_replayed_rows_to_their_stored_outputs():
    trainer = make("derpp", **REPLAY, protection={"strength": 0.5})
    train(trainer, until=STEPS + 1)
    learner, batch = trainer.learner, trainer.learner.source.batch(3)
    out = learner.student(batch.obs_RLO)
    added = trainer.protection.loss(learner, out, batch)
    mean, log_std = batch.student_outputs_RLP[:16, 0].split(4, -1)
    distance = reverse_kl(out.mean_BLA[:16, 0], out.log_std_BLA[:16, 0], mean, log_std)
    assert batch.replayed_R.tolist() == [1.0] * 16 + [0.0] * 16
    torch.testing.assert_close(added, 0.5 * distance.sum() / 32)
    plain = learner.gradient(batch)
    gradient = learner.flat.grads.clone()
    learner.gradient(batch, None, lambda out: trainer.protection.loss(learner, out, batch))
    assert plain.distance_RL.sum() > 0 and not torch.equal(gradient, learner.flat.grads)


@pytest.mark.parametrize("identity", ["none", "onehot"])
def test_lwf_keeps_the_previous_students_outputs_on_new_observations(identity):
    trainer = make("lwf", tasks=TASKS, student={**DENSE["student"], "task_identity": identity})
    train(trainer, until=2 * STEPS)
    previous = trainer.learner.flat.values.clone()
    train(trainer, until=2 * STEPS + 5)
    learner, batch = trainer.learner, trainer.learner.source.batch(5)
    trainer.protection.begin_step(learner)
    added = float(trainer.protection.loss(learner, learner.student(batch.obs_RLO, task_B=2), batch).detach())
    task_R = trainer.protection._task_R
    assert task_R is None if identity == "none" else set(task_R.tolist()) == {0, 1}

    def gaussian(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kept = learner.flat.values.clone()
        learner.flat.values.copy_(values)
        with torch.no_grad():
            out = learner.student(batch.obs_RLO, task_B=task_R)
        learner.flat.values.copy_(kept)
        return out.mean_BLA, out.log_std_BLA

    mean, log_std = gaussian(previous)
    distance = reverse_kl(*gaussian(learner.flat.values), mean.clamp(-1, 1), log_std.clamp(min=np.log(0.1)))
    assert added == pytest.approx(float(distance.mean()) * (1 if identity == "none" else 2))


@pytest.mark.parametrize("kind", ["lora", "hat"])
def test_a_file_holds_the_weights_of_every_task_and_results_are_labelled_as_told(kind, tmp_path):
    trainer = make(kind)
    train(trainer)
    path = tmp_path / "student.safetensors"
    save_student(path, trainer.learner.student, {})
    assert labels(trainer.config).task_identity == "given"
    actions = []
    for task in TASKS[:2]:
        for student in (trainer.learner.student, load_student(path)):
            actor = make_actor(student, TASKS[:2])
            actor.reset([task] * 5)
            actions.append(actor.act(stage_data(0).observations[:5]))
    np.testing.assert_array_equal(actions[0], actions[1])
    np.testing.assert_array_equal(actions[2], actions[3])
    assert not np.array_equal(actions[0], actions[2])


def test_lora_adds_a_product_of_the_tasks_own_factors_and_changes_nothing_else():
    trainer = make("lora", protection={"lora_rank": 2})
    train(trainer, until=STEPS)
    student, flat = trainer.learner.student, trainer.learner.flat
    first = flat.values.clone()
    assert not any(up.stack.any() for up in student.packing.up)
    train(trainer)
    shared, name = dict(student.named_parameters()), "blocks.1.moe.down.stack"
    weights = student.packing.effective(shared, 1, is_training=False)
    place = student.packing.names.index(name)
    up, down = student.packing.up[place].stack[1], student.packing.down[place].stack[1]
    assert up.any() and up.shape == (32, 2) and down.shape == (2, 16)
    torch.testing.assert_close(weights[name][0], shared[name][0] + up @ down)
    for name, slot in flat.slots.items():
        changed = (flat.values[slot] != first[slot]).view(flat.shapes[name])
        assert changed[1].any() and not changed[0].any() if name.startswith("packing.") else not changed.any(), (
            name
        )
    # Rank times the sides of all matrices: embedding, attention, experts, head.
    sides = (39 + 16) + 2 * ((16 + 48) + (16 + 16) + 2 * (32 + 16)) + (16 + 8)
    assert trainer.protection.report() == {"parameters_per_task": 2 * sides}


class TestHAT:
    def test_the_gates_are_annealed_and_their_gradient_is_compensated(self):
        trainer = make("hat")
        train(trainer, until=1)
        gates = trainer.learner.student.packing
        assert float(gates.scale) == pytest.approx(1 / GATE_SCALE)
        at_the_end_of_the_first_stage(trainer)
        assert float(gates.scale) == pytest.approx(GATE_SCALE)
        embedding, scale = gates.embedding.stack.detach()[0], 3.0
        _, leaf = gates.embedding.leaf()
        values = gates.gates(0, scale)
        torch.testing.assert_close(values, torch.sigmoid(scale * embedding))
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
        own = torch.sigmoid(scale * embedding)
        factor = ((scale * embedding).cosh() + 1) / (scale * (embedding.cosh() + 1))  # the paper's, without s_max
        torch.testing.assert_close(gradient[0], scale * own * (1 - own) * factor)

    def test_updates_shrink_by_what_earlier_tasks_use_and_the_rest_is_frozen(self):
        trainer = make("hat", protection={"strength": 0.75})
        train(trainer, until=STEPS)
        learner = trainer.learner
        used = torch.sigmoid(GATE_SCALE * learner.student.packing.embedding.stack[0]).detach()
        first = learner.flat.values.clone()
        train(trainer, until=STEPS + 3)
        torch.testing.assert_close(trainer.protection.state()["used"], used)
        for layer in range(2):
            slot = learner.flat.slots[f"blocks.{layer}.moe.down.stack"]
            rows = trainer.protection.update_mask(learner)[slot].view(32, 16)
            torch.testing.assert_close(rows, (1 - used[layer]).unsqueeze(1).expand(32, 16))
        unchanged = [
            name
            for name, slot in learner.flat.slots.items()
            if torch.equal(learner.flat.values[slot], first[slot])
        ]
        assert {"embed.weight", "head.weight", "norm.weight"} <= set(unchanged)
        assert not any("moe.up" in name or "moe.down" in name or "packing" in name for name in unchanged)
        gates = torch.sigmoid(learner.student.packing.scale * learner.student.packing.embedding.stack[1]).detach()
        added = trainer.protection.loss(learner, None, None)
        torch.testing.assert_close(added.detach(), 0.75 * (gates * (1 - used)).sum() / (1 - used).sum())


def test_segments_of_old_and_new_kind_survive_a_state():
    """Memories without outputs have the arrays of earlier versions."""
    plain, derpp = make("none", **REPLAY), make("derpp", **REPLAY)
    for trainer, added in ((plain, set()), (derpp, {"student_outputs"})):
        train(trainer, until=STEPS)
        state = trainer.memory.state()
        names = {field.name for field in dataclasses.fields(trainer.memory.segments)}
        assert state.keys() == names - {"student_outputs"} | added
