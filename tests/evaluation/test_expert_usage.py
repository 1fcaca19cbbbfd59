"""Recording a student while it acts: the actions stay the same, and every step is counted."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from cpd.comm import SerialComm
from cpd.config import StudentConfig
from cpd.evaluation.expert_usage import ExpertUsage, retrieval_steps
from cpd.run.provenance import Labels
from cpd.student.actor import StudentActor
from cpd.student.network import Student

TASKS = ("a-v3", "b-v3", "c-v3")
COMMON: dict[str, Any] = {
    "method": "m",
    "seed": 1,
    "stage": 2,
    **asdict(Labels("rl", 9, "none", "v2", "1", "2")),
}


def student() -> Student:
    config = StudentConfig(width=16, num_heads=2, expert_width=8, num_experts=4, top_k=2, task_identity="none")
    return Student(config, len(TASKS))


def observations(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.uniform(-1, 1, (5, 39)).astype(np.float32) for _ in range(count)]


def test_a_recorded_student_acts_the_same_and_every_step_counts_top_k_times() -> None:
    model = student()
    recorder = ExpertUsage(model, StudentActor(model, TASKS), TASKS, horizon=9)
    alone = StudentActor(model, TASKS)
    for task in ("b-v3", "a-v3", "b-v3"):
        recorder.reset([task] * 5)
        alone.reset([task] * 5)
        for obs in observations(7):
            np.testing.assert_array_equal(recorder.act(obs), alone.act(obs))
    usage, retrieval = recorder.rows(SerialComm(), **COMMON)
    assert retrieval == [], "this student does not infer its task"
    assert list(dict.fromkeys((row.task, row.layer) for row in usage)) == [
        (task, layer) for task in ("a-v3", "b-v3") for layer in (0, 1)
    ]
    for task, passes in (("a-v3", 1), ("b-v3", 2)):
        for layer in (0, 1):
            counts = [row.chosen for row in usage if (row.task, row.layer) == (task, layer)]
            assert len(counts) == 4
            assert sum(counts) == 2 * 5 * 7 * passes


class Believer:
    """An actor that infers task 0 in the first two steps, and task 1 from the third step on."""

    def __init__(self) -> None:
        self.believed: list[np.ndarray] = []

    def reset(self, tasks: list[str]) -> None:
        self.believed = []

    def act(self, obs_BO: np.ndarray) -> np.ndarray:
        self.believed.append(np.full(len(obs_BO), int(len(self.believed) >= 2)))
        return np.zeros((len(obs_BO), 4), np.float32)


def test_inferred_tasks_are_compared_with_the_right_one_at_the_recorded_steps() -> None:
    recorder = ExpertUsage(student(), Believer(), TASKS, horizon=9)  # type: ignore[arg-type]
    recorder._believes = True
    for task in ("b-v3", "a-v3", "b-v3"):
        recorder.reset([task] * 5)
        for obs in observations(9):
            recorder.act(obs)
    _, rows = recorder.rows(SerialComm(), **COMMON)
    counts = {(row.task, row.step): (row.correct, row.episodes) for row in rows}
    steps = retrieval_steps(9)
    assert list(counts) == [(task, step) for task in ("a-v3", "b-v3") for step in steps]
    assert [counts["a-v3", step] for step in steps] == [(5 if step < 3 else 0, 5) for step in steps]
    assert [counts["b-v3", step] for step in steps] == [(10 if step >= 3 else 0, 10) for step in steps]


@pytest.mark.parametrize("horizon", [1, 2, 9, 60, 200, 500])
def test_recorded_steps_are_few_and_include_the_first_and_the_last(horizon: int) -> None:
    steps = retrieval_steps(horizon)
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (1, horizon)
    assert len(steps) <= 26
