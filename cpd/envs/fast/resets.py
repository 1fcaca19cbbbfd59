"""Cached resets of Meta-World tasks: simulated once per goal, then restored to the bit in 1 % of the time.

A real reset simulates 500 physics steps, and always ends in the same state for the same goal.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
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


class _DataView:
    """An attribute that is a live view of an array of the simulation's data, such as `data.xpos[3]`."""

    def __init__(self, name: str, offset: int, like: npt.NDArray[Any]) -> None:
        self._name, self._offset = name, offset
        self._shape, self._strides = like.shape, like.strides

    def in_data(self, data: Any) -> npt.NDArray[Any]:
        """Return the same view of another simulation of the same model."""
        array = getattr(data, self._name)
        return np.ndarray(self._shape, array.dtype, array, self._offset, self._strides)


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
        owners = _data_arrays(env.data)
        self._values: dict[str, Any] = {}
        for name, value in vars(env).items():
            if name in _SETTINGS or name in env.LIVE_ATTRIBUTES or not isinstance(value, _PLAIN):
                continue
            self._values[name] = _frozen(value, owners)

    def restore(self, env: Any) -> None:
        """Set these attributes on `env`: arrays are copied, and views become views of its own data."""
        attributes = vars(env)
        for name, value in self._values.items():
            kind = type(value)
            if kind is np.ndarray:
                attributes[name] = value.copy()
            elif kind is _DataView:
                attributes[name] = value.in_data(env.data)
            else:
                attributes[name] = value

    @property
    def num_bytes(self) -> int:
        """Approximate memory."""
        return sum(value.nbytes if isinstance(value, np.ndarray) else 100 for value in self._values.values())


def _frozen(value: Any, owners: dict[str, npt.NDArray[Any]]) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    if not value.flags.owndata:
        start = value.__array_interface__["data"][0]
        for name, owner in owners.items():
            offset = start - owner.__array_interface__["data"][0]
            if 0 <= offset < owner.nbytes:
                return _DataView(name, offset, value)
    return value.copy()


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

    @property
    def num_bytes(self) -> int:
        """Approximate memory."""
        arrays = [self._obs, self._state, *self.goal_fields, *self._patches.values()]
        return sum(array.nbytes for array in arrays) + self._attributes.num_bytes


class ResetCache:
    """Reset states up to a limit on memory; the least recently used ones are dropped first.

    Args:
        max_bytes: the limit; sizes are approximate.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._states: OrderedDict[Hashable, ResetState] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._states)

    def get(self, key: Hashable) -> ResetState | None:
        """Return the state of `key`; None if it is not in the cache."""
        state = self._states.get(key)
        if state is not None:
            self._states.move_to_end(key)
        return state

    def put(self, key: Hashable, state: ResetState) -> None:
        """Store a state, and drop the least recently used ones that no longer fit."""
        assert key not in self._states
        self._states[key] = state
        self.num_bytes += state.num_bytes
        while self.num_bytes > self._max_bytes and len(self._states) > 1:
            _, oldest = self._states.popitem(last=False)
            self.num_bytes -= oldest.num_bytes

    def clear(self) -> None:
        """Drop all states."""
        self._states.clear()
        self.num_bytes = 0


#: This process's cache, shared by all environments; about 15 kB per goal.
RESET_CACHE: Final = ResetCache(64 * 2**20)
