"""Registers the tasks and streams of Meta-World with Gymnasium: `import cpd.envs.gym`.

`gymnasium.make("cpd/push-v3")` is one task, `gymnasium.make("cpd/CW10")` a stream of tasks, one after another.
`register_suite` does the same for other suites.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.envs.registration import register, registry
from gymnasium.spaces import Box

from cpd.envs.goals import Split
from cpd.envs.suite import ACTION_CLIP, DEFAULT_SUITE, load_suite

#: Continual World's budget for each task.
STEPS_PER_TASK: Final = 1_000_000


class StreamEnv(gymnasium.Env[npt.NDArray[np.float64], npt.NDArray[np.floating[Any]]]):
    """Tasks of a suite, one after another; those of Meta-World have the goal visible and its own bits.

    The next task begins with the first reset after `steps_per_task` steps of the present one; the last goes on.
    Each reset draws one of the goals, or takes the one whose index `options["goal"]` gives. A reset's info holds
    the task, its position in the stream (`stage`), and the goal's index. A step's info holds `success`, and what
    the task's environment has in its attribute `info`: Meta-World's.

    Args:
        tasks: names of tasks; one, or a stream of several.
        steps_per_task: steps in the environment.
        split: the set of goals to draw from.
        num_goals: how many goals of that set.
        suite: name of the suite.

    Raises:
        ValueError: unknown task or split, or numbers out of range.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        steps_per_task: int = STEPS_PER_TASK,
        split: Split = "training",
        num_goals: int = 50,
        suite: str = DEFAULT_SUITE,
    ) -> None:
        if steps_per_task < 1:
            raise ValueError(f"steps_per_task must be positive, got {steps_per_task}")
        self._suite = load_suite(suite)
        spaces = self._suite.spaces
        self.observation_space = Box(-np.inf, np.inf, (spaces.observation_size,), np.float64)
        self.action_space = Box(-ACTION_CLIP, ACTION_CLIP, (spaces.action_size,), np.float32)
        self.tasks = tuple(tasks)
        self._split, self._num_goals = split, num_goals
        self._steps_per_task = steps_per_task
        self._num_steps = self._episode_steps = 0
        self._begin(self.tasks[0])

    def _begin(self, task: str) -> None:
        self._task = task
        self._goals = self._suite.goal_set(task, self._split, self._num_goals)
        self._env = self._suite.make(task)
        self._padding = (0, self._suite.spaces.observation_size - self._suite.sizes(task).observation)
        self._action_size = self._suite.sizes(task).action

    def _padded(self, obs: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
        return np.asarray(np.pad(obs, self._padding) if self._padding[1] else obs, np.float64)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[npt.NDArray[np.float64], dict[str, Any]]:
        """Start an episode; return the first observation, [O] float64, and the info."""
        super().reset(seed=seed)
        stage = min(self._num_steps // self._steps_per_task, len(self.tasks) - 1)
        task = self.tasks[stage]
        if task != self._task:
            self._env.close()
            self._begin(task)
        index = (options or {}).get("goal")
        index = int(self.np_random.integers(len(self._goals))) if index is None else index
        self._episode_steps = 0
        return self._padded(self._env.reset(self._goals[index])), {"task": task, "stage": stage, "goal": index}

    def step(
        self, action: npt.NDArray[np.floating[Any]]
    ) -> tuple[npt.NDArray[np.float64], float, bool, bool, dict[str, Any]]:
        """Apply one action, [A]; return observation, reward, terminated, truncated and info as Meta-World does."""
        obs, reward, success = self._env.step(np.asarray(action, np.float32)[: self._action_size])
        self._num_steps += 1
        self._episode_steps += 1
        # Like Meta-World's, an episode does not end at a success, and is truncated at its limit.
        info = {"success": float(success), **getattr(self._env, "info", {})}
        return self._padded(obs), reward, False, self._episode_steps >= self._suite.horizon, info

    def close(self) -> None:
        """Release the simulator."""
        self._env.close()


def register_suite(name: str) -> None:
    """Register every task of a suite as `cpd/<task>`, and its streams as `cpd/<STREAM>` in capitals."""
    suite = load_suite(name)
    streams: dict[str, tuple[str, ...]] = {task: (task,) for task in suite.tasks}
    streams |= {stream.upper(): tasks for stream, tasks in suite.streams.items()}
    for label, tasks in streams.items():
        if f"cpd/{label}" not in registry:
            register(
                id=f"cpd/{label}",
                entry_point="cpd.envs.gym:StreamEnv",
                max_episode_steps=suite.horizon,
                kwargs={"tasks": tasks} if name == DEFAULT_SUITE else {"tasks": tasks, "suite": name},
            )


register_suite(DEFAULT_SUITE)
