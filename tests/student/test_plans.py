"""What the student does under doubt."""

import numpy as np
import pytest
import torch

from cpd.student.actor import StudentActor
from cpd.student.plans import Plan, Plans, candidate_plans
from tests.student.test_network import TASKS, make_student, observations


def belief(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities], dtype=torch.float64)


def record(plans: Plans, success: dict[Plan, dict[int, float]]) -> None:
    for plan, by_task in success.items():
        for task, share in by_task.items():
            plans.record(plan, task, share)


def test_without_measurements_the_most_likely_task_is_acted_for():
    plans = Plans(3)
    for hedged in (False, True):
        assert plans.choose(belief(0.2, 0.5, 0.3), hedged=hedged).tolist() == [[1, 1]]


def test_a_policy_that_serves_both_tasks_is_preferred_and_a_plan_of_two_only_if_allowed():
    plans = Plans(3)
    record(plans, {Plan(2, 2): {1: 0.9, 2: 1.0}})
    assert plans.choose(belief(0.0, 0.6, 0.4), hedged=False).tolist() == [[2, 2]]
    record(plans, {Plan(2, 1): {1: 1.0, 2: 1.0}, Plan(1, 2): {1: 1.0, 2: 0.0}})
    assert plans.choose(belief(0.0, 0.6, 0.4), hedged=True).tolist() == [[2, 1]]
    assert plans.choose(belief(0.0, 0.6, 0.4), hedged=False).tolist() == [[2, 2]]
    assert plans.choose(belief(1.0, 0.0, 0.0), hedged=True).tolist() == [[0, 0]]


def test_measurements_are_kept_by_plan_and_task_and_survive_saving():
    plans = Plans(3)
    assert len(candidate_plans([0, 2])) == 4
    record(plans, {plan: {0: 0.5, 2: 0.25} for plan in candidate_plans([0, 2])})
    plans.record(Plan(0, 2), 2, 1.0)
    assert plans.tasks_P2.tolist() == [[0, 0], [1, 1], [2, 2], [0, 2], [2, 0]]
    assert plans.success_PK[3].tolist() == [0.5, 0.0, 1.0]
    other = Plans(3)
    other.resize(5)
    other.load_state_dict(plans.state_dict())
    assert torch.equal(other.success_PK, plans.success_PK) and other.index(Plan(2, 0)) == 4


def test_an_episode_follows_its_plan_and_states_the_belief(monkeypatch):
    monkeypatch.setattr("cpd.student.actor.FIRST_STEPS", 2)
    obs_B = observations(4)
    student = make_student(task_identity="inferred", belief="density", act="hedged", context=1)
    for task in (0, 1):  # begin alike, so that the belief is a half each
        student.known_K[task] = True
        student.density.fit(task, obs_B)
    record(student.plans, {Plan(1, 0): {0: 1.0, 1: 1.0}})
    actor = StudentActor(student, TASKS)
    actor.reset([""] * 4)
    for task in (1, 1, 0, 0):
        with torch.no_grad():
            out = student(obs_B.float().double().unsqueeze(1), task_B=torch.tensor([task] * 4))
        actions = actor.act(obs_B.float().numpy())
        np.testing.assert_array_equal(actions, out.mean_BLA[:, 0].clamp(-1.0, 1.0).float().numpy())
    for belief in actor.beliefs:
        assert belief.confidence == pytest.approx(0.5)
        assert (belief.plan_first, belief.plan_second) == (TASKS[1], TASKS[0])


def test_a_student_of_an_earlier_version_without_densities_acts_by_its_prototypes():
    student = make_student(task_identity="inferred")
    for task in (0, 1):
        student.known_K[task] = True
        student.set_prototype(task, observations(1, seed=task))
    tensors = {n: t for n, t in student.state_dict().items() if not n.startswith(("density.", "plans."))}
    old = make_student(seed=2, task_identity="inferred")
    old.load(tensors)
    actor = StudentActor(old, TASKS)
    actor.reset([""] * 2)
    actor.act(torch.cat([observations(1, seed=seed) for seed in (1, 0)]).float().numpy())
    assert [belief.believed for belief in actor.beliefs] == [TASKS[1], TASKS[0]]
    del tensors["known_K"]
    with pytest.raises(RuntimeError, match="known_K"):
        old.load(tensors)
