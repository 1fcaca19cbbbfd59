"""The goal sets against Meta-World's own generator."""

import pickle

import metaworld
import numpy as np
import pytest

from cpd.envs.goals import FIRST_SEEDS, Goal, check_disjoint
from cpd.envs.metaworld.tasks import ALL_TASKS
from tests.conftest import goal_set


def mt1_rand_vecs(task, seed):
    return [pickle.loads(t.data)["rand_vec"] for t in metaworld.MT1(task, seed=seed).train_tasks]


@pytest.mark.parametrize("task", ALL_TASKS)
def test_goals_are_those_of_mt1(task, monkeypatch):
    # MT1 draws goals one after another, so a shortened one yields the first of the fifty.
    monkeypatch.setattr(metaworld, "_N_GOALS", 3)
    for split, seed in FIRST_SEEDS.items():
        if split == "held_out":
            continue  # drawn like the others; the slow suite compares them, too
        expected = mt1_rand_vecs(task, seed)
        for goal, rand_vec in zip(goal_set(task, split, 3), expected, strict=True):
            np.testing.assert_array_equal(goal.vector, rand_vec)


@pytest.mark.slow
@pytest.mark.parametrize("task", ALL_TASKS)
def test_all_goals_are_those_of_mt1(task):
    for split, seed in FIRST_SEEDS.items():
        expected = mt1_rand_vecs(task, seed) + mt1_rand_vecs(task, seed + 1)
        goals = goal_set(task, split, 100)
        assert len(goals) == 100
        for index, (goal, rand_vec) in enumerate(zip(goals, expected, strict=True)):
            assert (goal.task, goal.split, goal.index) == (task, split, index)
            np.testing.assert_array_equal(goal.vector, rand_vec)


def test_generating_goals_leaves_the_global_random_state_alone():
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    goal_set("plate-slide-v3", "held_out", 7)
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002


def test_fewer_goals_are_a_prefix_of_more():
    many, few = goal_set("reach-v3", "training", 60), goal_set("reach-v3", "training", 5)
    assert len(many) == 60
    for a, b in zip(few, many[:5], strict=True):
        assert a[:3] == b[:3]
        np.testing.assert_array_equal(a.vector, b.vector)


def test_goals_cannot_be_changed_by_accident():
    with pytest.raises(ValueError, match="read-only"):
        goal_set("reach-v3", "training", 1)[0].vector[0] = 1.0


def test_equal_goals_are_named():
    a = Goal("reach-v3", "training", 3, np.array([0.25, 0.5, 0.75]))
    b = Goal("reach-v3", "held_out", 8, np.array([0.25, 0.5, 0.75]))
    other_task = Goal("push-v3", "held_out", 8, np.array([0.25, 0.5, 0.75]))
    check_disjoint([a], [other_task])
    with pytest.raises(ValueError, match=r"reach-v3.*training goal 3.*held_out goal 8.*0\.25"):
        check_disjoint([a], [b])


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (("puhs-v3", "training"), "puhs-v3.*push-v3"),
        (("push-v3", "test"), "test.*training, validation, held_out"),
        (("push-v3", "training", 0), "num_goals.*1.*50000.*0"),
    ],
)
def test_mistakes_are_explained(arguments, facts):
    with pytest.raises(ValueError, match=facts):
        goal_set(*arguments)
