"""The interface of a suite of tasks, and the suite that a name stands for.

A run uses one suite. Everything that differs between suites is asked of it, when objects are constructed and never
at a step: tasks, sizes, goals, environments, scripted experts, scaling of observations. Meta-World is the default;
a suite of a user is a class that derives from `Suite`.

The module of a suite is imported on login nodes too, where recipes are checked: it should import a simulator only
inside of `make`.
"""

from __future__ import annotations

import abc
import difflib
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import entry_points
from typing import Any, ClassVar, Final, NamedTuple, Protocol, get_args

import numpy as np
import numpy.typing as npt

from cpd.envs.goals import FIRST_SEEDS, Goal, Split, check_disjoint

DEFAULT_SUITE: Final = "metaworld"
#: The group of Python entry points that name suites.
ENTRY_POINT_GROUP: Final = "cpd.suites"
#: Suites of this package.
_SHIPPED: Final = {
    DEFAULT_SUITE: "cpd.envs.metaworld.suite:MetaWorld",
    "gym-mujoco": "cpd.envs.gym_mujoco.suite:GymMujoco",
}
#: The module of the suite that several suites are joined to; it imports this one.
_MIXTURE: Final = "cpd.envs.mixture"
#: Policies act in [-1, 1].
ACTION_CLIP: Final = 1.0
#: Goals per set at most.
MAX_GOALS: Final = 50_000
#: Numbers in the vector of a goal at most.
MAX_GOAL_SIZE: Final = 16

FloatArray = npt.NDArray[np.float64]
#: A scripted expert: maps an observation [O] to an action [A].
Expert = Callable[[FloatArray], npt.NDArray[np.floating[Any]]]


class SuiteError(ValueError):
    """A suite that cannot be found, or that is not what the interface asks for."""


class Environment(Protocol):
    """One environment of one task. Goal and actions alone determine an episode, to the last bit.

    It ends no episode by itself: the caller resets it, after `Suite.horizon` steps at the latest.
    """

    def reset(self, goal: Goal) -> npt.NDArray[np.floating[Any]]:
        """Start an episode from `goal`; return the first observation, [O]."""

    def step(self, action: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.floating[Any]], float, bool]:
        """Apply an action [A] in [-1, 1].

        Returns:
            The observation [O], the reward, and whether this step (not an earlier one) counts as a success.
        """

    def close(self) -> None:
        """Release what the environment holds."""


class BatchEnvironment(Protocol):
    """Many environments of one task, each with the bits that `Suite.make` gives it, whatever the others do."""

    def reset(self, rows: Sequence[int], goals: Sequence[Goal]) -> npt.NDArray[np.floating[Any]]:
        """Start an episode from `goals[i]` in environment `rows[i]`; return the first observations, [rows, O]."""

    def step(
        self, rows: Sequence[int], actions: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.floating[Any]], FloatArray, npt.NDArray[np.bool_]]:
        """Apply the actions [rows, A] in environments `rows`, as `Environment.step` does.

        Returns:
            Observations [rows, O], rewards [rows], and successes [rows].
        """

    def close(self) -> None:
        """Release what the environments hold."""


class Sizes(NamedTuple):
    """Sizes of a task's observations and actions, O and A."""

    observation: int
    action: int


class Returns(NamedTuple):
    """Undiscounted returns of episodes of `Suite.horizon` steps, which a task's return is normalised by."""

    random: float
    """Mean of a random policy; its normalised return is 0."""
    reference: float
    """Mean of a policy that counts as good; its normalised return is 1."""

    def normalise(self, episode_return: float) -> float:
        """Return the normalised return, clipped to [0, 1]."""
        return min(max((episode_return - self.random) / (self.reference - self.random), 0.0), 1.0)


@dataclass(frozen=True, eq=False)
class Spaces:
    """What policies of a suite see and do: sizes, and the fixed scaling of the student's observations."""

    observation_size: int
    """O, the largest of all tasks; observations of other tasks end with zeros."""
    action_size: int
    """A, the largest of all tasks; a task ignores the components that it lacks."""
    centre: FloatArray
    """[O]; the student sees `(observation - centre) / scale`."""
    scale: FloatArray
    """[O]."""

    @property
    def sizes(self) -> Sizes:
        """O and A."""
        return Sizes(self.observation_size, self.action_size)


