"""What the scripted expert shows: states with its actions, to be cloned, and transitions, to be replayed.

Everything is a pure function of (settings, task, seed). Shape letters: B rows, O = 39 observation, A = 4 action,
T steps, N episodes, M episodes still running.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from cpd.config import WarmStartConfig
from cpd.envs.cells import CHUNK
from cpd.envs.goals import Goal
from cpd.envs.sampler import VectorEnv
from cpd.interrupt import Interrupt, InterruptedBySignal
from cpd.seeding import generator
from cpd.tasks import ACTION_SIZE
from cpd.teachers.policy import FloatArray, Teacher
from cpd.teachers.sampling import Batch, EpisodeRules, rewarded
from cpd.teachers.scripted import ScriptedPolicy


class Labelled(NamedTuple):
    """States that were visited, and what the expert would do there.

    Attributes:
        obs_BO: observations.
        labels_BA: the expert's clean action, clipped to [-1, 1].
    """

    obs_BO: FloatArray
    labels_BA: FloatArray


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


@dataclass(frozen=True)
class Demonstrator:
    """The scripted expert of a task, and where and how it is watched.

    Attributes:
        task: Meta-World task name.
        goals: training goals, dealt in an order of each round's own.
        envs: at least `CHUNK` slots of the task.
        config: numbers of episodes and their noise.
        horizon: longest episode.
        seed: of goals and noise.
        interrupt: looked at after every step; every method raises `InterruptedBySignal` if asked to stop.
    """

    task: str
    goals: Sequence[Goal]
    envs: VectorEnv
    config: WarmStartConfig
    horizon: int
    seed: int
    interrupt: Interrupt

    def gather(self, round_number: int, clone: Teacher | None = None) -> Labelled:
        """The labelled states of one round, in a fixed order, however many processes step `envs`.

        Args:
            round_number: 0 for the demonstrations, from 1 for DAgger rounds.
            clone: acts with its clipped mean in DAgger rounds; None lets the expert act, with noise.
        """
        num_episodes = self.config.num_demonstrations if clone is None else self.config.num_dagger_episodes
        rows: list[Labelled] = []
        for numbers in self._begin(round_number, num_episodes):
            noise_TNA = np.zeros((self.horizon, len(numbers), ACTION_SIZE), np.float32)
            if clone is None:
                noise_TNA = np.stack(
                    [demonstration_noise(number, self.horizon, self.config, self.seed) for number in numbers],
                    axis=1,
                )
            rows += self._labelled(clone, noise_TNA)
        return Labelled(
            np.concatenate([row.obs_BO for row in rows]), np.concatenate([row.labels_BA for row in rows])
        )

    def _begin(self, round_number: int, num_episodes: int) -> Iterator[range]:
        """Reset the first slots for one chunk of a round's episodes after another; yields their numbers."""
        order = generator(self.seed, "demonstration-goals", round_number).permutation(len(self.goals))
        # A chunk's composition is fixed, since a clone's arithmetic may depend on the size of its batch.
        for first in range(0, num_episodes, CHUNK):
            numbers = range(first, min(first + CHUNK, num_episodes))
            goals = [self.goals[int(order[number % len(order)])] for number in numbers]
            self.envs.reset(range(len(numbers)), goals)
            yield numbers

    def _expert_actions(self, obs_NO: FloatArray) -> FloatArray:
        """What the expert would do, `[N, A]`, clipped."""
        actions_NA: FloatArray = np.clip(self._expert.distribution(obs_NO).raw_mean, -1.0, 1.0)
        return actions_NA

    @cached_property
    def _expert(self) -> ScriptedPolicy:
        return ScriptedPolicy(self.task, assumed_std=1.0)  # only its mean is used

    def _raise_if_asked_to_stop(self) -> None:
        if self.interrupt.requested:
            raise InterruptedBySignal("asked to stop in the warm start; launch again to start it anew")

    def _labelled(self, clone: Teacher | None, noise_TNA: FloatArray) -> Iterator[Labelled]:
        """The labelled states, step by step, of episodes that have just been reset in the first N slots."""
        num_episodes, envs = noise_TNA.shape[1], self.envs
        running = np.arange(envs.num_envs) < num_episodes
        steps_left = np.full(envs.num_envs, self.horizon)
        executed = np.zeros((envs.num_envs, ACTION_SIZE), np.float32)
        for t in range(self.horizon):
            self._raise_if_asked_to_stop()
            obs_NO = envs.observations[:num_episodes].copy()
            rows = np.flatnonzero(running)
            labels_BA = self._expert_actions(obs_NO[rows])
            yield Labelled(obs_NO[rows], labels_BA)
            if clone is None:
                executed[rows] = labels_BA
            else:
                executed[:num_episodes] = np.clip(clone.distribution(obs_NO).raw_mean, -1.0, 1.0)
            executed[:num_episodes] = np.clip(executed[:num_episodes] + noise_TNA[t], -1.0, 1.0)
            envs.step(executed, running)
            steps_left -= 1
            succeeded = running & envs.successes
            steps_left[succeeded] = np.minimum(steps_left[succeeded], self.config.steps_after_success)
            running &= steps_left > 0
            if not running.any():
                return

    def transitions(self, rules: EpisodeRules) -> list[Batch]:
        """The transitions of the demonstrations, with their goals and noise, each up to its success.

        Args:
            rules: of training, for what success means and what is rewarded; the horizon is the demonstrations'.

        Returns:
            A batch [1, M] per step and chunk of episodes.
        """
        executed = np.zeros((self.envs.num_envs, ACTION_SIZE), np.float32)
        batches, envs = [], self.envs
        envs.want_grasps(rules.grasp_bonus > 0)
        for numbers in self._begin(0, self.config.num_demonstrations):
            noise_NTA = np.stack(
                [demonstration_noise(number, self.horizon, self.config, self.seed) for number in numbers]
            )
            running = np.arange(envs.num_envs) < len(numbers)
            for t in range(self.horizon):
                self._raise_if_asked_to_stop()
                rows = np.flatnonzero(running)
                obs_MO = envs.observations[rows]
                clean_MA = self._expert_actions(obs_MO)
                executed[rows] = np.clip(clean_MA + noise_NTA[rows, t], -1.0, 1.0)
                envs.step(executed, running)
                batches.append(
                    Batch(
                        obs=obs_MO[None],
                        next_obs=envs.observations[rows][None],
                        actions=executed[rows][None],
                        rewards=rewarded(envs, rules)[rows][None],
                        terminated=envs.successes[rows][None] & rules.terminate_on_success,
                        ends=np.ones((1, len(rows)), np.bool_),
                        train_success=0.0,
                        train_return=0.0,
                    )
                )
                running &= ~envs.successes
                if not running.any():
                    break
        return batches
