"""Cached resets of Meta-World tasks: simulated once per goal, then restored to the bit in 1 % of the time.

A real reset simulates 500 physics steps, and always ends in the same state for the same goal.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Final

import mujoco
import numpy as np
import numpy.typing as npt

_STATE: Final = mujoco.mjtState.mjSTATE_INTEGRATION

#: Attributes that the caller or the constructor sets, not resets and steps.
_SETTINGS: Final = frozenset(
    {
        "_freeze_rand_vec",
        "_last_rand_vec",
        "_partially_observable",
        "_set_task_called",
        "camera_id",
        "camera_name",
        "height",
        "max_path_length",
        "render_mode",
        "reward_function_version",
        "seeded_rand_vec",
        "width",
    }
)

#: Types of the attributes that resets and steps set. Lists, tuples and dictionaries hold only configuration.
_PLAIN: Final = (np.ndarray, np.generic, int, float, str, type(None))

#: Arrays of which only a varying number of rows is valid, or that hold uninitialised memory, and one (134 kB) that
#: only visualisation reads.
_SKIPPED_PREFIXES: Final = ("efc_", "contact", "island", "dof_island", "tendon_efcadr", "bvh_active")


def _data_arrays(data: Any) -> dict[str, npt.NDArray[Any]]:
    """Return MuJoCo's arrays of the simulation's state and of what derives from it."""
    arrays = {}
    for name in dir(type(data)):
        if name.startswith(("_", *_SKIPPED_PREFIXES)):
            continue
        value = getattr(data, name)
        if isinstance(value, np.ndarray) and value.size:
            arrays[name] = value
    return arrays


class Attributes:
    """The plain attributes (numbers, arrays, strings, None) of an environment at one moment."""

    def __init__(self, env: Any) -> None:
        arrays = _data_arrays(env.data)
        self._makers = {
            name: _value_maker(value, arrays)
            for name, value in vars(env).items()
            if name not in _SETTINGS and isinstance(value, _PLAIN)
        }

    def restore(self, env: Any) -> None:
        """Set these attributes on `env`: arrays are copied, and views become views of its own data."""
        vars(env).update({name: make(env.data) for name, make in self._makers.items()})


def _value_maker(value: Any, arrays: dict[str, npt.NDArray[Any]]) -> Callable[[Any], Any]:
    """Return a function that makes this value of an attribute for an environment with the given data."""
    if not isinstance(value, np.ndarray):
        return lambda data: value
    if not value.flags.owndata:  # a live view, such as `data.xpos[3]`?
        # The function must not hold `value`, which would keep all data of the simulation alive.
        shape, dtype, strides = value.shape, value.dtype, value.strides
        start = value.__array_interface__["data"][0]
        for name, array in arrays.items():
            offset = start - array.__array_interface__["data"][0]
            if 0 <= offset < array.nbytes:
                return lambda data: np.ndarray(shape, dtype, getattr(data, name), offset, strides)
    stored = value.copy()
    return lambda data: stored.copy()


class ResetState:
    """The complete state after a reset to a goal.

    Args:
        env: an environment that was just reset; the constructor steps it and then restores it.
        goal_fields: the model's fields with this goal (`registry.GOAL_FIELDS`).
        obs: [39] float64, what the reset returned.
    """

    def __init__(
        self, env: Any, goal_fields: tuple[npt.NDArray[np.float64], ...], obs: npt.NDArray[np.float64]
    ) -> None:
        self.goal_fields = goal_fields
        self._obs = obs.copy()
        self._attributes = Attributes(env)
        self._state = np.empty(mujoco.mj_stateSize(env.model, _STATE))
        mujoco.mj_getState(env.model, env.data, self._state, _STATE)
        # Setting the state and calling mj_forward reproduces nearly all arrays, but not the solver's warm start
        # and arrays that the reset left stale. Step away and restore to see which differ, and store those.
        self._patches: dict[str, npt.NDArray[Any]] = {}
        wanted = {name: array.copy() for name, array in _data_arrays(env.data).items()}
        env.data.ctrl[:] = 1.0
        env.data.mocap_pos[:] += 0.01
        mujoco.mj_step(env.model, env.data, 5)
        self._restore_data(env)
        for name, array in _data_arrays(env.data).items():
            if array.tobytes() != wanted[name].tobytes():
                self._patches[name] = wanted[name]
        self._restore_data(env)

    def restore(self, env: Any) -> npt.NDArray[np.float64]:
        """Set `env`, whose model holds `goal_fields`, to this state; return the first observation, [39]."""
        self._attributes.restore(env)
        self._restore_data(env)
        return self._obs.copy()

    def _restore_data(self, env: Any) -> None:
        mujoco.mj_setState(env.model, env.data, self._state, _STATE)
        mujoco.mj_forward(env.model, env.data)
        for name, value in self._patches.items():
            getattr(env.data, name)[...] = value


#: This process's cache, shared by all environments: the states used last, at 8 to 32 kB each.
RESET_CACHE: Final[OrderedDict[Hashable, ResetState]] = OrderedDict()
MAX_CACHED_RESETS: Final = 4096
