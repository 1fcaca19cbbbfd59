"""Whole deterministic episodes of an actor: the one loop behind validation, evaluation and gates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from cpd.envs.goals import Goal
from cpd.envs.sampler import VectorEnv


class Actor(Protocol):
    """A policy that acts in many episodes at once, and may remember each one's past."""

    def reset(self, task: str, num_envs: int) -> None:
        """Forget all: `num_envs` fresh episodes of `task` begin. Only a student that is told may use `task`."""

    def act(self, obs_BO: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Deterministic actions `[B, A]`, clipped to [-1, 1], for the episodes' current observations `[B, O]`."""


class Outcome(NamedTuple):
    """One episode."""

    goal: int
    success: bool
    """The flag was set at some step."""
    success_last: bool | None
    """The flag at the last step; None where the episode ended at its first success."""
    length: int
    episode_return: float


def run_episodes(
    actor: Actor,
    envs: VectorEnv,
    goals: Sequence[Goal],
    horizon: int,
    *,
    stop_at_success: bool = True,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Outcome]:
    """One episode per goal, all of one task, `len(goals) <= envs.num_envs`, in lock-step from the first step on.

    The batch that the actor sees keeps its composition until all are done (finished episodes stay with their last
    observation), so that results depend on the goals alone and not on how work was split over processes.

    Returns:
        Outcomes in the goals' order; an empty list if `should_stop()` turned true.
    """
    num_goals = len(goals)
    assert 0 < num_goals <= envs.num_envs
    slots = np.arange(num_goals)
    envs.reset(slots, goals)
    actor.reset(goals[0].task, num_goals)
    running = np.zeros(envs.num_envs, dtype=bool)
    running[:num_goals] = True
    success = np.zeros(num_goals, dtype=bool)
    length = np.zeros(num_goals, dtype=np.int64)
    total = np.zeros(num_goals)
    actions = np.zeros((envs.num_envs, 4), dtype=np.float32)
    for _ in range(horizon):
        if should_stop():
            return []
        actions[:num_goals] = actor.act(envs.observations[:num_goals])
        envs.step(actions, running)
        live = running[:num_goals]
        success |= live & envs.successes[:num_goals]
        length += live
        total += np.where(live, envs.rewards[:num_goals], 0.0)
        if stop_at_success:
            running[:num_goals] &= ~success
            if not running.any():
                break
    last = envs.successes[:num_goals]
    return [
        Outcome(
            goal.index,
            bool(success[i]),
            None if stop_at_success and success[i] else bool(last[i]),
            int(length[i]),
            float(total[i]),
        )
        for i, goal in enumerate(goals)
    ]
