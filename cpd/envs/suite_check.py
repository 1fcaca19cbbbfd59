"""Find mistakes in a suite before a run does: `cpd check-suite`."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from typing import Any, Final, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from cpd.envs.goals import Goal, Split
from cpd.envs.suite import MAX_GOAL_SIZE, Environment, Expert, Sizes, Suite
from cpd.envs.vector_env import make_vector_env

#: Goals per set that are compared, and episodes with random actions per task.
NUM_GOALS: Final = 20
NUM_EPISODES: Final = 8

FloatArray = npt.NDArray[np.float32]


class _Episode(NamedTuple):
    observations: npt.NDArray[np.float64]
    """[T + 1, O]."""
    rewards: npt.NDArray[np.float64]
    """[T]."""
    successes: npt.NDArray[np.bool_]
    """[T]."""

    @property
    def bits(self) -> bytes:
        """All that the environment has returned."""
        return b"".join(array.tobytes() for array in self)


class _MistakeError(Exception):
    """A mistake after which a task cannot be checked any further."""


def suite_mistakes(suite: Suite) -> list[str]:
    """Return a line for each mistake in what concerns all tasks."""
    lines = []
    if not suite.tasks or len(set(suite.tasks)) < len(suite.tasks):
        lines.append("tasks: at least one is needed, and no name may repeat")
    lines += [
        f"tasks: {task!r} is no name of a folder; use letters, digits, dots, dashes and underscores"
        for task in suite.tasks
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", task)
    ]
    if suite.horizon < 1:
        lines.append(f"horizon: {suite.horizon} is not positive")
    for name, tasks in suite.streams.items():
        lines += [
            f"streams: {name!r} has {task!r}, which is not in tasks" for task in tasks if task not in suite.tasks
        ]
    for task in suite.tasks:
        if not isinstance(suite.sizes(task), Sizes):
            return [*lines, f"sizes: those of {task} are {suite.sizes(task)!r}; return cpd.envs.suite.Sizes"]
        if min(suite.sizes(task)) < 1:
            lines.append(f"sizes: those of {task} are {tuple(suite.sizes(task))}; both must be positive")
    size = max(suite.sizes(task).observation for task in suite.tasks)
    for name, values in zip(("centre", "scale"), suite.scaling(), strict=True):
        if np.shape(values) != (size,) or not np.isfinite(values).all():
            lines.append(f"scaling: the {name} has shape {np.shape(values)}; {size} finite numbers are needed")
        elif name == "scale" and np.min(values) <= 0:
            lines.append("scaling: every scale must be positive")
    return lines


def task_mistakes(suite: Suite, task: str, notes: list[str] | None = None) -> list[str]:
    """Return a line for each mistake in one task: its goals, its environment, its expert.

    What could not be checked is no mistake; a line for it is appended to `notes`.
    """
    try:
        return list(_task_mistakes(suite, task, [] if notes is None else notes))
    except _MistakeError as mistake:
        return [f"{task}: {mistake}"]
    except Exception:
        return [f"{task}: an error was raised:\n{traceback.format_exc()}"]


def _task_mistakes(suite: Suite, task: str, notes: list[str]) -> Iterator[str]:
    try:
        sets = {split: suite.goal_set(task, split, NUM_GOALS) for split in get_args(Split)}
    except ValueError as error:  # it names the task
        yield f"goals: {error}"
        return
    goals = sets["training"]
    for goal in (goal for goals in sets.values() for goal in goals):
        if goal.vector.ndim != 1 or not np.isfinite(goal.vector).all():
            raise _MistakeError(f"the {goal.split} goal {goal.index} is not 1 to {MAX_GOAL_SIZE} finite numbers")
    env = suite.make(task)
    actions = _random_actions(suite, task)
    episodes = [_run(suite, env, goal, rows) for goal, rows in zip(goals, actions, strict=False)]
    same = [_run(suite, env, goal, actions[0]) for goal in goals[:NUM_EPISODES]]
    again = _run(suite, suite.make(task), goals[0], actions[0])
    if again.bits != same[0].bits or again.bits != episodes[0].bits:
        yield (
            f"{task}: two episodes with one goal and the same actions differ: reset must set the whole state, and "
            "draw random numbers only from a generator that it seeds with the goal"
        )
    elif len({episode.bits for episode in same}) == 1:
        yield f"{task}: reset ignores its goal (or its seed): episodes with {NUM_EPISODES} goals are equal"
    elif _in_worker(suite, task, goals[0], actions[0]) != again.observations.astype(np.float32).tobytes():
        yield f"{task}: an episode differs in another process; it must not depend on what a process remembers"
    if (expert := suite.expert(task)) is not None:
        episodes += [_run(suite, env, goal, expert) for goal in goals[:2]]
    env.close()
    yield from _measure_mistakes(suite, task, episodes)
    if suite.returns(task) is None and not any(episode.successes.any() for episode in episodes):
        actors = "random actions and the expert" if expert else "random actions"
        notes.append(
            f"{task}: no success in {len(episodes)} episodes with {actors}, so success could not be checked; this "
            "is no mistake if the task is hard"
        )


def _random_actions(suite: Suite, task: str) -> list[FloatArray]:
    """Return the actions [T, A] of `NUM_EPISODES` episodes."""
    rng, size = np.random.default_rng(0), suite.sizes(task).action
    actions = [rng.uniform(-1, 1, (suite.horizon, size)).astype(np.float32) for _ in range(NUM_EPISODES)]
    # Independent actions mostly cancel, so those of every second episode repeat one.
    for repeated in actions[1::2]:
        repeated[:] = repeated[0]
    return actions


def _measure_mistakes(suite: Suite, task: str, episodes: list[_Episode]) -> Iterator[str]:
    """Yield mistakes in success, or in the returns by which a task without a success measure is judged."""
    flags = np.concatenate([episode.successes for episode in episodes])
    returns = suite.returns(task)
    if returns is None:
        if flags.all():
            yield f"{task}: success is True at every step, so no policy could fail"
        return
    if flags.any():
        yield f"{task}: step reports a success, but the task has returns; leave out one of them"
    totals = [float(episode.rewards.sum()) for episode in episodes]
    if not np.isfinite(returns).all() or returns.random >= returns.reference:
        yield f"{task}: returns are {tuple(returns)}; the reference must exceed that of a random policy"
    elif min(totals) == max(totals):
        yield f"{task}: all {len(totals)} episodes have the return {totals[0]:g}, so none is better than another"


def _run(suite: Suite, env: Environment, goal: Goal, actor: FloatArray | Expert) -> _Episode:
    """Run an episode with given actions [T, A], or with those of an expert; check all that it returns."""
    sizes, horizon = suite.sizes(goal.task), suite.horizon
    observations = np.empty((horizon + 1, sizes.observation))
    rewards, successes = np.empty(horizon), np.empty(horizon, np.bool_)
    _store(observations[0], env.reset(goal), "reset: the observation", sizes.observation)
    for t in range(horizon):
        action = np.zeros(sizes.action, np.float32)
        chosen = actor[t] if isinstance(actor, np.ndarray) else actor(observations[t])
        _store(action, np.clip(chosen, -1.0, 1.0), "expert: the action", sizes.action)
        if not isinstance(step := env.step(action), tuple) or len(step) != 3:
            raise _MistakeError(f"step {t}: {step!r:.200} is not (observation, reward, success)")
        obs, reward, success = step
        _store(observations[t + 1], obs, f"step {t}: the observation", sizes.observation)
        if np.ndim(reward) or not np.isfinite(reward):
            raise _MistakeError(f"step {t}: the reward {reward!r} is not a finite number")
        if not isinstance(success, bool | np.bool_):
            raise _MistakeError(f"step {t}: the success {success!r} is neither True nor False")
        rewards[t], successes[t] = reward, success
    return _Episode(observations, rewards, successes)


def _store(row: npt.NDArray[np.floating[Any]], values: Any, what: str, size: int) -> None:
    if isinstance(values, tuple):  # as Gymnasium's reset returns
        raise _MistakeError(f"{what} is a tuple, not an array")
    if np.shape(values) != (size,):
        raise _MistakeError(f"{what} has shape {np.shape(values)}, but sizes says ({size},)")
    row[:] = values
    if not np.isfinite(row).all():
        raise _MistakeError(
            f"{what} holds NaN or infinity at position {int(np.flatnonzero(~np.isfinite(row))[0])}"
        )


def _in_worker(suite: Suite, task: str, goal: Goal, actions: FloatArray) -> bytes:
    """Return the observations [T + 1, O] float32 of an episode in a worker process."""
    sizes, seen = suite.sizes(task), []
    with make_vector_env([task, task], 2, suite) as envs:
        envs.reset([1], [goal])
        seen.append(envs.observations[1, : sizes.observation].copy())
        padded = np.zeros((2, suite.spaces.action_size), np.float32)
        for action in actions:
            padded[1, : sizes.action] = action
            envs.step(padded, np.array([False, True]))
            seen.append(envs.observations[1, : sizes.observation].copy())
    return np.stack(seen).tobytes()
