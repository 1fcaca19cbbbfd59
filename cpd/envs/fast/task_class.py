"""Accelerated classes for Meta-World's tasks: same numbers, bit for bit, at several times the speed.

The tasks' code is neither copied nor patched. A task's functions are bound anew, in a subclass, to globals in
which slow helpers (`numpy.linalg.norm`, `reward_utils.tolerance`, SciPy's rotations) have exact fast versions;
what all tasks share is overridden by `FastSawyer`. Meta-World's own classes stay as they are, side by side.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from typing import Any, Final

from metaworld.sawyer_xyz_env import SawyerXYZEnv

from cpd.envs.fast.helpers import fast_globals, first_inexact_helper, rebind
from cpd.envs.fast.sawyer import FastSawyer
from cpd.envs.registry import metaworld_class

#: What the test suite compared step by step.
VERIFIED_VERSIONS: Final = {"metaworld": ("3.1.1",), "mujoco": ("3.3.0",)}


class UnverifiedError(RuntimeError):
    """Bit-exactness was not verified for what is installed, or does not hold on this machine."""


def check_installation() -> None:
    """Raise UnverifiedError unless acceleration is exact with the installed packages.

    The message names the package and its version, or the helper that differs from its original here.
    """
    for package, verified in VERIFIED_VERSIONS.items():
        installed = version(package)
        if installed not in verified:
            raise UnverifiedError(
                f"the accelerated environments were verified against {package} {' and '.join(verified)}, "
                f"but {installed} is installed"
            )
    if helper := _first_inexact_helper():
        raise UnverifiedError(
            f"the accelerated {helper} differs in the last bits from its original on this machine "
            f"(numpy {version('numpy')}, scipy {version('scipy')})"
        )


_first_inexact_helper = cache(first_inexact_helper)


def accelerated_class(task: str) -> type[Any]:
    """A drop-in for Meta-World's class of a task: a subclass, exact in observation, reward and info.

    See `FastSawyer` for what differs beside speed.

    Raises:
        ValueError: no such task.
        UnverifiedError: a metaworld or mujoco that it was not verified against, or inexact arithmetic here.
    """
    stock: Any = metaworld_class(task)
    check_installation()
    made: type[Any] = _accelerated(stock)
    return made


@cache
def _accelerated(stock: Any) -> Any:
    assert stock.__bases__ == (SawyerXYZEnv,)
    namespace = fast_globals(vars(sys.modules[stock.__module__]))
    members = {name: _rebound(member, namespace) for name, member in vars(stock).items()}
    for name in ("__dict__", "__weakref__"):
        members.pop(name, None)
    # In the order of method resolution, FastSawyer stands between the task's class and the shared base.
    made = types.new_class(stock.__name__, (stock, FastSawyer), exec_body=lambda body: body.update(members))
    # Tasks call their own static methods by the class's name.
    namespace[stock.__name__] = made
    return made


def _rebound(member: Any, namespace: dict[str, Any]) -> Any:
    """A class's member with its functions bound to `namespace`."""
    if isinstance(member, staticmethod):
        return staticmethod(rebind(member.__func__, namespace))
    if isinstance(member, property):
        fget, fset, fdel = (f and rebind(f, namespace) for f in (member.fget, member.fset, member.fdel))
        return property(fget, fset, fdel, member.__doc__)
    if isinstance(member, types.FunctionType):
        return rebind(_unwrapped(member), namespace)
    return member


def _unwrapped(function: types.FunctionType) -> Callable[..., Any]:
    """The function inside Meta-World's `assert_task_is_set`, whose check `FastSawyer.step` makes once."""
    if function.__qualname__.endswith("assert_task_is_set.<locals>.inner"):
        (cell,) = [
            cell
            for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
            if name == "func"
        ]
        inner: Callable[..., Any] = cell.cell_contents
        return inner
    return function
