"""The SAC learner (Haarnoja et al. 2018, with a learned temperature) of a single-task teacher.

An iteration samples whole episodes with a fixed policy and then takes its gradient steps, so that it starts and
ends like one of PPO: nothing is under way in between, and a checkpoint is the learner's state and the buffer.

Departures from the textbook, each for a reason:
- Success ends an episode and is worth the largest reward for ever after, as in PPO.
- Actor and critics take their gradients at the same weights, so that one pass serves both.
- Exploration noise is correlated in time; the learner never sees it but through the actions.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor

from cpd.config import SACConfig
from cpd.envs.tasks import ACTION_SIZE, OBSERVATION_SIZE
from cpd.seeding import derive, generator
from cpd.teachers.policy import OBSERVATION_CLIP, SquashedPolicy
from cpd.teachers.rollout import LARGEST_REWARD, Experience
from cpd.teachers.sac.buffer import ReplayBuffer
from cpd.teachers.sac.cuda_graphs import Graphed
from cpd.teachers.sac.networks import NUM_CRITICS, Actions, Actor, Critics

#: Gradient steps between two looks at the losses, which cost more than they tell.
STEPS_PER_LOOK: Final = 25


class SACLearner:
    """Policy, critics, temperature, their optimisers, and the replay buffer of one teacher.

    Args:
        config: the recipe.
        seed: of the initial weights, the minibatches, and the actions drawn in updates.
        keep_normalizer: leave the policy's observation statistics as they are; new ones would change what a cloned
            policy does.
        device: where networks and buffer live. An accelerator repeats a run to rounding only.
    """

    def __init__(
        self,
        config: SACConfig,
        seed: int,
        *,
        keep_normalizer: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self.config = config
        self.seed = seed
        self.device = device or torch.device("cpu")
        self._keep_normalizer = keep_normalizer
        weights = torch.Generator().manual_seed(derive(seed, "weights"))
        bounds = (config.min_log_std, config.max_log_std)
        self.policy = SquashedPolicy(config.hidden_sizes, config.init_log_std, bounds, weights).to(self.device)
        self._actor = Actor(self.policy, math.log(config.init_alpha))
        self._critics = Critics(config.hidden_sizes, weights, self.device)
        self.replay = ReplayBuffer(config.buffer_size, self.device)
        self.largest_reward = LARGEST_REWARD
        self._graphed_step = Graphed(self._step, self.device)
        self._actor_optimizer, self._critic_optimizer = (
            torch.optim.Adam([values], lr=config.learning_rate, fused=True, capturable=self._graphed_step.records)
            for values in (self._actor.values, self._critics.values)
        )
        batch, size = config.batch_size, OBSERVATION_SIZE + ACTION_SIZE
        # What a step reads, always in the same place. Rows of states and actions: those replayed, those replayed
        # with new actions, the following states; noise for the latter two.
        self._inputs = torch.zeros((3 * batch, size), device=self.device)
        self._noise = torch.zeros((2 * batch, ACTION_SIZE), device=self.device)
        self._rows = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self._mean, self._scale = torch.zeros((2, OBSERVATION_SIZE), device=self.device)
        self._success_value = torch.zeros((), device=self.device)

    def state(self) -> dict[str, Any]:
        """Everything that the next update depends on."""
        return {
            "normalizer": self.policy.normalizer.state_dict(),
            "actor": self._actor.values,
            "critics": self._critics.values,
            "targets": self._critics.targets,
            "replay": self.replay.state(),
            "largest_reward": self.largest_reward,
            "actor_optimizer": self._actor_optimizer.state_dict(),
            "critic_optimizer": self._critic_optimizer.state_dict(),
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state` gave."""
        self.policy.normalizer.load_state_dict(state["normalizer"])
        self._actor.values.copy_(state["actor"])
        self._critics.values.copy_(state["critics"])
        self._critics.targets.copy_(state["targets"])
        self.replay.restore(state["replay"])
        self.largest_reward = state["largest_reward"]
        self._actor_optimizer.load_state_dict(state["actor_optimizer"])
        self._critic_optimizer.load_state_dict(state["critic_optimizer"])
        for optimizer in (self._actor_optimizer, self._critic_optimizer):
            # The checkpoint may come from a machine of another kind.
            optimizer.param_groups[0]["capturable"] = self._graphed_step.records
        self._graphed_step.forget()

    @torch.no_grad()
    def remember(self, batch: Experience) -> None:
        """Take transitions into the buffer, whoever acted in them."""
        self.replay.add(batch)
        self.largest_reward = max(self.largest_reward, float(batch.rewards.max()))
        if not self._keep_normalizer:
            self.policy.normalizer.update(torch.from_numpy(batch.obs).flatten(0, 1))

    @torch.no_grad()
    def update(
        self, batch: Experience, iteration: int, *, critic_only: bool = False, exploring: bool = False
    ) -> dict[str, float]:
        """Take in an iteration's batch and learn from the buffer; with `critic_only` the policy stays as it is.
        Whether it is `exploring` makes no difference: the temperature keeps the deviation up.

        Returns:
            For the record: `policy_updates`, `updates`, and, as means over looks, `policy_loss`, `value_loss`,
            `value` (of replayed actions), `alpha`, `entropy` (nats); no `policy_loss` where the policy was not
            learned, and none of these before learning starts.
        """
        config = self.config
        self.remember(batch)
        looks: list[Tensor] = []
        num_updates, num_policy_updates = 0, 0
        if self.replay.size >= config.learning_starts:
            num_updates = round(batch.rewards.size * config.updates_per_step)
            shape = (num_updates, config.batch_size)
            drawn = generator(self.seed, "replayed", iteration).integers(self.replay.size, size=shape)
            rows_UB = torch.from_numpy(drawn).to(self.device)
            noise = torch.Generator(self.device).manual_seed(derive(self.seed, "drawn-actions", iteration))
            self._mean.copy_(self.policy.normalizer.mean)
            self._scale.copy_(self.policy.normalizer.std.float().reciprocal())
            self._success_value.fill_(self.largest_reward * config.reward_scale / (1 - config.gamma))
            for index in range(num_updates):
                # Counted over iterations, all of which have as many steps.
                is_policys_turn = (iteration * num_updates + index) % config.policy_delay == 0
                learns_policy = not critic_only and is_policys_turn
                self._rows.copy_(rows_UB[index])
                self._noise[0 if learns_policy else config.batch_size :].normal_(generator=noise)
                told = self._graphed_step(learns_policy, index % STEPS_PER_LOOK == 0)
                looks += [told] if told is not None else []
                num_policy_updates += learns_policy
        names = ("policy_loss", "value_loss", "value", "alpha", "entropy")
        means = torch.stack(looks).nanmean(dim=0).tolist() if looks else [math.nan] * len(names)
        counts = {"policy_updates": float(num_policy_updates), "updates": float(num_updates)}
        return {**counts, **{name: mean for name, mean in zip(names, means, strict=True) if not math.isnan(mean)}}

    def policy_updates(self, learned: dict[str, float]) -> int:
        """Gradient steps on the policy in what `update` returned."""
        return int(learned["policy_updates"])

    def _step(self, learns_policy: bool, look: bool) -> Tensor | None:
        """One gradient step on the critics, and on the policy if it `learns_policy`; the losses if to `look`."""
        config, tables, inputs, rows_B = self.config, self.replay.tables, self._inputs, self._rows
        num_rows, split = len(rows_B), OBSERVATION_SIZE
        obs_BO, next_obs_BO = tables["obs"].index_select(0, rows_B), tables["next_obs"].index_select(0, rows_B)
        states = inputs[:, :split]
        torch.sub(obs_BO, self._mean, out=states[:num_rows])
        torch.sub(next_obs_BO, self._mean, out=states[2 * num_rows :])
        states.mul_(self._scale).clamp_(-OBSERVATION_CLIP, OBSERVATION_CLIP)
        states[num_rows : 2 * num_rows] = states[:num_rows]
        inputs[:num_rows, split:] = tables["actions"].index_select(0, rows_B)

        # New actions at the replayed states, where the actor learns, and at those that follow them.
        first = num_rows if learns_policy else 2 * num_rows
        hidden = self._actor.forward(states[first:])
        drawn = self._actor.draw(hidden[-1], self._noise[first - num_rows :])
        inputs[first:, split:] = drawn.actions_MA
        alpha = self._actor.log_alpha.exp()

        next_value_B = self._critics.target_values(inputs[2 * num_rows :]).amin(dim=0)
        next_value_B.sub_(alpha * drawn.log_prob_M[-num_rows:])
        terminated_B = tables["terminated"].index_select(0, rows_B).squeeze(1)
        next_value_B.lerp_(self._success_value.expand_as(next_value_B), terminated_B)
        reward_B = tables["rewards"].index_select(0, rows_B).squeeze(1)
        target_B = next_value_B.mul_(config.gamma).add_(reward_B, alpha=config.reward_scale)

        activations = self._critics.forward(inputs[: 2 * num_rows] if learns_policy else inputs[:num_rows])
        value_EM = activations[-1].squeeze(-1)
        error_EB = value_EM[:, :num_rows] - target_B
        grad_EM = torch.empty_like(value_EM)
        grad_EM[:, :num_rows] = error_EB / num_rows
        if learns_policy:
            chosen_EB = value_EM[:, num_rows:]
            # The smaller of both values is the actor's; only its critic gets a gradient.
            is_smaller_B = chosen_EB[0] <= chosen_EB[1]
            grad_EM[0, num_rows:] = is_smaller_B * (-1.0 / num_rows)
            grad_EM[1, num_rows:] = ~is_smaller_B * (-1.0 / num_rows)
        told = self._look(value_EM, error_EB, drawn, alpha, learns_policy) if look else None
        grad_actions_BA = self._critics.backward(activations, grad_EM.unsqueeze(-1), num_rows)
        if learns_policy:
            own = type(drawn)(*(part[:num_rows] for part in drawn))
            below = [part[:num_rows] for part in hidden]
            self._actor.backward(below, own, grad_actions_BA, alpha, ACTION_SIZE * config.target_entropy)
            self._actor_optimizer.step()
        self._critic_optimizer.step()
        self._critics.track(config.target_rate)
        return told

    def _look(
        self, value_EM: Tensor, error_EB: Tensor, drawn: Actions, alpha: Tensor, learns_policy: bool
    ) -> Tensor:
        """`[5]`: policy loss (NaN unless the policy is learned), value loss, value, temperature, entropy."""
        num_rows = error_EB.shape[1]
        entropy = -drawn.log_prob_M[:num_rows].mean()
        value_loss = 0.5 * error_EB.square().mean()
        value = value_EM[:, :num_rows].mean()
        if learns_policy:  # else the only values are those of replayed actions
            policy_loss = -alpha * entropy - value_EM[:, -num_rows:].amin(dim=0).mean()
        else:
            policy_loss = torch.full_like(entropy, math.nan)
        assert len(value_EM) == NUM_CRITICS
        return torch.stack((policy_loss, value_loss, value, alpha, entropy))
