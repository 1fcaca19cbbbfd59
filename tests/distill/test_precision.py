"""Mixed precision on the CPU: what runs in bfloat16, and what stays in float32."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cpd.distill.trainer import StudentTrainer
from tests.distill.synthetic import stage_data
from tests.distill.test_trainer import PLAIN, make_trainer

#: All experts of the task for each token; chosen experts, with replay; labels by the student itself.
VARIANTS: dict[str, dict[str, dict[str, object]]] = {
    "dense": {},
    "chosen": {name: table for name, table in PLAIN.items() if name != "protection"},
    "rehearsal": {"distill": {"replay_share": 0.5, "rehearsal": True}},
}


class ProductTypes(TorchDispatchMode):
    """Records the types of operands of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().split(".")[0] in ("aten::mm", "aten::addmm", "cpd::grouped_product", "cpd::grouped_outer"):
            self.seen |= {arg.dtype for arg in args if isinstance(arg, torch.Tensor) and arg.is_floating_point()}
        return func(*args, **(kwargs or {}))


def second_stage(variant: str, precision: str) -> tuple[StudentTrainer, list[float]]:
    """The trainer after a few steps of its second stage, and the losses of these."""
    tables = VARIANTS[variant]
    trainer = make_trainer(**{**tables, "distill": {**tables.get("distill", {}), "precision": precision}})
    for task in range(2):
        trainer.begin_stage(stage_data(task))
        reports = [trainer.train_step(report=True) for _ in range(4)]
        if task == 0:
            trainer.end_stage(stage_data(0))
    return trainer, [report.loss for report in reports if report]


@pytest.mark.parametrize("variant", VARIANTS)
def test_products_are_mixed_and_the_rest_is_float32(variant: str) -> None:
    mixed, losses = second_stage(variant, "bfloat16")
    _, wanted = second_stage(variant, "float32")
    assert losses != wanted
    assert losses == pytest.approx(wanted, rel=0.02)
    learner = mixed.learner
    vectors = (learner.flat.values, learner.flat.grads, learner.optimizer.first_moment)
    assert {vector.dtype for vector in vectors} == {torch.float32}
    with ProductTypes() as products:
        batch = learner.source.batch(9)
        terms = learner.gradient(batch)
    assert products.seen == {torch.bfloat16, torch.float32}  # the router's, the head's and the embedding's
    assert {term.dtype for term in terms} == {torch.float32}
    # Sums over tokens would be rounded in bfloat16, which knows no odd number above 256.
    assert terms.counts_LE.sum(1).tolist() == [2 * batch.num_tokens] * 2
    with torch.no_grad(), ProductTypes() as acting:
        learner.student(batch.obs_RLO, task_B=batch.task_R)
    assert acting.seen == {torch.float32}
