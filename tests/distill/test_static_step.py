"""A step is the same operations on the same shapes every time, and never reads a result.

A GPU can then be given a step, or a recording of it, without waiting. This needs no GPU to show: the whole step is
traced as one graph.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cpd.comm import SerialComm
from cpd.config import Config
from cpd.config.load import load, merge, to_dict
from cpd.distill.trainer import StudentTrainer
from jobs.launch_options import load_recipe
from tests.distill.synthetic import stage_data

SMALL = {
    "student": {"width": 16, "num_heads": 2, "opening_steps": 4},
    "rollouts": {"num_steps": 280},
    "memory": {"share": 0.1},
    "distill": {"steps_per_stage": 20, "batch_size": 16},
}
ABLATION = load_recipe("ablation", [])
#: Variants whose steps differ; all others train with one of these steps on other data or with other numbers.
SLOWLY_TRACED = [
    "dense-replay",
    "ewc",
    "agem",
    "derpp",
    "lwf",
    "packnet",
    "lora",
    "hat",
    "no-expansion",
    "scaled-masks",
]
TRACED = [
    ("cpd", "float32"),
    ("rehearsal", "bfloat16"),
    *(pytest.param(label, "float32", marks=pytest.mark.slow) for label in SLOWLY_TRACED),
]


def trainer_in_second_stage(label: str, precision: str = "float32") -> StudentTrainer:
    tables = merge(SMALL, {"distill": {"precision": precision}})
    config = load(Config, merge(to_dict(ABLATION.of_method(label)), tables), label)
    trainer = StudentTrainer(config, 1, SerialComm(), torch.device("cpu"))
    for stage in range(2):
        trainer.begin_stage(stage_data(stage))
        trainer.train_step()
        if stage == 0:
            trainer.end_stage(stage_data(0))
    return trainer


class NoReading(TorchDispatchMode):
    """Refuses operations that read elements, or whose results have shapes that depend on elements."""

    REFUSED = ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "unique", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        assert not name.startswith(self.REFUSED), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("label", ABLATION.methods)
def test_a_step_reads_no_result(label: str) -> None:
    trainer = trainer_in_second_stage(label)
    with NoReading():
        for _ in range(3):
            trainer.train_step()
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            trainer.check_finite()


@pytest.mark.parametrize(("label", "precision"), TRACED)
def test_a_step_is_one_graph(label: str, precision: str) -> None:
    wanted, traced = (trainer_in_second_stage(label, precision) for _ in range(2))
    old_values = wanted.learner.flat.values.clone()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        traced._run_update = torch.compile(traced._update, fullgraph=True, dynamic=False, backend="eager")
        traced.train_step()
    wanted.train_step()
    torch.testing.assert_close(traced.learner.flat.values, wanted.learner.flat.values)
    assert not torch.equal(traced.learner.flat.values, old_values)
