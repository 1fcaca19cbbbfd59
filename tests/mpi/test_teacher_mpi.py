"""A teacher on real MPI ranks: the same update as one rank, common stops, exact resumption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpd.cluster.element_job import MPIEXEC_ENVIRONMENT, mpi_command
from cpd.comm import SerialComm
from cpd.config import Config
from cpd.config.load import load, merge, read_toml, to_dict
from cpd.run.directory import Run, TeacherElement
from cpd.run.files import sha256, write_json
from cpd.run.progress import read_metrics, read_status
from tests.conftest import MINIATURE, ROOT
from tests.mpi import teacher_ranks
from tests.teachers.small_teacher import finish

SCRIPT = ("-m", "tests.mpi.teacher_ranks")
#: Four iterations of five environments and fifty steps.
SMALL: dict[str, Any] = {
    "max_env_steps": 1_000,
    "validate_every": 2,
    "num_validation_goals": 30,
    "ppo": {"hidden_sizes": [16], "num_envs": 5, "steps_per_env": 50, "minibatch_size": 50, "num_epochs": 2},
}
FAST_CHECKPOINTS = {"teacher_checkpoint_every": 1}


def teacher_tables(**teacher: Any) -> dict[str, Any]:
    return {"teacher": {**SMALL, **teacher}, "logging": FAST_CHECKPOINTS, "evaluation": {"num_episodes": 3}}


@pytest.fixture
def make_teacher_run(make_run: Callable[..., Run]) -> Callable[..., Run]:
    return lambda name, **teacher: make_run(name, **teacher_tables(**teacher))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The products of a run on two ranks that nothing disturbed."""
    root = tmp_path_factory.mktemp("straight")
    write_json(root / "config.json", to_dict(load(Config, merge(read_toml(MINIATURE), teacher_tables()), "test")))
    command = mpi_command(2, [sys.executable, *SCRIPT, "run", str(root), "1000000"])
    subprocess.run(command, cwd=ROOT, env=two_ranks(), check=True, stdin=subprocess.DEVNULL)
    return products(Run(root).teachers()[0])


def two_ranks() -> dict[str, str]:
    return {**os.environ, **MPIEXEC_ENVIRONMENT, "OMP_NUM_THREADS": "1", "CPD_RANKS": "2"}


def succeed(result: subprocess.CompletedProcess[str], code: int = 0) -> None:
    assert result.returncode == code, result.stderr


def products(teacher: TeacherElement) -> dict[str, str]:
    """Hashes of all results, and the learning curve without wall times."""
    files = [teacher.policy, teacher.evaluation, teacher.episodes, *sorted(teacher.shards.iterdir())]
    curve = [{k: v for k, v in line.items() if "seconds" not in k} for line in read_metrics(teacher.metrics)]
    return {file.name: sha256(file) for file in files} | {"curve": json.dumps(curve)}


def description(teacher: TeacherElement) -> dict[str, Any]:
    training: dict[str, Any] = json.loads(teacher.policy.with_suffix(".json").read_text())["training"]
    return training


