"""The tasks: which body, how it is changed, and what it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from cpd.envs.gym_mujoco.bodies import Body, BodyEnv, Change, Crane, Reacher, Runner

#: Half as long again.
_LONG_POLE: Final = (
    Change(".//geom[@name='cpole']", "fromto", "0 0 0 0.001 0 0.9"),
    Change(".//joint[@name='hinge']", "limited", "false"),
)
#: Motors of a seventh of the strength: Gymnasium's whirl the arm around at little effort.
_WEAK_MOTORS: Final = tuple(Change(f".//motor[@joint='joint{i}']", "gear", "30.0") for i in (0, 1))
_LOW_GRAVITY: Final = (Change(".//option", "gravity", "0 0 -6"),)

#: Names of tasks, and what makes an environment of each.
MAKERS: Final[dict[str, Callable[[], BodyEnv]]] = {
    "crane": lambda: Crane(Body("inverted_pendulum.xml", 2, 0.01, 0.01, _LONG_POLE)),
    "reacher": lambda: Reacher(Body("reacher.xml", 2, 0.1, 5e-3, _WEAK_MOTORS)),
    "cheetah": lambda: Runner(Body("half_cheetah.xml", 5, 0.1, 0.1, _LOW_GRAVITY), 1.0, 1, None),
    "hopper": lambda: Runner(Body("hopper.xml", 4, 5e-3, 5e-3), 1.0, 1, (0.7, 0.4)),
}
