"""The fixed scaling of observations: constants, the same for all tasks and stages.

Running statistics would shift the input of every task learned earlier. Meta-World's 39 numbers are 18 of the
current frame, the same 18 of the previous frame, and the position of the goal. A frame consists of the position of
the hand, the opening of the gripper, and position and quaternion of two objects; an absent object is all zero.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

#: Middle of the table top in front of the robot, in metres.
POSITION_CENTRE: Final = (0.0, 0.65, 0.15)
#: The distance in metres that becomes 1: less than the workspace (1 x 0.6 x 0.45), since centimetres matter.
POSITION_SCALE: Final = 0.15
#: The gripper's opening lies in [0, 1].
GRIPPER_CENTRE: Final = 0.5
GRIPPER_SCALE: Final = 0.5


def observation_scaling() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Centre and scale, [39] each: the student sees `(observation - centre) / scale`."""
    position = list(POSITION_CENTRE)
    centre = [*position, GRIPPER_CENTRE] + [*position, 0.0, 0.0, 0.0, 0.0] * 2
    scale = [POSITION_SCALE] * 3 + [GRIPPER_SCALE] + ([POSITION_SCALE] * 3 + [1.0] * 4) * 2
    return np.array(centre * 2 + position), np.array(scale * 2 + [POSITION_SCALE] * 3)
