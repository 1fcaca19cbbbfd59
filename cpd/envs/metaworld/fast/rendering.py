"""Complete models that render simulations of light ones (`cpd.envs.metaworld.fast.model`)."""

from __future__ import annotations

from typing import Any, Final

import mujoco
import numpy as np

from cpd.envs.metaworld.registry import GOAL_FIELDS, complete_model

_STATE: Final = mujoco.mjtState.mjSTATE_INTEGRATION

#: Poses of what both models contain. They are copied, since they may differ from those that the state gives:
#: Meta-World's resets leave some stale, and it moves target sites by hand.
_POSES: Final = (
    "xpos",
    "xquat",
    "xmat",
    "xipos",
    "ximat",
    "site_xpos",
    "site_xmat",
    "cam_xpos",
    "cam_xmat",
    "light_xpos",
    "light_xdir",
)


class RenderModel:
    """A complete model and its data, which copy the state of an environment's light ones.

    Args:
        width, height: largest picture that can be rendered, pixels.
    """

    def __init__(self, path: str, width: int, height: int) -> None:
        self.model = complete_model(path, width, height)
        self.data = mujoco.MjData(self.model)

    def copy_state(self, model: mujoco.MjModel, data: mujoco.MjData) -> None:
        """Copy goal and state from a simulation of the same task's light model."""
        for name in GOAL_FIELDS:
            getattr(self.model, name)[:] = getattr(model, name)
        state = np.empty(mujoco.mj_stateSize(model, _STATE))
        mujoco.mj_getState(model, data, state, _STATE)
        mujoco.mj_setState(self.model, self.data, state, _STATE)
        mujoco.mj_forward(self.model, self.data)
        for name in _POSES:
            getattr(self.data, name)[:] = getattr(data, name)
        # The light model lacks most geoms, so their poses follow from those of the bodies.
        full: Any = self.model
        geoms = zip(full.geom_pos, full.geom_quat, full.geom_bodyid, full.geom_sameframe, strict=True)
        for i, (position, quaternion, body, same_frame) in enumerate(geoms):
            xpos, xmat = self.data.geom_xpos[i], self.data.geom_xmat[i]
            mujoco.mj_local2Global(self.data, xpos, xmat, position, quaternion, body, same_frame)
