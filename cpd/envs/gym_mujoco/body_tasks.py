"""The tasks: which body does what."""

from __future__ import annotations

from typing import Final

from cpd.envs.gym_mujoco.bodies import Body, BodyEnv, Change, DoublePendulum, Reacher, Runner

_HOPPER: Final = Body("hopper.xml", 4, 5e-3, 5e-3)
#: The thigh is 0.2 m longer, so the torso starts that much higher.
_LONG_HOPPER: Final = Body(
    "hopper.xml",
    4,
    5e-3,
    5e-3,
    (
        Change(".//body[@name='torso']", "pos", "0 0 1.45"),
        Change(".//joint[@name='rootx']", "pos", "0 0 -1.45"),
        Change(".//joint[@name='rootz']", "pos", "0 0 -1.45"),
        Change(".//joint[@name='rootz']", "ref", "1.45"),
        Change(".//geom[@name='thigh_geom']", "pos", "0 0 -0.325"),
        Change(".//geom[@name='thigh_geom']", "size", "0.05 0.325"),
        Change(".//body[@name='leg']", "pos", "0 0 -0.9"),
    ),
)
#: Less gravity, as in Gymnasium-based benchmarks of changed dynamics.
_LIGHT: Final = (Change(".//option", "gravity", "0 0 -6"),)
#: Motors of a seventh of the strength: Gymnasium's whirl the arm around at little effort.
_WEAK_MOTORS: Final = tuple(Change(f".//motor[@joint='joint{i}']", "gear", "30.0") for i in (0, 1))
_HEAVY_POLE: Final = (Change(".//geom[@name='cpole2']", "size", "0.06 0.3"),)


def make(task: str) -> BodyEnv:
    """Return a new environment of a task."""
    if task == "reacher":
        return Reacher(Body("reacher.xml", 2, 0.1, 5e-3, _WEAK_MOTORS))
    if task == "double-pendulum":
        return DoublePendulum(Body("inverted_double_pendulum.xml", 5, 0.1, 0.1, _HEAVY_POLE))
    if task == "swimmer":
        return Runner(Body("swimmer.xml", 4, 0.1, 0.1), -0.1, 2, None)
    if task == "cheetah":
        return Runner(Body("half_cheetah.xml", 5, 0.1, 0.1, _LIGHT), 1.0, 1, None)
    long = task == "hopper-long"
    return Runner(_LONG_HOPPER if long else _HOPPER, 0.5 if long else 1.0, 1, (0.9 if long else 0.7, 0.4))
