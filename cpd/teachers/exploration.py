"""Exploration: correlated noise on actions, random starts of episodes, perturbations within them.

Random starts and perturbations repeat one random action, to bring episodes to states that the policy itself may
never visit: an action of 1 moves the hand by 1 cm only, and independent actions mostly cancel. A random start does
this at the start of an episode (exploring starts; Sutton and Barto 2018, section 5.3), a perturbation within it.
During a perturbation the policy keeps the command of `Suite.held_actions`, such as a gripper, without noise: it
still holds its object. A success during these steps does not end the episode: it counts if it still holds after
the next step of the policy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cpd.config import ExplorationConfig
from cpd.envs.vector_env import VectorEnv
from cpd.teachers.policy import FloatArray


def correlated_noise(
    num_steps: int, num_envs: int, size: int, correlation: float, rng: np.random.Generator
) -> FloatArray:
    """Stationary AR(1) noise `[S, N, A]` of unit variance: `e_t = c e_{t-1} + sqrt(1 - c^2) w_t`, w white.

    Args:
        num_steps: S.
        num_envs: N.
        size: A.
        correlation: c, from 0 (white noise) to below 1.
        rng: source of w.
    """
    # Step 0 keeps its white noise: it has unit variance already, so there is no transient.
    noise_SNA = rng.standard_normal((num_steps, num_envs, size), dtype=np.float32)
    innovation = np.float32(np.sqrt(1.0 - correlation**2))
    for t in range(1, num_steps):
        noise_SNA[t] = np.float32(correlation) * noise_SNA[t - 1] + innovation * noise_SNA[t]
    return noise_SNA


def random_starts(
    config: ExplorationConfig, envs: VectorEnv, slots: Sequence[int], rngs: Sequence[np.random.Generator]
) -> int:
    """Step the environments of `slots`, which have just been reset, with probability `start_share` each.

    Args:
        config: `start_share` and `max_steps`.
        envs: all environments.
        slots: environments that begin an episode.
        rngs: one for every environment that is sampled; may be empty if `start_share` is 0.

    Returns:
        The number of environment steps taken.
    """
    if not config.start_share:
        return 0
    action_size = envs.spaces.action_size
    actions = np.zeros((envs.num_envs, action_size), np.float32)
    lengths = np.zeros(envs.num_envs, np.int64)
    # Environments are stepped together afterwards, so that worker processes run at the same time.
    for slot in slots:
        actions[slot] = rngs[slot].uniform(-1.0, 1.0, action_size)
        is_chosen = rngs[slot].random() < config.start_share
        lengths[slot] = is_chosen * rngs[slot].integers(1, config.max_steps, endpoint=True)
    _repeat(envs, actions, lengths)
    return int(lengths.sum())


def perturb(
    config: ExplorationConfig,
    envs: VectorEnv,
    max_steps_N: npt.NDArray[np.int64],
    action_NA: FloatArray,
    rngs: Sequence[np.random.Generator],
) -> npt.NDArray[np.int64]:
    """Step environments within their episodes, with probability `step_rate` each.

    Args:
        config: `step_rate` and `max_steps`.
        envs: N environments or more.
        max_steps_N: maximum number of steps of each environment; 0 excludes it.
        action_NA: the policy's actions, of which the held components are repeated, clipped to [-1, 1].
        rngs: one for every environment.

    Returns:
        [N] the number of steps taken in each environment.
    """
    actions = np.zeros((envs.num_envs, envs.spaces.action_size), np.float32)
    actions[: len(rngs)] = np.clip(action_NA[: len(rngs)], -1.0, 1.0)
    free = np.setdiff1d(np.arange(envs.spaces.action_size), envs.suite.of(envs.tasks[0]).held_actions)
    lengths = np.zeros(envs.num_envs, np.int64)
    for slot, rng in enumerate(rngs):
        if rng.random() < config.step_rate and max_steps_N[slot] > 0:
            actions[slot, free] = rng.uniform(-1.0, 1.0, len(free))
            lengths[slot] = min(max_steps_N[slot], rng.integers(1, config.max_steps, endpoint=True))
    _repeat(envs, actions, lengths)
    return lengths[: len(rngs)]


def _repeat(envs: VectorEnv, actions: npt.NDArray[np.float32], lengths: npt.NDArray[np.int64]) -> None:
    """Repeat every environment's action for its number of steps."""
    # Environments whose steps are done stay inactive, and keep their last observation.
    for t in range(lengths.max()):
        envs.step(actions, lengths > t)
