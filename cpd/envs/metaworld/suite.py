"""Meta-World as a suite. It imports the simulator only where an environment, a goal or an expert is made."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt

from cpd.envs.goals import FIRST_SEEDS, Split
from cpd.envs.metaworld.scaling import observation_scaling
from cpd.envs.metaworld.tasks import (
    ACTION_SIZE,
    ALL_TASKS,
    MAX_EPISODE_STEPS,
    OBSERVATION_SIZE,
    REWARD_VERSION,
    STREAMS,
)
from cpd.envs.suite import Environment, Expert, Sizes, Suite

FloatArray = npt.NDArray[np.float64]


class MetaWorld(Suite):
    """The fifty tasks of Meta-World with the goal visible; success is its own flag."""

    tasks = ALL_TASKS
    streams = STREAMS
    horizon = MAX_EPISODE_STEPS
    largest_reward = 10.0  # of its v2 reward functions
    held_actions = (3,)  # the gripper
    measures_grasps = True

    def sizes(self, task: str) -> Sizes:
        """Return the sizes, which are the same for all tasks."""
        return Sizes(OBSERVATION_SIZE, ACTION_SIZE)

    def make(self, task: str) -> Environment:
        """Return an accelerated environment with the bits of Meta-World's own."""
        from cpd.envs.metaworld.task_env import TaskEnv

        return TaskEnv(task)

    def goal_vectors(self, task: str, split: Split, num_goals: int) -> Sequence[FloatArray]:
        """Return what `metaworld.MT1` draws with the split's seeds, whole blocks of fifty [3..6], metres."""
        from cpd.envs.metaworld.goal_vectors import GOALS_PER_SEED, mt1_rand_vecs

        seeds = (FIRST_SEEDS[split] + block for block in range(-(-num_goals // GOALS_PER_SEED)))
        return [vector for seed in seeds for vector in mt1_rand_vecs(task, seed)]

    def expert(self, task: str) -> Expert:
        """Return Meta-World's scripted expert."""
        from metaworld.policies import ENV_POLICY_MAP

        expert_class: Any = ENV_POLICY_MAP[task]
        get_action: Expert = expert_class().get_action
        return get_action

    def scaling(self) -> tuple[FloatArray, FloatArray]:
        """Return the fixed scaling in metres."""
        return observation_scaling()

    def versions(self) -> dict[str, str]:
        """Return the versions of simulator and reward functions."""
        return {
            "reward_version": REWARD_VERSION,
            "metaworld": version("metaworld"),
            "mujoco": version("mujoco"),
        }
