"""Meta-World's task classes by name, and cheap construction of many environments of one task."""

from __future__ import annotations

import copy
import difflib
from functools import cache
from typing import Any

import mujoco
from metaworld.env_dict import ALL_V3_ENVIRONMENTS


def task_class(task: str) -> type[Any]:
    """Meta-World's own class of a v3 task.

    Raises:
        ValueError: no such task; the message suggests the nearest name.
    """
    if task not in ALL_V3_ENVIRONMENTS:
        near = difflib.get_close_matches(task, ALL_V3_ENVIRONMENTS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "names look like 'push-v3'"
        raise ValueError(f"unknown Meta-World task {task!r}: {hint}")
    found: type[Any] = ALL_V3_ENVIRONMENTS[task]
    return found


@cache
def _compiled_model(path: str) -> mujoco.MjModel:
    """The compiled model of an XML file; callers copy it and never change it."""
    return mujoco.MjModel.from_xml_path(path)


@cache
def _cheap_class(base: Any) -> Any:
    """Subclass that copies the compiled model (12 ms) instead of compiling the XML (150 ms)."""

    class CopiedModel(base):  # type: ignore[misc]
        def _initialize_simulation(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
            model = copy.copy(_compiled_model(self.fullpath))
            model.vis.global_.offwidth = max(model.vis.global_.offwidth, self.width)
            model.vis.global_.offheight = max(model.vis.global_.offheight, self.height)
            return model, mujoco.MjData(model)

    CopiedModel.__name__ = base.__name__
    CopiedModel.__qualname__ = base.__qualname__
    return CopiedModel


def build_env(base: Any, **kwargs: Any) -> Any:
    """An instance of a Meta-World class, compiling each XML model once per process."""
    return _cheap_class(base)(**kwargs)
