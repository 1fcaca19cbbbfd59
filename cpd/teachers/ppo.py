"""The PPO learner (Schulman et al. 2017) of a single-task teacher.

It departs from the textbook in three points:
- Exploration noise is correlated in time, which moves the hand further than white noise of the same variance.
  Log-probabilities are computed as for white noise.
- Success ends a training episode. Meta-World's reward is dense, so a plain termination would punish success: it
  would cut off all later rewards. The value of a success is therefore that of the largest reward forever after
  (`teacher.terminate_on_success = false` lets episodes continue instead).
- Means are unbounded and the environment clips actions; a penalty keeps means from drifting far beyond the bounds.

Everything runs on the CPU: the simulator takes most of an iteration. With networks of this size, the overhead of
many small operations limits an update, and a GPU does not reduce it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from cpd.comm import Comm, SerialComm
from cpd.config import PPOConfig
from cpd.config.teacher import MAX_LOG_STD
from cpd.envs.suite import Suite, load_suite
from cpd.seeding import derive, generator
from cpd.teachers.adam import Adam
from cpd.teachers.policy import GaussianPolicy, RunningMoments, gaussian_log_prob, mlp
from cpd.teachers.ranks import largest, moments_over_ranks, reduce_gradients, slots_of_rank
from cpd.teachers.rollout import Experience


def gae(
    rewards_TN: Tensor, values_TN: Tensor, next_values_TN: Tensor, ends_TN: Tensor, gamma: float, lam: float
) -> Tensor:
    """Advantages `[T, N]`: `A_t = delta_t + gamma * lam * A_{t+1}`, with `A_{t+1} = 0` where a segment ends.

    `delta_t = r_t + gamma * V'_t - V_t`, where V' is the value of what follows step t: of the next observation if
    the episode continues or a time limit cut it, and of a terminal state if it ended there.

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


#: Means may leave [-1, 1] by this much before the penalty begins.
MEAN_MARGIN: Final = 0.2
#: Weight of the penalty on action means beyond that margin.
MEAN_PENALTY: Final = 0.01
MIN_VALUE_STD: Final = 1e-2


class Samples(NamedTuple):
    """An iteration's experience as the losses use it, flattened to B = S x N rows."""

    obs_BO: Tensor
    """Normalised observations."""
    actions_BA: Tensor
    old_log_prob_B: Tensor
    advantages_B: Tensor
    targets_B: Tensor
    """Normalised value targets."""


