"""Accelerated classes for Meta-World's tasks: the same bits at several times the speed.

The tasks' code is neither copied nor patched. A subclass rebinds a task's functions to globals in which exact,
fast versions replace slow helpers (`numpy.linalg.norm`, `reward_utils.tolerance`, SciPy's rotations).
`FastSawyer` overrides what all tasks share. Meta-World's own classes stay unchanged.
"""

from __future__ import annotations

import inspect
import sys
import types
from functools import cache
from importlib.metadata import version
from typing import Any, Final

from metaworld.sawyer_xyz_env import SawyerXYZEnv

from cpd.envs.metaworld.fast.helpers import fast_globals, first_inexact_helper, rebind
from cpd.envs.metaworld.fast.sawyer import FastSawyer
from cpd.envs.metaworld.registry import metaworld_class

#: Versions that the test suite compared step by step.
VERIFIED_VERSIONS: Final = {"metaworld": ("3.1.1",), "mujoco": ("3.3.0",)}


class UnverifiedError(RuntimeError):
    """Bit-exactness is not verified for the installed versions, or does not hold on this machine."""


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
    if helper := first_inexact_helper():
        raise UnverifiedError(
            f"the accelerated {helper} differs in the last bits from its original on this machine "
            f"(numpy {version('numpy')}, scipy {version('scipy')})"
        )


def accelerated_class(task: str) -> type[Any]:
    """Return a drop-in subclass of Meta-World's class of a task, exact in observation, reward and info.

    See `FastSawyer` for the differences other than speed.

    Raises:
        ValueError: no such task.
        UnverifiedError: unverified versions of metaworld or mujoco, or inexact arithmetic on this machine.
    """
    stock: Any = metaworld_class(task)
    check_installation()
    return _accelerated(stock)


@cache
def _accelerated(stock: Any) -> type[Any]:
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
    """Rebind the functions of a class's member to `namespace`."""
    if isinstance(member, staticmethod):
        return staticmethod(rebind(member.__func__, namespace))
    if isinstance(member, property):
        fget, fset, fdel = (f and rebind(f, namespace) for f in (member.fget, member.fset, member.fdel))
        return property(fget, fset, fdel, member.__doc__)
    if isinstance(member, types.FunctionType):
        if member.__qualname__.endswith("assert_task_is_set.<locals>.inner"):
            # Meta-World's check, which `FastSawyer.step` makes once.
            member = inspect.getclosurevars(member).nonlocals["func"]
        return rebind(member, namespace)
    return member
