"""EWC and A-GEM do what their papers say: less is forgotten, and memory's loss does not rise to first order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cpd.config.load import ConfigError
from cpd.distill.protection import ewc, mas
from cpd.distill.protection.importance import fisher
from tests.distill.synthetic import stage_data
from tests.distill.test_trainer import TASKS, make_config, make_trainer, through_a_file, train

#: Fixed size, no replay: what remains is the protection.
PLAIN = {
    "student": {"expansion": "none", "task_identity": "none", "num_experts": 4},
    "memory": {"selection": "none"},
    "protection": {"kind": "none"},
}
SHORT = {"steps_per_stage": 25}
EWC_KIND = {"kind": "ewc", "strength": 1.0}
AGEM_KIND = {"kind": "agem", "agem_windows": 16}


NUM_WINDOWS = 32


@pytest.fixture(autouse=True)
def few_states(monkeypatch):
    """Estimate the importance of parameters from fewer states: that takes most of the time."""
    for module in (ewc, mas):
        monkeypatch.setattr(module, "FISHER_WINDOWS", NUM_WINDOWS)


def with_ewc(**over):
    return {**PLAIN, "distill": SHORT, "protection": EWC_KIND, **over}


def with_agem(**over):
    return {
        **PLAIN,
        "memory": {"selection": "reservoir"},
        "distill": {**SHORT, "replay_share": 0.0},
        "protection": AGEM_KIND,
        **over,
    }


#: A dense student without a task identity on two tasks, which trains fast.
DENSE = {
    "tasks": TASKS[:2],
    "student": {"expansion": "none", "task_identity": "none", "num_experts": 1, "top_k": 1, "context": 1},
    "memory": {"selection": "none"},
    "distill": {"steps_per_stage": 80, "lr": 5e-3},
}
TOLD = {**DENSE["student"], "task_identity": "onehot"}
#: Half of the batch from a memory.
REPLAY = {"memory": {"selection": "reservoir"}, "distill": {**DENSE["distill"], "replay_share": 0.5}}


def forgotten(**over) -> float:
    """Rise of the first task's error in the second stage, in which the second task is learned."""
    trainer, errors = make_trainer(**{**DENSE, **over}), []
    for until in (80, None):
        train(trainer, until=until)
        errors.append([error(trainer, task) for task in range(2)])
    assert errors[0][0] < 0.05 and errors[1][1] < 0.3 * float(np.square(stage_data(1).teacher_mean).mean())
    return errors[1][0] - errors[0][0]


def error(trainer, task: int) -> float:
    data, student = stage_data(task), trainer.learner.student
    student = student.packing.view(student, task) if student.packing else student
    with torch.no_grad():
        out = student(torch.from_numpy(data.observations).double().unsqueeze(1))
    return float(np.square(out.mean_BLA[:, 0].numpy() - data.teacher_mean).mean())


@pytest.fixture(scope="module")
def forgotten_without() -> float:
    return forgotten(protection={"kind": "none"})


@pytest.mark.parametrize(
    "over, share",
    [
        ({"protection": {"kind": "ewc", "strength": 10.0}}, 0.5),
        ({"protection": {"kind": "mas", "strength": 100.0}}, 0.5),
        ({"protection": {"kind": "l2", "strength": 1.0}}, 0.9),
        ({"protection": AGEM_KIND, "memory": {"selection": "reservoir"}}, 0.5),
        ({"protection": {"kind": "derpp", "strength": 0.5}, **REPLAY}, 0.1),
        ({"protection": {"kind": "bc"}, **REPLAY}, 0.1),
        ({"protection": {"kind": "lwf"}}, 0.5),
        ({"protection": {"kind": "lora"}}, 1e-9),
        ({"protection": {"kind": "hat", "strength": 0.75}}, 0.05),
    ],
    ids=lambda value: value["protection"]["kind"] if isinstance(value, dict) else None,
)
def test_less_is_forgotten_in_as_many_steps(forgotten_without, over, share):
    assert forgotten(**over) < share * forgotten_without


