"""What the student does under doubt."""

import torch

from cpd.student.plans import Plan, Plans, candidate_plans


def belief(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities], dtype=torch.float64)


def test_without_measurements_the_most_likely_task_is_acted_for():
    plans = Plans(3)
    for hedged in (False, True):
        assert plans.choose(belief(0.2, 0.5, 0.3), hedged=hedged).tolist() == [[1, 1]]


def test_a_policy_that_serves_both_tasks_is_preferred_and_a_plan_of_two_only_if_allowed():
    plans = Plans(3)
    plans.record({Plan(2, 2): {1: 0.9, 2: 1.0}})
    assert plans.choose(belief(0.0, 0.6, 0.4), hedged=False).tolist() == [[2, 2]]
    plans.record({Plan(2, 1): {1: 1.0, 2: 1.0}, Plan(1, 2): {1: 1.0, 2: 0.0}})
    assert plans.choose(belief(0.0, 0.6, 0.4), hedged=True).tolist() == [[2, 1]]
    assert plans.choose(belief(0.0, 0.6, 0.4), hedged=False).tolist() == [[2, 2]]
    assert plans.choose(belief(1.0, 0.0, 0.0), hedged=True).tolist() == [[0, 0]]


def test_measurements_are_kept_by_plan_and_task_and_survive_saving():
    plans = Plans(3)
    assert len(candidate_plans([0, 2])) == 4
    plans.record({plan: {0: 0.5, 2: 0.25} for plan in candidate_plans([0, 2])})
    plans.record({Plan(0, 2): {2: 1.0}})
    assert plans.tasks_P2.tolist() == [[0, 0], [1, 1], [2, 2], [0, 2], [2, 0]]
    assert plans.success_PK[3].tolist() == [0.5, 0.0, 1.0]
    other = Plans(3)
    other.resize(5)
    other.load_state_dict(plans.state_dict())
    assert torch.equal(other.success_PK, plans.success_PK) and other.index(Plan(2, 0)) == 4
