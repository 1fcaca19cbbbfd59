"""Whole transitions of the scripted expert, for learners that replay what others did."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cpd.config import WarmStartConfig
from cpd.envs.cells import CHUNK
from cpd.envs.goals import Goal
from cpd.envs.sampler import VectorEnv
from cpd.interrupt import Interrupt, InterruptedBySignal
from cpd.seeding import generator
from cpd.shards.schema import ACTION_SIZE
from cpd.teachers.sampling import Batch
from cpd.teachers.scripted import ScriptedPolicy
from cpd.teachers.warm_start import demonstration_noise


def demonstrated(
    task: str,
    goals: Sequence[Goal],
    envs: VectorEnv,
    config: WarmStartConfig,
    horizon: int,
    seed: int,
    interrupt: Interrupt,
    terminate_on_success: bool = True,
) -> list[Batch]:
    """The transitions of the warm start's demonstrations, with their goals and noise, each up to its success.

    Args:
        task: Meta-World task name.
        goals: training goals.
        envs: at least `CHUNK` slots of the task.
        config: numbers of episodes and their noise.
        horizon: longest episode.
        seed: of goals and noise.
        interrupt: looked at after every step.
        terminate_on_success: whether success counts as the end, beyond which nothing is estimated.

    Returns:
        A batch [1, M] per step and chunk of episodes, M of which were still running.

    Raises:
        InterruptedBySignal: if asked to stop.
    """
    order = generator(seed, "demonstration-goals", 0).permutation(len(goals))
    expert = ScriptedPolicy(task, assumed_std=1.0)  # only its mean is used
    executed = np.zeros((envs.num_envs, ACTION_SIZE), np.float32)
    batches = []
    for first in range(0, config.num_demonstrations, CHUNK):
        numbers = range(first, min(first + CHUNK, config.num_demonstrations))
        noise_NTA = np.stack([demonstration_noise(number, horizon, config, seed) for number in numbers])
        envs.reset(range(len(numbers)), [goals[int(order[number % len(goals)])] for number in numbers])
        running = np.arange(envs.num_envs) < len(numbers)
        for t in range(horizon):
            if interrupt.requested:
                raise InterruptedBySignal("asked to stop in the warm start; launch again to start it anew")
            rows = np.flatnonzero(running)
            obs_MO = envs.observations[rows]
            clean_MA = np.clip(expert.distribution(obs_MO).raw_mean, -1.0, 1.0)
            executed[rows] = np.clip(clean_MA + noise_NTA[rows, t], -1.0, 1.0)
            envs.step(executed, running)
            batches.append(
                Batch(
                    obs=obs_MO[None],
                    next_obs=envs.observations[rows][None],
                    actions=executed[rows][None],
                    rewards=envs.rewards[rows].astype(np.float32)[None],
                    terminated=envs.successes[rows][None] & terminate_on_success,
                    ends=np.ones((1, len(rows)), np.bool_),
                    train_success=0.0,
                    train_return=0.0,
                )
            )
            running &= ~envs.successes
            if not running.any():
                break
    return batches
