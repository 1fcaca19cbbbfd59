"""TaskEnv: what it returns and refuses, and that earlier episodes have no influence."""

import pickle

import metaworld
import numpy as np
import pytest

from cpd.envs.goals import Goal
from cpd.envs.metaworld.fast import sawyer
from cpd.envs.metaworld.fast.resets import RESET_CACHE
from cpd.envs.metaworld.task_env import TaskEnv
from cpd.envs.metaworld.tasks import REWARD_VERSION
from tests.conftest import goal_set

TASKS = ("push-v3", "basketball-v3", "sweep-into-v3", "stick-pull-v3", "window-close-v3")


def episode(env, goal, num_steps=40, seed=0):
    rows = [np.array([*env.reset(goal), 0.0, 0.0])]
    for action in np.random.default_rng(seed).uniform(-1.2, 1.2, (num_steps, 4)).astype(np.float32):
        obs, reward, success = env.step(action)
        rows.append(np.array([*obs, reward, success]))
    return np.array(rows)


@pytest.mark.parametrize("accelerated", [True, False])
@pytest.mark.parametrize("task", TASKS)
def test_the_past_does_not_matter(task, accelerated):
    goals = goal_set(task, "training")
    fresh = episode(TaskEnv(task, accelerated=accelerated), goals[3])
    used = TaskEnv(task, accelerated=accelerated)
    episode(used, goals[7], seed=1)
    episode(used, goals[8], num_steps=7, seed=2)
    RESET_CACHE.clear()
    np.testing.assert_array_equal(episode(used, goals[3]), fresh)
    episode(used, goals[7], seed=1)
    np.testing.assert_array_equal(episode(used, goals[3]), fresh)


def test_it_is_the_multi_task_benchmark():
    """Against Meta-World used as its documentation says."""
    benchmark = metaworld.MT1("hammer-v3", seed=2001)
    stock = benchmark.train_classes["hammer-v3"](reward_function_version=REWARD_VERSION)
    env = TaskEnv("hammer-v3")
    for index in (0, 5):
        task, goal = benchmark.train_tasks[index], goal_set("hammer-v3", "held_out")[index]
        np.testing.assert_array_equal(pickle.loads(task.data)["rand_vec"], goal.vector)
        stock.set_task(task)
        np.testing.assert_array_equal(stock.reset()[0], env.reset(goal))
        for action in np.random.default_rng(4).uniform(-1, 1, (30, 4)).astype(np.float32):
            obs, reward, _, _, info = stock.step(action)
            got = env.step(action)
            np.testing.assert_array_equal(obs, got[0])
            assert (reward, bool(info["success"])) == got[1:]
            distance = np.linalg.norm(obs[4:7] - stock.tcp_center)
            assert env.grasp(obs) == pytest.approx(0.5 * (info["grasp_reward"] + 1.0 - np.tanh(10.0 * distance)))


def test_types_and_visible_goal():
    env = TaskEnv("reach-v3")
    goal = goal_set("reach-v3", "training")[0]
    obs = env.reset(goal)
    assert obs.shape == (39,) and obs.dtype == np.float64
    np.testing.assert_array_equal(obs[36:], goal.vector[3:])
    np.testing.assert_array_equal(obs[:18], obs[18:36])
    first = obs.copy()
    obs, reward, success = env.step(np.zeros(4))
    assert obs.shape == (39,) and obs.dtype == np.float64
    assert type(reward) is float and type(success) is bool
    np.testing.assert_array_equal(obs[18:36], first[:18])


def test_actions_are_clipped_and_taken_as_float32():
    env = TaskEnv("reach-v3")
    goal = goal_set("reach-v3", "training")[0]
    steps = []
    for action in ([3.0, -7.0, 0.1, 0.0], [1.0, -1.0, np.float32(0.1), 0.0]):
        env.reset(goal)
        steps.append(env.step(np.array(action))[0])
    np.testing.assert_array_equal(*steps)


def test_returned_observations_are_the_callers():
    env = TaskEnv("reach-v3")
    goal = goal_set("reach-v3", "training")[0]
    env.reset(goal)[:] = np.nan
    obs, _, _ = env.step(np.zeros(4))
    assert np.isfinite(obs).all()
    obs[:] = np.nan
    assert np.isfinite(env.step(np.zeros(4))[0]).all()
    assert np.isfinite(env.reset(goal)).all()


@pytest.mark.parametrize("accelerated", [True, False])
def test_mistakes_are_explained(accelerated):
    env = TaskEnv("reach-v3", accelerated=accelerated)
    goal = goal_set("reach-v3", "training")[0]
    with pytest.raises(ValueError, match="reach-v3"):
        env.step(np.zeros(4))
    with pytest.raises(ValueError, match=r"reach-v3.*push-v3"):
        env.reset(goal_set("push-v3", "training")[0])
    with pytest.raises(ValueError, match=r"6.*\(3,\)"):
        env.reset(Goal("reach-v3", "training", 0, np.zeros(3)))
    env.reset(goal)
    for _ in range(500):
        env.step(np.zeros(4))
    with pytest.raises(ValueError, match=r"reach-v3.*500"):
        env.step(np.zeros(4))
    env.reset(goal)
    env.step(np.zeros(4))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"reach-v2.*reach-v3"):
        TaskEnv("reach-v2")


def test_the_reset_cache_is_bounded_and_forgets_the_least_recently_used(monkeypatch):
    monkeypatch.setattr(sawyer, "MAX_CACHED_RESETS", 3)
    RESET_CACHE.clear()
    env, goals = TaskEnv("push-v3"), goal_set("push-v3", "training")[:4]
    for index in (0, 1, 2, 0, 3):
        env.reset(goals[index])
    assert [key[-1] for key in RESET_CACHE] == [goals[index].vector.tobytes() for index in (2, 0, 3)]
