"""The warm start of `demo_rl`: demonstrations, cloning and DAgger, ended while success is still modest.

A clone of the scripted expert can pass the gate by itself, and RL would then get the credit for imitation. The
policy is therefore validated after every small increment of cloning. An increment that exceeds the cap is undone
and repeated with half as many steps.

Everything is a pure function of (settings, task, seed). A warm start takes a minute at most, so an interrupted one
is repeated from its beginning. Dimensions: B rows, O observation, A action.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from cpd.config import WarmStartConfig
from cpd.seeding import generator
from cpd.teachers.adam import Adam
from cpd.teachers.demonstrations import Demonstrator, Labelled
from cpd.teachers.policy import GaussianPolicy

#: Gradient steps on the demonstrations, and again after each DAgger round.
NUM_CLONING_STEPS: Final = 1_000
#: Gradient steps between validations; halved whenever the cap is exceeded.
STEPS_PER_CHECK: Final = 200
BATCH_SIZE: Final = 256
LEARNING_RATE: Final = 1e-3


@dataclass(frozen=True)
class WarmStart:
    """How the policy that RL starts from was made."""

    validation_success: float
    """Success rate on validation goals before RL; at most the cap, unless the untrained policy exceeds it."""
    highest_success: float
    """Highest success rate during cloning; if it exceeds the cap, that policy was dropped."""
    cloning_steps: int
    """Gradient steps of cloning that were kept."""
    dagger_rounds: int
    demonstration_env_steps: int
    """Environment steps of demonstrations and DAgger rounds; the expert labelled the states of all."""
    cloning_loss: float
    """Mean loss of the last increment that was kept; 0 if none was."""


class Cloner:
    """Regression of a policy's mean on labels, with minibatches that depend on the seed and the step alone.

    Args:
        policy: only its mean network is trained.
        seed: of the minibatches.
    """

    # Minibatches depend on nothing else, so that a repeated increment takes the same steps up to its shorter end.

    def __init__(self, policy: GaussianPolicy, seed: int) -> None:
        self.num_steps = 0
        self._policy = policy
        self._seed = seed
        self._optimizer = Adam(policy.net.parameters(), LEARNING_RATE)

    def state(self) -> dict[str, Any]:
        """A copy of everything that the next step depends on."""
        # A deep copy, since the optimiser changes its tensors in place.
        return copy.deepcopy(
            {
                "net": self._policy.net.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "num_steps": self.num_steps,
            }
        )

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self._policy.net.load_state_dict(state["net"])
        self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.num_steps = state["num_steps"]

    def run(self, data: Labelled, num_steps: int) -> float:
        """Take `num_steps` gradient steps; returns their mean Huber loss."""
        obs_BO, labels_BA = (torch.from_numpy(array) for array in data)
        losses: list[Tensor] = []
        for _ in range(num_steps):
            rng = generator(self._seed, "cloning", self.num_steps)
            rows = torch.from_numpy(rng.integers(len(obs_BO), size=BATCH_SIZE))
            # Only the mean: after a warm start, teacher.ppo.init_log_std decides how much RL explores.
            loss = nn.functional.huber_loss(self._policy(obs_BO[rows]), labels_BA[rows])
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotations here
            self._optimizer.step()
            self.num_steps += 1
            losses.append(loss.detach())
        return float(torch.stack(losses).mean())


@dataclass
class _Search:
    """Cloning up to the target and never beyond the cap; the policy is always the last one below the cap."""

    cloner: Cloner
    config: WarmStartConfig
    validate: Callable[[], float]
    success: float
    highest: float
    increment: int
    loss: float = 0.0
    is_over: bool = False

    def clone(self, data: Labelled) -> None:
        """Clone for one round; the search is over if the target is reached or no increment stays below the cap."""
        end = self.cloner.num_steps + NUM_CLONING_STEPS
        kept = self.cloner.state()
        # The number of steps that exceeded the cap last. The same steps on the same data give the same weights, so
        # an increment that ends there again needs no second validation.
        exceeded_at = -1
        while not self.is_over and self.cloner.num_steps < end:
            num_steps = min(self.increment, end - self.cloner.num_steps)
            if self.cloner.num_steps + num_steps == exceeded_at:
                self._halve()
                continue
            loss = self.cloner.run(data, num_steps)
            success = self.validate()
            self.highest = max(self.highest, success)
            if success > self.config.success_cap:
                exceeded_at = self.cloner.num_steps
                self.cloner.restore(kept)
                self._halve()
                continue
            kept, self.success, self.loss = self.cloner.state(), success, loss
            self.is_over = success >= self.config.success_target

    def _halve(self) -> None:
        self.increment //= 2
        self.is_over = self.increment == 0


def warm_start(
    policy: GaussianPolicy, demonstrator: Demonstrator, config: WarmStartConfig, validate: Callable[[], float]
) -> WarmStart:
    """Clone the scripted expert into `policy`, in place, up to a modest success rate.

    The policy's observation statistics become those of the demonstrations.

    Args:
        policy: newly initialised.
        demonstrator: runs the expert.
        config: target, cap, and number of DAgger rounds.
        validate: returns the current success rate of `policy` on validation goals.

    Raises:
        InterruptedBySignal: if asked to stop; discard the policy then.
    """
    data = demonstrator.gather(0)
    # The statistics are fixed from here on: updating them with later data would change the actions of the clone.
    policy.normalizer.update(torch.from_numpy(data.obs_BO))
    untrained = validate()
    cloner = Cloner(policy, demonstrator.seed)
    search = _Search(cloner, config, validate, untrained, untrained, STEPS_PER_CHECK)
    search.is_over = untrained >= config.success_target
    round_number = 0
    search.clone(data)
    while not search.is_over and round_number < config.num_dagger_rounds:
        round_number += 1
        # The clone acts, so that the expert labels the states to which the clone's own errors lead.
        more = demonstrator.gather(round_number, policy)
        data = Labelled(
            np.concatenate([data.obs_BO, more.obs_BO]), np.concatenate([data.labels_BA, more.labels_BA])
        )
        search.clone(data)
    return WarmStart(
        validation_success=search.success,
        highest_success=search.highest,
        cloning_steps=cloner.num_steps,
        dagger_rounds=round_number,
        demonstration_env_steps=len(data.obs_BO),
        cloning_loss=search.loss,
    )
