"""The SAC learner: its hand-written gradients against autograd, its targets, its buffer, and exact resumption."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cpd.config import SACConfig
from cpd.teachers.policy import SquashedPolicy
from cpd.teachers.replay import ReplayBuffer
from cpd.teachers.sac import SACLearner
from cpd.teachers.sac_networks import Actor, Critics
from cpd.teachers.sampling import Batch

CONFIG = SACConfig(
    hidden_sizes=(16, 12), num_envs=4, steps_per_env=25, batch_size=32, learning_starts=100, updates_per_step=0.2
)
CPU = torch.device("cpu")


def synthetic_batch(seed: int = 0, **changes: np.ndarray) -> Batch:
    rng = np.random.default_rng(seed)
    shape = (CONFIG.steps_per_env, CONFIG.num_envs)
    ends = np.zeros(shape, np.bool_)
    ends[-1] = True
    fields = {
        "obs": rng.normal(size=(*shape, 39)).astype(np.float32),
        "next_obs": rng.normal(size=(*shape, 39)).astype(np.float32),
        "actions": np.tanh(rng.normal(size=(*shape, 4))).astype(np.float32),
        "rewards": rng.random(shape).astype(np.float32),
        "terminated": np.zeros(shape, np.bool_),
        "ends": ends,
    }
    return Batch(**{**fields, **changes}, train_success=0.0, train_return=0.0)


def weights(learner: SACLearner) -> Tensor:
    state = learner.state()
    return torch.cat([state["actor"], state["critics"], state["targets"]])


def make_actor(dtype: torch.dtype = torch.float64) -> tuple[SquashedPolicy, Actor]:
    policy = SquashedPolicy((16, 12), -0.5, (-0.6, -0.4), torch.Generator().manual_seed(3)).to(dtype)
    # Spread the log standard deviations over both sides of their bounds.
    last = policy.net[-1]
    assert isinstance(last, nn.Linear)
    nn.init.normal_(last.weight, std=0.05, generator=torch.Generator().manual_seed(4))
    return policy, Actor(policy, math.log(0.2))


def test_the_actors_gradient_is_autograds() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        policy, actor = make_actor()
        generator = torch.Generator().manual_seed(1)
        obs, noise = torch.randn(50, 39, generator=generator), torch.randn(50, 4, generator=generator)
        pull = torch.randn(50, 4, generator=generator)
        hidden = actor.forward(obs)
        actor.backward(hidden, actor.draw(hidden[-1], noise), pull, actor.log_alpha.exp(), -4.0)
        found = actor.values.grad
        assert found is not None

        reference = SquashedPolicy((16, 12), -0.5)
        reference.net.load_state_dict({name: value.clone() for name, value in policy.net.state_dict().items()})
        mean, raw = reference.net(obs).chunk(2, dim=1)
        log_std = raw.clamp(-0.6, -0.4)
        assert 0.1 < float((log_std == raw).double().mean()) < 0.9
        normal = torch.distributions.Normal(mean, log_std.exp())
        unsquashed = mean + log_std.exp() * noise
        actions = torch.tanh(unsquashed)
        log_prob = (normal.log_prob(unsquashed) - torch.log(1 - actions**2)).sum(dim=1)
        loss = (0.2 * log_prob).mean() + (pull * actions).sum()
        loss.backward()
        wanted = torch.cat([parameter.grad.flatten() for parameter in reference.net.parameters()])
        torch.testing.assert_close(found[:-1], wanted, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found[-1], -(log_prob.mean() - 4.0).detach(), rtol=1e-9, atol=1e-12)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_critics_gradient_is_autograds() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        critics = Critics((16, 12), torch.Generator().manual_seed(1), CPU)
        inputs = torch.randn(30, 43, generator=torch.Generator().manual_seed(2))
        pull = torch.randn(2, 30, 1, generator=torch.Generator().manual_seed(3))
        activations = critics.forward(inputs)
        torch.testing.assert_close(critics.target_values(inputs), activations[-1].squeeze(-1))
        action_grad = critics.backward(activations, pull, 20)

        values = critics.values.detach().clone().requires_grad_()
        rows = inputs.clone().requires_grad_()
        hidden = rows.expand(2, 30, 43)
        layers = critics._layers(values)
        for index, (weight, bias) in enumerate(layers):
            hidden = hidden @ weight + bias
            hidden = hidden if index == len(layers) - 1 else hidden.relu()
        torch.testing.assert_close(hidden, activations[-1])
        # Learned rows move the weights, the others' actions only.
        (found,) = torch.autograd.grad((hidden * pull)[:, :20].sum(), values, retain_graph=True)
        torch.testing.assert_close(critics.values.grad, found, rtol=1e-9, atol=1e-12)
        (found,) = torch.autograd.grad((hidden * pull)[:, 20:].sum(), rows)
        torch.testing.assert_close(action_grad, found[20:, 39:], rtol=1e-9, atol=1e-12)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_policy_acts_with_the_weights_that_the_optimiser_moves() -> None:
    learner = SACLearner(CONFIG, seed=1)
    obs = synthetic_batch().obs[0]
    before = learner.policy.distribution(obs).raw_mean
    learner.update(synthetic_batch(), 0)
    after = learner.policy.distribution(obs).raw_mean
    assert not np.array_equal(before, after)
    assert np.abs(learner.policy.explore(obs, np.full((4, 4), 3.0, np.float32))).max() <= 1.0


def test_a_critic_step_leaves_the_policy_as_it_is() -> None:
    learner = SACLearner(CONFIG, seed=1, keep_normalizer=True)
    before = learner.state()["actor"].clone()
    critics = learner.state()["critics"].clone()
    learned = learner.update(synthetic_batch(), 0, critic_only=True)
    assert learner.policy_updates(learned) == 0
    assert learned["updates"] == 20
    assert torch.equal(learner.state()["actor"], before)
    assert not torch.equal(learner.state()["critics"], critics)
    assert learner.policy.normalizer.count == 0


def test_the_policy_may_learn_more_rarely() -> None:
    learner = SACLearner(replace(CONFIG, policy_delay=3), seed=1)
    assert learner.policy_updates(learner.update(synthetic_batch(), 0)) == 7


def test_learning_waits_for_enough_transitions() -> None:
    learner = SACLearner(replace(CONFIG, learning_starts=150), seed=1)
    before = weights(learner)
    assert learner.update(synthetic_batch(0), 0)["updates"] == 0
    assert torch.equal(weights(learner), before)
    assert learner.update(synthetic_batch(1), 1)["updates"] == 20


def test_resumption_is_exact() -> None:
    learner = SACLearner(CONFIG, seed=1)
    learner.update(synthetic_batch(0), 0)
    file = io.BytesIO()
    torch.save(learner.state(), file)
    file.seek(0)
    other = SACLearner(CONFIG, seed=1)
    other.load_state(torch.load(file, weights_only=True))
    for iteration in (1, 2):
        batch = synthetic_batch(iteration)
        assert learner.update(batch, iteration) == other.update(batch, iteration)
    assert torch.equal(weights(learner), weights(other))
    assert not torch.equal(weights(learner), weights(SACLearner(CONFIG, seed=2)))


def test_success_is_worth_the_largest_reward_for_ever_after() -> None:
    """Where every step is a success, the value of everything is that of success."""
    config = replace(CONFIG, updates_per_step=20.0, gamma=0.9, learning_rate=3e-3, target_rate=0.05)
    terminated = np.ones((CONFIG.steps_per_env, CONFIG.num_envs), np.bool_)
    rewards = np.full(terminated.shape, 10.0, np.float32)
    learner = SACLearner(config, seed=1)
    batch = synthetic_batch(terminated=terminated, rewards=rewards)
    learner.update(batch, 0)
    assert learner.update(batch, 1)["value"] == pytest.approx(10.0 * 0.1 / (1 - 0.9), rel=0.05)


def test_it_learns_a_one_step_problem() -> None:
    """The reward is highest where the action equals a number that the observation tells."""
    config = replace(CONFIG, gamma=0.01, updates_per_step=3.0, reward_scale=1.0, init_alpha=0.01)
    learner = SACLearner(config, seed=1)
    first_only = np.eye(39, 1, dtype=np.float32).T

    def error() -> float:
        obs = (synthetic_batch(99).obs * first_only).reshape(-1, 39)
        wanted = np.tanh(obs[:, 0])
        return float(np.abs(learner.policy.distribution(obs).raw_mean[:, 0] - wanted).mean())

    before = error()
    for iteration in range(10):
        batch = synthetic_batch(iteration)
        batch = replace(batch, obs=batch.obs * first_only, next_obs=batch.next_obs * first_only)
        flat = batch.obs.reshape(-1, 39)
        noise = np.random.default_rng(iteration).normal(size=(len(flat), 4)).astype(np.float32)
        actions = learner.policy.explore(flat, noise).reshape(batch.actions.shape)
        rewards = -np.abs(actions[..., 0] - np.tanh(batch.obs[..., 0]))
        learner.update(replace(batch, actions=actions, rewards=rewards), iteration)
    assert error() < 0.5 * before


def test_the_buffer_is_a_ring_of_the_newest() -> None:
    buffer = ReplayBuffer(250, CPU)
    for seed in range(3):
        buffer.add(synthetic_batch(seed))
    assert buffer.size == 250
    kept = np.concatenate([synthetic_batch(seed).rewards.ravel() for seed in range(3)])[-250:]
    assert sorted(buffer.tables["rewards"].squeeze(1).tolist()) == sorted(kept.tolist())
    other = ReplayBuffer(250, CPU)
    other.load_state(buffer.state())
    for one in (buffer, other):
        one.add(synthetic_batch(3))
    assert all(torch.equal(buffer.tables[name], other.tables[name]) for name in buffer.tables)


def test_a_batch_larger_than_the_buffer_keeps_its_end() -> None:
    buffer = ReplayBuffer(30, CPU)
    batch = synthetic_batch()
    buffer.add(batch)
    assert buffer.size == 30
    assert sorted(buffer.tables["rewards"].squeeze(1).tolist()) == sorted(batch.rewards.ravel()[-30:].tolist())


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="learning would never start"):
        SACConfig(learning_starts=10, buffer_size=5)
    with pytest.raises(ValueError, match="init_log_std"):
        SACConfig(init_log_std=7.0)
