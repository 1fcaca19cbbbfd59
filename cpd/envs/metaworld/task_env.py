"""One Meta-World task that is reset to chosen goals: the environment that the rest of this package steps."""

from __future__ import annotations

import math
import warnings
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cpd.envs.goals import Goal
from cpd.envs.metaworld.fast.sawyer import FastSawyer
from cpd.envs.metaworld.fast.task_class import UnverifiedError, accelerated_class
from cpd.envs.metaworld.registry import build_stock, metaworld_class
from cpd.envs.metaworld.tasks import MAX_EPISODE_STEPS, REWARD_VERSION

#: The object's position in an observation, metres.
OBJECT: Final = slice(4, 7)


class TaskEnv:
    """A Meta-World task with the goal visible, as in its multi-task benchmarks.

    It has no horizon and no automatic reset: the caller resets it. Goal and actions alone determine an episode;
    earlier episodes have no influence.

    Attributes:
        info: what Meta-World says of the last step.

    Args:
        task: Meta-World task name, such as "push-v3".
        accelerated: use the faster classes, which give the same bits, if they are verified for the installed
            versions.

    Raises:
        ValueError: unknown task.
    """

    def __init__(self, task: str, *, accelerated: bool = True) -> None:
        self.task = task
        self._env: Any = _build(task, accelerated)
        self._rand_vec_size = int(self._env._random_reset_space.low.size)
        self._has_goal = False
        self.info: dict[str, Any] = {}

    def reset(self, goal: Goal) -> npt.NDArray[np.float64]:
        """Start an episode from `goal`.

        Returns:
            The first observation, [39] float64: 18 current, 18 previous (equal to current), goal position.

        Raises:
            ValueError: a goal of another task, or one of the wrong size.
        """
        if goal.task != self.task:
            raise ValueError(f"{self.task}: cannot reset to a goal of {goal.task}")
        if goal.vector.shape != (self._rand_vec_size,):
            raise ValueError(
                f"{self.task}: a goal has {self._rand_vec_size} numbers, got shape {goal.vector.shape}"
            )
        env = self._env
        env._set_task_called = True
        env._freeze_rand_vec = True
        env._last_rand_vec = np.array(goal.vector, dtype=np.float64)  # resets keep views of it
        if env._partially_observable:
            env._partially_observable = False
            env.__dict__.pop("sawyer_observation_space", None)  # cached for a hidden goal
        obs, _ = env.reset()
        self._has_goal = True
        first: npt.NDArray[np.float64] = obs
        return first

    def step(self, action: npt.NDArray[np.floating[Any]]) -> tuple[npt.NDArray[np.float64], float, bool]:
        """Apply one action.

        Args:
            action: [4], taken as float32: hand displacement (x, y, z; 1 is 1 cm) and gripper effort. The
                displacement is clipped to [-1, 1] and the effort by the actuator's limits, as Meta-World does.

        Returns:
            Observation [39] float64, reward, and whether this step (not an earlier one) counts as a success.

        Raises:
            ValueError: before the first reset, or beyond Meta-World's limit of 500 steps.
        """
        env = self._env
        if not self._has_goal:
            raise ValueError(f"{self.task}: reset to a goal before the first step")
        if self.at_limit:
            raise ValueError(
                f"{self.task}: an episode has at most {MAX_EPISODE_STEPS} steps; reset before the next step"
            )
        obs, reward, _, _, info = env.step(np.asarray(action, dtype=np.float32))
        self.info = info
        return obs, float(reward), bool(info["success"])

    @property
    def at_limit(self) -> bool:
        """Whether the episode has Meta-World's 500 steps."""
        return bool(self._env.curr_path_length >= MAX_EPISODE_STEPS)

    def grasp(self, obs: npt.NDArray[np.float64]) -> float:
        """Return how close the last step, which returned `obs`, came to grasping the object, 0 to 1.

        The mean of Meta-World's `grasp_reward` (in its `info`), which is 0 almost everywhere for some tasks, and
        of the fingers' nearness to the object, `1 - tanh(10 d)` at d metres (as in robosuite; Zhu et al. 2020).
        """
        nearness = 1.0 - math.tanh(10.0 * math.dist(obs[OBJECT], self._env.tcp_center))
        return 0.5 * (float(self.info["grasp_reward"]) + nearness)

    @property
    def unwrapped(self) -> Any:
        """Meta-World's environment, with the current goal in its model; for rendering and scripted experts."""
        if isinstance(self._env, FastSawyer):
            self._env.take_model()
        return self._env

    def close(self) -> None:
        """Release the renderer, if any."""
        self._env.close()


def _build(task: str, accelerated: bool) -> Any:
    if accelerated:
        try:
            return accelerated_class(task)(reward_function_version=REWARD_VERSION)
        except UnverifiedError as error:
            warnings.warn(f"{error}; using Meta-World's own, slower classes", stacklevel=3)
    return build_stock(metaworld_class(task), reward_function_version=REWARD_VERSION)
