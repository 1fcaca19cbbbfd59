"""Real Slurms of two virtual nodes on this machine."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from workbench import LONG, Workbench

from slurm.testbed.cluster import Testbed, missing_packages
from slurm.testbed.conf import Settings


def start(prefix: str, **settings: Any) -> Iterator[Workbench]:
    message = missing_packages(accounting=settings.get("accounting", False))
    if message:
        pytest.skip(message)
    # A short path: unix sockets lie in it.
    state = Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp")) / "s"
    testbed = Testbed(state)
    testbed.up(Settings(state=state, kill_wait=10, grace_seconds=15, **settings))
    try:
        yield Workbench(testbed)
    finally:
        testbed.down()
        shutil.rmtree(state.parent, ignore_errors=True)


@pytest.fixture(scope="session")
def bench() -> Iterator[Workbench]:
    """A plain cluster."""
    yield from start("cpd")


@pytest.fixture(scope="module")
def forgetful() -> Iterator[Workbench]:
    """One that forgets ended jobs at once, as some sites do, and preempts with a job's own signal."""
    yield from start("cpdf", min_job_age=2, preempt_user_signal=True)


@pytest.fixture(scope="module")
def accounted() -> Iterator[Workbench]:
    """One with slurmdbd, which forgets ended jobs at once otherwise."""
    yield from start("cpda", accounting=True, min_job_age=2)


@pytest.fixture(scope="module")
def strict() -> Iterator[Workbench]:
    """One that kills jobs which exceed their memory, and whose nodes have two simulated GPUs each."""
    yield from start("cpds", enforce_memory=True, gpus=2)


@pytest.fixture(autouse=True)
def _nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Cancel the jobs of a failed test, for which the next test would wait."""
    yield
    for name in ("bench", "forgetful", "accounted", "strict"):
        if name in request.fixturenames:
            workbench: Workbench = request.getfixturevalue(name)
            if workbench.slurm("squeue", "-h"):
                workbench.testbed.cancel_all(60.0)


@pytest.fixture(scope="session")
def finished(bench: Workbench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that went through the whole chain undisturbed."""
    root = tmp_path_factory.mktemp("runs") / "undisturbed"
    bench.launch(root, *LONG)
    bench.drain()
    return root


@pytest.fixture
def taught(finished: Path, tmp_path: Path) -> Path:
    """A run whose teachers are finished, and nothing else."""
    root = tmp_path / "run"
    root.mkdir()
    for name in ("config.json", "provenance.json", "teachers"):
        (shutil.copytree if (finished / name).is_dir() else shutil.copy2)(finished / name, root / name)
    return root
