"""A recorded step, replayed on the CPU: the same operations on the same memory do what the step itself does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cpd.distill.recorded import WARM_UP, Outputs, RecordedUpdate
from cpd.distill.trainer import StudentTrainer
from tests.distill.test_static_step import SLOWLY_TRACED, trainer_in_second_stage

#: A-GEM and LwF draw data within the step.
SLOWLY = [pytest.param(label, marks=pytest.mark.slow) for label in SLOWLY_TRACED if label not in ("agem", "lwf")]
RECORDED = ["cpd", "rehearsal", *SLOWLY]


class Recorder(TorchDispatchMode):
    """Keeps every operation with its arguments and results, as a CUDA graph keeps kernels and addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        several = isinstance(results, tuple | list)
        # Other views of the same memory, since operations in place may change the shape of a result.
        values = results if several else [results]
        kept = [torch.ops.aten.alias(value) if isinstance(value, torch.Tensor) else None for value in values]
        if func.name() not in ("aten::squeeze_.dim", "aten::unsqueeze_", "aten::t_"):
            self.operations.append((func, args, kwargs or {}, kept))
        return results

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, results in self.operations:
                repeated = func(*args, **kwargs)
                if any(returned.alias_info for returned in func._schema.returns):
                    continue  # views, and results that are written in place
                repeated = repeated if isinstance(repeated, tuple | list) else [repeated]
                for result, value in zip(results, repeated, strict=True):
                    if result is not None:
                        result.copy_(value)


def state_of(trainer: StudentTrainer) -> list[torch.Tensor]:
    """Clones of everything that a step changes."""
    optimizer = trainer.learner.optimizer
    vectors = (trainer.learner.flat.values, optimizer.first_moment, optimizer.second_moment, optimizer.ages)
    return [vector.clone() for vector in (*vectors, trainer._num_finite)]


@pytest.mark.parametrize("label", RECORDED)
def test_a_replayed_step_is_the_step(label: str) -> None:
    wanted, replayed = trainer_in_second_stage(label), trainer_in_second_stage(label)
    recorders = []

    def record(step: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        before = state_of(replayed)
        with Recorder() as recorder:
            outputs = step()
        # A recording on a GPU runs nothing: undo the step.
        optimizer = replayed.learner.optimizer
        vectors = (replayed.learner.flat.values, optimizer.first_moment, optimizer.second_moment, optimizer.ages)
        for vector, value in zip((*vectors, replayed._num_finite), before, strict=True):
            vector.copy_(value)
        recorders.append(recorder)
        return recorder.replay, outputs

    replayed._run_update = RecordedUpdate(replayed._update, replayed.learner.flat, record)
    for _ in range(WARM_UP + 4):
        reports = [trainer.train_step(report=True) for trainer in (wanted, replayed)]
        assert reports[0] == reports[1]
    assert recorders
    for one, other in zip(state_of(wanted), state_of(replayed), strict=True):
        assert torch.equal(one, other)


def test_what_cannot_be_recorded_runs_operation_by_operation() -> None:
    wanted, other = trainer_in_second_stage("cpd"), trainer_in_second_stage("cpd")

    def refuse(step: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        raise RuntimeError("operation not permitted when stream is capturing")

    other._run_update = update = RecordedUpdate(other._update, other.learner.flat, refuse)
    for _ in range(WARM_UP):
        wanted.train_step()
        other.train_step()
    with pytest.warns(UserWarning, match="operation not permitted when stream is capturing") as warned:
        for _ in range(2):
            wanted.train_step()
            other.train_step()
    assert len(warned) == 1
    assert not update.is_possible
    assert torch.equal(wanted.learner.flat.values, other.learner.flat.values)
