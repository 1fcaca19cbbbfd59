"""The slots of a vector environment: one environment and one row of every array per slot.

The arrays lie in one flat buffer, which worker processes map into their memory. A step therefore pickles nothing
and sends one byte through a pipe.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cpd.envs.goals import Goal
from cpd.envs.metaworld.task_env import TaskEnv
from cpd.envs.metaworld.tasks import ACTION_SIZE, OBSERVATION_SIZE

#: Room for one goal's vector; Meta-World's longest has six numbers.
MAX_RAND_VEC_SIZE: Final = 16

_FIELDS: Final[tuple[tuple[str, Any, tuple[int, ...]], ...]] = (
    ("observations", np.float32, (OBSERVATION_SIZE,)),
    ("rewards", np.float64, ()),
    ("grasps", np.float64, ()),
    ("wants_grasps", np.bool_, ()),
    ("successes", np.bool_, ()),
    ("actions", np.float32, (ACTION_SIZE,)),
    ("selected", np.bool_, ()),
    ("rand_vec_sizes", np.int64, ()),
    ("rand_vecs", np.float64, (MAX_RAND_VEC_SIZE,)),
)


class SlotError(RuntimeError):
    """An environment or its worker process failed; the message names the task and contains the cause."""


class SlotArrays:
    """Views of one buffer, with a row per slot."""

    observations: npt.NDArray[np.float32]
    """[N, 39] float32, the current observation of each slot."""
    rewards: npt.NDArray[np.float64]
    """[N] float64 of the last step; 0 after a reset."""
    grasps: npt.NDArray[np.float64]
    """[N] float64, `TaskEnv.grasp` of the last step, in slots with `wants_grasps`."""
    wants_grasps: npt.NDArray[np.bool_]
    """[N] bool, whether a step computes `grasps`."""
    successes: npt.NDArray[np.bool_]
    """[N] bool of the last step, not latched; False after a reset."""
    actions: npt.NDArray[np.float32]
    """[N, 4] float32, input of a step."""
    selected: npt.NDArray[np.bool_]
    """[N] bool, the slots that the next step or reset applies to."""
    rand_vec_sizes: npt.NDArray[np.int64]
    """[N] int64, how many numbers of `rand_vecs` count; input of a reset."""
    rand_vecs: npt.NDArray[np.float64]
    """[N, 16] float64, input of a reset."""

    def __init__(self, num_slots: int, buffer: Any) -> None:
        record = np.ndarray((), _layout(num_slots), buffer)
        vars(self).update({name: record[name] for name, _, _ in _FIELDS})

    @staticmethod
    def size(num_slots: int) -> int:
        """Return the bytes that `num_slots` slots need."""
        return _layout(num_slots).itemsize


def _layout(num_slots: int) -> np.dtype[np.void]:
    return np.dtype([(name, dtype, (num_slots, *shape)) for name, dtype, shape in _FIELDS], align=True)


class SlotGroup:
    """Some of the slots, stepped one after another in this process.

    Args:
        tasks: one task name per slot, of all slots.
        slots: indices of this group's slots.
        arrays: the rows of all slots.
    """

    def __init__(self, tasks: Sequence[str], slots: Sequence[int], arrays: SlotArrays) -> None:
        self._arrays = arrays
        self._envs: list[tuple[int, TaskEnv]] = []
        for slot in slots:
            try:
                self._envs.append((slot, TaskEnv(tasks[slot])))
            except Exception as error:
                raise _slot_error("constructing", slot, tasks[slot]) from error

    def reset(self) -> None:
        """Reset the selected slots to the goals in their rows, and write their observations."""
        arrays = self._arrays
        for slot, env in self._envs:
            if not arrays.selected[slot]:
                continue
            rand_vec = arrays.rand_vecs[slot, : arrays.rand_vec_sizes[slot]].copy()
            try:
                arrays.observations[slot] = env.reset(Goal(env.task, "", 0, rand_vec))
            except Exception as error:
                raise _slot_error("resetting", slot, env.task) from error
            arrays.rewards[slot] = 0.0
            arrays.successes[slot] = False

    def step(self) -> None:
        """Step the selected slots, and write their observations, rewards and success flags."""
        arrays = self._arrays
        for slot, env in self._envs:
            if not arrays.selected[slot]:
                continue
            try:
                obs, reward, success = env.step(arrays.actions[slot])
            except Exception as error:
                raise _slot_error("stepping", slot, env.task) from error
            arrays.observations[slot] = obs
            arrays.rewards[slot] = reward
            if arrays.wants_grasps[slot]:
                arrays.grasps[slot] = env.grasp(obs)
            arrays.successes[slot] = success

    def close(self) -> None:
        """Close the environments."""
        for _, env in self._envs:
            env.close()
        self._envs = []


def _slot_error(doing: str, slot: int, task: str) -> SlotError:
    return SlotError(f"{doing} slot {slot} ({task}) failed:\n{traceback.format_exc()}")
