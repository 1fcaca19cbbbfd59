"""Collect a finished teacher's rollouts, from which students learn.

In half of the episodes (by default), noise is added to the executed action, so that the data cover states that a
student reaches when it errs. The label is always the teacher's distribution at the state, without noise. Episodes
end a few steps after their first success, since teachers trained with termination on success have never seen later
states.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cpd.config import RolloutConfig
from cpd.envs.goals import Goal
from cpd.envs.suite import Spaces
from cpd.envs.vector_env import VectorEnv
from cpd.run.interrupt import Interrupt, InterruptedBySignal
from cpd.run.shards.schema import Episode
from cpd.seeding import derive, generator
from cpd.teachers.policy import FloatArray, Teacher

#: Steps for which each noise sample is held, in every second pass through the scales.
NOISE_HOLD: Final = 8


@dataclass(frozen=True)
class EpisodePlan:
    """The goal and the noise of an episode, fixed before it starts."""

    goal: Goal
    """Initial condition, one of the training goals."""
    seed: int
    """Seed of the noise."""
    noise_scale: float
    """Standard deviation of the noise; 0 for a clean episode."""
    noise_hold: int
    """Steps for which each sample of the noise is held."""

    def noise(self, horizon: int, action_size: int) -> FloatArray:
        """The noise `[horizon, A]` to add to the executed action."""
        if self.noise_scale == 0.0:
            return np.zeros((horizon, action_size), np.float32)
        num_samples = -(-horizon // self.noise_hold)
        samples = generator(self.seed).standard_normal((num_samples, action_size), dtype=np.float32)
        held: FloatArray = np.repeat(samples, self.noise_hold, axis=0)[:horizon]
        return np.float32(self.noise_scale) * held


def plan_episode(number: int, goals: Sequence[Goal], config: RolloutConfig, seed: int) -> EpisodePlan:
    """The plan of episode `number`, a pure function of the arguments.

    Every pass through the goals has a new order. Noisy episodes are spread evenly. They take the scales in turn,
    and in every second pass through the scales each noise sample is held for `NOISE_HOLD` steps.
    """
    goal_pass, position = divmod(number, len(goals))
    order = generator(seed, "rollout-goals", goal_pass).permutation(len(goals))
    # The number of noisy episodes among the first n is floor(n * share).
    num_noisy = int(number * config.noisy_share)
    is_noisy = int((number + 1) * config.noisy_share) > num_noisy and bool(config.noise_scales)
    scale_pass, scale_position = divmod(num_noisy, max(1, len(config.noise_scales)))
    return EpisodePlan(
        goals[int(order[position])],
        derive(seed, "rollout-noise", number),
        config.noise_scales[scale_position] if is_noisy else 0.0,
        NOISE_HOLD if scale_pass % 2 else 1,
    )


class _Recorder:
    """The recorded steps of a round of episodes that run in lock-step: steps in rows, slots in columns."""

    def __init__(self, num_slots: int, horizon: int, spaces: Spaces) -> None:
        self.observations = np.empty((horizon + 1, num_slots, spaces.observation_size), np.float32)
        self.actions, self.teacher_mean, self.teacher_raw_mean, self.teacher_log_std = (
            np.empty((horizon, num_slots, spaces.action_size), np.float32) for _ in range(4)
        )
        self.rewards = np.empty((horizon, num_slots), np.float64)
        self.successes = np.empty((horizon, num_slots), np.bool_)
        self.length = np.zeros(num_slots, np.int64)

    def episode(self, slot: int, plan: EpisodePlan, num_steps: int) -> Episode:
        """The first `num_steps` steps of the episode in `slot`."""
        assert 0 < num_steps <= self.length[slot]

        def rows(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
            """Copy the steps of this episode."""
            return array[:num_steps, slot].copy()

        return Episode(
            observations=self.observations[: num_steps + 1, slot].copy(),
            actions=rows(self.actions),
            teacher_mean=rows(self.teacher_mean),
            teacher_raw_mean=rows(self.teacher_raw_mean),
            teacher_log_std=rows(self.teacher_log_std),
            rewards=rows(self.rewards),
            successes=rows(self.successes),
            noise_scale=np.full(num_steps, plan.noise_scale, np.float32),
            goal_index=plan.goal.index,
            seed=plan.seed,
        )


def collect(
    teacher: Teacher,
    envs: VectorEnv,
    goals: Sequence[Goal],
    config: RolloutConfig,
    horizon: int,
    seed: int,
    interrupt: Interrupt,
) -> Iterator[Episode]:
    """Yield episodes in a fixed order, exactly `config.num_steps` steps in all; the last one is cut to fit.

    Results do not depend on where the slots of `envs` run. They depend on their number, which sets the teacher's
    batch size, and so how its arithmetic rounds.

    Raises:
        InterruptedBySignal: if asked to stop.
    """
    remaining, first = config.num_steps, 0  # steps still to yield; number of the next round's first episode
    while remaining > 0:
        plans = [plan_episode(first + slot, goals, config, seed) for slot in range(envs.num_envs)]
        recorder = _run_round(teacher, envs, plans, config, horizon, remaining, interrupt)
        for slot, plan in enumerate(plans):
            if remaining > 0:
                num_steps = min(int(recorder.length[slot]), remaining)
                remaining -= num_steps
                yield recorder.episode(slot, plan, num_steps)
        first += len(plans)


def _run_round(
    teacher: Teacher,
    envs: VectorEnv,
    plans: Sequence[EpisodePlan],
    config: RolloutConfig,
    horizon: int,
    remaining: int,
    interrupt: Interrupt,
) -> _Recorder:
    """Run one episode per slot; stop those that are not needed for `remaining` steps in the order of slots."""
    num_slots = envs.num_envs
    recorder = _Recorder(num_slots, horizon, envs.spaces)
    noise_TBA = np.stack([plan.noise(horizon, envs.spaces.action_size) for plan in plans], axis=1)
    steps_left = np.full(num_slots, horizon)
    running = np.ones(num_slots, np.bool_)
    envs.reset(range(num_slots), [plan.goal for plan in plans])
    for t in range(horizon):
        if interrupt.requested:
            raise InterruptedBySignal("asked to stop while collecting rollouts; launch again to repeat it")
        recorder.observations[t] = envs.observations
        raw_mean_BA, log_std_BA = teacher.distribution(envs.observations)
        mean_BA = np.clip(raw_mean_BA, -1.0, 1.0)
        recorder.teacher_raw_mean[t], recorder.teacher_log_std[t] = raw_mean_BA, log_std_BA
        recorder.teacher_mean[t] = mean_BA
        recorder.actions[t] = np.clip(mean_BA + noise_TBA[t], -1.0, 1.0)
        envs.step(recorder.actions[t], running)
        recorder.observations[t + 1] = envs.observations
        recorder.rewards[t], recorder.successes[t] = envs.rewards, envs.successes
        recorder.length += running
        steps_left -= 1
        succeeded = running & envs.successes
        steps_left[succeeded] = np.minimum(steps_left[succeeded], config.steps_after_success)
        # Episodes only grow, so slots after those that already have enough steps are not needed.
        needed = np.concatenate([[True], np.cumsum(recorder.length)[:-1] < remaining])
        running &= (steps_left > 0) & needed
        if not running.any():
            break
    return recorder
