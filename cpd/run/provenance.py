"""Where results come from: versions, code state, machine. Recorded once per run and in every label."""

from __future__ import annotations

import platform
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cpd.config import Config
from cpd.envs.tasks import REWARD_VERSION

PACKAGES = ("torch", "mpi4py", "metaworld", "mujoco", "submitit", "h5py", "numpy")


@dataclass(frozen=True)
class Labels:
    """What every record, shard and table says of its conditions."""

    teacher_recipe: str
    horizon: int
    task_identity: str
    reward_version: str
    metaworld: str
    mujoco: str


def labels(config: Config) -> Labels:
    """The labels of a run's results.

    Where the task chooses what acts, PackNet's mask or one of single tasks' students, its identity is `given`.
    """
    protocol = config.distill.protocol
    is_told = protocol == "single_task" or (protocol == "continual" and config.protection.kind == "packnet")
    return Labels(
        config.teacher.recipe,
        config.stream.horizon,
        "given" if is_told else config.student.task_identity,
        REWARD_VERSION,
        version("metaworld"),
        version("mujoco"),
    )


@cache
def code_version() -> str:
    """The commit of the code, with `+changes` if the tree differs from it; the package's version without git."""
    root = Path(__file__).resolve().parents[2]
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty=+changes", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return version("continual-policy-distillation")


def provenance() -> dict[str, Any]:
    """Versions and machine of this process, for provenance.json."""
    return {
        "code": code_version(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "machine": platform.machine(),
        "system": platform.platform(),
        "command": sys.argv,
    }