class Suite(abc.ABC):
    """A set of tasks. A subclass sets `tasks` and `horizon`, and defines `sizes` and `make`; the rest may stay."""

    name: str = ""
    """The name by which recipes call it; `load_suite` sets it."""
    tasks: ClassVar[tuple[str, ...]]
    """Names of all tasks; they are also names of folders."""
    horizon: ClassVar[int]
    """Most steps of an episode, and the default of `stream.horizon`."""
    streams: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Streams of tasks by the names that recipes may use in place of a list."""
    largest_reward: ClassVar[float] = float("-inf")
    """The largest reward of a step, if it is known; otherwise training takes the largest that it has seen."""
    held_actions: ClassVar[tuple[int, ...]] = ()
    """Components of the action that exploration leaves to the policy, such as a gripper."""
    measures_grasps: ClassVar[bool] = False
    """Whether environments have a method `grasp(observation)`, as `teacher.grasp_bonus` needs."""

    @abc.abstractmethod
    def sizes(self, task: str) -> Sizes:
        """Return the sizes of a task's observations and actions."""

    @abc.abstractmethod
    def make(self, task: str) -> Environment:
        """Return a new environment of a task; it may be an accelerated one."""

    def goal_vectors(self, task: str, split: Split, num_goals: int) -> Sequence[FloatArray]:
        """Return the vectors of the first goals of a set: `num_goals` or more, fewer if the set has fewer.

        Args:
            task: name of the task.
            split: which of the three sets; no vector may occur twice in them.
            num_goals: 1 to 50,000.

        Returns:
            Vectors [1..16]. By default a goal is a seed, which `Goal.seed` returns.
        """
        return [np.array([FIRST_SEEDS[split] * MAX_GOALS + index], np.float64) for index in range(num_goals)]

    def returns(self, task: str) -> Returns | None:
        """Return what normalises the return of a task without a success measure; None if it has one."""
        return None

    def make_batch(self, task: str, num_envs: int) -> BatchEnvironment | None:
        """Return `num_envs` environments of a task that are stepped by one call, if the suite has such a form."""
        return None

    def expert(self, task: str) -> Expert | None:
        """Return a scripted expert of a task, if there is one."""
        return None

    def scaling(self) -> tuple[FloatArray, FloatArray]:
        """Return centre and scale [O] of the largest observation, constants for all tasks: by default 0 and 1."""
        size = max(self.sizes(task).observation for task in self.tasks)
        return np.zeros(size), np.ones(size)

    def versions(self) -> dict[str, str]:
        """Return the versions that determine results, by package; every table, shard and policy states them."""
        return {}

    def of(self, task: str) -> Suite:
        """Return the suite that a task comes from: another one only in a `Mixture`."""
        return self

    def columns(self, task: str) -> slice:
        """Return where the observations of that suite are in those of this one: all of it, if it is this one."""
        return slice(None)

    @property
    def has_experts(self) -> bool:
        """Whether the suite has scripted experts."""
        return type(self).expert is not Suite.expert

    @cached_property
    def spaces(self) -> Spaces:
        """Sizes and scaling for policies of all tasks."""
        sizes = [self.sizes(task) for task in self.tasks]
        return Spaces(max(s.observation for s in sizes), max(s.action for s in sizes), *self.scaling())

    def goal_set(self, task: str, split: Split, num_goals: int = 50) -> tuple[Goal, ...]:
        """Return the first `num_goals` goals of a split, always the same ones; cached per process.

        Raises:
            ValueError: unknown task or split, `num_goals` out of range, a set with fewer goals, or goals that
                occur twice among the three splits (the message names the task and the goals).
        """
        if split not in get_args(Split):
            raise ValueError(f"unknown goal split {split!r}: choose one of {', '.join(get_args(Split))}")
        if not 1 <= num_goals <= MAX_GOALS:
            raise ValueError(f"num_goals must lie between 1 and {MAX_GOALS}, got {num_goals}")
        goals = _disjoint_splits(self, task, num_goals)[split]
        if len(goals) < num_goals:
            raise ValueError(f"{task}: the {split} set has {len(goals)} goals, but {num_goals} are needed")
        return goals[:num_goals]


@cache
def _disjoint_splits(suite: Suite, task: str, num_goals: int) -> dict[str, tuple[Goal, ...]]:
    """The first goals of every split, checked against one another."""
    splits: dict[str, tuple[Goal, ...]] = {}
    for split in get_args(Split):
        goals = []
        for index, vector in enumerate(suite.goal_vectors(task, split, num_goals)):
            if not 1 <= vector.size <= MAX_GOAL_SIZE:
                raise ValueError(f"{task}: a goal has 1 to {MAX_GOAL_SIZE} numbers, not {vector.size}")
            vector.flags.writeable = False
            goals.append(Goal(task, split, index, vector))
        splits[split] = tuple(goals)
    check_disjoint(*splits.values())
    return splits


_LOADED: Final[dict[str, Suite]] = {}


def load_suite(name: str = DEFAULT_SUITE) -> Suite:
    """Return the suite of this name; the first call imports and constructs it.

    Args:
        name: `metaworld`, `gym-mujoco`, an entry point of the group `cpd.suites`, or `package.module:Class`;
            several names, joined by `+`, for a `cpd.envs.mixture.Mixture`.

    Raises:
        SuiteError: no such name, a module that cannot be imported, or an object that is no suite.
    """
    if name not in _LOADED:
        _LOADED[name] = _construct(name)
    return _LOADED[name]


def is_task(name: str) -> bool:
    """Whether a suite that this process uses has a task of this name; those of this package always count."""
    for suite in _SHIPPED:
        load_suite(suite)
    return any(name in suite.tasks for suite in _LOADED.values())


def _construct(name: str) -> Suite:
    if "+" in name:
        try:
            mixture = importlib.import_module(_MIXTURE).Mixture
            return _named(mixture([load_suite(part) for part in name.split("+")]), name)
        except ValueError as error:
            raise SuiteError(f"the suites {name!r} cannot be joined: {error}") from None
    installed = {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP)}
    target = _SHIPPED.get(name) or installed.get(name, name)
    module, _, attribute = target.partition(":")
    if not attribute:
        names = sorted([*_SHIPPED, *installed])
        near = "".join(f"; did you mean {match!r}?" for match in difflib.get_close_matches(name, names, n=1))
        raise SuiteError(
            f"no suite is called {name!r}{near} (known: {', '.join(names)}); write one of these, or "
            "'package.module:Class'"
        )
    try:
        made: Any = getattr(importlib.import_module(module), attribute)()
    except Exception as error:  # whatever a user's module raises
        raise SuiteError(
            f"the suite {name!r} cannot be loaded: {type(error).__name__}: {error}; install its package in this "
            "environment, or add its folder to PYTHONPATH"
        ) from error
    if not isinstance(made, Suite):
        raise SuiteError(f"the suite {name!r} is no subclass of cpd.envs.suite.Suite")
    return _named(made, name)


def _named(suite: Suite, name: str) -> Suite:
    suite.name = name
    return suite
