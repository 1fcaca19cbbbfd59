"""A student with a single expert is dense, and can have as many parameters as one with several."""

from __future__ import annotations

import pytest
import torch

from cpd.config import StudentConfig
from cpd.config.student import WIDTH_MULTIPLE, dense_expert_width, final_num_experts
from cpd.student.moe import MoE
from cpd.student.network import Student
from tests.distill.synthetic import stage_data
from tests.distill.test_trainer import make_trainer, train
from tests.student.test_moe import expert

DENSE = {"num_experts": 1, "top_k": 1, "expansion": "none"}


def num_parameters(config: StudentConfig, num_experts: int) -> int:
    return sum(parameter.numel() for parameter in Student(config, 10, num_experts=num_experts).parameters())


@pytest.mark.parametrize("expansion", ["none", "per_task"])
@pytest.mark.parametrize("sizes", [{}, {"width": 32, "expert_width": 16, "num_layers": 3}])
def test_has_as_many_parameters_as_the_student_of_several_experts_or_slightly_more(expansion, sizes):
    config = StudentConfig(expansion=expansion, task_identity="none", **sizes)
    dense = StudentConfig(
        **DENSE, task_identity="none", **{**sizes, "expert_width": dense_expert_width(config, 10)}
    )
    wanted = num_parameters(config, final_num_experts(config, 10))
    per_unit = 2 * config.width * config.num_layers
    assert 0 <= num_parameters(dense, 1) - wanted < WIDTH_MULTIPLE * per_unit
    assert dense.expert_width % WIDTH_MULTIPLE == 0


def test_computes_what_one_expert_does_and_no_more():
    moe = MoE(8, 16, 1, 1, torch.float64)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter)
    x_ND = torch.randn(50, 8, dtype=torch.float64)
    valid_N = (torch.arange(50) % 3 > 0).double()
    y_ND, stats = moe(x_ND, valid_N)
    torch.testing.assert_close(y_ND, expert(moe, 0, x_ND))
    assert stats.counts_E.tolist() == stats.prob_sums_E.tolist() == [33.0] and stats.z_square_sum == 0
    y_ND.square().sum().backward()
    assert moe.router.stack.grad is None


def test_growth_of_a_dense_student_changes_no_output_by_a_single_bit():
    growing = {"expansion": "per_task", "experts_per_task": 1, "task_identity": "none"}
    trainer = make_trainer(student={**DENSE, **growing})
    train(trainer, until=60)
    data = stage_data(1)
    obs = torch.from_numpy(data.observations[None, :4]).double()
    mean_BLA = trainer.learner.student(obs).mean_BLA
    trainer.begin_stage(data)
    assert trainer.learner.student.num_experts == 2
    assert torch.equal(trainer.learner.student(obs).mean_BLA, mean_BLA)


def test_learns_and_does_not_change_its_router():
    trainer = make_trainer(
        student={**DENSE, "task_identity": "none", "width": 32},
        protection={"kind": "none"},
        distill={"steps_per_stage": 60, "lr": 5e-3, "weight_decay": 0.1},
    )
    routers = [moe.router.stack.detach().clone() for moe in trainer.learner.student.moes]
    trainer.begin_stage(stage_data(0))
    first = trainer.train_step(report=True)
    train(trainer, until=59)
    last = trainer.train_step(report=True)
    assert last.imitation < 0.3 * first.imitation
    assert last.expert_shares == [[1.0], [1.0]]
    for moe, router in zip(trainer.learner.student.moes, routers, strict=True):
        assert torch.equal(moe.router.stack, router)
