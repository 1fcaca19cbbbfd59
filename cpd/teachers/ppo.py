"""The PPO learner (Schulman et al. 2017) of a single-task teacher.

Departures from the textbook, each for a reason:
- Exploration noise is correlated in time, which moves a hand further than white noise of the same variance;
  log-probabilities are computed as if it were white.
- Success ends a training episode. Meta-World's reward is dense, so a plain termination would punish success by
  cutting off what was still to come: the value of a success is that of the largest reward for ever after.
- Means are unbounded and actions clipped by the environment; a penalty keeps means from drifting far beyond.

Everything runs on the CPU: the simulator takes most of an iteration, and at these network sizes an update is bound
by the overhead of its many small operations, which a GPU does not lower.
"""

from __future__ import annotations

from itertools import chain
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from cpd.config import PPOConfig
from cpd.seeding import derive, generator
from cpd.shards.schema import OBSERVATION_SIZE
from cpd.teachers.advantages import gae
from cpd.teachers.policy import GaussianPolicy, gaussian_log_prob, mlp
from cpd.teachers.sampling import Batch
from cpd.teachers.statistics import RunningMoments

#: Meta-World's v2 rewards lie in [0, 10]; the v1 ones do not, for which the bound grows with what was seen.
LARGEST_REWARD: Final = 10.0
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


class Learner:
    """Policy, value network and optimiser of one teacher.

    Args:
        config: the recipe.
        seed: of the initial weights and of the order of minibatches.
        keep_normalizer: leave the policy's observation statistics as they are; new ones would change what a cloned
            policy does.
    """

    def __init__(self, config: PPOConfig, seed: int, *, keep_normalizer: bool = False) -> None:
        self.config = config
        self.seed = seed
        self._keep_normalizer = keep_normalizer
        torch_generator = torch.Generator().manual_seed(derive(seed, "weights"))
        self.policy = GaussianPolicy(config.hidden_sizes, config.init_log_std, torch_generator)
        self.value_net = mlp((OBSERVATION_SIZE, *config.hidden_sizes, 1), 1.0, torch_generator)
        self.value_moments = RunningMoments(1, MIN_VALUE_STD)
        self.largest_reward = LARGEST_REWARD
        parameters = chain(self.policy.parameters(), self.value_net.parameters())
        self.optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, fused=True)

    def state(self) -> dict[str, Any]:
        """Everything that the next update depends on."""
        return {
            "policy": self.policy.state_dict(),
            "value_net": self.value_net.state_dict(),
            "value_moments": self.value_moments.state_dict(),
            "largest_reward": self.largest_reward,
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` gave."""
        self.policy.load_state_dict(state["policy"])
        self.value_net.load_state_dict(state["value_net"])
        self.value_moments.load_state_dict(state["value_moments"])
        self.largest_reward = state["largest_reward"]
        self.optimizer.load_state_dict(state["optimizer"])

    def update(self, batch: Batch, iteration: int, *, critic_only: bool = False) -> dict[str, float]:
        """Learn from an iteration's batch; with `critic_only` the policy stays exactly as it is.

        Returns:
            For the record: `kl` (nats, from the old policy, estimated over the last epoch), `policy_loss`,
            `value_loss`, `grad_norm` (the policy's, before clipping), `value_explained` (share of the targets'
            variance, before the update), `log_std` (mean), `entropy` (nats), `epochs`.
        """
        samples, explained = self._prepare(batch)
        steps: list[dict[str, float]] = []
        kl, epoch = 0.0, 0
        for epoch in range(1, self.config.num_epochs + 1):
            rows_of_minibatches = self._minibatches(len(samples.obs_BO), iteration, epoch)
            minibatches = [Samples(*(tensor[rows] for tensor in samples)) for rows in rows_of_minibatches]
            steps += [self._step(minibatch, critic_only) for minibatch in minibatches]
            own = steps[-len(rows_of_minibatches) :]
            kl = sum(step["kl"] for step in own) / len(own)
            if kl > self.config.target_kl:
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
    def _prepare(self, batch: Batch) -> tuple[Samples, float]:
        """Advantages and targets, with observation statistics that know this batch already."""
        config = self.config
        obs_BO = torch.from_numpy(batch.obs).flatten(0, 1)
        next_obs_BO = torch.from_numpy(batch.next_obs).flatten(0, 1)
        actions_BA = torch.from_numpy(batch.actions).flatten(0, 1)
        # Old means are taken after this, so that ratios start at one.
        if not self._keep_normalizer:
            self.policy.normalizer.update(obs_BO)
        self.largest_reward = max(self.largest_reward, float(batch.rewards.max()))
        success_value = self.largest_reward * config.reward_scale / (1 - config.gamma)

        shape = batch.rewards.shape
        values_SN = self._values(obs_BO).reshape(shape)
        terminated_SN = torch.from_numpy(batch.terminated)
        next_values_SN = self._values(next_obs_BO).reshape(shape).masked_fill(terminated_SN, success_value)
        rewards_SN = torch.from_numpy(batch.rewards) * config.reward_scale
        ends_SN = torch.from_numpy(batch.ends)
        advantages_SN = gae(rewards_SN, values_SN, next_values_SN, ends_SN, config.gamma, config.gae_lambda)
        targets_B1 = (advantages_SN + values_SN).reshape(-1, 1)
        explained = float(1 - advantages_SN.var() / targets_B1.var().clamp_min(1e-12))
        self.value_moments.update(targets_B1)
        targets_B = ((targets_B1 - self.value_moments.mean) / self.value_moments.std).float().squeeze(1)
        advantages_B = advantages_SN.flatten()
        advantages_B = (advantages_B - advantages_B.mean()) / (advantages_B.std() + 1e-8)
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
        """Disjoint row indices of the epoch's minibatches; a remainder waits for another epoch."""
        rng = generator(self.seed, "minibatches", iteration, epoch)
        order = torch.from_numpy(rng.permutation(num_rows))
        size = self.config.minibatch_size
        return [order[start : start + size] for start in range(0, num_rows - size + 1, size)]

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
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(self.policy.parameters(), config.max_grad_norm)
        nn.utils.clip_grad_norm_(self.value_net.parameters(), config.max_grad_norm)
        self.optimizer.step()
        with torch.no_grad():
            log_std_A.clamp_(config.min_log_std, config.max_log_std)
            # Schulman's estimator of KL(old || new): unbiased and never negative.
            kl = (ratio_B - 1 - log_ratio_B).mean()
        return {
            "kl": kl.item(),
            "policy_loss": policy_loss.item(),
            "value_loss": value_loss.item(),
            "grad_norm": grad_norm.item(),
        }


_LOG_2PI: Final = 1.8378770664093453
