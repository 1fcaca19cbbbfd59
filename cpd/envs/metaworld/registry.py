"""Meta-World's task classes by name, and fast construction of many environments of one task.

Of the compiled model, a reset writes two small arrays only. All environments of a task in a process therefore
share one model, and an environment writes its values of these arrays before it uses the model. The shared model is
a light one (`cpd.envs.metaworld.fast.model`). Meta-World's own classes and the renderer use complete models
(21 MB, 0.15 s to compile).
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

from cpd.envs.metaworld.fast.model import light_model

#: The model fields that Meta-World's resets write; a test compares all fields for all tasks.
GOAL_FIELDS: Final = ("body_pos", "site_pos")


def metaworld_class(task: str) -> type[Any]:
    """Return Meta-World's own class of a v3 task.

    Raises:
        ValueError: no such task; the message suggests the nearest name.
    """
    if task not in ALL_V3_ENVIRONMENTS:
        near = difflib.get_close_matches(task, ALL_V3_ENVIRONMENTS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "names look like 'push-v3'"
        raise ValueError(f"unknown Meta-World task {task!r}: {hint}")
    stock: type[Any] = ALL_V3_ENVIRONMENTS[task]
    return stock


class SharedModel:
    """One compiled model, shared by environments, and the owner of the goal in it. Not thread-safe.

    Attributes:
        model: the model that environments step; its `GOAL_FIELDS` belong to `owner`.
        owner: any object that identifies an environment; None if the model holds no environment's values.
        pristine: copies of the `GOAL_FIELDS` as compiled.
        mocap_is_weld_only: the position of the one mocap body enters equality constraints only, so that moving
            it changes no inertia, contact, transmission or bias force.
    """

    def __init__(self, path: str) -> None:
        self.model = light_model(path)
        # Otherwise each step clears the visualisation flags of 32,000 mesh nodes six times.
        self.model.vis.global_.bvactive = 0
        self.owner: object = None
        self._fields: list[npt.NDArray[np.float64]] = [getattr(self.model, name) for name in GOAL_FIELDS]
        self.pristine: tuple[npt.NDArray[np.float64], ...] = self.fields()
        self.mocap_is_weld_only = _mocap_is_weld_only(self.model)

    def fields(self) -> tuple[npt.NDArray[np.float64], ...]:
        """Copies of the current `GOAL_FIELDS`: positions of bodies [nbody, 3] and sites [nsite, 3], metres."""
        return tuple(field.copy() for field in self._fields)

    def pristine_copy(self) -> mujoco.MjModel:
        """A copy of the model as compiled."""
        model = copy.copy(self.model)
        for name, value in zip(GOAL_FIELDS, self.pristine, strict=True):
            getattr(model, name)[:] = value
        return model

    def take(self, owner: object, fields: tuple[npt.NDArray[np.float64], ...]) -> None:
        """Write `fields` into the model and make `owner` its owner."""
        for field, value in zip(self._fields, fields, strict=True):
            field[:] = value
        self.owner = owner


def _mocap_is_weld_only(model: mujoco.MjModel) -> bool:
    # Each condition excludes one way in which MuJoCo could read the pose of the mocap body or of its children.
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


#: This process's shared model of an XML file; the 16 used last are cached.
shared_model = lru_cache(maxsize=16)(SharedModel)
_compiled = lru_cache(maxsize=16)(mujoco.MjModel.from_xml_path)


def complete_model(path: str, width: int, height: int) -> mujoco.MjModel:
    """Return a complete model of an XML file for the caller alone: a copy, which is faster than compiling.

    Like Gymnasium's constructor, enlarge its offscreen buffer to `width` x `height` pixels.
    """
    model = copy.copy(_compiled(path))
    model.vis.global_.offwidth = max(model.vis.global_.offwidth, width)
    model.vis.global_.offheight = max(model.vis.global_.offheight, height)
    return model


@cache
def _stock_class(base: Any) -> Any:
    """Subclass one of Meta-World's classes: copy the compiled model instead of compiling the XML."""

    class CopiedModel(base):  # type: ignore[misc]
        """The task with a copied model."""

        def _initialize_simulation(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
            model = complete_model(self.fullpath, self.width, self.height)
            return model, mujoco.MjData(model)

    CopiedModel.__name__ = base.__name__
    CopiedModel.__qualname__ = base.__qualname__
    return CopiedModel


def build_stock(base: Any, **kwargs: Any) -> Any:
    """Return an instance of one of Meta-World's classes with its own model, a copy of one compiled per process."""
    return _stock_class(base)(**kwargs)
