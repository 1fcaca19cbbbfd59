"""Gymnasium's MuJoCo bodies as a suite. It imports the simulator only where an environment is made."""

from __future__ import annotations

from importlib.metadata import version
from typing import Final

from cpd.envs.suite import Environment, Returns, Sizes, Suite

#: Increased whenever a task changes.
TASKS_VERSION: Final = "1"

_SIZES: Final = {
    "crane": Sizes(4, 1),
    "reacher": Sizes(10, 2),
    "cheetah": Sizes(17, 6),
    "hopper": Sizes(11, 3),
}
#: Of a policy that draws actions uniformly, the mean over the first fifty training goals; and nine tenths of the
#: most that an episode can give.
_RETURNS: Final = {
    "crane": Returns(70.7, 180.0),
    "cheetah": Returns(88.3, 180.0),
    "hopper": Returns(13.4, 180.0),
}


class GymMujoco(Suite):
    """Four tasks with bodies of Gymnasium's MuJoCo models; only the reacher has a success measure."""

    tasks = tuple(_SIZES)
    streams = {"bodies": tasks}  # noqa: RUF012
    horizon = 200

    def sizes(self, task: str) -> Sizes:
        """Return the sizes of the body's observations and actions."""
        return _SIZES[task]

    def returns(self, task: str) -> Returns | None:
        """Return the measured returns of a random policy and of a reference, or None for the reacher."""
        return _RETURNS.get(task)

    def make(self, task: str) -> Environment:
        """Return a new environment."""
        from cpd.envs.gym_mujoco.body_tasks import MAKERS

        return MAKERS[task]()

    def versions(self) -> dict[str, str]:
        """Return the versions of the simulator, of the models and of the tasks."""
        return {"mujoco": version("mujoco"), "gymnasium": version("gymnasium"), "tasks": TASKS_VERSION}
