"""Meta-World's task classes by name, and cheap construction of many environments of one task.

Resets write two small arrays of a compiled model, so all environments of a task in a process share one model
and put their own values of these arrays back when they take it over. It is a light one
(`cpd.envs.fast.model`); Meta-World's own classes and pictures get complete ones (21 MB, 0.15 s to compile).
"""

from __future__ import annotations

import copy
import difflib
from functools import cache, lru_cache
from typing import Any, Final

import mujoco
import numpy as np
import numpy.typing as npt
from metaworld.env_dict import ALL_V3_ENVIRONMENTS

from cpd.envs.fast.model import light_model

#: The model fields that Meta-World's resets write; a test compares all fields for all tasks.
GOAL_FIELDS: Final = ("body_pos", "site_pos")


def metaworld_class(task: str) -> type[Any]:
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


class SharedModel:
    """One compiled model with the token of the environment whose goal it holds. Not for several threads.

    Attributes:
        model: the model that environments step; its `GOAL_FIELDS` belong to `owner`.
        owner: any object that identifies an environment; None when nobody's values are in place.
        pristine: copies of the `GOAL_FIELDS` as compiled.
        mocap_is_weld_only: nothing but equality constraints of the one mocap body depends on where it is, so
            that moving it leaves inertias, contacts, transmissions and bias forces as they are.
    """

    def __init__(self, path: str) -> None:
        self.model = light_model(path)
        # Else each step clears the visualisation flags of 32,000 mesh nodes six times.
        self.model.vis.global_.bvactive = 0
        self.owner: object = None
        self.pristine: tuple[npt.NDArray[np.float64], ...] = self.fields()
        self.mocap_is_weld_only = _mocap_is_weld_only(self.model)

    def fields(self) -> tuple[npt.NDArray[np.float64], ...]:
        """Copies of the current `GOAL_FIELDS`: positions of bodies [nbody, 3] and sites [nsite, 3], metres."""
        return tuple(getattr(self.model, name).copy() for name in GOAL_FIELDS)

    def take(self, owner: object, fields: tuple[npt.NDArray[np.float64], ...]) -> None:
        """Make `owner` the one whose `fields` the model holds."""
        for name, value in zip(GOAL_FIELDS, fields, strict=True):
            getattr(self.model, name)[:] = value
        self.owner = owner


def _mocap_is_weld_only(model: mujoco.MjModel) -> bool:
    moved = model.body_mocapid[model.body_rootid] >= 0
    collides = (model.geom_contype | model.geom_conaffinity).astype(bool)
    return (
        moved.sum() == model.nmocap == 1
        and bool((model.eq_objtype == mujoco.mjtObj.mjOBJ_BODY).all())
        and not (collides & moved[model.geom_bodyid]).any()
        and model.ntendon == 0
        and model.nsensor == 0
        and model.nplugin == 0
        and model.opt.enableflags == 0
        and model.opt.integrator == mujoco.mjtIntegrator.mjINT_EULER
        and model.opt.solver == mujoco.mjtSolver.mjSOL_NEWTON
        and model.opt.noslip_iterations == 0
        and bool((model.actuator_trntype == mujoco.mjtTrn.mjTRN_JOINT).all())
    )


@lru_cache(maxsize=16)
def shared_model(path: str) -> SharedModel:
    """The process's one model of an XML file. Of models without environments, the last 16 used are kept."""
    return SharedModel(path)


def complete_model(path: str) -> mujoco.MjModel:
    """A model of an XML file for the caller alone: a copy of one that was compiled before, if possible."""
    return copy.copy(_compiled(path))


@lru_cache(maxsize=16)
def _compiled(path: str) -> mujoco.MjModel:
    return mujoco.MjModel.from_xml_path(path)


@cache
def _stock_class(base: Any) -> Any:
    """Subclass of one of Meta-World's classes that copies the compiled model instead of compiling the XML."""

    class CopiedModel(base):  # type: ignore[misc]
        def _initialize_simulation(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
            model = complete_model(self.fullpath)
            grow_framebuffer(model, self.width, self.height)
            return model, mujoco.MjData(model)

    CopiedModel.__name__ = base.__name__
    CopiedModel.__qualname__ = base.__qualname__
    return CopiedModel


def grow_framebuffer(model: mujoco.MjModel, width: int, height: int) -> None:
    """Make room for rendering at a size in pixels, as Gymnasium's constructor does."""
    model.vis.global_.offwidth = max(model.vis.global_.offwidth, width)
    model.vis.global_.offheight = max(model.vis.global_.offheight, height)


def build_stock(base: Any, **kwargs: Any) -> Any:
    """An instance of one of Meta-World's classes with a model of its own, compiled once per process."""
    return _stock_class(base)(**kwargs)
