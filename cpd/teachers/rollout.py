"""An iteration's experience: a pure function of policy, seed and iteration, whatever the number of workers.

Shape letters: S steps of an iteration, N environments, O = 39, A = 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from cpd.config import PPOConfig
from cpd.envs.goals import Goal
from cpd.envs.vector_env import VectorEnv
from cpd.seeding import generator
from cpd.teachers.exploration import Exploration, correlated_noise
from cpd.teachers.policy import FloatArray, GaussianPolicy

#: Meta-World's v2 rewards lie in [0, 10]; with what training adds to them, the bound grows with what was seen.
LARGEST_REWARD: Final = 10.0


@dataclass(frozen=True)
class Experience:
    """What happened in an iteration, or in this rank's part of its environments.

    Attributes:
        obs: [S, N, O] before each step.
        next_obs: [S, N, O] after it, and before any reset.
        actions: [S, N, A] as sampled; executed clipped to [-1, 1].
        rewards: [S, N], Meta-World's with what training adds to them (`rewarded`).
        terminated: [S, N] bool, the step reached success, and that ended the episode.
        ends: [S, N] bool, the step is the last of its segment: termination, time limit, an excursion, or the
            iteration's end.
        train_success: share of environments whose first episode reached success.
        train_return: mean undiscounted return of these first episodes, in `rewards`.
        exploring_steps: steps of exploring starts and excursions, which are not among the others.
    """

    obs: FloatArray
    next_obs: FloatArray
    actions: FloatArray
    rewards: FloatArray
    terminated: npt.NDArray[np.bool_]
    ends: npt.NDArray[np.bool_]
    train_success: float
    train_return: float
    exploring_steps: int = 0


class GoalDealer:
    """Deals training goals to resets: each environment walks through the goals in an order of its own.

    The walks start evenly apart in one shuffled order, so that an iteration's first episodes differ.
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


NO_EXPLORATION: Final = Exploration()


@dataclass(frozen=True)
class EpisodeRules:
    """How a teacher's training episodes begin, what they reward, and when they end."""

    horizon: int
    """Longest episode in steps."""
    terminate_on_success: bool = True
    """Whether success ends an episode."""
    exploring: Exploration = NO_EXPLORATION
    """How they are perturbed on purpose."""
    grasp_bonus: float = 0.0
    """Weight in rewards of how near a step comes to holding the object."""
    reward_convexity: float = 0.0
    """Weight in rewards of the square of Meta-World's."""


def rewarded(envs: VectorEnv, rules: EpisodeRules) -> npt.NDArray[np.float32]:
    """[N] rewards of the last step: r + c r^2 + b g, of Meta-World's reward r and nearness g to a grasp.

    Where b is not 0, grasps must be wanted (`VectorEnv.want_grasps`).
    """
    rewards = envs.rewards + rules.reward_convexity * envs.rewards**2 + rules.grasp_bonus * envs.grasps
    return rewards.astype(np.float32)


class _Episodes:
    """Begins the episodes of an iteration in the environments `slots` of it, and perturbs them.

    Chance and goals are the whole iteration's.
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
        exploring = rules.exploring
        self._start_rngs = [generator(seed, "starts", iteration, slot) for slot in slots if exploring.share]
        self._stray_rngs = [generator(seed, "excursions", iteration, slot) for slot in slots if exploring.rate]
        self.lengths_N = np.zeros(len(slots), np.int64)
        self.num_exploring_steps = 0

    def begin(self, ended: Sequence[int]) -> None:
        """The next episodes in the environments numbered `ended` here."""
        if ended:
            self._envs.reset(ended, [self._dealer.deal(self._slots[slot]) for slot in ended])
            self.num_exploring_steps += self._rules.exploring.begin(self._envs, ended, self._start_rngs)
            self.lengths_N[ended] = 0

    def perturb(self, policy: GaussianPolicy) -> npt.NDArray[np.bool_]:
        """[N] which episodes were perturbed; none reaches its end meanwhile."""
        num_envs = len(self._slots)
        if not self._rules.exploring.rate:
            return np.zeros(num_envs, np.bool_)
        wanted_NA = policy.explore(self._envs.observations[:num_envs], np.zeros((num_envs, 4), np.float32))
        left_N = np.where(self.lengths_N > 0, self._rules.horizon - 1 - self.lengths_N, 0)
        strayed_N = self._rules.exploring.perturb(self._envs, left_N, wanted_NA[:, 3], self._stray_rngs)
        self.lengths_N += strayed_N
        self.num_exploring_steps += int(strayed_N.sum())
        return strayed_N > 0


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
    """Act with exploration noise for an iteration, from fresh resets on, in the first slots of `envs`.

    Where an episode ends the next one starts; the iteration's end cuts all.

    Args:
        policy: acts in all environments at once.
        envs: as many slots as are stepped here, or more.
        goals: training goals.
        config: sizes of the iteration, and the noise's correlation.
        rules: of the episodes.
        seed: of noise and goals.
        iteration: number of the iteration.
        slots: which of the iteration's `num_envs` environments are stepped here; None: all. Noise and goals are
            those of the whole iteration, whoever steps the others.
        should_stop: looked at before every step.

    Returns:
        The batch; None if `should_stop()` turned true.
    """
    num_steps, slots = config.steps_per_env, slots or range(config.num_envs)
    num_envs = len(slots)
    noise_SNA = correlated_noise(
        num_steps, config.num_envs, 4, config.noise_correlation, generator(seed, "exploration", iteration)
    )[:, slots.start : slots.stop]
    episodes = _Episodes(envs, goals, config.num_envs, slots, rules, seed, iteration)
    obs = np.empty((num_steps, num_envs, envs.observations.shape[1]), np.float32)
    next_obs = np.empty_like(obs)
    actions = np.empty((num_steps, num_envs, 4), np.float32)
    rewards = np.empty((num_steps, num_envs), np.float32)
    successes = np.zeros((num_steps, num_envs), np.bool_)
    ends, perturbed = np.zeros_like(successes), np.zeros_like(successes)
    executed = np.zeros((envs.num_envs, 4), np.float32)
    active = np.arange(envs.num_envs) < num_envs
    envs.want_grasps(rules.grasp_bonus > 0)
    ended: Sequence[int] = range(num_envs)
    for t in range(num_steps):
        if should_stop():
            return None
        episodes.begin(ended)
        perturbed[t - 1] = episodes.perturb(policy)  # at t = 0, where all begin, none is
        obs[t] = envs.observations[:num_envs]
        actions[t] = policy.explore(obs[t], noise_SNA[t])
        executed[:num_envs] = np.clip(actions[t], -1.0, 1.0)
        envs.step(executed, active)
        next_obs[t] = envs.observations[:num_envs]
        rewards[t] = rewarded(envs, rules)[:num_envs]
        successes[t] = envs.successes[:num_envs]
        episodes.lengths_N += 1
        is_late = episodes.lengths_N == rules.horizon
        ends[t] = (successes[t] & rules.terminate_on_success) | is_late | (t == num_steps - 1)
        ended = np.flatnonzero(ends[t]).tolist()
    in_first = np.arange(num_steps)[:, None] <= ends.argmax(axis=0)  # steps of first episodes
    return Experience(
        obs,
        next_obs,
        actions,
        rewards,
        successes & rules.terminate_on_success,
        ends | perturbed,
        train_success=float((successes & in_first).any(axis=0).mean()),
        train_return=float((rewards * in_first).sum(axis=0).mean()),
        exploring_steps=episodes.num_exploring_steps,
    )
