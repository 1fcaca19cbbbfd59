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
from cpd.envs.suite import MAX_GOAL_SIZE, Environment, Spaces, Suite


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
        self._slots: list[_Slot] = []
        for slot in slots:
            task = tasks[slot]
            try:
                sizes = suite.sizes(task)
                rows = arrays.observations[slot, : sizes.observation], arrays.actions[slot, : sizes.action]
                self._slots.append(_Slot(slot, task, suite.make(task), *rows))
            except Exception as error:
                raise _slot_error("constructing", slot, task) from error

    def reset(self) -> None:
        """Reset the selected slots to the goals in their rows, and write their observations."""
        arrays = self._arrays
        for slot, task, env, observation, _ in self._slots:
            if not arrays.selected[slot]:
                continue
            vector = arrays.goal_vectors[slot, : arrays.goal_sizes[slot]].copy()
            try:
                observation[:] = env.reset(Goal(task, "", 0, vector))
            except Exception as error:
                raise _slot_error("resetting", slot, task) from error
            arrays.rewards[slot] = 0.0
            arrays.successes[slot] = False

    def step(self) -> None:
        """Step the selected slots, and write their observations, rewards and success flags."""
        arrays = self._arrays
        for slot, task, env, observation, action in self._slots:
            if not arrays.selected[slot]:
                continue
            try:
                obs, reward, success = env.step(action)
                observation[:] = obs
            except Exception as error:
                raise _slot_error("stepping", slot, task) from error
            arrays.rewards[slot] = reward
            if arrays.wants_grasps[slot]:
                arrays.grasps[slot] = env.grasp(obs)  # type: ignore[attr-defined]  # `Suite.measures_grasps`
            arrays.successes[slot] = success

    def close(self) -> None:
        """Close the environments."""
        for slot in self._slots:
            slot.env.close()
        self._slots = []


def _slot_error(doing: str, slot: int, task: str) -> SlotError:
    return SlotError(f"{doing} slot {slot} ({task}) failed:\n{traceback.format_exc()}")
