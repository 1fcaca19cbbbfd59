"""Training of a teacher: exploration, validation, stopping, selection, divergence."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpd.comm import DivergedError
from cpd.run.checkpoint import published
from cpd.run.interrupt import Interrupt, InterruptedBySignal
from cpd.run.progress import read_metrics, read_status
from cpd.teachers import ppo
from cpd.teachers import trainer as training_module
from cpd.teachers.policy import load_policy
from cpd.teachers.rollout import sample
from tests.teachers.small_teacher import SMALL, curve, finish, new_run, products, with_teacher

pytestmark = pytest.mark.usefixtures("validate_failing_policies")


def test_exploring_starts_count_as_environment_steps(tmp_path: Path) -> None:
    teacher = finish(new_run(tmp_path, **with_teacher(exploration={"start_share": 1.0, "max_steps": 20})))
    counts = [record["env_steps"] for record in read_metrics(teacher.metrics)]
    added = np.diff([0, *counts])
    # Two episodes for each of four environments, unless some succeed; what is added to the iteration's 200 varies.
    assert all(steps >= 200 + 4 for steps in added)
    assert len(set(added.tolist())) > 1
    assert 1_200 - 200 - 8 * 20 < counts[-1] <= 1_200 + 8 * 20


EXPLORATION = {"start_share": 1.0, "max_steps": 20, "stop_at_success": 0.4}


@pytest.fixture
def succeeding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the success rate of the first episodes of every iteration by a fixed one."""
    rates = [0.2, 0.4, 0.5, 0.1, 0.9, 0.0]

    def sampled(*arguments: Any, **named: Any) -> Any:
        batch, iteration = sample(*arguments, **named), arguments[6]
        return batch and replace(batch, train_success=rates[iteration])

    monkeypatch.setattr(training_module, "sample", sampled)


def exploring_tables(min_log_std: float = -3.0, **ppo: float) -> dict[str, Any]:
    """Six iterations that explore until more than .4 of episodes succeed; the stopping rule ends them."""
    ends = {"max_env_steps": 3_000, "gate": 0.0, "stop_success": 0.0, "stop_passes": 3}
    exploration = {**EXPLORATION, "min_log_std": min_log_std}
    return with_teacher(**ends, exploration=exploration, ppo={**SMALL["teacher"]["ppo"], **ppo})


@pytest.mark.usefixtures("succeeding")
def test_exploration_stops_permanently_once_enough_episodes_succeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ppo, "MAX_LOG_STD", -0.3)
    run = new_run(tmp_path, **exploring_tables(learning_rate=0.1, min_log_std=-0.3))
    records = read_metrics(finish(run).metrics)
    assert [record["exploring_steps"] > 0 for record in records] == [True] * 3 + [False] * 3
    assert [record["log_std"] for record in records[:3]] == pytest.approx([-0.3] * 3)
    assert all(record["log_std"] < -0.301 for record in records[3:])


@pytest.mark.usefixtures("succeeding")
def test_that_exploring_is_over_survives_interruptions(
    tmp_path: Path, counting_interrupt: Callable[[int], Interrupt]
) -> None:
    undisturbed, interrupted = (new_run(tmp_path / name, **exploring_tables()) for name in ("whole", "parts"))
    teacher = interrupted.teachers()[0]
    for _ in range(12):
        with contextlib.suppress(InterruptedBySignal):
            finish(interrupted, counting_interrupt(190))
    assert teacher.finished
    assert [record["exploring_steps"] > 0 for record in curve(teacher)] == [True] * 3 + [False] * 3
    assert products(teacher) == products(finish(undisturbed))


def test_training_stops_after_successive_passes(tmp_path: Path) -> None:
    run = new_run(tmp_path, **with_teacher(gate=0.0, stop_success=0.0, stop_passes=2))
    teacher = finish(run)
    training = json.loads(teacher.policy.with_suffix(".json").read_text())["training"]
    assert training["stopped_by"] == "validation"
    assert training["iterations"] == training["selected_iteration"] == 4


def test_a_failed_validation_starts_the_count_of_passes_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = iter([1.0, 0.6, 0.8, 0.7, 0.9])
    monkeypatch.setattr(training_module, "validate", lambda *arguments: next(rates))
    changes = {"validate_every": 1, "stop_success": 0.7, "stop_passes": 3}
    teacher = finish(new_run(tmp_path, **with_teacher(**changes)))
    training = json.loads(teacher.policy.with_suffix(".json").read_text())["training"]
    assert not list(rates)
    assert (training["stopped_by"], training["iterations"]) == ("validation", 5)
    assert (training["selected_iteration"], training["validation_success"]) == (1, 1.0)


def test_the_last_of_the_best_policies_is_selected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter([0.2, 0.6, 0.4, 0.6, 0.5, 0.1])
    monkeypatch.setattr(training_module, "validate", lambda *arguments: next(rates))
    teacher = finish(new_run(tmp_path, **with_teacher(validate_every=1)))
    training = json.loads(teacher.policy.with_suffix(".json").read_text())["training"]
    assert (training["stopped_by"], training["iterations"]) == ("budget", 6)
    assert (training["selected_iteration"], training["validation_success"]) == (4, 0.6)
    # From scratch, it normalises with all observations so far: 200 steps in each iteration.
    assert load_policy(teacher.policy).normalizer.count == 4 * 200


def test_hopeless_policies_are_validated_at_the_end_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_module, "VALIDATE_FROM", 1.0)
    teacher = finish(new_run(tmp_path, **with_teacher(horizon=5)))
    assert [r["validation_success"] for r in read_metrics(teacher.metrics)] == [None] * 5 + [0.0]


def test_an_update_that_diverged_is_told_and_not_saved(tmp_path: Path) -> None:
    ppo = {**SMALL["teacher"]["ppo"], "learning_rate": 1e30}
    run = new_run(tmp_path, **with_teacher(ppo=ppo))
    with pytest.raises(DivergedError, match=f"{run.teachers()[0].name}: .*iteration 1:"):
        finish(run)
    status = read_status(run.teachers()[0].status)
    assert status.state == "failed"
    assert "teacher.ppo.learning_rate" in status.message
    assert published(run.teachers()[0].checkpoints) == []