class TestEWC:
    def test_the_gradient_is_that_of_the_sum_of_all_stages_penalties(self):
        """By finite differences of the penalty by its formula, with F and theta* of each stage."""
        trainer = make_trainer(**with_ewc())
        terms = []
        for stage in range(2):
            train(trainer, until=25 * (stage + 1) - 1)
            trainer.train_step()
            terms.append(
                (fisher(trainer.learner, stage_data(stage), NUM_WINDOWS), trainer.learner.flat.values.clone())
            )
            trainer.end_stage(stage_data(stage))
        values, strength = trainer.learner.flat.values, trainer.config.protection.strength
        values += 0.1 * torch.randn(values.shape, generator=torch.Generator().manual_seed(0), dtype=values.dtype)
        theta = values.clone().requires_grad_()
        penalty = strength / 2 * sum((F * (theta - centre).square()).sum() for F, centre in terms)
        penalty.backward()
        trainer.learner.flat.grads.fill_(0.25)
        trainer.protection.adjust_gradient(trainer.learner)
        torch.testing.assert_close(trainer.learner.flat.grads - 0.25, theta.grad, rtol=1e-9, atol=1e-12)

    def test_without_an_earlier_stage_nothing_is_added(self):
        trainer = make_trainer(**with_ewc())
        train(trainer, until=10)
        gradient = trainer.learner.flat.grads.clone()
        trainer.protection.adjust_gradient(trainer.learner)
        assert torch.equal(trainer.learner.flat.grads, gradient)

    def test_parameters_that_growth_adds_are_free_at_first(self):
        trainer = make_trainer(**with_ewc(student={"opening_steps": 5, "task_identity": "none"}))
        train(trainer, until=25)
        old = trainer.learner.flat
        held = trainer.protection.state()["precision"].clone()
        train(trainer, until=26)
        now, flat = trainer.protection.state()["precision"], trainer.learner.flat
        is_old = flat.carried(torch.ones_like(held), old).bool()
        assert flat.size > old.size
        assert torch.equal(now[is_old], held) and not now[~is_old].any()
        train(trainer, until=50)
        assert trainer.protection.state()["precision"][~is_old].any()
        assert trainer.protection.report()["mean_precision"] > 0


def test_l2_draws_to_the_mean_of_the_parameters_at_the_ends_of_stages():
    trainer, ends = make_trainer(**with_ewc(protection={"kind": "l2"})), []
    for stage in range(2):
        train(trainer, until=25 * (stage + 1) - 1)
        trainer.train_step()
        ends.append(trainer.learner.flat.values.clone())
        trainer.end_stage(stage_data(stage))
    assert (trainer.protection.state()["precision"] == 2.0).all()
    torch.testing.assert_close(trainer.protection.state()["centre"], (ends[0] + ends[1]) / 2)


