"""Bodies of Gymnasium's MuJoCo models, changed, and their environments.

Dimensions: O observation, A action.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

import mujoco
import numpy as np
import numpy.typing as npt

from cpd.envs.goals import Goal

FloatArray = npt.NDArray[np.float64]

#: Largest velocity in an observation, as in Gymnasium's Hopper.
MAX_VELOCITY: Final = 10.0


@dataclass(frozen=True)
class Change:
    """One changed attribute of a model's XML."""

    path: str
    """Path of the element, in the form of ElementTree."""
    attribute: str
    value: str


@dataclass(frozen=True)
class Body:
    """A model, how it is changed, and how an episode begins."""

    model: str
    """Name of the file among Gymnasium's models."""
    frame_skip: int
    """Steps of the simulator in a step of the environment, as in Gymnasium."""
    position_noise: float
    """Initial positions are uniform within this distance of the model's."""
    velocity_noise: float
    """Standard deviation of the initial velocities."""
    changes: tuple[Change, ...] = ()

    def load(self) -> mujoco.MjModel:
        """Return the model with its changes."""
        import gymnasium.envs.mujoco

        folder = Path(gymnasium.envs.mujoco.__file__).parent / "assets"
        tree = ElementTree.parse(folder / self.model)
        for change in self.changes:
            element = tree.find(change.path)
            assert element is not None, change
            element.set(change.attribute, change.value)
        return mujoco.MjModel.from_xml_string(ElementTree.tostring(tree.getroot(), encoding="unicode"))


class BodyEnv(abc.ABC):
    """An environment of one body. Subclasses say what is observed, and what is rewarded.

    A body that has fallen stays as it is until the end of the episode, without reward: no policy gains by falling.
    """

    def __init__(self, body: Body) -> None:
        self._body, self.model = body, body.load()
        self.data = mujoco.MjData(self.model)
        self.seconds = float(self.model.opt.timestep) * body.frame_skip
        self._has_fallen = False

    def reset(self, goal: Goal) -> FloatArray:
        """Start an episode from a state that the seed of `goal` determines."""
        rng, body, data = np.random.default_rng(goal.seed), self._body, self.data
        mujoco.mj_resetData(self.model, data)
        data.qpos += rng.uniform(-body.position_noise, body.position_noise, self.model.nq)
        data.qvel += body.velocity_noise * rng.standard_normal(self.model.nv)
        self.begin(rng)
        mujoco.mj_forward(self.model, data)
        self._has_fallen = False
        return self.observation()

    def step(self, action: npt.NDArray[np.float32]) -> tuple[FloatArray, float, bool]:
        """Apply the action [A] for `frame_skip` steps of the simulator."""
        if self._has_fallen:
            return self.observation(), 0.0, False
        position = float(self.data.qpos[0])
        self.data.ctrl[:] = action
        mujoco.mj_step(self.model, self.data, self._body.frame_skip)
        velocity = (float(self.data.qpos[0]) - position) / self.seconds
        self._has_fallen = self.has_fallen()
        return self.observation(), 0.0 if self._has_fallen else self.reward(velocity), self.is_success()

    def begin(self, rng: np.random.Generator) -> None:  # noqa: B027  # most draw nothing
        """Draw what else an episode begins with."""

    @abc.abstractmethod
    def observation(self) -> FloatArray:
        """Return the observation, [O]."""

    @abc.abstractmethod
    def reward(self, velocity: float) -> float:
        """Return the reward of a step, in which the first coordinate moved at this velocity."""

    def has_fallen(self) -> bool:
        """Return whether the body can no longer do its task."""
        return False

    def is_success(self) -> bool:
        """Return whether this step counts as a success."""
        return False

    def close(self) -> None:  # noqa: B027
        """Release nothing: the simulator frees its memory itself."""


