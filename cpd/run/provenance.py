"""Where results come from: versions, state of the code and machine of a run, and the labels of its results."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from typing_extensions import TypedDict

from cpd.config import Config
from cpd.envs.suite import DEFAULT_SUITE, Suite
from cpd.programs import ROOT
from cpd.run.folders import KIND_KEY

PACKAGES = ("torch", "mpi4py", "metaworld", "mujoco", "submitit", "h5py", "numpy")
#: Variables of a shell or a hook that would name another repository than this code's.
REPOSITORY_VARIABLES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_COMMON_DIR", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY")


@dataclass(frozen=True)
class Labels:
    """The conditions of a result, written with every table, shard and policy.

    Versions that the suite does not state are empty. Files on Meta-World lack `suite` and `suite_versions`.
    """

    teacher_recipe: str
    horizon: int
    task_identity: str
    reward_version: str
    metaworld: str
    mujoco: str
    suite: str | None = None
    """Name of the suite; None: Meta-World."""
    suite_versions: str | None = None
    """Its other versions, as `package 1.0, other 2.1`."""

    def as_dict(self) -> dict[str, Any]:
        """Return the labels for a JSON file, without those that are None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def labels(config: Config, suite: Suite | None = None) -> Labels:
    """Return the labels of a run's results; if `suite` is given, those that a run on it would have."""
    suite = suite or config.stream.suite_object
    protocol = config.distill.protocol
    # In these cases the task selects the policy that acts: a separate student, or weights of the task's own.
    needs_task = protocol == "single_task" or (protocol == "continual" and config.protection.needs_task)
    versions = suite.versions()
    columns = {name: versions.pop(name, "") for name in ("reward_version", "metaworld", "mujoco")}
    return Labels(
        config.teacher.recipe,
        config.stream.horizon,
        "given" if needs_task else "inferred" if protocol == "isolated" else config.student.task_identity,
        **columns,
        suite=None if suite.name == DEFAULT_SUITE else suite.name,
        suite_versions=", ".join(f"{name} {number}" for name, number in versions.items()) or None,
    )


class Provenance(TypedDict):
    """What is read of provenance.json."""

    code: str


@cache
def code_version() -> str:
    """Return the commit, with `+changes` if the tree differs from it; without git, the package's version."""
    try:
        if not (ROOT / "pyproject.toml").exists():  # a wheel, which may be installed in another project's clone
            raise FileNotFoundError("no clone")
        # Git refuses a clone of another user, since its hooks could run code. This process runs its code anyway.
        trust = f"safe.directory={ROOT}"
        command = ["git", "-c", trust, "-C", str(ROOT), "describe", "--always", "--dirty=+changes", "--abbrev=12"]
        environment = {key: value for key, value in os.environ.items() if key not in REPOSITORY_VARIABLES}
        return subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=True,
            timeout=10,
            env=environment,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return version("continual-policy-distillation")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # of an extra that this machine does without
        return None


def provenance() -> dict[str, Any]:
    """Return the contents of provenance.json: versions and machine of this process."""
    return {
        KIND_KEY: "run",
        "code": code_version(),
        "python": platform.python_version(),
        "packages": {name: number for name in PACKAGES if (number := _version(name))},
        "machine": platform.machine(),
        "system": platform.platform(),
        "command": sys.argv,
    }