class PPOLearner:
    """Policy, value network and optimiser of one teacher.

    Args:
        config: settings of PPO.
        seed: seed of the initial weights and of the order of minibatches.
        keep_normalizer: leave the policy's observation statistics unchanged; new ones would change the actions of
            a cloned policy.
        comm: the ranks that share the iteration's environments; all of them compute the same update.
        suite: the suite of the task; None: Meta-World.
        task: its name; None: a task with all components of the suite's actions. The losses leave out the others.
    """

    def __init__(
        self,
        config: PPOConfig,
        seed: int,
        *,
        keep_normalizer: bool = False,
        comm: Comm | None = None,
        suite: Suite | None = None,
        task: str | None = None,
    ) -> None:
        suite = suite or load_suite()
        sizes = suite.spaces.sizes
        self._num_actions = suite.sizes(task).action if task else sizes.action
        self.config = config
        self.seed = seed
        self._comm: Comm = comm or SerialComm()
        self._slots = slots_of_rank(self._comm, config.num_envs)
        self._keep_normalizer = keep_normalizer
        torch_generator = torch.Generator().manual_seed(derive(seed, "weights"))
        self.policy = GaussianPolicy(
            config.hidden_sizes, config.init_log_std, torch_generator, sizes, self._num_actions
        )
        self.value_net = mlp((sizes.observation, *config.hidden_sizes, 1), 1.0, torch_generator)
        self.value_moments = RunningMoments(1, MIN_VALUE_STD)
        self.largest_reward = (suite.of(task) if task else suite).largest_reward
        self.optimizer = Adam(self.parameters(), config.learning_rate)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the policy, then those of the value network."""
        return chain(self.policy.parameters(), self.value_net.parameters())

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
        """Restore what `state` returned."""
        self.policy.load_state_dict(state["policy"])
        self.value_net.load_state_dict(state["value_net"])
        self.value_moments.load_state_dict(state["value_moments"])
        self.largest_reward = state["largest_reward"]
        self.optimizer.load_state_dict(state["optimizer"])

    def update(
        self,
        experience: Experience,
        iteration: int,
        *,
        critic_only: bool = False,
        min_log_std: float | None = None,
    ) -> dict[str, float]:
        """Learn from an iteration's experience.

        Args:
            experience: samples of this rank's environments.
            iteration: number of the iteration, which determines the order of minibatches.
            critic_only: train the value network and leave the policy unchanged.
            min_log_std: lower bound of the policy's log standard deviation; None: the configured one.

        Returns:
            `kl` (nats, from the old policy, estimated over the last epoch), `policy_loss`, `value_loss`,
            `grad_norm` (the policy's, before clipping), `value_explained` (share of the targets' variance, before
            the update), `log_std` (mean), `entropy` (nats), `epochs`.
        """
        config, log_std_A = self.config, self.policy.log_std_A
        samples, explained = self._prepare(experience)
        num_rows = config.num_envs * len(experience.rewards)
        records: list[dict[str, float]] = []
        kl, epoch = 0.0, 0
        for epoch in range(1, config.num_epochs + 1):
            rows_of_minibatches = self._minibatches(num_rows, iteration, epoch)
            for minibatch in [Samples(*(tensor[rows] for tensor in samples)) for rows in rows_of_minibatches]:
                loss, statistics = self._losses(minibatch, critic_only)
                self.optimizer.zero_grad()
                if self._comm.size == 1:
                    loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotations here
                else:
                    share = len(minibatch.obs_BO) / config.minibatch_size
                    statistics = self._backward_over_ranks(loss, statistics, share, critic_only)
                grad_norm = nn.utils.clip_grad_norm_(self.policy.parameters(), config.max_grad_norm)
                nn.utils.clip_grad_norm_(self.value_net.parameters(), config.max_grad_norm)
                self.optimizer.step()
                with torch.no_grad():
                    log_std_A.clamp_(config.min_log_std if min_log_std is None else min_log_std, MAX_LOG_STD)
                names = ("kl", "policy_loss", "value_loss", "grad_norm")
                records.append(dict(zip(names, (*statistics.tolist(), grad_norm.item()), strict=True)))
            last_epoch = records[-len(rows_of_minibatches) :]
            kl = sum(record["kl"] for record in last_epoch) / len(last_epoch)
            if kl > config.target_kl:
                break
        log_std = float(log_std_A.detach()[: self._num_actions].mean())
        return {
            "kl": kl,
            **{
                name: sum(record[name] for record in records) / len(records)
                for name in ("policy_loss", "value_loss", "grad_norm")
            },
            "value_explained": explained,
            "log_std": log_std,
            "entropy": self._num_actions * (log_std + 0.5 * (1 + math.log(2 * math.pi))),
            "epochs": float(epoch),
        }

    @torch.no_grad()
    def _prepare(self, experience: Experience) -> tuple[Samples, float]:
        """Update the statistics of observations and values, then compute advantages and value targets.

        Returns:
            The samples, and the share of the targets' variance that the value network explained.
        """
        config = self.config
        obs_BO = torch.from_numpy(experience.obs).flatten(0, 1)
        next_obs_BO = torch.from_numpy(experience.next_obs).flatten(0, 1)
        actions_BA = torch.from_numpy(experience.actions).flatten(0, 1)
        # Before the log-probabilities of the old policy are computed, so that ratios start at one.
        if not self._keep_normalizer:
            self.policy.normalizer.update(obs_BO, self._comm)
        self.largest_reward = largest(max(self.largest_reward, float(experience.rewards.max())), self._comm)
        # The value of a terminal state: the largest reward forever after.
        success_value = self.largest_reward * config.reward_scale / (1 - config.gamma)

        # Where a time limit cut an episode, the next value is that of its last observation: it could have gone on.
        shape = experience.rewards.shape
        values_SN = self._values(obs_BO).reshape(shape)
        terminated_SN = torch.from_numpy(experience.terminated)
        next_values_SN = self._values(next_obs_BO).reshape(shape).masked_fill(terminated_SN, success_value)
        rewards_SN = torch.from_numpy(experience.rewards) * config.reward_scale
        ends_SN = torch.from_numpy(experience.ends)
        advantages_SN = gae(rewards_SN, values_SN, next_values_SN, ends_SN, config.gamma, config.gae_lambda)
        targets_B1 = (advantages_SN + values_SN).reshape(-1, 1)
        advantage_moments = moments_over_ranks(advantages_SN, self._comm)
        target_moments = moments_over_ranks(targets_B1, self._comm)
        explained = float(1 - advantage_moments.variance / target_moments.variance.clamp_min(1e-12))
        self.value_moments.update(targets_B1, self._comm)
        targets_B = ((targets_B1 - self.value_moments.mean) / self.value_moments.std).float().squeeze(1)
        advantages_B = (advantages_SN.flatten() - advantage_moments.mean) / (advantage_moments.std + 1e-8)
        mean_BA = self.policy(obs_BO)
        log_prob_B = self._log_prob(actions_BA, mean_BA)
        normalized_BO = self.policy.normalize(obs_BO)
        return Samples(normalized_BO, actions_BA, log_prob_B, advantages_B, targets_B), explained

    def _log_prob(self, actions_BA: Tensor, mean_BA: Tensor) -> Tensor:
        """Log density `[B]` of the components that the task has."""
        num = self._num_actions
        return gaussian_log_prob(actions_BA[:, :num], mean_BA[:, :num], self.policy.log_std_A[:num])

    def _values(self, obs_BO: Tensor) -> Tensor:
        """Values `[B]` in units of scaled reward."""
        normalized_B: Tensor = self.value_net(self.policy.normalize(obs_BO)).squeeze(-1)
        mean, std = self.value_moments.mean.float(), self.value_moments.std.float()
        return normalized_B * std + mean

    def _minibatches(self, num_rows: int, iteration: int, epoch: int) -> list[Tensor]:
        """Indices of this rank's rows in each minibatch of an epoch; an incomplete last minibatch is dropped."""
        rng = generator(self.seed, "minibatches", iteration, epoch)
        order = torch.from_numpy(rng.permutation(num_rows))
        size = self.config.minibatch_size
        minibatches = [order[start : start + size] for start in range(0, num_rows - size + 1, size)]
        return [self._local_rows(rows) for rows in minibatches] if self._comm.size > 1 else minibatches

    def _local_rows(self, rows: Tensor) -> Tensor:
        """Select from the iteration's `rows` those that this rank sampled, as indices of its samples."""
        steps, slots = rows // self.config.num_envs, rows % self.config.num_envs
        is_local = (slots >= self._slots.start) & (slots < self._slots.stop)
        return steps[is_local] * len(self._slots) + slots[is_local] - self._slots.start

    def _losses(self, samples: Samples, critic_only: bool) -> tuple[Tensor, Tensor]:
        """The loss of a minibatch, and its `[3]` KL divergence, policy loss and value loss."""
        config = self.config
        mean_BA = self.policy.net(samples.obs_BO)
        log_prob_B = self._log_prob(samples.actions_BA, mean_BA)
        log_ratio_B = log_prob_B - samples.old_log_prob_B
        ratio_B = torch.exp(log_ratio_B)
        clipped_B = ratio_B.clamp(1 - config.clip_ratio, 1 + config.clip_ratio)
        policy_loss = -torch.min(ratio_B * samples.advantages_B, clipped_B * samples.advantages_B).mean()
        excess_BA = (mean_BA.abs() - (1 + MEAN_MARGIN)).clamp_min(0)
        penalty = MEAN_PENALTY * (excess_BA**2).sum(dim=-1).mean()
        entropy = self.policy.log_std_A[: self._num_actions].sum()  # up to a constant
        value_B = self.value_net(samples.obs_BO).squeeze(-1)
        value_loss = nn.functional.huber_loss(value_B, samples.targets_B)
        # Schulman's estimator of KL(old || new): unbiased and never negative.
        kl = (ratio_B - 1 - log_ratio_B).mean()
        statistics = torch.stack((kl, policy_loss, value_loss)).detach()
        if critic_only:  # the policy's parameters then have no gradient, and Adam skips them
            return value_loss, statistics
        return policy_loss + penalty - config.entropy_coef * entropy + value_loss, statistics

    def _backward_over_ranks(self, loss: Tensor, statistics: Tensor, share: float, critic_only: bool) -> Tensor:
        """Set the gradients of the mean over the whole minibatch; returns the mean of `statistics`; a collective.

        This rank holds a `share` of the minibatch's rows. Without any, its loss is the mean of no rows, which is
        not a number.
        """
        if share:
            (loss * share).backward()  # type: ignore[no-untyped-call]  # torch has no annotations here
        trained = [*self.value_net.parameters()] if critic_only else [*self.parameters()]
        return reduce_gradients(trained, statistics * share if share else torch.zeros_like(statistics), self._comm)
