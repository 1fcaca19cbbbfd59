"""The PPO learner (Schulman et al. 2017) of a single-task teacher.

Departures from the textbook, each for a reason:
- Exploration noise is correlated in time, which moves a hand further than white noise of the same variance;
  log-probabilities are computed as if it were white.
- Success ends a training episode. Meta-World's reward is dense, so a plain termination would punish success by
  cutting off what was still to come: the value of a success is that of the largest reward for ever after
  (`teacher.terminate_on_success = false` lets episodes go on instead).
- Means are unbounded and actions clipped by the environment; a penalty keeps means from drifting far beyond.

Everything runs on the CPU: the simulator takes most of an iteration, and at these network sizes an update is bound
by the overhead of its many small operations, which a GPU does not lower.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from cpd.comm import Comm, SerialComm
from cpd.config import PPOConfig
from cpd.envs.tasks import OBSERVATION_SIZE
from cpd.seeding import derive, generator
from cpd.teachers.policy import GaussianPolicy, RunningMoments, gaussian_log_prob, mlp
from cpd.teachers.ranks import largest, moments_over_ranks, own_slots, reduce_gradients
from cpd.teachers.rollout import LARGEST_REWARD, Experience


def gae(
    rewards_TN: Tensor, values_TN: Tensor, next_values_TN: Tensor, ends_TN: Tensor, gamma: float, lam: float
) -> Tensor:
    """Advantages `[T, N]`: `A_t = delta_t + gamma * lam * A_{t+1}`, with `A_{t+1} = 0` where a segment ends.

    `delta_t = r_t + gamma * V'_t - V_t`, where V' is the value of what follows step t: of the next observation
    where the episode goes on, of the last one where it was cut by a time limit, and whatever stands for the
    future where it ended in a terminal state.

    Args:
        rewards_TN: rewards of T steps in N environments.
        values_TN: values of the observations before each step.
        next_values_TN: V'.
        ends_TN: bool, true at the last step of every segment; must be true at the last step of all.
        gamma: discount per step.
        lam: lambda, 0 (one-step) to 1 (Monte Carlo).
    """
    assert bool(ends_TN[-1].all())
    deltas_TN = rewards_TN + gamma * next_values_TN - values_TN
    decay_TN = gamma * lam * (~ends_TN).to(deltas_TN.dtype)
    advantages_TN = torch.empty_like(deltas_TN)
    following_N = torch.zeros_like(deltas_TN[0])
    for t in range(len(deltas_TN) - 1, -1, -1):
        following_N = deltas_TN[t] + decay_TN[t] * following_N
        advantages_TN[t] = following_N
    return advantages_TN


#: Means may leave [-1, 1] by this much before the penalty sets in.
MEAN_MARGIN: Final = 0.2
MIN_VALUE_STD: Final = 1e-2


class Samples(NamedTuple):
    """An iteration's experience as the losses see it, flattened to B = S x N rows."""

    obs_BO: Tensor
    actions_BA: Tensor
    old_log_prob_B: Tensor
    advantages_B: Tensor
    targets_B: Tensor
    """Normalised value targets."""


