"""Bit-exact, faster versions of the code that Meta-World's fifty tasks share.

`FastSawyer` stands between a task's class and Meta-World's base class. Slow there (metaworld 3.1.1) are named
look-ups, scans of the contact list in Python, temporary arrays, clips through wrappers, and a call of
`mj_rnePostConstraint` whose results nobody reads.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt
from metaworld.sawyer_xyz_env import SawyerXYZEnv

from cpd.envs.metaworld.fast.helpers import clip_ufunc, hamacher_product, length, long_tail
from cpd.envs.metaworld.fast.rendering import RenderModel
from cpd.envs.metaworld.fast.resets import MAX_CACHED_RESETS, RESET_CACHE, Attributes, ResetState
from cpd.envs.metaworld.registry import SharedModel, shared_model
from cpd.envs.metaworld.tasks import OBSERVATION_SIZE

_FRAME_SIZE = 18
_WRIST_QUATERNION = np.array([1.0, 0.0, 1.0, 0.0])
_VELOCITY_STAGE = int(mujoco.mjtStage.mjSTAGE_VEL)
# float32, the smaller type: a clipped action keeps its own, float32 or float64, as in Meta-World.
_ACTION_LOW = np.full(3, -1.0, dtype=np.float32)
_ACTION_HIGH = np.full(3, 1.0, dtype=np.float32)


class _Views(dict[tuple[str, str], Any]):
    """Named views of a simulation's data; a dictionary that supports weak references."""

    __slots__ = ("__weakref__",)


def _cached_lookup(kind: str) -> Callable[[Any, Any], Any]:
    """MjData's method `kind`, which returns the view of an object by name or id, with a cache."""
    look_up = getattr(mujoco.MjData, kind)

    def view(self: FastData, name: Any) -> Any:
        """Return the live view of the object with this name or id."""
        views = self._views()
        if views is None:
            return look_up(self, name)
        try:
            return views[kind, name]
        except KeyError:
            return views.setdefault((kind, name), look_up(self, name))

    return view


class FastData(mujoco.MjData):  # type: ignore[misc]
    """MjData that looks up each name once. Views are live, so a kept one equals a new one.

    A view keeps its data alive through C++, where the garbage collector does not see it. If this object held the
    views, no simulation would ever be freed. So the environment holds them, and this object a weak reference.
    """

    def __init__(self, model: mujoco.MjModel, views: _Views) -> None:
        super().__init__(model)
        self._views = weakref.ref(views)

    body, geom, site, joint = map(_cached_lookup, ("body", "geom", "site", "joint"))


