"""Accelerated environments render the same pictures as Meta-World's own, although their models are light."""

import os
import subprocess
import sys

import numpy as np
import pytest

from cpd.envs.metaworld.fast.task_class import accelerated_class
from cpd.envs.metaworld.registry import build_stock, metaworld_class
from tests.conftest import goal_set

NO_GRAPHICS = 77


def frames(env, task):
    """Pictures after resets, one of them from the cache, and within episodes."""
    actions = np.random.default_rng(3).uniform(-1, 1, (12, 4)).astype(np.float32)
    env._set_task_called = env._freeze_rand_vec = True
    for index in (0, 1, 0):
        env._last_rand_vec = goal_set(task, "training")[index].vector.copy()
        env.reset()
        yield env.render()
        for action in actions:
            env.step(action)
        yield env.render()
    env.close()


def compare(task):
    import mujoco

    try:
        mujoco.GLContext(8, 8).make_current()
    except Exception as error:  # whatever this machine's graphics libraries raise
        print(error)
        sys.exit(NO_GRAPHICS)
    settings = {"render_mode": "rgb_array", "width": 160, "height": 160, "camera_name": "corner2"}
    stock, fast = build_stock(metaworld_class(task), **settings), accelerated_class(task)(**settings)
    pairs = list(zip(frames(stock, task), frames(fast, task), strict=True))
    for expected, shown in pairs:
        # A rasteriser may round single pixels differently; a missing geom changes hundreds, by much.
        differences = np.abs(expected.astype(int) - shown)
        assert differences.max() <= 2 and (differences > 0).mean() < 1e-3
    assert len(pairs) == 6 and all(expected.std() > 10 for expected, _ in pairs)
    assert not np.array_equal(pairs[0][1], pairs[1][1]) and not np.array_equal(pairs[0][1], pairs[2][1])


@pytest.mark.parametrize("task", ["basketball-v3", "window-close-v3"])
def test_pictures_are_those_of_metaworld(task):
    # MuJoCo chooses how to render when it is imported, hence a process of its own.
    code = f"from tests.envs.test_fast_rendering import compare; compare({task!r})"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | {"MUJOCO_GL": "egl"},
        capture_output=True,
        text=True,
    )
    if done.returncode == NO_GRAPHICS or "mujoco.egl" in done.stderr:
        pytest.skip(f"nothing can be rendered here: {(done.stdout + done.stderr).strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
