"""The Fisher information against finite differences, one state and one output at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cpd.distill.protection.importance import fisher, sensitivity
from cpd.seeding import generator
from tests.distill.synthetic import stage_data
from tests.distill.test_trainer import make_plain, train

NUM_WINDOWS = 4


@pytest.fixture(scope="module")
def trained():
    """A trainer at the end of its first stage; tests leave its parameters as they are."""
    trainer = make_plain()
    train(trainer, until=60)
    return trainer


def outputs(trainer, data, step: int) -> np.ndarray:
    """The Gaussian's means and log deviations [8] at a step of `data`, with its past."""
    episode = np.searchsorted(data.offsets, step, side="right") - 1
    start = max(step - 3, data.offsets[episode])
    with torch.no_grad():
        out = trainer.learner.student(torch.from_numpy(data.observations[start : step + 1]).double()[None])
    return torch.cat([out.mean_BLA[0, -1], out.log_std_BLA[0, -1]]).numpy()


def test_is_the_mean_of_squared_derivatives_of_single_states(trained):
    trainer = trained
    data = stage_data(1)
    importance = fisher(trainer.learner, data, NUM_WINDOWS, exact=True)
    steps = generator(1, "fisher", 1).integers(data.num_steps, size=NUM_WINDOWS)

    values, compared = trainer.learner.flat.values, 0
    weights = [np.concatenate([np.exp(-2 * outputs(trainer, data, step)[4:]), [2.0] * 4]) for step in steps]
    for slot in trainer.learner.flat.slots.values():
        for index in {slot.start, (slot.start + slot.stop) // 2, slot.start + (slot.stop - slot.start) // 5}:
            wanted, kept, width = 0.0, float(values[index]), 1e-5
            for step, weight in zip(steps, weights, strict=True):
                values[index] = kept + width
                above = outputs(trainer, data, step)
                values[index] = kept - width
                below = outputs(trainer, data, step)
                wanted += float(weight @ ((above - below) / (2 * width)) ** 2) / NUM_WINDOWS
            values[index] = kept
            np.testing.assert_allclose(float(importance[index]), wanted, rtol=1e-4, atol=1e-9)
            compared += wanted > 1e-6
    assert compared > 60
    assert not trainer.learner.flat.grads.any()


def test_actions_that_the_task_lacks_have_no_influence(trained, monkeypatch):
    learner, data = trained.learner, stage_data(1)
    head = learner.flat.slots["head.bias"]
    everything = fisher(learner, data, NUM_WINDOWS, exact=True), sensitivity(learner, data, NUM_WINDOWS)
    has_action_KA = torch.ones(3, 4, dtype=torch.bool)
    has_action_KA[1, 3] = False
    monkeypatch.setattr(learner, "has_action_KA", has_action_KA)
    for importance, whole in zip(
        (fisher(learner, data, NUM_WINDOWS, exact=True), sensitivity(learner, data, NUM_WINDOWS)),
        everything,
        strict=True,
    ):
        assert importance[head].view(2, 4)[:, 3].tolist() == [0.0, 0.0]
        torch.testing.assert_close(importance[head].view(2, 4)[:, :3], whole[head].view(2, 4)[:, :3])


def test_random_signs_estimate_it_without_bias(trained):
    """Their error falls with the number of states, at the rate of a mean."""
    data = stage_data(0)
    errors = []
    for num_windows in (9, 144):
        exact = fisher(trained.learner, data, num_windows, exact=True)
        estimate = fisher(trained.learner, data, num_windows)
        errors.append(float((estimate - exact).abs().sum() / exact.sum()))
    assert errors[1] < 0.25
    assert 0.15 < errors[1] / errors[0] < 0.4


def test_is_of_the_student_not_of_its_error(trained):
    """A student that agrees with its teacher has no distillation gradient, but a Fisher information."""
    trainer, data = trained, stage_data(0)
    importance = fisher(trainer.learner, data, NUM_WINDOWS)
    data.teacher_mean[:] = 0.0
    assert torch.equal(fisher(trainer.learner, data, NUM_WINDOWS), importance)
    assert (importance >= 0).all() and (importance > 0).float().mean() > 0.5
    # Only experts that are not chosen have none.
    without = {name for name, slot in trainer.learner.flat.slots.items() if (importance[slot] == 0).any()}
    assert all(name.endswith(".stack") for name in without)


def test_the_sensitivity_of_the_heads_bias_is_twice_the_mean_size_of_the_action():
    """Of |m|^2, the derivative by a bias of the mean is 2 m; a bias of the deviation has none."""
    trainer = make_plain()
    train(trainer, until=60)
    data = stage_data(1)
    importance = sensitivity(trainer.learner, data, NUM_WINDOWS)[trainer.learner.flat.slots["head.bias"]]
    steps = generator(1, "fisher", 1).integers(data.num_steps, size=NUM_WINDOWS)
    means = np.stack([outputs(trainer, data, step)[:4] for step in steps])
    np.testing.assert_allclose(importance, [*2 * np.abs(means).mean(0), 0, 0, 0, 0], rtol=1e-9)
