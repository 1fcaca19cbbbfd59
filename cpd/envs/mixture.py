"""Several suites joined to one, so that one stream may hold tasks of all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from cpd.envs.goals import Split
from cpd.envs.suite import BatchEnvironment, Environment, Expert, FloatArray, Returns, Sizes, Suite


class Mixture(Suite):
    """The tasks of several suites, so that one stream may hold them all.

    Every suite has its own positions in the observation, so that each keeps its scaling. At the positions of the
    others is the centre of their scaling, which students see as 0. Actions begin at the first component in all.

    Episodes have the shortest horizon of the suites, but no shorter one than a suite with returns. An environment
    that has reached the horizon of its own suite stays as it is, without reward, until the episode ends.
    """

    tasks: ClassVar[tuple[str, ...]] = ()
    horizon = 0

    def __init__(self, suites: Sequence[Suite]) -> None:
        """Join `suites`; raise ValueError if two of them have a task of the same name."""
        self._suites, owners = suites, dict[str, Suite]()
        for suite in suites:
            for task in suite.tasks:
                if (other := owners.setdefault(task, suite)) is not suite or suites.count(suite) > 1:
                    raise ValueError(
                        f"{other.name!r} and {suite.name!r} both have a task {task!r}; rename it in one of them"
                    )
        self._owners, self.tasks = owners, tuple(owners)  # type: ignore[misc]
        with_returns = [suite.horizon for suite in suites if any(map(suite.returns, suite.tasks))]
        self.horizon = max([min(suite.horizon for suite in suites), *with_returns])  # type: ignore[misc]
        self.streams = {name: tasks for suite in suites for name, tasks in suite.streams.items()}  # type: ignore[misc]
        self._first = np.cumsum([0, *(suite.spaces.observation_size for suite in suites)])

    def of(self, task: str) -> Suite:
        """Return the suite that has the task."""
        return self._owners[task]

    def columns(self, task: str) -> slice:
        """Return the positions of the suite that has the task."""
        number = self._suites.index(self.of(task))
        return slice(int(self._first[number]), int(self._first[number + 1]))

    def sizes(self, task: str) -> Sizes:
        """Return the size of all observations together, and the size of the task's actions."""
        return Sizes(int(self._first[-1]), self.of(task).sizes(task).action)

    def make(self, task: str) -> Environment:
        """Return an environment of the task's suite, whose observations are put in their place."""
        return _Placed(self, task, self.of(task).make(task), self.of(task).horizon)

    def make_batch(self, task: str, num_envs: int) -> BatchEnvironment | None:
        """Return environments of the task's suite, unless they must be stopped at its horizon one by one."""
        if self.of(task).horizon < self.horizon or (envs := self.of(task).make_batch(task, num_envs)) is None:
            return None
        return _Placed(self, task, envs)

    def goal_vectors(self, task: str, split: Split, num_goals: int) -> Sequence[FloatArray]:
        """Return the goals of the task's suite."""
        return self.of(task).goal_vectors(task, split, num_goals)

    def returns(self, task: str) -> Returns | None:
        """Return those of the task's suite."""
        return self.of(task).returns(task)

    def expert(self, task: str) -> Expert | None:
        """Return the expert of the task's suite; it sees the task's own observation."""
        expert, first = self.of(task).expert(task), self.columns(task).start
        own = slice(first, first + self.of(task).sizes(task).observation)
        return expert and (lambda observation: expert(observation[own]))

    def scaling(self) -> tuple[FloatArray, FloatArray]:
        """Return the scaling of every suite, one after another."""
        centres, scales = zip(*(suite.scaling() for suite in self._suites), strict=True)
        return np.concatenate(centres), np.concatenate(scales)

    def versions(self) -> dict[str, str]:
        """Return the versions of all suites; the suite's name precedes a package that two state differently."""
        versions = dict[str, str]()
        for suite in self._suites:
            for name, number in suite.versions().items():
                versions[name if versions.get(name, number) == number else f"{suite.name} {name}"] = number
        return versions

    @property
    def has_experts(self) -> bool:
        """Whether all suites have scripted experts."""
        return all(suite.has_experts for suite in self._suites)


class _Placed:
    """One environment of a mixture's task or a batch of them, with observations at their place in longer ones."""

    def __init__(self, mixture: Mixture, task: str, envs: Any, last_step: float = float("inf")) -> None:
        """Place the observations of `envs`; after `last_step` steps, an environment stays as it is."""
        self._envs, self._last_step, self._num_steps = envs, last_step, 0
        self._around, columns = mixture.scaling()[0], mixture.columns(task)
        self._around[columns] = 0.0  # as in the suite itself, where zeros follow smaller observations
        self._own = slice(columns.start, columns.start + mixture.of(task).sizes(task).observation)

    def _place(self, own: npt.NDArray[np.floating[Any]]) -> FloatArray:
        observations = np.tile(self._around, (*np.shape(own)[:-1], 1)) if np.ndim(own) > 1 else self._around.copy()
        observations[..., self._own] = own
        return observations

    def reset(self, *arguments: Any) -> FloatArray:
        """Reset the environments; return their observations in place."""
        self._num_steps, self._observation = 0, self._place(self._envs.reset(*arguments))
        return self._observation

    def step(self, *arguments: Any) -> tuple[FloatArray, Any, Any]:
        """Step the environments; return their observations in place, rewards and successes."""
        if self._num_steps >= self._last_step:
            return self._observation, 0.0, False
        self._num_steps += 1
        own, reward, success = self._envs.step(*arguments)
        self._observation = self._place(own)
        return self._observation, reward, success

    def close(self) -> None:
        """Close the environments."""
        self._envs.close()
