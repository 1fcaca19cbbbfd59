"""Demonstrations: who acts, whose actions are the labels, and where episodes end."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cpd.envs.goals import Goal
from cpd.envs.metaworld.task_env import TaskEnv
from cpd.envs.vector_env import VectorEnv, make_vector_env
from cpd.run.interrupt import Interrupt
from cpd.teachers import demonstrations
from cpd.teachers.demonstrations import Demonstrator, Labelled, ScriptedPolicy, demonstration_noise
from cpd.teachers.policy import FloatArray, GaussianPolicy
from tests.conftest import goal_set

TASK = "drawer-close-v3"
HORIZON = 100
NUM_GOALS = 10
NUM_DEMONSTRATIONS, NUM_DAGGER_EPISODES, STEPS_AFTER_SUCCESS = 4, 3, 5


@pytest.fixture(autouse=True)
def few_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demonstrations, "NUM_DAGGER_EPISODES", NUM_DAGGER_EPISODES)
    monkeypatch.setattr(demonstrations, "STEPS_AFTER_SUCCESS", STEPS_AFTER_SUCCESS)


def demonstrator(envs: VectorEnv, horizon: int = HORIZON) -> Demonstrator:
    goals = goal_set(TASK, "training", NUM_GOALS)
    return Demonstrator(TASK, goals, envs, NUM_DEMONSTRATIONS, horizon, 1, Interrupt())


def shown() -> Labelled:
    with make_vector_env([TASK] * 25, 1) as envs:
        return demonstrator(envs).gather(0)


def goals_of(first_obs_NO: FloatArray) -> list[Goal]:
    """The training goals whose episodes begin with these observations."""
    env = TaskEnv(TASK)
    goals = {env.reset(goal).astype(np.float32).tobytes(): goal for goal in goal_set(TASK, "training", NUM_GOALS)}
    return [goals[obs_O.tobytes()] for obs_O in first_obs_NO]


def expert(obs_O: FloatArray) -> FloatArray:
    return ScriptedPolicy(TASK, 1.0).distribution(obs_O[None]).raw_mean[0].clip(-1, 1)


def pusher() -> GaussianPolicy:
    """Moves somewhere, beyond the bounds of actions too, but closes no drawer."""
    policy = GaussianPolicy((8,), -2.0, torch.Generator().manual_seed(3))
    with torch.no_grad():
        policy.net[-1].weight *= 100
        policy.net[-1].bias.copy_(torch.tensor([0.5, -1.5, 0.2, 0.0]))
    return policy


def test_in_demonstrations_the_expert_acts_with_noise_and_its_clean_actions_are_the_labels() -> None:
    labelled = shown()
    episodes = []
    for number, goal in enumerate(goals_of(labelled.obs_BO[:NUM_DEMONSTRATIONS])):
        env, rows, left = TaskEnv(TASK), [], HORIZON
        noise = demonstration_noise(number, HORIZON, 4, 1)
        obs = env.reset(goal).astype(np.float32)
        for t in range(HORIZON):
            label = expert(obs)
            rows.append((obs, label))
            following, _, success = env.step((label + noise[t]).clip(-1, 1))
            obs = following.astype(np.float32)
            left = min(left - 1, STEPS_AFTER_SUCCESS) if success else left - 1
            if left == 0:
                break
        episodes.append(rows)
    assert any(len(rows) < HORIZON for rows in episodes)
    # Step by step, the episodes that are still running.
    wanted = [rows[t] for t in range(HORIZON) for rows in episodes if t < len(rows)]
    assert np.array_equal(labelled.obs_BO, np.array([obs for obs, _ in wanted]))
    assert np.array_equal(labelled.labels_BA, np.array([label for _, label in wanted]))


def test_in_dagger_rounds_the_clones_clean_actions_are_executed_and_the_experts_are_the_labels() -> None:
    clone = pusher()
    with make_vector_env([TASK] * 25, 1) as envs:
        labelled = demonstrator(envs).gather(1, clone)
    obs_TNO = labelled.obs_BO.reshape(HORIZON, NUM_DAGGER_EPISODES, 39)
    labels_TNA = labelled.labels_BA.reshape(HORIZON, NUM_DAGGER_EPISODES, 4)
    means_TNA = np.array([clone.distribution(obs_NO).raw_mean for obs_NO in obs_TNO])
    assert 0.1 < (np.abs(means_TNA) > 1).mean() < 0.9
    for slot, goal in enumerate(goals_of(obs_TNO[0])):
        env = TaskEnv(TASK)
        obs = env.reset(goal)
        for t in range(HORIZON):
            assert np.array_equal(obs_TNO[t, slot], obs.astype(np.float32))
            assert np.array_equal(labels_TNA[t, slot], expert(obs_TNO[t, slot]))
            obs, _, success = env.step(means_TNA[t, slot].clip(-1, 1))
            assert not success


def test_rounds_deal_goals_in_orders_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demonstrations, "NUM_DAGGER_EPISODES", NUM_GOALS)
    with make_vector_env([TASK] * 25, 1) as envs:
        rounds = [demonstrator(envs, 1).gather(number, pusher()) for number in (1, 2)]
    first, second = ([goal.index for goal in goals_of(labelled.obs_BO)] for labelled in rounds)
    assert sorted(first) == sorted(second) == list(range(NUM_GOALS))
    assert first != second


def test_demonstrations_go_on_after_success(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    for steps in (0, 1, 7, HORIZON):
        monkeypatch.setattr(demonstrations, "STEPS_AFTER_SUCCESS", steps)
        lengths.append(len(shown().obs_BO))
    succeeded = lengths[1] - lengths[0]
    assert 0 < succeeded <= NUM_DEMONSTRATIONS
    assert lengths[2] - lengths[0] == 7 * succeeded
    assert lengths[3] == NUM_DEMONSTRATIONS * HORIZON