@pytest.fixture(scope="module")
def updates(mpi, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two and three ranks learned from the same samples."""
    folder = tmp_path_factory.mktemp("updates")
    for ranks in (2, 3):
        succeed(mpi(ranks, *SCRIPT, "update", str(folder), CPD_RANKS=str(ranks)))
    return folder


def test_two_ranks_have_the_gradient_of_one(updates: Path) -> None:
    alone = teacher_ranks.update(SerialComm(), one_step=True)
    first, second = (np.load(updates / f"one-step-2-{rank}.npz") for rank in range(2))
    np.testing.assert_array_equal(first["grads"], second["grads"])
    np.testing.assert_allclose(first["grads"], alone["grads"], rtol=1e-4, atol=1e-6 * np.abs(alone["grads"]).max())
    np.testing.assert_allclose(first["normalizer"], alone["normalizer"], rtol=1e-12)
    np.testing.assert_allclose(first["learned"], alone["learned"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ranks", [2, 3])
def test_several_ranks_learn_what_one_learns(ranks: int, updates: Path) -> None:
    alone = teacher_ranks.update(SerialComm(), one_step=False)
    by_rank = [np.load(updates / f"all-{ranks}-{rank}.npz") for rank in range(ranks)]
    for other in by_rank:
        np.testing.assert_array_equal(other["values"], by_rank[0]["values"])
        np.testing.assert_array_equal(other["learned"], by_rank[0]["learned"])
    # For a gradient near zero, Adam turns rounding into a fraction of its step of 1e-3.
    np.testing.assert_allclose(by_rank[0]["values"], alone["values"], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(by_rank[0]["learned"], alone["learned"], rtol=1e-2, atol=1e-4)


def test_ranks_share_a_run_and_their_number_is_recorded(mpi, make_teacher_run) -> None:
    # Exploration is over as soon as an iteration has a success, which all ranks must agree on.
    exploration = {"start_share": 0.5, "step_rate": 0.02, "max_steps": 10, "stop_at_success": 0.0}
    one, two = (make_teacher_run(name, exploration=exploration) for name in ("one", "two"))
    finish(one)
    succeed(mpi(2, "-m", "jobs.teacher", str(two.root), CPD_RANKS="2", CPD_CPUS="1"))
    teachers = [run.teachers()[0] for run in (one, two)]
    assert all(teacher.complete.exists() for teacher in teachers)
    assert [description(teacher)["ranks"] for teacher in teachers] == [[1], [2]]
    assert len(list((teachers[1].path / "attempts").iterdir())) == 1
    # The first iteration has the same noise and goals; later ones feel rounding.
    first, other = (read_metrics(teacher.metrics)[0] for teacher in teachers)
    for key in ("env_steps", "exploring_steps", "train_return", "value_loss", "log_std", "grad_norm"):
        assert other[key] == pytest.approx(first[key], rel=1e-3), key


def test_ranks_stop_together_and_resume_exactly(mpi, make_teacher_run, straight: dict[str, str]) -> None:
    run = make_teacher_run("stopped")
    for count, code in ((160, 75), (1_000_000, 0)):
        succeed(mpi(2, *SCRIPT, "run", str(run.root), str(count), CPD_RANKS="2"), code)
        assert read_status(run.teachers()[0].status).state == ("done" if code == 0 else "stopped")
    assert products(run.teachers()[0]) == straight


@pytest.mark.slow
def test_a_killed_run_ends_the_same(mpi, make_teacher_run, straight: dict[str, str]) -> None:
    run = make_teacher_run("killed")
    teacher = run.teachers()[0]
    command = mpi_command(2, [sys.executable, *SCRIPT, "run", str(run.root), "1000000"])
    process = subprocess.Popen(command, cwd=ROOT, env=two_ranks(), start_new_session=True)
    while len(read_metrics(teacher.metrics)) < 2 and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not teacher.complete.exists()
    succeed(mpi(2, *SCRIPT, "run", str(run.root), "1000000", CPD_RANKS="2"))
    assert products(teacher) == straight
    assert description(teacher)["ranks"] == [2]


@pytest.mark.slow
def test_the_number_of_ranks_may_change_and_is_recorded(mpi, make_teacher_run) -> None:
    run = make_teacher_run("changing")
    succeed(mpi(2, *SCRIPT, "run", str(run.root), "120", CPD_RANKS="2"), 75)
    succeed(mpi(1, *SCRIPT, "run", str(run.root), "1000000"))
    assert description(run.teachers()[0])["ranks"] == [1, 2]


@pytest.mark.slow
def test_a_warm_start_is_shared(mpi, make_teacher_run) -> None:
    few = {"num_demonstrations": 3, "num_dagger_rounds": 0}
    run = make_teacher_run("warm", recipe="demo_rl", warm_start=few)
    succeed(mpi(2, *SCRIPT, "run", str(run.root), "1000000", CPD_RANKS="2"))
    assert description(run.teachers()[0])["warm_start"]["cloning_steps"] > 0


def test_parameters_that_differ_are_noticed(updates: Path) -> None:
    for rank in range(2):
        assert "rank(s) 1 " in (updates / f"differ-2-{rank}").read_text()


def test_too_few_environments_for_the_ranks_are_refused(mpi, make_teacher_run) -> None:
    narrow = make_teacher_run("narrow", ppo={**SMALL["ppo"], "num_envs": 1})
    result = mpi(2, "-m", "jobs.teacher", str(narrow.root), CPD_RANKS="2", CPD_CPUS="1", timeout=60)
    assert result.returncode != 0
    assert "teacher.ppo.num_envs = 1" in result.stderr
