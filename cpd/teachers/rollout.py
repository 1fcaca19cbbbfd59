"""An iteration's experience: a pure function of policy, seed and iteration, whatever the number of workers.

Dimensions: S steps of an iteration, N environments, O observation, A action.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cpd.config import ExplorationConfig, PPOConfig
from cpd.envs.goals import Goal
from cpd.envs.vector_env import VectorEnv
from cpd.seeding import generator
from cpd.teachers.exploration import correlated_noise, perturb, random_starts
from cpd.teachers.policy import FloatArray, GaussianPolicy


@dataclass(frozen=True)
class Experience:
    """The samples of an iteration, of all its environments or of those of this rank."""

    obs: FloatArray
    """[S, N, O] before each step."""
    next_obs: FloatArray
    """[S, N, O] after it, and before any reset."""
    actions: FloatArray
    """[S, N, A] as sampled; executed clipped to [-1, 1]."""
    rewards: FloatArray
    """[S, N], the task's with the additions of training (`EpisodeRules.rewards`)."""
    terminated: npt.NDArray[np.bool_]
    """[S, N] bool, the step reached success, and that ended the episode."""
    ends: npt.NDArray[np.bool_]
    """[S, N] bool, the step is the last of its segment: termination, time limit, a perturbation, or the
    iteration's end."""
    train_success: float
    """Share of environments whose first episode reached success; for a task without a success measure, the mean
    normalised return of these episodes."""
    train_return: float
    """Mean undiscounted return of these first episodes, in `rewards`."""
    exploring_steps: int = 0
    """Steps of random starts and perturbations, which the arrays do not contain."""


