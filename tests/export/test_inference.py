"""The inference form of a student acts as the student does, for any number of episodes at any step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cpd.export.inference import InferenceStudent
from cpd.student.actor import StudentActor
from cpd.student.packing import Packing
from cpd.student.plans import FIRST_STEPS
from tests.student.grown import TASKS, first_observations, grown_student, observations

SETTINGS: list[dict[str, Any]] = [
    {},
    {"context": 4, "dtype": torch.float64},
    {"top_k": 1, "belief": "density", "act": "expected_success"},
    {"belief": "embedding", "act": "most_likely"},
    {"task_identity": "none", "context": 2},
    {"task_identity": "given"},
    {"unobserved": ((18, 36),), "context": 3},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_it_equals_the_actor_over_whole_episodes(settings: dict[str, Any]) -> None:
    student = grown_student(**settings)
    actor, policy = StudentActor(student, TASKS), InferenceStudent(student)
    actor.reset(TASKS)
    task = (torch.arange(3),) if policy.is_told else ()
    state = torch.zeros(3, policy.state_size)
    for step in range(FIRST_STEPS + 5):
        obs = observations(3, seed=9 + step) if step else first_observations()
        action, state = policy(obs, state, *task)
        np.testing.assert_allclose(action.numpy(), actor.act(obs.numpy()), rtol=0, atol=1e-6)
    plans = [[TASKS.index(belief[2]), TASKS.index(belief[3])] for belief in actor.beliefs]
    assert state[:, 1:3].tolist() == (plans or [[0, 0]] * 3)


def test_a_student_with_weights_for_every_task_is_refused() -> None:
    student = grown_student(task_identity="none")
    student.packing = Packing({}, torch.zeros(3, dtype=torch.int16))
    with pytest.raises(ValueError, match="PackNet"):
        InferenceStudent(student)
