"""Distillation on real MPI ranks: the number of ranks changes nothing but rounding."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.numpy

from cpd.comm import SerialComm
from cpd.distill import run_student as run_student_module
from cpd.distill.run_student import run_student
from cpd.run.interrupt import Interrupt, InterruptedBySignal
from cpd.run.progress import read_status
from tests.distill.synthetic import write_teachers
from tests.mpi import distill_ranks

SCRIPT = ("-m", "tests.mpi.distill_ranks")
#: Methods whose steps sum in different ways: frozen experts and importance; the balance of experts within the
#: forward pass; parameters that freeze within a stage; two gradients a step.
IN_BUCKETS = ["ours", "plain", "packnet", "agem"]
#: Tables of a run without environments: stages of 40 steps in float64, checked after every step.
QUICK = {
    "stream": {"horizon": 60},
    "distill": {"precision": "float64", "batch_size": 16},
    "evaluation": {"curve_points": 0},
    "logging": {"checkpoint_every": 7},
}


@pytest.fixture
def make_student_run(make_run):
    def make(name: str):
        run = make_run(name, **QUICK)
        write_teachers(run, run.students()[0])
        return run

    return make


def final_weights(run) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(run.students()[0].stage_policy(1))


def succeed(result) -> None:
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def on_two_ranks(mpi, tmp_path_factory):
    """The folders of what two ranks trained, by backend: one start of MPI for all methods."""

    def trained(backend: str, methods: list[str]):
        if backend not in folders:
            folders[backend] = tmp_path_factory.mktemp(backend)
            arguments = ("train", str(folders[backend]), *methods)
            succeed(mpi(2, *SCRIPT, backend, *arguments, timeout=280, CPD_RANKS="2"))
        return folders[backend]

    folders = {}
    return trained


def compare_with_one_rank(folder, method: str) -> None:
    alone = distill_ranks.train(SerialComm(), method)
    clipped = (alone["norms"] > alone["max_norm"]).mean()
    assert clipped > 0.2 and (clipped < 1.0 or method != "ours"), "clipping should be on in part of the steps"
    first, second = (np.load(folder / f"{method}-{rank}.npz") for rank in range(2))
    np.testing.assert_array_equal(first["values"], second["values"])
    assert len(alone["losses"]) == (135 if method == "ours" else 60)
    np.testing.assert_allclose(first["losses"], alone["losses"], rtol=1e-8)
    scale = np.abs(alone["values"]).mean()
    np.testing.assert_allclose(first["values"], alone["values"], rtol=1e-8, atol=1e-8 * scale)
    np.testing.assert_array_equal(first["memory"], alone["memory"])


@pytest.mark.parametrize("method", distill_ranks.METHODS)
def test_two_ranks_train_the_student_that_one_trains(on_two_ranks, method):
    compare_with_one_rank(on_two_ranks("mpi", list(distill_ranks.METHODS)), method)


@pytest.mark.parametrize("method", IN_BUCKETS)
def test_buckets_of_torch_distributed_train_the_same_student(on_two_ranks, method):
    compare_with_one_rank(on_two_ranks("gloo", IN_BUCKETS), method)


@pytest.mark.parametrize("backend", ["mpi", "gloo"])
def test_ranks_stop_together_and_another_number_resumes(mpi, make_student_run, monkeypatch, backend):
    monkeypatch.setattr(run_student_module, "AGREE_EVERY", 1)
    straight = make_student_run("straight")
    run_student(straight, straight.students()[0], SerialComm(), interrupt=Interrupt(), log=lambda line: None)
    run = make_student_run("changing")
    element = run.students()[0]
    for ranks, count, code in ((2, 11, 75), (1, 20, 75), (2, 10**6, 0)):
        if ranks == 1:
            with pytest.raises(InterruptedBySignal):
                run_student(
                    run, element, SerialComm(), interrupt=distill_ranks.AskedAfter(count), log=lambda line: None
                )
        else:
            result = mpi(ranks, *SCRIPT, backend, "run", str(run.root), str(count), CPD_RANKS=str(ranks))
            assert result.returncode == code, result.stderr
        assert element.complete.exists() == (code == 0)
        record = read_status(element.status)
        assert record.state == ("done" if code == 0 else "stopped")
        if count == 11:  # processor time of the first attempt: that of both ranks
            first, second = (float((run.root / f"cpu-{rank}").read_text()) for rank in range(2))
            assert max(first, second) < record.cpu_seconds <= first + second
    expected, weights = final_weights(straight), final_weights(run)
    assert expected.keys() == weights.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(weights[name], value, rtol=1e-8, atol=1e-9, err_msg=name)
    steps = [line["step"] for line in map(json.loads, run.students()[0].metrics.open()) if "step" in line]
    assert steps == [1, 5, 10, 15, 20, 25, 30, 35, 40] * 2


def test_a_failure_on_one_rank_ends_all_of_them(mpi, make_student_run):
    run = make_student_run("broken")
    shards = run.teacher_of("window-close-v3", 1).shards
    (shards / "shard-00000.h5").write_bytes(b"damaged")
    result = mpi(2, "-m", "jobs.distill", str(run.root), CPD_RANKS="2", timeout=60)
    assert result.returncode != 0
    assert "shard-00000.h5" in result.stderr
    assert not run.students()[0].complete.exists()


@pytest.mark.parametrize("how", ["raises", "killed"])
@pytest.mark.parametrize("backend", ["mpi", "gloo"])
def test_a_failure_within_a_step_ends_all_ranks(mpi, make_student_run, backend, how):
    run = make_student_run("failing")
    result = mpi(2, *SCRIPT, backend, "fail", str(run.root), how, CPD_RANKS="2", timeout=60)
    assert result.returncode != 0
    assert not run.students()[0].complete.exists()
    if how == "raises":
        assert "this rank alone fails" in result.stderr
        assert read_status(run.students()[0].status).state == "failed"


def test_missing_ranks_are_refused(mpi, make_student_run):
    run = make_student_run("short")
    result = mpi(2, "-m", "jobs.distill", str(run.root), CPD_RANKS="3", timeout=60)
    assert result.returncode != 0
    assert "CommSizeError" in result.stderr
    assert not (run.students()[0].path / "checkpoints").exists()