class PPOLearner:
    """Policy, value network and optimiser of one teacher.

    Args:
        config: the recipe.
        seed: of the initial weights and of the order of minibatches.
        keep_normalizer: leave the policy's observation statistics as they are; new ones would change what a cloned
            policy does.
        comm: the ranks that share the iteration's environments; all of them learn the same.
    """

    def __init__(
        self, config: PPOConfig, seed: int, *, keep_normalizer: bool = False, comm: Comm | None = None
    ) -> None:
        self.config = config
        self.seed = seed
        self._comm: Comm = comm or SerialComm()
        self._slots = own_slots(self._comm, config.num_envs)
        self._keep_normalizer = keep_normalizer
        torch_generator = torch.Generator().manual_seed(derive(seed, "weights"))
        self.policy = GaussianPolicy(config.hidden_sizes, config.init_log_std, torch_generator)
        self.value_net = mlp((OBSERVATION_SIZE, *config.hidden_sizes, 1), 1.0, torch_generator)
        self.value_moments = RunningMoments(1, MIN_VALUE_STD)
        self.largest_reward = LARGEST_REWARD
        self.optimizer = torch.optim.Adam(self.parameters(), lr=config.learning_rate, fused=True)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of the policy, then those of the value network."""
        return chain(self.policy.parameters(), self.value_net.parameters())

    def policy_updates(self, learned: dict[str, float]) -> int:
        """Gradient steps on the policy in what `update` returned."""
        num_rows = self.config.num_envs * self.config.steps_per_env
        return int(learned["epochs"]) * (num_rows // self.config.minibatch_size)

    def state(self) -> dict[str, Any]:
        """Everything that the next update depends on."""
        return {
            "policy": self.policy.state_dict(),
            "value_net": self.value_net.state_dict(),
            "value_moments": self.value_moments.state_dict(),
            "largest_reward": self.largest_reward,
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state` gave."""
        self.policy.load_state_dict(state["policy"])
        self.value_net.load_state_dict(state["value_net"])
        self.value_moments.load_state_dict(state["value_moments"])
        self.largest_reward = state["largest_reward"]
        self.optimizer.load_state_dict(state["optimizer"])

    def update(
        self, batch: Experience, iteration: int, *, critic_only: bool = False, exploring: bool = False
    ) -> dict[str, float]:
        """Learn from an iteration's batch; with `critic_only` the policy stays exactly as it is, and while
        `exploring` its deviation keeps to the bound that is meant for that.

        Returns:
            For the record: `kl` (nats, from the old policy, estimated over the last epoch), `policy_loss`,
            `value_loss`, `grad_norm` (the policy's, before clipping), `value_explained` (share of the targets'
            variance, before the update), `log_std` (mean), `entropy` (nats), `epochs`.
        """
        samples, explained = self._prepare(batch)
        config = self.config
        least = config.least_log_std(exploring=exploring)
        steps: list[dict[str, float]] = []
        kl, epoch = 0.0, 0
        for epoch in range(1, config.num_epochs + 1):
            num_rows = config.num_envs * batch.rewards.shape[0]
            rows_of_minibatches = self._minibatches(num_rows, iteration, epoch)
            minibatches = [Samples(*(tensor[rows] for tensor in samples)) for rows in rows_of_minibatches]
            for minibatch in minibatches:
                steps.append(self._step(minibatch, critic_only))
                with torch.no_grad():
                    self.policy.log_std_A.clamp_(least, config.max_log_std)
            own = steps[-len(rows_of_minibatches) :]
            kl = sum(step["kl"] for step in own) / len(own)
            if kl > config.target_kl:
                break
        log_std = float(self.policy.log_std_A.detach().mean())
        return {
            "kl": kl,
            **{name: sum(step[name] for step in steps) / len(steps) for name in steps[0] if name != "kl"},
            "value_explained": explained,
            "log_std": log_std,
            "entropy": self.policy.log_std_A.numel() * (log_std + 0.5 * (1 + _LOG_2PI)),
            "epochs": float(epoch),
        }

    @torch.no_grad()
    def _prepare(self, batch: Experience) -> tuple[Samples, float]:
        """Advantages and targets, with observation statistics that know this batch already."""
        config = self.config
        obs_BO = torch.from_numpy(batch.obs).flatten(0, 1)
        next_obs_BO = torch.from_numpy(batch.next_obs).flatten(0, 1)
        actions_BA = torch.from_numpy(batch.actions).flatten(0, 1)
        # Old means are taken after this, so that ratios start at one.
        if not self._keep_normalizer:
            self.policy.normalizer.update(obs_BO, self._comm)
        self.largest_reward = largest(max(self.largest_reward, float(batch.rewards.max())), self._comm)
        success_value = self.largest_reward * config.reward_scale / (1 - config.gamma)

        shape = batch.rewards.shape
        values_SN = self._values(obs_BO).reshape(shape)
        terminated_SN = torch.from_numpy(batch.terminated)
        next_values_SN = self._values(next_obs_BO).reshape(shape).masked_fill(terminated_SN, success_value)
        rewards_SN = torch.from_numpy(batch.rewards) * config.reward_scale
        ends_SN = torch.from_numpy(batch.ends)
        advantages_SN = gae(rewards_SN, values_SN, next_values_SN, ends_SN, config.gamma, config.gae_lambda)
        targets_B1 = (advantages_SN + values_SN).reshape(-1, 1)
        of_advantages = moments_over_ranks(advantages_SN, self._comm)
        of_targets = moments_over_ranks(targets_B1, self._comm)
        explained = float(1 - of_advantages.variance / of_targets.variance.clamp_min(1e-12))
        self.value_moments.update(targets_B1, self._comm)
        targets_B = ((targets_B1 - self.value_moments.mean) / self.value_moments.std).float().squeeze(1)
        advantages_B = (advantages_SN.flatten() - of_advantages.mean) / (of_advantages.std + 1e-8)
        mean_BA = self.policy(obs_BO)
        log_prob_B = gaussian_log_prob(actions_BA, mean_BA, self.policy.log_std_A)
        normalized_BO = self.policy.normalize(obs_BO)
        return Samples(normalized_BO, actions_BA, log_prob_B, advantages_B, targets_B), explained

    def _values(self, obs_BO: Tensor) -> Tensor:
        """Values `[B]` in units of scaled reward."""
        normalized_B: Tensor = self.value_net(self.policy.normalize(obs_BO)).squeeze(-1)
        mean, std = self.value_moments.mean.float(), self.value_moments.std.float()
        return normalized_B * std + mean

    def _minibatches(self, num_rows: int, iteration: int, epoch: int) -> list[Tensor]:
        """Disjoint indices of this rank's rows in the epoch's minibatches; a remainder waits for another epoch."""
        rng = generator(self.seed, "minibatches", iteration, epoch)
        order = torch.from_numpy(rng.permutation(num_rows))
        size = self.config.minibatch_size
        minibatches = [order[start : start + size] for start in range(0, num_rows - size + 1, size)]
        return [self._own(rows) for rows in minibatches] if self._comm.size > 1 else minibatches

    def _own(self, rows: Tensor) -> Tensor:
        """Those of an iteration's `rows` that were sampled here, as indices of this rank's batch."""
        steps, slots = rows // self.config.num_envs, rows % self.config.num_envs
        is_own = (slots >= self._slots.start) & (slots < self._slots.stop)
        return steps[is_own] * len(self._slots) + slots[is_own] - self._slots.start

    def _step(self, samples: Samples, critic_only: bool) -> dict[str, float]:
        """One step of the optimiser; `samples.obs_BO` are normalised already."""
        config, log_std_A = self.config, self.policy.log_std_A
        mean_BA = self.policy.net(samples.obs_BO)
        log_prob_B = gaussian_log_prob(samples.actions_BA, mean_BA, log_std_A)
        log_ratio_B = log_prob_B - samples.old_log_prob_B
        ratio_B = torch.exp(log_ratio_B)
        clipped_B = ratio_B.clamp(1 - config.clip_ratio, 1 + config.clip_ratio)
        policy_loss = -torch.min(ratio_B * samples.advantages_B, clipped_B * samples.advantages_B).mean()
        excess_BA = (mean_BA.abs() - (1 + MEAN_MARGIN)).clamp_min(0)
        penalty = config.mean_penalty * (excess_BA**2).sum(dim=-1).mean()
        entropy = log_std_A.sum()  # up to a constant
        value_B = self.value_net(samples.obs_BO).squeeze(-1)
        value_loss = nn.functional.huber_loss(value_B, samples.targets_B)
        self.optimizer.zero_grad()
        # Adam leaves parameters without a gradient alone.
        loss = value_loss if critic_only else policy_loss + penalty - config.entropy_coef * entropy + value_loss
        # Schulman's estimator of KL(old || new): unbiased and never negative.
        kl = (ratio_B - 1 - log_ratio_B).mean()
        told = torch.stack((kl, policy_loss, value_loss)).detach()
        if self._comm.size == 1:
            loss.backward()
        else:
            told = self._backward_together(loss, told, len(samples.obs_BO) / config.minibatch_size, critic_only)
        grad_norm = nn.utils.clip_grad_norm_(self.policy.parameters(), config.max_grad_norm)
        nn.utils.clip_grad_norm_(self.value_net.parameters(), config.max_grad_norm)
        self.optimizer.step()
        kl_value, policy_value, value_value = told.tolist()
        return {
            "kl": kl_value,
            "policy_loss": policy_value,
            "value_loss": value_value,
            "grad_norm": grad_norm.item(),
        }

    def _backward_together(self, loss: Tensor, told: Tensor, share: float, critic_only: bool) -> Tensor:
        """Gradients of the minibatch's mean, of which this rank has a `share`; returns the mean of `told`."""
        if share:
            (loss * share).backward()  # type: ignore[no-untyped-call]  # torch leaves it without annotations
        trained = [*self.value_net.parameters()] if critic_only else [*self.parameters()]
        return reduce_gradients(trained, told * share if share else torch.zeros_like(told), self._comm)


_LOG_2PI: Final = 1.8378770664093453
