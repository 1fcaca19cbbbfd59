"""The scripted expert: a stand-in for a teacher, labelled as such, and the source of demonstrations for cloning.

Everything is a pure function of (settings, task, seed), whatever the number of workers. Dimensions: B rows, O
observation, A action, T steps, N episodes, M episodes still running.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import torch
from typing_extensions import TypedDict

from cpd.config.types import PositiveFloat, Task
from cpd.envs.cells import CHUNK
from cpd.envs.goals import Goal
from cpd.envs.suite import Suite, load_suite
from cpd.envs.vector_env import VectorEnv
from cpd.run.interrupt import Interrupt, InterruptedBySignal
from cpd.seeding import generator
from cpd.teachers.policy import Distribution, FloatArray, Teacher, read_tensors, write_tensors

#: Standard deviation declared for scripted experts (labelled `assumed`), which are deterministic.
ASSUMED_STD: Final = 0.1
#: Share of demonstrations with white noise of LIGHT_SCALE on the expert's actions; the others have noise bursts.
LIGHT_SHARE: Final = 0.25
LIGHT_SCALE: Final = 0.1
#: Standard deviation of the vector that a burst adds to every executed action.
BURST_SCALE: Final = 0.6
#: Longest burst in steps, and mean number of steps from the start of one burst to the next.
BURST_STEPS: Final = 8
BURST_EVERY: Final = 25
#: Steps after an episode's first success at which it ends.
STEPS_AFTER_SUCCESS: Final = 30
#: Episodes of each DAgger round.
NUM_DAGGER_EPISODES: Final = 20


class ScriptedPolicy:
    """The scripted expert of one task, a deterministic function of the observation.

    Args:
        task: name of the task.
        assumed_std: the standard deviation that it is assumed to have, since it is deterministic.
        suite: the suite of the task; None: Meta-World.

    Raises:
        ValueError: if the suite has no expert of the task.
    """

    std_source: Literal["policy", "assumed"] = "assumed"

    def __init__(self, task: str, assumed_std: float = ASSUMED_STD, suite: Suite | None = None) -> None:
        suite = suite or load_suite()
        self.task = task
        self.assumed_std = assumed_std
        self.action_size = suite.spaces.action_size
        self._sizes = suite.sizes(task)
        expert = suite.expert(task)
        if expert is None:
            raise ValueError(f"the suite {suite.name!r} has no expert of {task}: set teacher.recipe = 'rl'")
        self._expert = expert

    def distribution(self, obs_BO: FloatArray) -> Distribution:
        """The expert's action as the mean, with the assumed constant standard deviation."""
        raw_mean_BA = np.zeros((len(obs_BO), self.action_size), np.float32)
        for row_A, obs_O in zip(raw_mean_BA, obs_BO[:, : self._sizes.observation], strict=True):
            row_A[: self._sizes.action] = self._expert(obs_O.astype(np.float64))
        return Distribution(raw_mean_BA, np.full_like(raw_mean_BA, math.log(self.assumed_std)))


def save_scripted(policy: ScriptedPolicy, path: Path, description: dict[str, Any]) -> None:
    """Write the stand-in to `path` in the format of a policy; its only tensor is the standard deviation."""
    tensors = {"log_std_A": torch.full((policy.action_size,), math.log(policy.assumed_std))}
    architecture = {"kind": "scripted", "task": policy.task, "assumed_std": policy.assumed_std}
    write_tensors(tensors, path, {"architecture": architecture, **description})


class _ScriptedArchitecture(TypedDict):
    task: Task
    assumed_std: PositiveFloat


def load_scripted(path: Path, suite: Suite | None = None) -> ScriptedPolicy:
    """Load the stand-in saved at `path`, for a task of `suite`; None: Meta-World.

    Raises:
        DamagedFileError: if it is missing, damaged, or of another kind.
    """
    _, architecture = read_tensors(path, "scripted", _ScriptedArchitecture)
    return ScriptedPolicy(architecture["task"], architecture["assumed_std"], suite)


class Labelled(NamedTuple):
    """Visited states, and what the expert would do there."""

    obs_BO: FloatArray
    labels_BA: FloatArray
    """The expert's clean action, clipped to [-1, 1]."""