class TestAGEM:
    def test_a_projected_gradient_is_orthogonal_to_memorys_and_others_are_left_alone(self):
        trainer = make_trainer(**with_agem())
        train(trainer, until=25)
        trainer.begin_stage(stage_data(1))
        seen = set()
        for _ in range(25):
            step = trainer.learner.progress.step
            trainer.learner.gradient(trainer.learner.source.batch(step))
            plain = trainer.learner.flat.grads.clone()
            trainer.learner.gradient(trainer.learner.source.reference(step, 16))
            reference = trainer.learner.flat.grads.clone()
            trainer.learner.flat.grads.copy_(plain)
            trainer.protection.begin_step(trainer.learner)
            trainer.protection.adjust_gradient(trainer.learner)
            projected, product = trainer.learner.flat.grads, float(plain @ reference)
            scale = float(plain.norm() * reference.norm())
            assert float(projected @ reference) > -1e-12 * scale  # -projected does not raise the loss of memory
            if product < 0:
                assert abs(float(projected @ reference)) < 1e-12 * scale
                rest = plain - projected  # only a multiple of memory's gradient was removed
                assert float(rest @ reference) == pytest.approx(-float(rest.norm() * reference.norm()))
            else:
                assert torch.equal(projected, plain)
            seen.add(product < 0)
            trainer.train_step()
        assert seen == {True, False}
        assert 0 < trainer.protection.report()["projected_share"] < 1

    def test_the_projected_share_is_of_the_stage_s_own_steps(self):
        trainer = make_trainer(**with_agem())
        train(trainer, until=50)
        assert 0 < trainer.protection.report()["projected_share"] < 1
        trainer.begin_stage(stage_data(2))
        assert trainer.protection.report()["projected_share"] == 0
        trainer.train_step()
        assert trainer.protection.report()["projected_share"] in (0, 1)
        assert trainer.protection.state()["num_steps"] == 1

    def test_the_reference_comes_from_memory_and_the_batch_does_not(self):
        trainer = make_trainer(**with_agem())
        train(trainer, until=26)
        assert not trainer.learner.source.batch(3).replayed_R.any()
        reference = trainer.learner.source.reference(3, 16)
        assert reference.replayed_R.all() and len(reference.task_R) == 16 and not reference.task_R.any()
        assert not torch.equal(reference.obs_RLO, trainer.learner.source.reference(4, 16).obs_RLO)

    def test_memorys_gradient_is_of_its_imitation_alone_and_so_the_encoders_stays_as_it_is(self):
        student = {"expansion": "none", "task_identity": "inferred", "num_experts": 4}
        distill = {**SHORT, "replay_share": 0.0}
        trainer = make_trainer(**with_agem(distill=distill, student=student))
        train(trainer, until=26)
        flat = trainer.learner.flat
        encoder = torch.cat(
            [torch.arange(s.start, s.stop) for n, s in flat.slots.items() if n.startswith("encoder.")]
        )
        num_projected = 0
        for _ in range(8):
            step = trainer.learner.progress.step
            with_contrast = trainer.learner.gradient(
                trainer.learner.source.batch(step), trainer.learner.contrast_batch()
            )
            plain = flat.grads.clone()
            without = trainer.learner.gradient(trainer.learner.source.reference(step, 16))
            reference = flat.grads.clone()
            assert with_contrast.contrast > 0 and without.contrast == 0
            assert plain[encoder].any() and not reference[encoder].any()
            product = float(plain @ reference)
            taken_out = min(product, 0.0) / float(reference @ reference) * reference
            flat.grads.copy_(plain)
            trainer.protection.begin_step(trainer.learner)
            trainer.protection.adjust_gradient(trainer.learner)
            torch.testing.assert_close(flat.grads, plain - taken_out)
            assert torch.equal(flat.grads[encoder], plain[encoder])
            num_projected += product < 0
            trainer.train_step()
        assert num_projected > 0

    @pytest.mark.parametrize(
        "over, path",
        [
            ({"distill": {"replay_share": 0.5}}, r"distill\.replay_share"),
            ({"memory": {"selection": "none"}}, r"memory\.selection"),
        ],
    )
    def test_needs_a_memory_apart_from_the_batch(self, over, path):
        with pytest.raises(ConfigError, match=path):
            make_config(**with_agem(**over))


@pytest.mark.parametrize(
    "settings",
    [
        with_ewc(student={"opening_steps": 12, "task_identity": "none"}),
        with_agem(),
        {**DENSE, "distill": SHORT, "protection": {"kind": "mas"}},
        {**DENSE, **REPLAY, "distill": {**SHORT, "replay_share": 0.5}, "protection": {"kind": "derpp"}},
        {**DENSE, "distill": SHORT, "protection": {"kind": "lwf"}, "student": TOLD},
        {**DENSE, "distill": SHORT, "protection": {"kind": "lora"}},
        {**DENSE, "distill": SHORT, "protection": {"kind": "hat"}},
    ],
    ids=["ewc", "agem", "mas", "derpp", "lwf", "lora", "hat"],
)
def test_resuming_equals_going_on_bit_for_bit(settings):
    straight = make_trainer(**settings)
    states = []
    for until in (25, 30):  # between stages, and within one
        train(straight, until=until)
        states.append(through_a_file(straight.state()))
    train(straight)
    for state in states:
        resumed = make_trainer(**settings)
        resumed.restore(state)
        train(resumed)
        assert torch.equal(resumed.learner.flat.values, straight.learner.flat.values)
        assert resumed.protection.report() == straight.protection.report()


def test_settings_that_another_kind_looks_at_are_warned_about():
    settings = {"kind": "none", "strength": 2.0, "agem_windows": 4}
    assert make_config(protection=settings).warnings() == [
        f"protection.{name} has no effect: protection.kind is 'none'" for name in ("strength", "agem_windows")
    ]
    assert make_config(protection={**settings, "kind": "ewc"}).warnings() == [
        "protection.agem_windows has no effect: protection.kind is 'ewc'"
    ]
