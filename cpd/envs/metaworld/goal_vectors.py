"""The vectors of goals that Meta-World draws at resets.

A vector holds object and target positions, three to six numbers. `metaworld.MT1(task, seed=s)` draws fifty of
them per seed; this module draws the same vectors, but does not simulate how the hand moves to its place, which
makes MT1 slow.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import mujoco
import numpy as np
import numpy.typing as npt

from cpd.envs.metaworld.registry import metaworld_class, shared_model

#: Goals that MT1 draws for one seed.
GOALS_PER_SEED: Final = 50


@cache
def mt1_rand_vecs(task: str, seed: int) -> tuple[npt.NDArray[np.float64], ...]:
    """Return the fifty vectors of `metaworld.MT1(task, seed=seed)`, in order.

    The draws do not depend on the physics: a reset draws until its rejection test passes, and that test reads
    only the drawn positions. So the task's own reset code runs here, but without placing the hand.
    """
    env: Any = _goal_drawing_class(task)()
    env.generator = np.random.RandomState(seed)  # the legacy generator, as in MT1
    env._set_task_called = True
    vectors = []
    for _ in range(GOALS_PER_SEED):
        env.reset()
        vector = np.array(env._last_rand_vec, dtype=np.float64)
        vector.flags.writeable = False
        vectors.append(vector)
    env.close()
    return tuple(vectors)


@cache
def _goal_drawing_class(task: str) -> type[Any]:
    """Subclass the task's class: resets draw goals from a given generator and skip the physics."""
    base: Any = metaworld_class(task)

    class GoalDrawing(base):  # type: ignore[misc]
        """The task without physics."""

        def _initialize_simulation(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
            # A complete model would be compiled for this alone, and take ten times the memory.
            model = shared_model(self.fullpath).pristine_copy()
            return model, mujoco.MjData(model)

        def _reset_hand(self, steps: int = 1) -> None:
            super()._reset_hand(steps=1)

        def do_simulation(self, ctrl: Any, n_frames: Any) -> None:
            """Leave the hand where it is: moving it makes a reset slow."""
            mujoco.mj_forward(self.model, self.data)

        def _get_state_rand_vec(self) -> Any:
            space = self._random_reset_space
            self._last_rand_vec = self.generator.uniform(space.low, space.high, size=space.low.size)
            return self._last_rand_vec

    return GoalDrawing
