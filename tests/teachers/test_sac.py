"""The SAC learner: its hand-written gradients against autograd, its targets, its buffer, and exact resumption."""

from __future__ import annotations

import copy
import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cpd.config import SACConfig
from cpd.seeding import derive, generator
from cpd.teachers.policy import SquashedPolicy
from cpd.teachers.rollout import Experience
from cpd.teachers.sac.buffer import ReplayBuffer
from cpd.teachers.sac.learner import SACLearner
from cpd.teachers.sac.networks import Actor, Critics

CONFIG = SACConfig(
    hidden_sizes=(16, 12), num_envs=4, steps_per_env=25, batch_size=32, learning_starts=100, updates_per_step=0.2
)
CPU = torch.device("cpu")


def synthetic_batch(seed: int = 0, **changes: np.ndarray) -> Experience:
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
    return Experience(**{**fields, **changes}, train_success=0.0, train_return=0.0)


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


@pytest.mark.parametrize("critic_only", [False, True])
def test_observation_statistics_stay_put_where_the_policy_was_cloned(critic_only: bool) -> None:
    for keep_normalizer, count in ((True, 30), (False, 230)):
        learner = SACLearner(CONFIG, seed=1, keep_normalizer=keep_normalizer)
        learner.policy.normalizer.update(torch.randn(30, 39, generator=torch.Generator().manual_seed(1)))
        before = learner.policy.normalizer.mean.clone()
        learner.remember(synthetic_batch(0))
        learner.update(synthetic_batch(1), 0, critic_only=critic_only)
        assert learner.policy.normalizer.count == count
        assert torch.equal(learner.policy.normalizer.mean, before) == keep_normalizer


def test_the_policy_may_learn_more_rarely() -> None:
    learner = SACLearner(replace(CONFIG, policy_delay=3), seed=1)
    # Every third of 20 steps an iteration, counted from the first one on.
    assert [learner.policy_updates(learner.update(synthetic_batch(), i)) for i in range(4)] == [7, 7, 6, 7]


def test_learning_waits_for_enough_transitions() -> None:
    learner = SACLearner(replace(CONFIG, learning_starts=150), seed=1)
    before = weights(learner)
    assert learner.update(synthetic_batch(0), 0) == {"policy_updates": 0, "updates": 0}
    assert torch.equal(weights(learner), before)
    assert learner.update(synthetic_batch(1), 1)["updates"] == 20


def test_resumption_is_exact() -> None:
    learner = SACLearner(CONFIG, seed=1)
    learner.update(synthetic_batch(0), 0)
    file = io.BytesIO()
    torch.save(learner.state(), file)
    file.seek(0)
    other = SACLearner(CONFIG, seed=1)
    other.restore(torch.load(file, weights_only=True))
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
    other.restore(buffer.state())
    for one in (buffer, other):
        one.add(synthetic_batch(3))
    assert all(torch.equal(buffer.tables[name], other.tables[name]) for name in buffer.tables)


def test_a_row_of_the_buffer_is_one_transition_with_its_action_as_executed() -> None:
    buffer = ReplayBuffer(150, CPU)
    terminated = np.random.default_rng(1).random((CONFIG.steps_per_env, CONFIG.num_envs)) < 0.5
    batch = synthetic_batch(terminated=terminated)
    batch = replace(batch, actions=3 * batch.actions)
    buffer.add(synthetic_batch(1))
    buffer.add(batch)
    rows = torch.from_numpy((100 + np.arange(100)) % 150)
    for name in ("obs", "next_obs", "rewards", "terminated", "actions"):
        wanted = getattr(batch, name).reshape(100, -1).astype(np.float32)
        wanted = wanted.clip(-1, 1) if name == "actions" else wanted
        assert np.array_equal(buffer.tables[name][rows].numpy(), wanted), name


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


