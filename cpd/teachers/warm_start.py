"""The warm start of `demo_rl`: demonstrations, cloning and DAgger, ended while success is still modest.

A clone of the scripted expert may well pass the gate by itself, and would then be imitation under RL's name. So
the policy is validated after every small increment of cloning, and an increment that carries it beyond the cap is
taken back and repeated in halves.

Everything is a pure function of (settings, task, seed). The whole takes a minute at most, so one that was cut
short starts again. Shape letters: B rows, O = 39 observation, A = 4 action, T steps, N episodes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cpd.config import WarmStartConfig
from cpd.envs.cells import CHUNK
from cpd.envs.goals import Goal
from cpd.envs.sampler import VectorEnv
from cpd.interrupt import Interrupt, InterruptedBySignal
from cpd.seeding import generator
from cpd.shards.schema import ACTION_SIZE, OBSERVATION_SIZE
from cpd.teachers.policy import FloatArray, MLPPolicy, Teacher
from cpd.teachers.scripted import ScriptedPolicy


class Labelled(NamedTuple):
    """States that were visited, and what the expert would do there.

    Attributes:
        obs_BO: observations.
        labels_BA: the expert's clean action, clipped to [-1, 1].
    """

    obs_BO: FloatArray
    labels_BA: FloatArray


@dataclass(frozen=True)
class WarmStart:
    """How the policy came to be from which RL starts."""

    validation_success: float
    """Success rate on validation goals before RL; at most the cap, unless the untrained policy exceeds it."""
    highest_success: float
    """The highest rate that cloning reached on the way; where it exceeds the cap, that policy was dropped."""
    cloning_steps: int
    """Gradient steps of cloning behind the policy."""
    dagger_rounds: int
    demonstration_env_steps: int
    """Environment steps whose states the expert labelled: demonstrations and DAgger rounds."""
    cloning_loss: float
    """Mean loss over the last increment that was kept; 0 without any."""


def demonstration_noise(number: int, horizon: int, config: WarmStartConfig, seed: int) -> FloatArray:
    """The noise `[horizon, A]` added to the expert's executed actions in demonstration `number`."""
    rng = generator(seed, "demonstration-noise", number)
    if int((number + 1) * config.light_share) > int(number * config.light_share):
        return np.float32(config.light_scale) * rng.standard_normal((horizon, ACTION_SIZE), dtype=np.float32)
    noise_TA = np.zeros((horizon, ACTION_SIZE), np.float32)
    for _ in range(math.ceil(horizon / config.burst_every)):
        start, length = int(rng.integers(horizon)), int(rng.integers(1, config.burst_steps + 1))
        burst_A = rng.standard_normal(ACTION_SIZE, dtype=np.float32)
        noise_TA[start : start + length] = np.float32(config.burst_scale) * burst_A
    return noise_TA


def gather(
    round_number: int,
    clone: Teacher | None,
    task: str,
    goals: Sequence[Goal],
    envs: VectorEnv,
    config: WarmStartConfig,
    horizon: int,
    seed: int,
    interrupt: Interrupt,
) -> Labelled:
    """The labelled states of one round, in a fixed order, however many processes step `envs`.

    Args:
        round_number: 0 for the demonstrations, from 1 for DAgger rounds.
        clone: acts with its clipped mean in DAgger rounds; None lets the expert act, with noise.
        task: Meta-World task name.
        goals: training goals, dealt in an order of the round's own.
        envs: at least `CHUNK` slots of the task.
        config: numbers of episodes and their noise.
        horizon: longest episode.
        seed: of goals and noise.
        interrupt: looked at after every step.

    Raises:
        InterruptedBySignal: if asked to stop.
    """
    num_episodes = config.num_demonstrations if clone is None else config.num_dagger_episodes
    order = generator(seed, "demonstration-goals", round_number).permutation(len(goals))
    expert = ScriptedPolicy(task, assumed_std=1.0)  # only its mean is used
    rows: list[Labelled] = []
    # A chunk's composition is fixed, since the clone's arithmetic may depend on the size of its batch.
    for first in range(0, num_episodes, CHUNK):
        numbers = range(first, min(first + CHUNK, num_episodes))
        noise_TNA = np.zeros((horizon, len(numbers), ACTION_SIZE), np.float32)
        if clone is None:
            noises = [demonstration_noise(number, horizon, config, seed) for number in numbers]
            noise_TNA = np.stack(noises, axis=1)
        envs.reset(range(len(numbers)), [goals[int(order[number % len(goals)])] for number in numbers])
        rows += _episodes(expert, clone or expert, envs, noise_TNA, config.steps_after_success, interrupt)
    return Labelled(np.concatenate([row.obs_BO for row in rows]), np.concatenate([row.labels_BA for row in rows]))