class GoalDealer:
    """Chooses the goals of training episodes: every environment goes through the goals in one shuffled order.

    Environments begin at evenly spaced positions of that order, so that an iteration's first episodes differ.
    """

    def __init__(self, goals: Sequence[Goal], num_envs: int, rng: np.random.Generator) -> None:
        self._goals = goals
        self._order = rng.permutation(len(goals))
        self._next = np.arange(num_envs) * max(1, len(goals) // num_envs)

    def deal(self, slot: int) -> Goal:
        """The next goal of environment `slot`."""
        goal = self._goals[int(self._order[self._next[slot] % len(self._goals)])]
        self._next[slot] += 1
        return goal


@dataclass(frozen=True)
class EpisodeRules:
    """How a teacher's training episodes begin, what they reward, and when they end."""

    horizon: int
    """Longest episode in steps."""
    terminate_on_success: bool = True
    """Whether success ends an episode."""
    exploration: ExplorationConfig = field(default_factory=ExplorationConfig)
    """Random starts and perturbations, by default none."""
    grasp_bonus: float = 0.0
    """b: weight of the nearness to a grasp."""
    reward_convexity: float = 0.0
    """c: weight of the square of the task's reward."""

    def rewards(self, envs: VectorEnv) -> npt.NDArray[np.float32]:
        """Rewards [N] of the last step: r + c r^2 + b g, with the task's reward r and the nearness g to a grasp.

        If b is not 0, `envs` must measure grasps (`VectorEnv.want_grasps`).
        """
        rewards = envs.rewards + self.reward_convexity * envs.rewards**2 + self.grasp_bonus * envs.grasps
        return rewards.astype(np.float32)


class _Episodes:
    """The episodes of an iteration in its environments `slots`: begins and perturbs them.

    Random numbers and goals depend on the environment's number, not on the rank that steps it.
    """

    def __init__(
        self,
        envs: VectorEnv,
        goals: Sequence[Goal],
        num_envs: int,
        slots: range,
        rules: EpisodeRules,
        seed: int,
        iteration: int,
    ) -> None:
        self._envs, self._slots, self._rules = envs, slots, rules
        self._dealer = GoalDealer(goals, num_envs, generator(seed, "goals", iteration))
        self._start_rngs, self._perturbation_rngs = (
            [generator(seed, stream, iteration, slot) for slot in slots if is_needed]
            for stream, is_needed in (
                ("starts", rules.exploration.start_share),
                ("excursions", rules.exploration.step_rate),
            )
        )
        self.lengths_N = np.zeros(len(slots), np.int64)
        self.num_exploration_steps = 0

    def begin(self, ended: Sequence[int]) -> None:
        """Begin the next episodes in the environments `ended`, which are positions in `slots`."""
        if ended:
            self._envs.reset(ended, [self._dealer.deal(self._slots[slot]) for slot in ended])
            exploration = self._rules.exploration
            self.num_exploration_steps += random_starts(exploration, self._envs, ended, self._start_rngs)
            self.lengths_N[ended] = 0

    def perturb(self, policy: GaussianPolicy) -> npt.NDArray[np.bool_]:
        """Perturb some episodes, at most up to the step before their last one; returns [N], whether each was."""
        num_envs = len(self._slots)
        exploration = self._rules.exploration
        if not exploration.step_rate:
            return np.zeros(num_envs, np.bool_)
        no_noise_NA = np.zeros((num_envs, self._envs.spaces.action_size), np.float32)
        action_NA = policy.explore(self._envs.observations[:num_envs], no_noise_NA)
        # An episode of length 0 has just begun; the policy takes its first step.
        max_steps_N = np.where(self.lengths_N > 0, self._rules.horizon - 1 - self.lengths_N, 0)
        num_steps_N = perturb(exploration, self._envs, max_steps_N, action_NA, self._perturbation_rngs)
        self.lengths_N += num_steps_N
        self.num_exploration_steps += int(num_steps_N.sum())
        return num_steps_N > 0


def sample(
    policy: GaussianPolicy,
    envs: VectorEnv,
    goals: Sequence[Goal],
    config: PPOConfig,
    rules: EpisodeRules,
    seed: int,
    iteration: int,
    *,
    slots: range | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Experience | None:
    """Act with exploration noise for an iteration, beginning with resets, in the first slots of `envs`.

    Where an episode ends, the next one begins. The end of the iteration cuts all episodes.

    Args:
        policy: acts in all environments at once.
        envs: at least as many slots as `slots`.
        goals: training goals.
        config: sizes of the iteration, and the correlation of the noise.
        rules: rules of the episodes.
        seed: seed of noise and goals.
        iteration: number of the iteration.
        slots: which of the iteration's `num_envs` environments are stepped here; None: all. An environment has the
            same noise and goals on every rank.
        should_stop: called before every step.

    Returns:
        The experience; None if `should_stop()` returned true.
    """
    num_steps, slots = config.steps_per_env, slots or range(config.num_envs)
    num_envs, action_size = len(slots), envs.spaces.action_size
    rng = generator(seed, "exploration", iteration)
    noise_SNA = correlated_noise(num_steps, config.num_envs, action_size, config.noise_correlation, rng)
    noise_SNA = noise_SNA[:, slots.start : slots.stop]
    noise_SNA[..., envs.suite.sizes(envs.tasks[0]).action :] = 0.0  # components that the task lacks
    episodes = _Episodes(envs, goals, config.num_envs, slots, rules, seed, iteration)
    obs = np.empty((num_steps, num_envs, envs.observations.shape[1]), np.float32)
    next_obs = np.empty_like(obs)
    actions = np.empty((num_steps, num_envs, action_size), np.float32)
    rewards = np.empty((num_steps, num_envs), np.float32)
    task_rewards = np.empty((num_steps, num_envs))
    successes = np.zeros((num_steps, num_envs), np.bool_)
    ends, perturbed = np.zeros_like(successes), np.zeros_like(successes)
    executed = np.zeros((envs.num_envs, action_size), np.float32)
    active = np.arange(envs.num_envs) < num_envs
    envs.want_grasps(rules.grasp_bonus > 0)
    ended: Sequence[int] = range(num_envs)
    for t in range(num_steps):
        if should_stop():
            return None
        episodes.begin(ended)
        # A perturbation ends the segment of the step before it. At t = 0 all episodes have just begun: none is.
        perturbed[t - 1] = episodes.perturb(policy)
        obs[t] = envs.observations[:num_envs]
        actions[t] = policy.explore(obs[t], noise_SNA[t])
        executed[:num_envs] = np.clip(actions[t], -1.0, 1.0)
        envs.step(executed, active)
        next_obs[t] = envs.observations[:num_envs]
        rewards[t] = rules.rewards(envs)[:num_envs]
        task_rewards[t] = envs.rewards[:num_envs]
        successes[t] = envs.successes[:num_envs]
        episodes.lengths_N += 1
        is_timeout = episodes.lengths_N == rules.horizon
        ends[t] = (successes[t] & rules.terminate_on_success) | is_timeout | (t == num_steps - 1)
        ended = np.flatnonzero(ends[t]).tolist()
    in_first = np.arange(num_steps)[:, None] <= ends.argmax(axis=0)  # steps of first episodes
    return Experience(
        obs,
        next_obs,
        actions,
        rewards,
        successes & rules.terminate_on_success,
        ends | perturbed,
        train_success=_mean_score(envs, successes & in_first, task_rewards * in_first),
        train_return=float((rewards * in_first).sum(axis=0).mean()),
        exploring_steps=episodes.num_exploration_steps,
    )


def _mean_score(
    envs: VectorEnv, successes_SN: npt.NDArray[np.bool_], rewards_SN: npt.NDArray[np.float64]
) -> float:
    """Share of episodes with a success, or their mean normalised return; each column is an episode."""
    if returns := envs.suite.returns(envs.tasks[0]):
        return float(np.mean([returns.normalise(total) for total in rewards_SN.sum(axis=0)]))
    return float(successes_SN.any(axis=0).mean())
