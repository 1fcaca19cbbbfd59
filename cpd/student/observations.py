"""The fixed scaling of observations: constants known before the first stage, the same for every task, for ever.

Running statistics would shift the input of every task learned before. Meta-World's 39 numbers are 18 of the
current frame, the same 18 of the previous frame, and the goal's position. A frame is the hand's position, the
gripper's opening, and position and quaternion of two objects; an absent object is all zero.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

#: Middle of the table top in front of the robot, metres.
POSITION_CENTRE: Final = (0.0, 0.65, 0.15)
#: Metres that become 1. Smaller than the workspace (1 x 0.6 x 0.45), since what matters is a few centimetres.
POSITION_SCALE: Final = 0.15
#: The gripper's opening lies in [0, 1].
GRIPPER_CENTRE: Final = 0.5
GRIPPER_SCALE: Final = 0.5


def _frame() -> tuple[list[float], list[float]]:
    """Centre and scale of one frame's 18 numbers."""
    position, quaternion = list(POSITION_CENTRE), [0.0] * 4
    centre = [*position, GRIPPER_CENTRE, *position, *quaternion, *position, *quaternion]
    scale = [POSITION_SCALE] * 3 + [GRIPPER_SCALE] + ([POSITION_SCALE] * 3 + [1.0] * 4) * 2
    return centre, scale


def observation_scaling() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Centre and scale, [39] each: the student sees `(observation - centre) / scale`."""
    centre, scale = _frame()
    return (
        np.array([*centre, *centre, *POSITION_CENTRE]),
        np.array([*scale, *scale, *([POSITION_SCALE] * 3)]),
    )
