"""Recording a student while it acts: the actions stay the same, and every step is counted."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from cpd.comm import SerialComm
from cpd.config import StudentConfig
from cpd.evaluation.expert_usage import ExpertUsage
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
    recorder = ExpertUsage(model, StudentActor(model, TASKS), TASKS)
    alone = StudentActor(model, TASKS)
    for task in ("b-v3", "a-v3", "b-v3"):
        recorder.reset([task] * 5)
        alone.reset([task] * 5)
        for obs in observations(7):
            np.testing.assert_array_equal(recorder.act(obs), alone.act(obs))
    usage = recorder.rows(SerialComm(), **COMMON)
    assert list(dict.fromkeys((row.task, row.layer) for row in usage)) == [
        (task, layer) for task in ("a-v3", "b-v3") for layer in (0, 1)
    ]
    for task, passes in (("a-v3", 1), ("b-v3", 2)):
        for layer in (0, 1):
            counts = [row.chosen for row in usage if (row.task, row.layer) == (task, layer)]
            assert len(counts) == 4
            assert sum(counts) == 2 * 5 * 7 * passes
