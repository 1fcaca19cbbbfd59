"""An interrupted `make setup` goes on: with a project that needs no packages, and real environments."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

#: Installs nothing, since there may be no network.
BACKEND = """
import base64, hashlib, zipfile
def build_editable(folder, settings=None, metadata=None):
    name = "x-1.dist-info"
    with zipfile.ZipFile(f"{folder}/x-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/METADATA", "Metadata-Version: 2.1\\nName: x\\nVersion: 1\\n")
        wheel.writestr(f"{name}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{name}/RECORD", "")
    return "x-1-py3-none-any.whl"
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    (root / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "setup", root / ".ci" / "setup")
    for name in ("requirements.lock", "requirements-readers.lock", "requirements-mpi.lock"):
        (root / name).touch()
    (root / "backend.py").write_text(BACKEND)
    (root / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        '[project]\nname = "x"\nversion = "1"\n'
    )
    mpiexec = root / "bin" / "mpiexec"
    mpiexec.parent.mkdir()
    mpiexec.write_text("#!/bin/sh\n")
    mpiexec.chmod(0o755)
    return root


def set_up(project: Path) -> subprocess.CompletedProcess[str]:
    path = f"{project / 'bin'}{os.pathsep}{os.environ['PATH']}"
    command = ["sh", ".ci/setup", sys.executable, "env"]
    return subprocess.run(command, cwd=project, env=os.environ | {"PATH": path}, capture_output=True, text=True)


def test_an_interrupted_setup_is_made_again(project: Path) -> None:
    environment = project / "env"
    # What a kill leaves: Python without pip, and a package that pip would take for installed.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (half := environment / "half-installed").touch()
    (unfinished := project / "env.unfinished").touch()
    done = set_up(project)
    assert done.returncode == 0, done.stderr
    assert not half.exists() and not unfinished.exists()
    subprocess.run([environment / "bin" / "python", "-m", "pip", "--version"], check=True, capture_output=True)
    half.touch()
    assert set_up(project).stdout == "" and half.exists()  # nothing is left to do


def test_an_environment_of_ones_own_is_never_cleared(project: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", project / "env"], check=True)
    (own := project / "env" / "own").touch()
    done = set_up(project)
    assert done.returncode == 0, done.stderr
    assert own.exists()
