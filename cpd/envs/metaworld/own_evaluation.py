"""Meta-World's own evaluation of a policy, with its environments, its goals and its loop.

This checks our numbers independently: it uses neither the accelerated environment, nor cached resets, nor the
loops of this package. With the first seed of a split in `cpd.envs.goals`, the goals are those of that split.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import gymnasium as gym
import metaworld  # noqa: F401  # registers its environments with gymnasium
import numpy as np
import numpy.typing as npt
from metaworld.evaluation import evaluation

from cpd.envs.episodes import Actor
from cpd.envs.metaworld.tasks import REWARD_VERSION


class MetaWorldAgent:
    """A policy without memory as `metaworld.evaluation.Agent`."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor

    def eval_action(self, observations: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Clipped means `[N, 4]` at Meta-World's float64 observations `[N, 39]`."""
        return self._actor.act(observations.astype(np.float32)).astype(np.float64)

    def reset(self, env_mask: npt.NDArray[np.bool_]) -> None:
        """Do nothing: the policy has no memory."""


class MetaWorldResult(NamedTuple):
    """The result of `metaworld.evaluation.evaluation`."""

    successes: int
    episodes: int
    mean_return: float
    """Undiscounted, over episodes that end at their first success."""


def evaluate_with_metaworld(
    actor: Actor,
    task: str,
    *,
    seed: int,
    horizon: int,
    num_episodes: int = 50,
) -> MetaWorldResult:
    """Run Meta-World's evaluation, whose episodes end at their first success.

    Args:
        actor: the policy.
        task: Meta-World task name.
        seed: seed of `metaworld.MT1`, which draws fifty goals; each is used once in fifty episodes.
        horizon: maximum steps per episode, at most 500.
        num_episodes: number of episodes; beyond fifty the goals repeat.

    Raises:
        ValueError: if `seed` is 0, which Meta-World treats as no seed.
    """
    if seed < 1:
        raise ValueError(f"seed must be at least 1, got {seed}: Meta-World treats 0 as no seed")
    options: dict[str, Any] = {
        "task_select": "pseudorandom",
        "max_episode_steps": horizon,
        "reward_function_version": REWARD_VERSION,
    }
    envs: Any = gym.make_vec(
        "Meta-World/custom-mt-envs", envs_list=[task], vector_strategy="sync", seed=seed, **options
    )
    try:
        envs.call("toggle_sample_tasks_on_reset", True)  # off by default, and needed even for the first goal
        success_rate, mean_return, *_ = evaluation(MetaWorldAgent(actor), envs, num_episodes)
    finally:
        envs.close()
    return MetaWorldResult(round(success_rate * num_episodes), num_episodes, mean_return)