def test_an_update_is_the_published_one() -> None:
    """One update's gradients, targets and temperature against autograd on the losses of Haarnoja et al. (2018)."""
    config = replace(CONFIG, updates_per_step=0.01, gamma=0.9, reward_scale=0.3, init_alpha=0.2, target_rate=0.05)
    learner = SACLearner(config, 1)
    terminated = np.random.default_rng(5).random((25, 4)) < 0.3
    for iteration in range(2):
        learner.update(synthetic_batch(iteration, terminated=terminated), iteration)
    actor, critics = learner._actor, learner._critics
    with torch.no_grad():  # targets that differ from their critics
        critics.values.add_(0.1 * torch.randn(critics.values.shape, generator=torch.Generator().manual_seed(9)))
    values, targets, net = critics.values.clone(), critics.targets.clone(), copy.deepcopy(learner.policy.net)
    alpha = actor.log_alpha.exp().clone()
    learner.update(synthetic_batch(7, terminated=terminated), 2)

    num_rows = config.batch_size
    drawn = generator(1, "replayed", 2).integers(learner.replay.size, size=(1, num_rows))
    rows = {name: table[torch.from_numpy(drawn)[0]] for name, table in learner.replay.tables.items()}
    noise = torch.zeros(2 * num_rows, 4).normal_(
        generator=torch.Generator().manual_seed(derive(1, "drawn-actions", 2))
    )

    def act(obs: Tensor, own_noise: Tensor) -> tuple[Tensor, Tensor]:
        mean, raw = net(learner.policy.normalize(obs)).chunk(2, 1)
        std = raw.clamp(config.min_log_std, config.max_log_std).exp()
        unsquashed = mean + std * own_noise
        log_prob = torch.distributions.Normal(mean, std).log_prob(unsquashed)
        return unsquashed.tanh(), (log_prob - torch.log(1 - unsquashed.tanh() ** 2 + 1e-12)).sum(1)

    def value(vector: Tensor, obs: Tensor, actions: Tensor) -> Tensor:
        hidden = torch.cat([learner.policy.normalize(obs), actions], 1).expand(2, len(obs), -1)
        *inner, (weight, bias) = critics._layers(vector)
        for own_weight, own_bias in inner:
            hidden = (hidden @ own_weight + own_bias).relu()
        return (hidden @ weight + bias).squeeze(-1)

    with torch.no_grad():
        next_actions, next_log_prob = act(rows["next_obs"], noise[num_rows:])
        next_value = value(targets, rows["next_obs"], next_actions).min(0).values - alpha * next_log_prob
        ever_after = learner.largest_reward * config.reward_scale / (1 - config.gamma)
        ended = rows["terminated"].squeeze(1)
        target = config.reward_scale * rows["rewards"].squeeze(1)
        target += config.gamma * torch.where(ended > 0, torch.full_like(next_value, ever_after), next_value)
    vector = values.clone().requires_grad_()
    critic_loss = 0.5 * (value(vector, rows["obs"], rows["actions"]) - target).square().mean(1).sum()
    (critic_grad,) = torch.autograd.grad(critic_loss, vector)
    actions, log_prob = act(rows["obs"], noise[:num_rows])
    actor_loss = (alpha * log_prob - value(values, rows["obs"], actions).min(0).values).mean()
    actor_grad = torch.cat([grad.flatten() for grad in torch.autograd.grad(actor_loss, list(net.parameters()))])
    assert 0 < ended.mean() < 1
    assert critics.values.grad is not None and actor.values.grad is not None
    torch.testing.assert_close(critics.values.grad, critic_grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(actor.values.grad[:-1], actor_grad, rtol=1e-3, atol=1e-5)
    # The temperature's own loss, by its logarithm: entropy is drawn to the target.
    wanted = -(log_prob.mean() + 4 * config.target_entropy)
    torch.testing.assert_close(actor.values.grad[-1], wanted.detach(), rtol=1e-4, atol=1e-5)
    moved = targets + config.target_rate * (critics.values - targets)
    torch.testing.assert_close(critics.targets, moved)
