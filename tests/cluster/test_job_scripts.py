"""The scripts of jobs, run as far as that needs no Slurm."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cpd.cluster.queue import state_in_log
from cpd.config.profile import SETUP_FAILED
from tests.cluster.test_sbatch import options, profile, srun, tell


def test_roles_differ_in_software(make_run) -> None:
    site = profile(
        modules=["gcc/13"],
        python="singularity exec 'my image.sif' python",
        srun_mpi="",
        sbatch={"export": "NONE"},
        student={"ranks": 2, "gpus": 2, "gpu_type": "a100", "modules": [], "setup": ["export A=1"], "python": ""},
        evaluation={"ranks": 2, "modules": ["$(rm) x"], "srun_args": ["--cpu-bind=cores"]},
    )
    chain = tell(make_run(), site)
    teacher, student, evaluation = (chain[name] for name in ("teacher-1", "student-2", "evaluation-3"))
    assert options(teacher)["export"] == "NONE"
    assert all("--export=ALL" in srun(text) for text in chain.values())
    assert not any(word.startswith("--mpi") for text in chain.values() for word in srun(text))
    assert srun(teacher)[-6:-3] == ["my image.sif", "python", "-u"]
    assert sys.executable in srun(student) and "module" not in student
    assert options(student)["gpus-per-node"] == "a100:4"
    assert "\nmodule load '$(rm) x' ||" in evaluation
    assert "--cpu-bind=cores" in srun(evaluation) and "--cpu-bind=cores" not in srun(student)


@pytest.mark.parametrize(
    ("modules", "setup", "told"),
    [
        (["gcc/13", "a b"], [], "setup failed: module load gcc/13 'a b'"),
        (
            [],
            ["false && echo x || export A=$B", "if false; then", "echo", "fi", "ls '/no where'"],
            "ls '/no where'",
        ),
        ([], ["absent --x", "exit 0"], "absent --x"),
    ],
)
def test_a_setup_line_that_fails_ends_the_job_by_name(make_run, modules, setup, told: str) -> None:
    text = tell(make_run(), profile(modules=modules, setup=setup))["teacher-1"].replace("\nsrun", "\necho")
    module = "module() { echo $#; return 1; }\n"
    done = subprocess.run(["bash", "-c", module + text], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "--unbuffered" not in done.stdout
    assert f"{SETUP_FAILED}: " in done.stderr and told in done.stderr
    assert state_in_log(done.stderr.splitlines()) == "SETUP"
