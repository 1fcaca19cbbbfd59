"""Finds a way to render without a display. Imports no simulator: mujoco chooses one when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

#: MuJoCo's ways to render without a display: EGL uses a GPU if there is one, OSMesa never does.
BACKENDS = ("egl", "osmesa")
_PROBE = """
import mujoco
context = mujoco.GLContext(8, 8)
context.make_current()
mujoco.MjrContext(mujoco.MjModel.from_xml_string("<mujoco/>"), mujoco.mjtFontScale.mjFONTSCALE_100)
print("renders")
"""


class GraphicsError(ValueError):
    """Nothing can be rendered on this machine."""


def choose_graphics(backends: Sequence[str] = BACKENDS) -> str:
    """Set MUJOCO_GL to the first of `backends` that renders, and return it; call it before mujoco is imported.

    Raises:
        GraphicsError: if none does; the message names the packages to install.
    """
    failures = []
    for backend in backends:
        environment = os.environ | {"MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend}
        done = subprocess.run(
            [sys.executable, "-c", _PROBE], env=environment, capture_output=True, text=True, errors="replace"
        )
        if done.returncode == 0 and "renders" in done.stdout:
            os.environ |= {"MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend}
            return backend
        # Errors of clean-up may follow the first one.
        errors = [line for line in done.stderr.splitlines() if "Error" in line and not line.startswith(" ")]
        failures.append(f"{backend}: {errors[0] if errors else f'exit status {done.returncode}'}")
    raise GraphicsError(
        "this machine cannot render: MuJoCo finds neither EGL nor OSMesa. On Debian and Ubuntu, install one with "
        "`apt-get install libegl1 libgl1-mesa-dri` (EGL) or `apt-get install libosmesa6` (OSMesa); on a cluster, "
        "`module avail mesa` lists what to `module load`, and nodes with GPUs have EGL. MuJoCo says:\n"
        + "\n".join(f"  {failure}" for failure in failures)
    )
