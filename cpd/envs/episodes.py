"""Run deterministic episodes to their end: the loop that validation, evaluation and gates share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from cpd.envs.goals import Goal
from cpd.envs.vector_env import VectorEnv


class Actor(Protocol):
    """A policy that acts in many episodes at once and may keep a state for each."""

    def reset(self, tasks: Sequence[str]) -> None:
        """Start an episode of each task, without memory. Only a student that is given the task may use `tasks`."""

    def act(self, obs_BO: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Deterministic actions `[B, A]`, clipped to [-1, 1], for the episodes' current observations `[B, O]`."""


class Belief(NamedTuple):
    """What a policy that infers the task of an episode believes and plans after the first observation."""

    believed: str
    """The most likely task."""
    confidence: float
    """Its probability."""
    plan_first: str
    """The task that the policy acts for first."""
    plan_second: str
    """The task that it acts for afterwards."""


class Outcome(NamedTuple):
    """One episode; four fields as in `Belief`, None for policies that do not infer the task."""

    goal: int
    success: bool
    """Success at any step."""
    success_last: bool | None
    """Success at the last step; None if the episode ended at its first success."""
    length: int
    episode_return: float
    believed: str | None = None
    confidence: float | None = None
    plan_first: str | None = None
    plan_second: str | None = None
    normalised_return: float | None = None
    """By `Suite.returns`; None for a task with a success measure."""

    @property
    def score(self) -> float:
        """The normalised return, or else 1 for a success and 0 for a failure."""
        return float(self.success) if self.normalised_return is None else self.normalised_return


def mean_of_scores(outcomes: Sequence[Outcome]) -> float:
    """Return the mean score of episodes: their success rate, or the mean normalised return."""
    return sum(outcome.score for outcome in outcomes) / len(outcomes)


def mean_normalised_return(outcomes: Sequence[Outcome]) -> float | None:
    """Return the mean normalised return of episodes of a task; None for a task with a success measure."""
    return None if outcomes[0].normalised_return is None else mean_of_scores(outcomes)


class RunningEpisodes:
    """Running episodes of one task, one per goal, in the first slots of a vector environment."""

    def __init__(self, envs: VectorEnv, goals: Sequence[Goal]) -> None:
        """Start an episode from each goal; at most `envs.num_envs`."""
        assert 0 < len(goals) <= envs.num_envs
        self.goals = goals
        self._envs = envs
        envs.reset(range(len(goals)), goals)
        self._running = np.arange(envs.num_envs) < len(goals)
        self._actions = np.zeros((envs.num_envs, envs.spaces.action_size), dtype=np.float32)
        self._success = np.zeros(len(goals), dtype=bool)
        self._length = np.zeros(len(goals), dtype=np.int64)
        self._return = np.zeros(len(goals))

    @property
    def observations(self) -> npt.NDArray[np.float32]:
        """Current observations, [goals, O]; an episode that has ended keeps its last one."""
        return self._envs.observations[: len(self.goals)]

    @property
    def is_running(self) -> bool:
        """Whether any episode still runs."""
        return bool(self._running.any())

    def step(self, actions_BA: npt.NDArray[np.float32], stop_at_success: bool) -> None:
        """Step the episodes that still run."""
        if not self.is_running:
            return
        num_goals = len(self.goals)
        self._actions[:num_goals] = actions_BA
        self._envs.step(self._actions, self._running)
        live = self._running[:num_goals]
        self._success |= live & self._envs.successes[:num_goals]
        self._length += live
        self._return += np.where(live, self._envs.rewards[:num_goals], 0.0)
        if stop_at_success:
            self._running[:num_goals] &= ~self._success

    def outcomes(self, stop_at_success: bool) -> list[Outcome]:
        """Return the outcomes in the goals' order."""
        last, returns = self._envs.successes, self._envs.suite.returns(self.goals[0].task)
        return [
            Outcome(
                goal.index,
                bool(self._success[i]),
                None if stop_at_success and self._success[i] else bool(last[i]),
                int(self._length[i]),
                float(self._return[i]),
                normalised_return=returns.normalise(float(self._return[i])) if returns else None,
            )
            for i, goal in enumerate(self.goals)
        ]


def run_episodes(
    actor: Actor,
    groups: Sequence[tuple[VectorEnv, Sequence[Goal]]],
    horizon: int,
    *,
    stop_at_success: bool = True,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[list[Outcome]]:
    """Run one episode per goal, all in lock-step from the first step on.

    The composition of the actor's batch is fixed until all episodes have ended: an ended episode stays in it with
    its last observation. Results therefore depend on the goals alone, not on how episodes are divided among ranks.

    Args:
        actor: the policy.
        groups: vector environments, all different, with goals of one task each for their first slots.
        horizon: steps per episode.
        stop_at_success: whether an episode ends at its first success.
        should_stop: called before every step.

    Returns:
        For each group its outcomes in the goals' order; an empty list if `should_stop()` returned true.
    """
    running = [RunningEpisodes(envs, goals) for envs, goals in groups]
    actor.reset([goal.task for episodes in running for goal in episodes.goals])
    ends = np.cumsum([len(episodes.goals) for episodes in running])[:-1]
    for _ in range(horizon):
        if should_stop():
            return []
        actions_BA = actor.act(np.concatenate([episodes.observations for episodes in running]))
        for episodes, task_actions_BA in zip(running, np.split(actions_BA, ends), strict=True):
            episodes.step(task_actions_BA, stop_at_success)
        if not any(episodes.is_running for episodes in running):
            break
    outcomes = [episodes.outcomes(stop_at_success) for episodes in running]
    # Only policies that infer the task have beliefs: one per episode, in the order of the batch.
    beliefs: Sequence[Belief] = getattr(actor, "beliefs", ())
    if not beliefs:
        return outcomes
    remaining = iter(beliefs)
    return [[outcome._replace(**next(remaining)._asdict()) for outcome in group] for group in outcomes]