def _episodes(
    expert: Teacher,
    actor: Teacher,
    envs: VectorEnv,
    noise_TNA: FloatArray,
    steps_after_success: int,
    interrupt: Interrupt,
) -> Iterator[Labelled]:
    """The labelled states, step by step, of episodes that have just been reset in the first N slots."""
    horizon, num_episodes = noise_TNA.shape[:2]
    running = np.arange(envs.num_envs) < num_episodes
    steps_left = np.full(envs.num_envs, horizon)
    executed = np.zeros((envs.num_envs, ACTION_SIZE), np.float32)
    for t in range(horizon):
        if interrupt.requested:
            raise InterruptedBySignal("asked to stop in the warm start; launch again to start it anew")
        obs_NO = envs.observations[:num_episodes].copy()
        rows = np.flatnonzero(running)
        labels_BA = np.clip(expert.distribution(obs_NO[rows]).raw_mean, -1.0, 1.0)
        yield Labelled(obs_NO[rows], labels_BA)
        if actor is expert:
            executed[rows] = labels_BA
        else:
            executed[:num_episodes] = np.clip(actor.distribution(obs_NO).raw_mean, -1.0, 1.0)
        executed[:num_episodes] = np.clip(executed[:num_episodes] + noise_TNA[t], -1.0, 1.0)
        envs.step(executed, running)
        steps_left -= 1
        succeeded = running & envs.successes
        steps_left[succeeded] = np.minimum(steps_left[succeeded], steps_after_success)
        running &= steps_left > 0
        if not running.any():
            return


class Cloner:
    """Regression of a policy's mean on labels, with minibatches that depend on the seed and the step alone.

    Args:
        policy: its mean network learns; the rest of it stays as it is.
        config: batch size and learning rate.
        seed: of the minibatches.
    """

    def __init__(self, policy: MLPPolicy, config: WarmStartConfig, seed: int) -> None:
        self.num_steps = 0
        self._policy = policy
        self._config = config
        self._seed = seed
        self._optimizer = torch.optim.Adam(policy.net.parameters(), lr=config.learning_rate, fused=True)

    def state(self) -> dict[str, Any]:
        """A copy of everything that the next step depends on."""
        return copy.deepcopy(
            {
                "net": self._policy.net.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "num_steps": self.num_steps,
            }
        )

    def load_state(self, state: dict[str, Any]) -> None:
        """Go back to what `state` gave."""
        self._policy.net.load_state_dict(state["net"])
        self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.num_steps = state["num_steps"]

    def run(self, data: Labelled, num_steps: int) -> float:
        """Take `num_steps` gradient steps; returns their mean Huber loss."""
        device = self._policy.normalizer.mean.device
        obs_BO, labels_BA = (torch.from_numpy(array).to(device) for array in data)
        losses: list[Tensor] = []
        for _ in range(num_steps):
            rng = generator(self._seed, "cloning", self.num_steps)
            rows = torch.from_numpy(rng.integers(len(obs_BO), size=self._config.batch_size))
            loss = nn.functional.huber_loss(self._policy(obs_BO[rows]), labels_BA[rows])
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it without annotations
            self._optimizer.step()
            self.num_steps += 1
            losses.append(loss.detach())
        return float(torch.stack(losses).mean())


@dataclass
class _Search:
    """Cloning up to the target and never beyond the cap; holds the last policy that kept to it."""

    cloner: Cloner
    config: WarmStartConfig
    validate: Callable[[], float]
    success: float
    highest: float
    increment: int
    loss: float = 0.0
    is_over: bool = False

    def clone(self, data: Labelled) -> None:
        """A round of cloning; ends the search where the target is reached or cannot be approached further."""
        end = self.cloner.num_steps + self.config.num_cloning_steps
        kept = self.cloner.state()
        while not self.is_over and self.cloner.num_steps < end:
            loss = self.cloner.run(data, min(self.increment, end - self.cloner.num_steps))
            success = self.validate()
            self.highest = max(self.highest, success)
            if success > self.config.success_cap:
                self.cloner.load_state(kept)
                self.increment //= 2
                self.is_over = self.increment == 0
                continue
            kept, self.success, self.loss = self.cloner.state(), success, loss
            self.is_over = success >= self.config.success_target


def warm_start(
    policy: MLPPolicy,
    task: str,
    goals: Sequence[Goal],
    envs: VectorEnv,
    config: WarmStartConfig,
    horizon: int,
    seed: int,
    interrupt: Interrupt,
    validate: Callable[[], float],
) -> WarmStart:
    """Clone the scripted expert into `policy`, in place, until it succeeds now and then.

    The policy's observation statistics are those of the demonstrations from then on.

    Args:
        policy: fresh from initialisation.
        task: Meta-World task name.
        goals: training goals.
        envs: at least `CHUNK` slots of the task.
        config: the settings.
        horizon: longest training episode.
        seed: of everything random.
        interrupt: looked at after every environment step.
        validate: the policy's present success rate on validation goals.

    Raises:
        InterruptedBySignal: if asked to stop; nothing of the attempt is worth keeping.
    """

    def gathered(round_number: int) -> Labelled:
        clone = policy if round_number else None
        return gather(round_number, clone, task, goals, envs, config, horizon, seed, interrupt)

    data = gathered(0)
    assert data.obs_BO.shape[1] == OBSERVATION_SIZE
    policy.normalizer.update(torch.from_numpy(data.obs_BO))
    untrained = validate()
    cloner = Cloner(policy, config, seed)
    search = _Search(cloner, config, validate, untrained, untrained, config.steps_per_check)
    search.is_over = untrained >= config.success_target
    round_number = 0
    search.clone(data)
    while not search.is_over and round_number < config.num_dagger_rounds:
        round_number += 1
        more = gathered(round_number)
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
