"""What the interface of suites offers beyond success flags: returns, batches, actions that a task lacks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from cpd.config import PPOConfig
from cpd.envs.goals import Goal
from cpd.envs.suite import Environment, Returns, Sizes, Suite, load_suite
from cpd.envs.vector_env import make_vector_env
from cpd.teachers.ppo import PPOLearner
from cpd.teachers.rollout import EpisodeRules, sample


class Walk:
    """A point on a line, started at random, that is rewarded for its action."""

    def __init__(self, num_actions: int) -> None:
        self.num_actions = num_actions

    def reset(self, goal: Goal) -> np.ndarray:
        self.position = np.random.default_rng(goal.seed).uniform(-1.0, 1.0, self.num_actions)
        return self.position.copy()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        self.position = self.position + action
        return self.position.copy(), float(action.sum()), False

    def close(self) -> None:
        pass


class Walks:
    """The same, all points of a batch at once."""

    def __init__(self, num_actions: int, num_envs: int) -> None:
        self.positions = np.zeros((num_envs, num_actions))

    def reset(self, rows: Sequence[int], goals: Sequence[Goal]) -> np.ndarray:
        size = self.positions.shape[1]
        self.positions[rows] = [np.random.default_rng(g.seed).uniform(-1.0, 1.0, size) for g in goals]
        return self.positions[rows]

    def step(self, rows: Sequence[int], actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self.positions[rows] += actions
        return self.positions[rows], actions.sum(1).astype(np.float64), np.zeros(len(rows), np.bool_)

    def close(self) -> None:
        pass


class Line(Suite):
    tasks = ("line", "plane")
    horizon = 4
    batched = False

    def sizes(self, task: str) -> Sizes:
        return Sizes(1, 1) if task == "line" else Sizes(2, 2)

    def make(self, task: str) -> Environment:
        return Walk(self.sizes(task).action)

    def make_batch(self, task: str, num_envs: int) -> Walks | None:
        return Walks(self.sizes(task).action, num_envs) if self.batched else None

    def returns(self, task: str) -> Returns:
        return Returns(0.0, 4.0)


def test_a_batch_gives_what_single_environments_give() -> None:
    seen = []
    for batched in (False, True):
        suite = Line()
        suite.batched = batched
        with make_vector_env(["plane", "line", "plane"], 1, suite) as envs:
            goals = suite.goal_set("plane", "training", 2)
            envs.reset([2, 1, 0], [goals[0], suite.goal_set("line", "training", 1)[0], goals[1]])
            actions = np.linspace(-1, 1, 6, dtype=np.float32).reshape(3, 2)
            envs.step(actions)
            envs.step(actions, np.array([True, False, True]))
            envs.reset([0], [goals[0]])
            seen.append([envs.observations.copy(), envs.rewards.copy(), envs.successes.copy()])
    for single, batch in zip(*seen, strict=True):
        np.testing.assert_array_equal(single, batch)


def test_ppo_neither_explores_nor_learns_actions_that_a_task_lacks() -> None:
    suite, config = Line(), PPOConfig(num_envs=4, steps_per_env=4, minibatch_size=8, num_epochs=2)
    learner = PPOLearner(config, seed=1, suite=suite, task="line")
    with make_vector_env(["line"] * 4, 1, suite) as envs:
        goals = suite.goal_set("line", "training", 4)
        experience = sample(learner.policy, envs, goals, config, EpisodeRules(4), 1, 0)
        assert experience is not None
        learned = learner.update(experience, 0)
    assert not experience.actions[..., 1].any() and experience.actions[..., 0].all()
    assert learned["log_std"] == pytest.approx(float(learner.policy.log_std_A[0].detach()))
    assert float(learner.policy.log_std_A[1].detach()) == pytest.approx(config.init_log_std)
    assert not learner.policy(torch.ones(3, 2))[:, 1].any()
    normalised = np.clip(experience.rewards.sum(0) / 4.0, 0.0, 1.0)
    assert experience.train_success == pytest.approx(float(normalised.mean()), abs=1e-6)


@pytest.mark.parametrize(("value", "score"), [(-3.0, 0.0), (0.0, 0.0), (1.0, 0.25), (9.0, 1.0)])
def test_returns_are_normalised_and_clipped(value: float, score: float) -> None:
    assert Returns(0.0, 4.0).normalise(value) == score


def test_the_bodies_of_gymnasium_repeat_an_episode_and_stay_where_they_fell() -> None:
    suite = load_suite("gym-mujoco")
    for task in suite.tasks:
        goal, size = suite.goal_set(task, "training", 1)[0], suite.sizes(task).action
        first, second = suite.make(task), suite.make(task)
        second.reset(suite.goal_set(task, "training", 2)[1])
        second.step(np.ones(size, np.float32))
        assert first.reset(goal).shape == (suite.sizes(task).observation,)
        second.reset(goal)
        for _ in range(20):
            one, two = (env.step(np.full(size, 0.5, np.float32)) for env in (first, second))
            assert one[0].tobytes() == two[0].tobytes() and one[1:] == two[1:]
        assert (suite.returns(task) is None) == (task == "reacher")
    fallen, goal = suite.make("hopper"), suite.goal_set("hopper", "training", 1)[0]
    fallen.reset(goal)
    steps = [fallen.step(np.ones(3, np.float32)) for _ in range(suite.horizon)]
    assert steps[-1][1] == 0.0 and steps[-1][0].tobytes() == steps[-2][0].tobytes()
