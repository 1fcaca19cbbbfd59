"""On an accelerator: what the CPU does to rounding, resumption, and a whole student element.

Skipped where no device is visible.
"""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from cpd.comm import SerialComm
from cpd.distill.run_student import run_student
from cpd.distill.trainer import StudentTrainer
from cpd.run.interrupt import Interrupt
from cpd.run.tables import CurveRow, read_rows
from cpd.student.actor import StudentActor
from tests.distill.synthetic import stage_data, write_teachers
from tests.distill.test_trainer import SHORT, make_short, through_a_file, train
from tests.mpi import distill_ranks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def make(name: str, device: torch.device) -> StudentTrainer:
    return StudentTrainer(make_short(name).config, 1, SerialComm(), device)


@pytest.fixture(scope="module", params=sorted(SHORT))
def trained(request) -> tuple[str, StudentTrainer]:
    """A short run of three stages on the accelerator, in float64."""
    trainer = make(request.param, CUDA)
    train(trainer)
    return request.param, trainer


def test_distillation_learns_what_it_learns_on_the_cpu(trained) -> None:
    name, trainer = trained
    wanted = make(name, CPU)
    train(wanted)
    assert trainer.learner.flat.values.device == CUDA
    assert trainer.learner.student.num_experts == wanted.learner.student.num_experts
    assert [decision.sources for decision in trainer.learner.progress.growth] == [
        decision.sources for decision in wanted.learner.progress.growth
    ]
    torch.testing.assert_close(trainer.learner.flat.values.cpu(), wanted.learner.flat.values, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("until", [10, 25, 30])
def test_resuming_equals_going_on(trained, until: int) -> None:
    name, wanted = trained
    first, resumed = make(name, CUDA), make(name, CUDA)
    train(first, until=until)
    resumed.restore(through_a_file(first.state()))
    train(resumed)
    torch.testing.assert_close(resumed.learner.flat.values, wanted.learner.flat.values, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        resumed.learner.optimizer.second_moment, wanted.learner.optimizer.second_moment, rtol=1e-6, atol=1e-15
    )


def test_acts_as_on_the_cpu(trained) -> None:
    _, trainer = trained
    tasks, observations = trainer.config.stream.distinct_tasks, stage_data(1).observations
    acted = []
    for student in (trainer.learner.student, copy.deepcopy(trainer.learner.student).to(CPU)):
        actor = StudentActor(student, tasks)
        actor.reset(tasks)
        acted.append(np.stack([actor.act(observations[[step, step + 30, step + 60]]) for step in range(20)]))
    np.testing.assert_allclose(acted[0], acted[1], atol=1e-6)


def test_a_student_element_trains_and_acts_in_real_environments(make_run) -> None:
    run = make_run(stream={"horizon": 20}, distill={"batch_size": 16})
    element = run.students()[0]
    write_teachers(run, element)
    lines: list[str] = []
    run_student(run, element, SerialComm(), interrupt=Interrupt(), log=lines.append)
    assert element.complete.exists()
    assert [row.episodes for row in read_rows(element.curves, CurveRow)] == [2, 2, 2, 2]
    losses = [line for line in map(json.loads, element.metrics.open()) if "step" in line]
    assert np.isfinite([line["loss"] for line in losses]).all()
    assert losses[-1]["imitation"] < losses[0]["imitation"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two ranks need two CUDA devices")
@pytest.mark.parametrize("method", ["ours", "plain"])
def test_two_ranks_sum_by_nccl(mpi, tmp_path, method: str) -> None:
    arguments = ("-m", "tests.mpi.distill_ranks", "nccl", "train", str(tmp_path), method)
    result = mpi(2, *arguments, timeout=280, CPD_RANKS="2")
    assert result.returncode == 0, result.stderr
    alone = distill_ranks.train(SerialComm(), method)
    first, second = (np.load(tmp_path / f"{method}-{rank}.npz") for rank in range(2))
    np.testing.assert_array_equal(first["values"], second["values"])
    np.testing.assert_allclose(first["losses"], alone["losses"], rtol=1e-6)
    np.testing.assert_allclose(first["values"], alone["values"], rtol=1e-6, atol=1e-8)
