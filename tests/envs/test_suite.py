"""What the interface of suites offers beyond success flags: returns, batches, actions that a task lacks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from cpd.config import Config, PPOConfig
from cpd.config.load import ConfigError, load
from cpd.envs.goals import Goal
from cpd.envs.mixture import Mixture
from cpd.envs.suite import Environment, Returns, Sizes, Suite, SuiteError, load_suite
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


def test_suites_are_joined_with_their_own_observations_scaling_and_goals() -> None:
    mixture, worlds, bodies = (load_suite(n) for n in ("metaworld+gym-mujoco", "metaworld", "gym-mujoco"))
    assert mixture.horizon == bodies.horizon and len(mixture.tasks) == len(worlds.tasks) + len(bodies.tasks)
    sizes = worlds.spaces.sizes, bodies.spaces.sizes
    assert mixture.spaces.sizes == (sizes[0].observation + sizes[1].observation, sizes[1].action)
    with make_vector_env(["hopper", "push-v3"], 1, mixture) as envs:
        goals = [mixture.goal_set(task, "training", 1)[0] for task in envs.tasks]
        assert goals[1].vector.tobytes() == worlds.goal_set("push-v3", "training", 1)[0].vector.tobytes()
        envs.reset([0, 1], goals)
        envs.step(np.full((2, 6), 0.3, np.float32))
        scaled = (envs.observations - mixture.spaces.centre) / mixture.spaces.scale
        for row, task, suite in ((0, "hopper", bodies), (1, "push-v3", worlds)):
            env = suite.make(task)
            env.reset(goals[row])
            own = env.step(np.full(suite.sizes(task).action, 0.3, np.float32))[0].astype(np.float32)
            first = 0 if suite is worlds else sizes[0].observation
            assert envs.observations[row, first : first + len(own)].tobytes() == own.tobytes()
            others = np.delete(scaled[row], range(first, first + len(own)))
            np.testing.assert_allclose(others, 0.0, atol=1e-5)
    with pytest.raises(SuiteError, match="'assembly-v3'; rename"):
        load_suite("metaworld+metaworld")


def test_a_mixture_ends_episodes_of_a_short_horizon_and_uses_batches() -> None:
    class Brief(Line):
        tasks = ("brief",)
        horizon = 2

        def versions(self) -> dict[str, str]:
            return {"numpy": "0"}

    class Other(Line):
        batched = True

        def versions(self) -> dict[str, str]:
            return {"numpy": "1"}

    brief, other = Brief(), Other()
    brief.name = "brief"
    other.name = "other"
    mixture = Mixture([brief, other])
    assert (mixture.horizon, mixture.tasks) == (4, ("brief", "line", "plane"))
    assert mixture.versions() == {"numpy": "0", "other numpy": "1"}
    assert mixture.make_batch("brief", 2) is None
    with (
        make_vector_env(["brief", "plane", "plane"], 1, mixture) as envs,
        make_vector_env(["plane"], 1, other) as own,
    ):
        envs.reset([0, 1, 2], [mixture.goal_set(task, "training", 1)[0] for task in envs.tasks])
        own.reset([0], other.goal_set("plane", "training", 1))
        assert envs.observations[1].tolist() == [0.0, 0.0, *own.observations[0]]
        total, seen = np.zeros(3), []
        for _ in range(mixture.horizon):
            envs.step(np.ones((3, 2), np.float32))
            total += envs.rewards
            seen.append(envs.observations[0].copy())
    assert total.tolist() == [4.0, 8.0, 8.0] and (seen[1] == seen[3]).all() and (seen[0] != seen[1]).any()


def test_a_recipe_names_several_suites_in_a_list() -> None:
    stream = {"suite": ["metaworld", "gym-mujoco"], "tasks": ["push-v3", "hopper"]}
    config = load(Config, {"name": "both", "stream": stream}, "test")
    assert (config.stream.suite, config.stream.horizon) == ("metaworld+gym-mujoco", 200)
    with pytest.raises(ConfigError, match=r"stream\.horizon"):
        load(Config, {"name": "both", "stream": {**stream, "horizon": 100}}, "test")