class Runner(BodyEnv):
    """Move along the x axis at a velocity that the observation does not show.

    The reward of a step is 1 at that velocity, 1/2 at rest, and 0 at its opposite or at more than three times it.
    """

    def __init__(self, body: Body, velocity: float, num_hidden: int, upright: tuple[float, float] | None) -> None:
        """Create an environment.

        Args:
            body: what runs.
            velocity: m/s.
            num_hidden: coordinates that are not observed, the first ones: where the body is on the ground.
            upright: least height in m and largest angle in radians before the body has fallen; None: never.
        """
        super().__init__(body)
        self._velocity, self._num_hidden, self._upright = velocity, num_hidden, upright

    def observation(self) -> FloatArray:
        """Return positions, then velocities."""
        velocities = np.clip(self.data.qvel, -MAX_VELOCITY, MAX_VELOCITY)
        return np.concatenate([self.data.qpos[self._num_hidden :], velocities])

    def reward(self, velocity: float) -> float:
        """Return how near the velocity is to the hidden one."""
        return 1.0 - min(1.0, abs(velocity - self._velocity) / (2.0 * abs(self._velocity)))

    def has_fallen(self) -> bool:
        """Return whether the body is too low or leans too far."""
        if self._upright is None:
            return False
        height, angle = self._upright
        return bool(self.data.qpos[1] < height or abs(self.data.qpos[2]) > angle)


class Crane(BodyEnv):
    """Bring a cart to a place that the observation does not show, so that its pole hangs still.

    This is Gymnasium's InvertedPendulum upside down.
    """

    #: Where the cart must be on its rail, which goes from -1 m to 1 m.
    place: Final = 0.5

    def begin(self, rng: np.random.Generator) -> None:
        """Let the pole hang."""
        self.data.qpos[1] += np.pi

    def step(self, action: npt.NDArray[np.float32]) -> tuple[FloatArray, float, bool]:
        """Apply the action [1], scaled to the motor's range."""
        return super().step(action * np.float32(self.model.actuator_ctrlrange[0, 1]))

    def observation(self) -> FloatArray:
        """Return the cart's place, the pole's angle from hanging, and their velocities."""
        return np.concatenate([self.data.qpos - (0.0, np.pi), self.data.qvel])

    def reward(self, velocity: float) -> float:
        """Return 1 less the distance in metres and a tenth of the angle, at least 0."""
        distance, angle = abs(self.data.qpos[0] - self.place), abs(self.data.qpos[1] - np.pi)
        return float(max(0.0, 1.0 - distance - 0.1 * angle))


class Reacher(BodyEnv):
    """Bring the tip of an arm to a target in the plane, as Gymnasium's Reacher; success is to be near it."""

    #: Metres between tip and target at which a step is a success.
    near: Final = 0.02
    #: Largest distance of a target from the arm's root, in metres.
    reach: Final = 0.2

    def begin(self, rng: np.random.Generator) -> None:
        """Draw a target in the disc; it rests."""
        angle, radius = rng.uniform(-np.pi, np.pi), self.reach * np.sqrt(rng.uniform())
        self.data.qpos[2:] = radius * np.cos(angle), radius * np.sin(angle)
        self.data.qvel[2:] = 0.0

    def _offset(self) -> Any:
        return self.data.body("fingertip").xpos[:2] - self.data.body("target").xpos[:2]

    def observation(self) -> FloatArray:
        """Return cosines and sines of the joints, the target, the joints' velocities, and from target to tip."""
        data = self.data
        parts = np.cos(data.qpos[:2]), np.sin(data.qpos[:2]), data.qpos[2:], data.qvel[:2], self._offset()
        return np.concatenate(parts)

    def reward(self, velocity: float) -> float:
        """Return minus the distance in units of `reach`."""
        return -float(np.linalg.norm(self._offset())) / self.reach

    def is_success(self) -> bool:
        """Return whether the tip is near the target."""
        return bool(np.linalg.norm(self._offset()) < self.near)