def demonstration_noise(number: int, horizon: int, action_size: int, seed: int) -> FloatArray:
    """The noise `[horizon, A]` to add to the expert's executed actions in demonstration `number`.

    Noise leads the expert to states off its path, so that the data show how to recover.
    """
    rng = generator(seed, "demonstration-noise", number)
    if int((number + 1) * LIGHT_SHARE) > int(number * LIGHT_SHARE):
        return np.float32(LIGHT_SCALE) * rng.standard_normal((horizon, action_size), dtype=np.float32)
    noise_TA = np.zeros((horizon, action_size), np.float32)
    for _ in range(math.ceil(horizon / BURST_EVERY)):
        start, length = int(rng.integers(horizon)), int(rng.integers(1, BURST_STEPS + 1))
        burst_A = rng.standard_normal(action_size, dtype=np.float32)
        noise_TA[start : start + length] = np.float32(BURST_SCALE) * burst_A
    return noise_TA


@dataclass(frozen=True)
class Demonstrator:
    """The scripted expert of a task, with the episodes in which it acts or labels."""

    task: str
    """Name of the task."""
    goals: Sequence[Goal]
    """Training goals; every round uses them in a new order."""
    envs: VectorEnv
    """At least `CHUNK` slots of the task."""
    num_demonstrations: int
    """Episodes in which the expert acts."""
    horizon: int
    """Maximum length of an episode in steps."""
    seed: int
    """Seed of the order of goals and of the noise."""
    interrupt: Interrupt
    """Checked after every step; every method raises `InterruptedBySignal` if asked to stop."""

    def gather(self, round_number: int, clone: Teacher | None = None) -> Labelled:
        """The labelled states of one round, in a fixed order.

        Args:
            round_number: 0 for the demonstrations, from 1 for DAgger rounds.
            clone: acts with its clipped mean in DAgger rounds; None: the expert acts, with noise.
        """
        steps = list(self._steps(round_number, clone))
        return Labelled(*(np.concatenate(arrays) for arrays in zip(*steps, strict=True)))

    def _steps(self, round_number: int, clone: Teacher | None) -> Iterator[Labelled]:
        """The steps of one round's episodes, one chunk of episodes after another."""
        num_episodes = self.num_demonstrations if clone is None else NUM_DAGGER_EPISODES
        order = generator(self.seed, "demonstration-goals", round_number).permutation(len(self.goals))
        action_size = self.envs.spaces.action_size
        # The composition of a chunk is fixed, since a clone's rounding may depend on the size of its batch.
        for first in range(0, num_episodes, CHUNK):
            numbers = range(first, min(first + CHUNK, num_episodes))
            goals = [self.goals[int(order[number % len(order)])] for number in numbers]
            noise_NTA = np.zeros((len(numbers), self.horizon, action_size), np.float32)
            if clone is None:
                for row_TA, number in zip(noise_NTA, numbers, strict=True):
                    row_TA[:] = demonstration_noise(number, self.horizon, action_size, self.seed)
            self.envs.reset(range(len(numbers)), goals)
            yield from self._chunk(clone, noise_NTA)

    def _chunk(self, clone: Teacher | None, noise_NTA: FloatArray) -> Iterator[Labelled]:
        """The steps of the episodes that were just reset in the first N slots, as rows of those still running."""
        num_episodes, envs = len(noise_NTA), self.envs
        running = np.arange(envs.num_envs) < num_episodes
        steps_left = np.full(envs.num_envs, self.horizon)
        executed = np.zeros((envs.num_envs, envs.spaces.action_size), np.float32)
        for t in range(self.horizon):
            if self.interrupt.requested:
                raise InterruptedBySignal("asked to stop in the warm start; launch again to repeat it")
            obs_NO = envs.observations[:num_episodes].copy()
            slots_M = np.flatnonzero(running)
            labels_MA: FloatArray = np.clip(self._expert.distribution(obs_NO[slots_M]).raw_mean, -1.0, 1.0)
            action_MA = labels_MA
            if clone is not None:  # with all rows, since its rounding may depend on their number
                action_MA = np.clip(clone.distribution(obs_NO).raw_mean, -1.0, 1.0)[slots_M]
            executed[slots_M] = np.clip(action_MA + noise_NTA[slots_M, t], -1.0, 1.0)
            envs.step(executed, running)
            yield Labelled(obs_NO[slots_M], labels_MA)
            steps_left -= 1
            succeeded = running & envs.successes
            steps_left[succeeded] = np.minimum(steps_left[succeeded], STEPS_AFTER_SUCCESS)
            running &= steps_left > 0
            if not running.any():
                return

    @cached_property
    def _expert(self) -> ScriptedPolicy:
        return ScriptedPolicy(self.task, suite=self.envs.suite)