class FastSawyer(SawyerXYZEnv):
    """Base class of the accelerated tasks; see `cpd.envs.metaworld.fast.task_class.accelerated_class`.

    Visible differences from Meta-World's base class:

    - Environments of a task share one compiled model. It lacks nameless geoms that nothing can touch; `render`
      still shows them.
    - A reset does not depend on earlier steps. In Meta-World, only stale site positions do.
    - A second reset to a goal is restored from a cache.
    - What only `mj_rnePostConstraint` computes (`data.cacc`, `data.cfrc_int`, `data.cfrc_ext`) stays zero.
    """

    reward_function_version: str
    _shared: SharedModel
    _pristine_attributes: Attributes | None = None
    #: `qpos` and `qvel`, as bytes, for which the derived data is complete and current; None if unknown.
    _forwarded: tuple[bytes, bytes] | None = None
    _render_model: RenderModel | None = None

    def _initialize_simulation(self) -> tuple[mujoco.MjModel, FastData]:
        shared = self._shared = shared_model(self.fullpath)
        self._goal_fields = shared.pristine
        self._token = object()
        shared.take(self._token, self._goal_fields)
        self._views = _Views()
        data = FastData(shared.model, self._views)
        self._hand_xpos = data.body("hand").xpos
        self._right_claw_xpos = data.body("rightclaw").xpos
        self._left_claw_xpos = data.body("leftclaw").xpos
        self._right_pad_xpos = data.body("rightpad").xpos
        self._left_pad_xpos = data.body("leftpad").xpos
        self._right_tip_xpos = data.site("rightEndEffector").xpos
        self._left_tip_xpos = data.site("leftEndEffector").xpos
        self._left_pad_id: int = data.geom("leftpad_geom").id
        self._right_pad_id: int = data.geom("rightpad_geom").id
        self._mocap_pos = data.mocap_pos[0]
        self._mocap_quat = data.mocap_quat
        self._mocap_body_xpos = data.body("mocap").xpos
        self._ctrl = data.ctrl
        self._qpos = data.qpos
        self._qvel = data.qvel
        return shared.model, data

    def take_model(self) -> None:
        """Write this environment's goal into the shared model; call it before you read `model` from outside."""
        if self._shared.owner is not self._token:
            self._shared.take(self._token, self._goal_fields)

    @property
    def tcp_center(self) -> npt.NDArray[np.float64]:
        """The middle between the fingertips, [3] metres."""
        center: npt.NDArray[np.float64] = (self._right_tip_xpos + self._left_tip_xpos) / 2.0
        return center

    def touching_object(self, object_geom_id: int) -> bool:
        """Whether both finger pads press on a geom: the summed normal forces of their contacts are positive."""
        data = self.data
        if not data.ncon:
            return False
        left_pad, right_pad = self._left_pad_id, self._right_pad_id
        # In the order of the contacts, as Meta-World adds them: a sum of floats depends on the order.
        left = right = 0.0
        contact = data.contact
        for i, pair in enumerate(contact.geom.tolist()):
            if object_geom_id in pair:
                if left_pad in pair:
                    left += data.efc_force[contact.efc_address[i]]
                if right_pad in pair:
                    right += data.efc_force[contact.efc_address[i]]
        return bool(left > 0 and right > 0)

    def _gripper_caging_reward(
        self,
        action: npt.NDArray[np.floating[Any]],
        obj_pos: npt.NDArray[np.float64],
        obj_radius: float,
        pad_success_thresh: float,
        object_reach_radius: float,
        xz_thresh: float,
        desired_gripper_effort: float = 1.0,
        high_density: bool = False,
        medium_density: bool = False,
    ) -> Any:
        """Meta-World's reward for having the object between the fingers, in scalars where it uses arrays.

        See `SawyerXYZEnv._gripper_caging_reward` for the arguments (metres) and the meaning. The result has
        Meta-World's type too: with float32 actions it is float32 once the gripper closes on the object.
        """
        obj_init_pos = self.obj_init_pos
        assert obj_init_pos is not None
        obj_y, obj_init_y = float(obj_pos[1]), float(obj_init_pos[1])
        left_y, right_y = float(self._left_pad_xpos[1]), float(self._right_pad_xpos[1])
        left_margin = abs(abs(left_y - obj_init_y) - pad_success_thresh)
        right_margin = abs(abs(right_y - obj_init_y) - pad_success_thresh)
        left = long_tail(abs(left_y - obj_y), obj_radius, pad_success_thresh, left_margin)
        right = long_tail(abs(right_y - obj_y), obj_radius, pad_success_thresh, right_margin)
        tcp = self.tcp_center
        xz_margin = length(obj_init_pos[::2] - self.init_tcp[::2]) - xz_thresh
        caging_xz = long_tail(length(tcp[::2] - obj_pos[::2]), 0, xz_thresh, xz_margin)
        caging = hamacher_product(hamacher_product(left, right), float(caging_xz))
        # Not a float: the type of the action decides that of the result.
        closed = min(max(0, action[-1]), desired_gripper_effort) / desired_gripper_effort
        reward = hamacher_product(caging, closed if caging > 0.97 else 0.0)
        if high_density:
            reward = (reward + caging) / 2
        if medium_density:
            reach_margin = abs(length(obj_init_pos - self.init_tcp) - object_reach_radius)
            reach = long_tail(length(obj_pos - tcp), 0, object_reach_radius, reach_margin)
            reward = (reward + float(reach)) / 2
        return reward

    def _step_mujoco_simulation(self, ctrl: Any, n_frames: int) -> None:
        self._ctrl[:] = ctrl
        mujoco.mj_step(self.model, self.data, n_frames)

    def _get_curr_obs_combined_no_goal(self) -> npt.NDArray[np.float64]:
        frame = np.zeros(_FRAME_SIZE)
        frame[:3] = self._hand_xpos
        # The fingers are at most 0.1 m apart, except for a little noise, which the clipping hides.
        frame[3] = min(max(length(self._right_claw_xpos - self._left_claw_xpos) / 0.1, 0.0), 1.0)
        positions = self._get_pos_objects()
        quaternions = self._get_quat_objects()
        assert len(positions) % 3 == 0 and len(quaternions) % 4 == 0
        for i in range(min(len(positions) // 3, len(quaternions) // 4)):
            frame[4 + 7 * i : 7 + 7 * i] = positions[3 * i : 3 * i + 3]
            frame[7 + 7 * i : 11 + 7 * i] = quaternions[4 * i : 4 * i + 4]
        return frame

    def _get_obs(self) -> npt.NDArray[np.float64]:
        frame = self._get_curr_obs_combined_no_goal()
        obs = np.empty(OBSERVATION_SIZE)
        obs[:18] = frame
        obs[18:36] = self._prev_obs
        obs[36:] = 0.0 if self._partially_observable else self._get_pos_goal()
        self._prev_obs = frame
        return obs

    def step(
        self, action: npt.NDArray[np.floating[Any]]
    ) -> tuple[npt.NDArray[np.float64], Any, bool, bool, dict[str, Any]]:
        """Like Meta-World's: an action [4] gives observation [39], reward, False, truncated and info."""
        if not self._set_task_called:
            raise RuntimeError("You must call env.set_task before using env.step")
        assert len(action) == 4, f"Actions should be size 4, got {len(action)}"
        if self.curr_path_length >= self.max_path_length:
            raise ValueError("You must reset the env manually once truncate==True")
        self.take_model()
        mocap = self._mocap_pos
        delta = clip_ufunc(action[:3], _ACTION_LOW, _ACTION_HIGH) * self.action_scale
        clip_ufunc(mocap + delta, self.mocap_low, self.mocap_high, mocap)
        self._mocap_quat[:] = _WRIST_QUATERNION
        self._ctrl[0], self._ctrl[1] = action[-1], -action[-1]
        self._simulate()
        self.curr_path_length += 1
        space = self.sawyer_observation_space
        obs = self._get_obs()
        self._last_stable_obs = clip_ufunc(obs, space.low, space.high, obs)
        reward, info = self.evaluate_state(obs, action)
        return obs.copy(), reward, False, self.curr_path_length == self.max_path_length, info

    def _simulate(self) -> None:
        """Do what `frame_skip` calls of `mj_step` and one of `mj_forward` do.

        Meta-World places target sites between the two, but `mj_forward` overwrites their positions.
        """
        model, data, qpos, qvel = self.model, self.data, self._qpos, self._qvel
        if (qpos.tobytes(), qvel.tobytes()) == self._forwarded:
            # The last step ended with mj_forward in exactly this state. Since then only the mocap body has moved,
            # and it enters the weld constraint alone. So the first mj_step can skip what depends on no constraint.
            self._mocap_body_xpos[:] = self._mocap_pos
            mujoco.mj_makeConstraint(model, data)
            mujoco.mj_referenceConstraint(model, data)
            mujoco.mj_forwardSkip(model, data, _VELOCITY_STAGE, 1)
            mujoco.mj_checkAcc(model, data)
            mujoco.mj_Euler(model, data)
            mujoco.mj_step(model, data, self.frame_skip - 1)
        else:
            mujoco.mj_step(model, data, self.frame_skip)
        mujoco.mj_forward(model, data)
        if self._shared.mocap_is_weld_only:
            self._forwarded = (qpos.tobytes(), qvel.tobytes())

    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[npt.NDArray[np.float64], dict[str, Any]]:
        """Like Meta-World's reset of a new environment; goals that were simulated before come from a cache."""
        if self._pristine_attributes is None:
            self._pristine_attributes = Attributes(self)
        self._forwarded = None
        goal = self._last_rand_vec
        if not self._freeze_rand_vec or goal is None:
            self._restore_pristine()
            obs, info = super().reset(seed=seed, options=options)
            self._goal_fields = self._shared.fields()
            return obs, info
        key = (type(self), self.reward_function_version, self._partially_observable, goal.tobytes())
        state = RESET_CACHE.get(key)
        if state is None:
            self._restore_pristine()
            obs, _ = super().reset(seed=seed, options=options)
            state = ResetState(self, self._shared.fields(), obs)
            RESET_CACHE[key] = state
            if len(RESET_CACHE) > MAX_CACHED_RESETS:
                RESET_CACHE.popitem(last=False)
        RESET_CACHE.move_to_end(key)
        self._goal_fields = state.goal_fields
        self._shared.take(self._token, state.goal_fields)
        return state.restore(self), {}

    def _restore_pristine(self) -> None:
        """Restore everything that a reset may read to its value after construction."""
        assert self._pristine_attributes is not None
        self._pristine_attributes.restore(self)
        self._shared.take(self._token, self._shared.pristine)
        mujoco.mj_resetData(self.model, self.data)
        mujoco.mj_forward(self.model, self.data)

    def render(self) -> Any:
        """Like Gymnasium's, with a complete model that has this environment's state."""
        self.take_model()
        if self._render_model is None:
            self._render_model = RenderModel(self.fullpath, self.width, self.height)
            self.mujoco_renderer.model = self._render_model.model
            self.mujoco_renderer.data = self._render_model.data
        self._render_model.copy_state(self.model, self.data)
        return super().render()  # type: ignore[no-untyped-call]
