"""Jobs whose Python is not the launcher's: one in a container, or one that `setup` activates."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from cpd.cluster.pickles import PROGRAM
from tests.cluster.test_sbatch import profile, srun, tell
from tests.conftest import ROOT

CONTAINERS = ROOT / "slurm" / "containers"
#: Stands for srun: drops its options, and runs the command.
SRUN = """
srun() { while [ "${1#-}" != "$1" ]; do case $1 in --output|--error) shift;; esac; shift; done; "$@"; }
conda() { PATH=$PWD/envs/$2/bin:$PATH; }
"""
#: Stands for a container, and for the Python of a conda environment: writes down how it was called.
RECORDER = '#!/bin/sh\nprintf "%s\\n" "$0" "$@" > called\n'


@pytest.fixture
def recorder(tmp_path: Path) -> Path:
    path = tmp_path / "envs" / "mine" / "bin" / "python"
    path.parent.mkdir(parents=True)
    path.write_text(RECORDER)
    path.chmod(0o755)
    shutil.copy(path, tmp_path / "apptainer")
    return path


@pytest.mark.parametrize("role", ["teacher-1", "student-2"])
def test_a_job_runs_the_python_of_the_profile(make_run, role: str, recorder: Path, tmp_path: Path) -> None:
    """In the container that it names, or the one that `conda activate` finds first; also with several ranks."""
    run = make_run()
    image = [str(tmp_path / "apptainer"), "exec", "my image.sif", "python"]
    for site, command in (
        (profile(python=shlex.join(image)), image),
        (profile(python="python", setup=["conda activate mine"]), [str(recorder)]),
    ):
        text = tell(run, site)[role]
        assert ("--mpi=pmi2" in srun(text)) == (role == "student-2")
        subprocess.run(["bash", "-c", SRUN + text], cwd=tmp_path, check=True)
        called = (tmp_path / "called").read_text().splitlines()
        assert called == [*command, "-u", "-m", PROGRAM, str(run.logs.absolute())]


def test_definitions_of_images_copy_what_the_package_needs() -> None:
    docker = re.findall(r"^COPY (.+) \S+$", (CONTAINERS / "Dockerfile").read_text(), flags=re.MULTILINE)
    (apptainer,) = re.findall(r"^%files\n(.+) \S+$", (CONTAINERS / "cpd.def").read_text(), flags=re.MULTILINE)
    names = " ".join(docker).split()
    assert names == apptainer.split()
    assert all((ROOT / name).exists() for name in names)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("apptainer", ["build", "{image}", "slurm/containers/cpd.def"]),
        ("docker", ["build", "-f", "slurm/containers/Dockerfile", "."]),
        ("podman", ["build", "-f", "slurm/containers/Dockerfile", "."]),
    ],
)
def test_an_image_is_built(tool: str, arguments: list[str], tmp_path: Path) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    words = [tool, *(word.format(image=tmp_path / "cpd.sif") for word in arguments)]
    subprocess.run(words, cwd=ROOT, check=True)
