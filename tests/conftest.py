"""Shared by all tests: a small configuration, and real MPI."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpd.cluster.element_job import MPIEXEC_ENVIRONMENT, mpi_command
from cpd.config import Config
from cpd.config.load import load, merge, read_toml, to_dict
from cpd.envs.suite import load_suite
from cpd.run.directory import Run
from cpd.run.files import write_json

ROOT = Path(__file__).resolve().parent.parent
MINIATURE = ROOT / "tests" / "recipes" / "miniature.toml"
#: The goals of Meta-World's tasks.
goal_set = load_suite().goal_set


@pytest.fixture
def make_config() -> Callable[..., Config]:
    """The miniature recipe with tables of overrides."""
    return lambda **over: load(Config, merge(read_toml(MINIATURE), over), "test")


@pytest.fixture
def make_run(tmp_path: Path, make_config: Callable[..., Config]) -> Callable[..., Run]:
    """A run directory of the miniature recipe with tables of overrides."""

    def make(name: str = "run", **over: Any) -> Run:
        root = tmp_path / name
        write_json(root / "config.json", to_dict(make_config(**over)))
        (root / "logs").mkdir()
        return Run(root)

    return make


@pytest.fixture(scope="session")
def mpi() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a Python command line on a number of real MPI ranks."""

    def run(ranks: int, *arguments: str, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **MPIEXEC_ENVIRONMENT, "OMP_NUM_THREADS": "1", **env}
        command = mpi_command(ranks, [sys.executable, *arguments])
        return subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            timeout=timeout,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )

    return run
