"""Registers the accelerated tasks and Continual World's streams with Gymnasium: `import cpd.envs.gym`.

`gymnasium.make("cpd/push-v3")` is one task, `gymnasium.make("cpd/CW10")` a stream of tasks, one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.envs.registration import register, registry
from gymnasium.spaces import Box

from cpd.envs.goals import Split, goal_set
from cpd.envs.metaworld.task_env import TaskEnv
from cpd.envs.metaworld.tasks import ACTION_SIZE, ALL_TASKS, MAX_EPISODE_STEPS, OBSERVATION_SIZE, STREAMS

#: Continual World's budget for each task.
STEPS_PER_TASK: Final = 1_000_000


class StreamEnv(gymnasium.Env[npt.NDArray[np.float64], npt.NDArray[np.floating[Any]]]):
    """Tasks, one after another, with the goal visible and Meta-World's own bits.

    The next task begins with the first reset after `steps_per_task` steps of the present one; the last goes on.
    Each reset draws one of the goals, or takes the one whose index `options["goal"]` gives. A reset's info holds
    the task, its position in the stream (`stage`), and the goal's index; a step's info is Meta-World's.

    Args:
        tasks: Meta-World task names; one, or a stream of several.
        steps_per_task: steps in the environment.
        split: the set of goals to draw from.
        num_goals: how many goals of that set.

    Raises:
        ValueError: unknown task or split, or numbers out of range.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        steps_per_task: int = STEPS_PER_TASK,
        split: Split = "training",
        num_goals: int = 50,
    ) -> None:
        if steps_per_task < 1:
            raise ValueError(f"steps_per_task must be positive, got {steps_per_task}")
        self.observation_space = Box(-np.inf, np.inf, (OBSERVATION_SIZE,), np.float64)
        self.action_space = Box(-1.0, 1.0, (ACTION_SIZE,), np.float32)
        self.tasks = tuple(tasks)
        self._split, self._num_goals = split, num_goals
        self._steps_per_task = steps_per_task
        self._num_steps = 0
        self._begin(self.tasks[0])

    def _begin(self, task: str) -> None:
        self._goals = goal_set(task, self._split, self._num_goals)
        self._env = TaskEnv(task)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[npt.NDArray[np.float64], dict[str, Any]]:
        """Start an episode; return the first observation, [39] float64, and the info."""
        super().reset(seed=seed)
        stage = min(self._num_steps // self._steps_per_task, len(self.tasks) - 1)
        task = self.tasks[stage]
        if task != self._env.task:
            self._env.close()
            self._begin(task)
        index = (options or {}).get("goal")
        index = int(self.np_random.integers(len(self._goals))) if index is None else index
        return self._env.reset(self._goals[index]), {"task": task, "stage": stage, "goal": index}

    def step(
        self, action: npt.NDArray[np.floating[Any]]
    ) -> tuple[npt.NDArray[np.float64], float, bool, bool, dict[str, Any]]:
        """Apply one action, [4]; return observation, reward, terminated, truncated and info as Meta-World does."""
        obs, reward, _ = self._env.step(action)
        self._num_steps += 1
        # Meta-World ends no episode at a success, and truncates it at its limit.
        return obs, reward, False, self._env.at_limit, dict(self._env.info)

    def close(self) -> None:
        """Release the simulator."""
        self._env.close()


def _register() -> None:
    streams = {task: (task,) for task in ALL_TASKS} | {name.upper(): STREAMS[name] for name in ("cw10", "cw20")}
    for name, tasks in streams.items():
        if f"cpd/{name}" not in registry:
            register(
                id=f"cpd/{name}",
                entry_point="cpd.envs.gym:StreamEnv",
                max_episode_steps=MAX_EPISODE_STEPS,
                kwargs={"tasks": tasks},
            )


_register()
