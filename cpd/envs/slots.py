"""The slots of a vector environment: one environment and one row of every array per slot.

The arrays lie in one flat buffer, which worker processes map into their memory. A step therefore pickles nothing
and sends one byte through a pipe.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cpd.envs.goals import Goal
from cpd.envs.suite import MAX_GOAL_SIZE, BatchEnvironment, Environment, Spaces, Suite


def _fields(spaces: Spaces) -> list[tuple[str, Any, tuple[int, ...]]]:
    """Return name, type and shape of a slot's row in each array."""
    return [
        ("observations", np.float32, (spaces.observation_size,)),
        ("rewards", np.float64, ()),
        ("grasps", np.float64, ()),
        ("wants_grasps", np.bool_, ()),
        ("successes", np.bool_, ()),
        ("actions", np.float32, (spaces.action_size,)),
        ("selected", np.bool_, ()),
        ("goal_sizes", np.int64, ()),
        ("goal_vectors", np.float64, (MAX_GOAL_SIZE,)),
    ]


class SlotError(RuntimeError):
    """An environment or its worker process failed; the message names the task and contains the cause."""


class SlotArrays:
    """Views of one buffer, with a row per slot."""

    observations: npt.NDArray[np.float32]
    """[N, O] float32, the current observation of each slot; zeros follow an observation of a smaller task."""
    rewards: npt.NDArray[np.float64]
    """[N] float64 of the last step; 0 after a reset."""
    grasps: npt.NDArray[np.float64]
    """[N] float64, the environment's `grasp` of the last step, in slots with `wants_grasps`."""
    wants_grasps: npt.NDArray[np.bool_]
    """[N] bool, whether a step computes `grasps`."""
    successes: npt.NDArray[np.bool_]
    """[N] bool of the last step, not latched; False after a reset."""
    actions: npt.NDArray[np.float32]
    """[N, A] float32, input of a step."""
    selected: npt.NDArray[np.bool_]
    """[N] bool, the slots that the next step or reset applies to."""
    goal_sizes: npt.NDArray[np.int64]
    """[N] int64, how many numbers of `goal_vectors` count; input of a reset."""
    goal_vectors: npt.NDArray[np.float64]
    """[N, 16] float64, input of a reset."""

    def __init__(self, num_slots: int, spaces: Spaces, buffer: Any) -> None:
        record = np.ndarray((), _layout(num_slots, spaces), buffer)
        vars(self).update({name: record[name] for name, _, _ in _fields(spaces)})

    @staticmethod
    def size(num_slots: int, spaces: Spaces) -> int:
        """Return the bytes that `num_slots` slots need."""
        return _layout(num_slots, spaces).itemsize


def _layout(num_slots: int, spaces: Spaces) -> np.dtype[np.void]:
    return np.dtype([(name, dtype, (num_slots, *shape)) for name, dtype, shape in _fields(spaces)], align=True)


class _Slot(NamedTuple):
    number: int
    task: str
    env: Environment
    observation: npt.NDArray[np.float32]
    """[O] of this task, the beginning of the slot's row."""
    action: npt.NDArray[np.float32]
    """[A] of this task, the beginning of the slot's row."""


class _Batch(NamedTuple):
    """Slots of one task that are stepped by one call (`Suite.make_batch`)."""

    task: str
    numbers: npt.NDArray[np.int64]
    """[n] the slots, in the order of the environments."""
    envs: BatchEnvironment


class SlotGroup:
    """Some of the slots, stepped one after another in this process.

    Args:
        suite: makes the environments.
        tasks: one task name per slot, of all slots.
        slots: indices of this group's slots.
        arrays: the rows of all slots.
    """

    def __init__(self, suite: Suite, tasks: Sequence[str], slots: Sequence[int], arrays: SlotArrays) -> None:
        self._arrays = arrays
        self._suite, self._slots, self._batches = suite, list[_Slot](), list[_Batch]()
        batched = set()
        for task in dict.fromkeys(tasks[slot] for slot in slots):
            numbers = [slot for slot in slots if tasks[slot] == task]
            if (envs := suite.make_batch(task, len(numbers))) is not None:
                self._batches.append(_Batch(task, np.array(numbers), envs))
                batched.update(numbers)
        for slot in slots:
            task = tasks[slot]
            if slot in batched:
                continue
            try:
                sizes = suite.sizes(task)
                rows = arrays.observations[slot, : sizes.observation], arrays.actions[slot, : sizes.action]
                self._slots.append(_Slot(slot, task, suite.make(task), *rows))
            except Exception as error:
                raise _slot_error("constructing", slot, task) from error

    def reset(self) -> None:
        """Reset the selected slots to the goals in their rows, and write their observations."""
        arrays = self._arrays
        for task, numbers, envs in self._batches:
            rows = np.flatnonzero(arrays.selected[numbers])
            if not len(rows):
                continue
            try:
                obs = envs.reset(rows.tolist(), [self._goal(slot, task) for slot in numbers[rows]])
                arrays.observations[numbers[rows], : self._suite.sizes(task).observation] = obs
            except Exception as error:
                raise _slot_error("resetting", int(numbers[rows[0]]), task) from error
            arrays.rewards[numbers[rows]] = 0.0
            arrays.successes[numbers[rows]] = False
        for slot, task, env, observation, _ in self._slots:
            if not arrays.selected[slot]:
                continue
            try:
                observation[:] = env.reset(self._goal(slot, task))
            except Exception as error:
                raise _slot_error("resetting", slot, task) from error
            arrays.rewards[slot] = 0.0
            arrays.successes[slot] = False

    def _goal(self, slot: int, task: str) -> Goal:
        vector = self._arrays.goal_vectors[slot, : self._arrays.goal_sizes[slot]].copy()
        return Goal(task, "", 0, vector)

    def step(self) -> None:
        """Step the selected slots, and write their observations, rewards and success flags."""
        arrays = self._arrays
        for task, numbers, envs in self._batches:
            rows = np.flatnonzero(arrays.selected[numbers])
            if not len(rows):
                continue
            slots, sizes = numbers[rows], self._suite.sizes(task)
            try:
                obs, rewards, successes = envs.step(rows.tolist(), arrays.actions[slots, : sizes.action])
                arrays.observations[slots, : sizes.observation] = obs
            except Exception as error:
                raise _slot_error("stepping", int(slots[0]), task) from error
            arrays.rewards[slots], arrays.successes[slots] = rewards, successes
        selected, wants_grasps = arrays.selected.tolist(), arrays.wants_grasps.tolist()
        for slot, task, env, observation, action in self._slots:
            if not selected[slot]:
                continue
            try:
                obs, reward, success = env.step(action)
                observation[:] = obs
            except Exception as error:
                raise _slot_error("stepping", slot, task) from error
            arrays.rewards[slot] = reward
            if wants_grasps[slot]:
                arrays.grasps[slot] = env.grasp(obs)  # type: ignore[attr-defined]  # `Suite.measures_grasps`
            arrays.successes[slot] = success

    def close(self) -> None:
        """Close the environments."""
        for slot in self._slots:
            slot.env.close()
        for batch in self._batches:
            batch.envs.close()
        self._slots, self._batches = [], []


def _slot_error(doing: str, slot: int, task: str) -> SlotError:
    return SlotError(f"{doing} slot {slot} ({task}) failed:\n{traceback.format_exc()}")
