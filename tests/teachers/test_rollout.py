"""An iteration's experience: contents, and that it depends on policy, seed and iteration only."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cpd.config import ExplorationConfig, PPOConfig
from cpd.envs.metaworld.task_env import TaskEnv
from cpd.envs.suite import load_suite
from cpd.envs.vector_env import make_vector_env
from cpd.seeding import generator
from cpd.teachers.exploration import correlated_noise, perturb, random_starts
from cpd.teachers.policy import GaussianPolicy
from cpd.teachers.rollout import EpisodeRules, Experience, GoalDealer, sample
from tests.conftest import goal_set

TASK = "drawer-close-v3"
CONFIG = PPOConfig(hidden_sizes=(8,), num_envs=5, steps_per_env=70, minibatch_size=50)
HORIZON = 40
RULES = EpisodeRules(HORIZON)
FIELDS = ("obs", "next_obs", "actions", "rewards", "terminated", "ends")


class Shover(GaussianPolicy):
    """Pushes forward, which closes some drawers by luck and others not."""

    def __init__(self) -> None:
        super().__init__((8,), -0.5, torch.Generator().manual_seed(3))
        with torch.no_grad():
            self.net[-1].bias.copy_(torch.tensor([0.0, 1.0, -0.3, 0.0]))


def draw(
    num_workers: int = 1,
    iteration: int = 0,
    num_slots: int = 5,
    should_stop=lambda: False,
    rules: EpisodeRules = RULES,
    slots: range | None = None,
) -> Experience | None:
    goals = goal_set(TASK, "training", 10)
    with make_vector_env([TASK] * num_slots, num_workers) as envs:
        return sample(Shover(), envs, goals, CONFIG, rules, 1, iteration, slots=slots, should_stop=should_stop)


@pytest.fixture(scope="module")
def batch() -> Experience:
    experience = draw()
    assert experience is not None
    return experience


def assert_equal(left: Experience, right: Experience) -> None:
    for name in FIELDS:
        assert np.array_equal(getattr(left, name), getattr(right, name)), name
    assert (left.train_success, left.train_return) == (right.train_success, right.train_return)


@pytest.mark.parametrize("num_workers", [2, 3])
def test_the_number_of_workers_does_not_matter(batch: Experience, num_workers: int) -> None:
    assert_equal(batch, draw(num_workers))


def test_spare_slots_do_not_matter(batch: Experience) -> None:
    assert_equal(batch, draw(num_slots=8))


def test_iterations_differ(batch: Experience) -> None:
    other = draw(iteration=1)
    assert not np.array_equal(batch.actions, other.actions)
    assert not np.array_equal(batch.obs[0], other.obs[0])


def test_it_stops_when_asked_to() -> None:
    looks = iter([False] * 10 + [True])
    assert draw(should_stop=lambda: next(looks)) is None


def test_segments_end_at_success_time_limit_and_iteration_end(batch: Experience) -> None:
    assert batch.terminated.any(), "this policy should close some drawers"
    assert batch.ends[-1].all()
    for slot in range(CONFIG.num_envs):
        length = 0
        for t in range(CONFIG.steps_per_env):
            length += 1
            is_end = batch.terminated[t, slot] or length == HORIZON or t == CONFIG.steps_per_env - 1
            assert batch.ends[t, slot] == is_end
            if is_end:
                length = 0
            else:  # within a segment, the observation after a step is the one before the next
                assert np.array_equal(batch.next_obs[t, slot], batch.obs[t + 1, slot])


def test_it_is_what_a_single_environment_does(batch: Experience) -> None:
    goals = goal_set(TASK, "training", 10)
    dealer = GoalDealer(goals, CONFIG.num_envs, generator(1, "goals", 0))
    env = TaskEnv(TASK)
    slot = int(batch.terminated.any(axis=0).argmax())
    obs = env.reset(dealer.deal(slot))
    for t in range(CONFIG.steps_per_env):
        assert np.array_equal(batch.obs[t, slot], obs.astype(np.float32))
        obs, reward, success = env.step(batch.actions[t, slot].clip(-1, 1))
        assert np.array_equal(batch.next_obs[t, slot], obs.astype(np.float32))
        assert batch.rewards[t, slot] == np.float32(reward)
        assert batch.terminated[t, slot] == success
        if batch.ends[t, slot]:
            obs = env.reset(dealer.deal(slot))


def test_a_bonus_for_grasps_is_added_to_rewards(batch: Experience) -> None:
    goals = goal_set(TASK, "training", 10)
    rewarded = draw(rules=EpisodeRules(HORIZON, grasp_bonus=2.0))
    assert rewarded is not None
    assert np.array_equal(rewarded.obs, batch.obs)
    env = TaskEnv(TASK)
    env.reset(GoalDealer(goals, CONFIG.num_envs, generator(1, "goals", 0)).deal(0))
    for t in range(20):
        obs, reward, _ = env.step(batch.actions[t, 0].clip(-1, 1))
        assert rewarded.rewards[t, 0] == np.float32(reward + 2.0 * env.grasp(obs))
    assert np.ptp(rewarded.rewards[:20, 0] - batch.rewards[:20, 0]) > 0.01


def test_squares_of_rewards_are_added_to_them(batch: Experience) -> None:
    rewarded = draw(rules=EpisodeRules(HORIZON, reward_convexity=0.5))
    assert rewarded is not None
    assert np.array_equal(rewarded.obs, batch.obs)
    np.testing.assert_allclose(rewarded.rewards, batch.rewards + 0.5 * batch.rewards**2, rtol=1e-5)


def test_train_success_counts_first_episodes_only(batch: Experience) -> None:
    first_end = batch.ends.argmax(axis=0)
    successes = [batch.terminated[first_end[slot], slot] for slot in range(CONFIG.num_envs)]
    returns = [batch.rewards[: first_end[slot] + 1, slot].sum() for slot in range(CONFIG.num_envs)]
    assert batch.train_success == pytest.approx(np.mean(successes))
    assert batch.train_return == pytest.approx(np.mean(returns), rel=1e-5)


def test_without_termination_episodes_outlast_success(batch: Experience) -> None:
    experience = draw(rules=EpisodeRules(HORIZON, terminate_on_success=False))
    assert experience is not None
    assert not experience.terminated.any()
    ends = np.zeros_like(experience.ends)
    ends[[HORIZON - 1, CONFIG.steps_per_env - 1]] = True
    assert np.array_equal(experience.ends, ends), "the time limit and the iteration's end, and nothing else"
    # First episodes are the same up to success, so as many succeed; then they collect further rewards.
    assert experience.train_success == batch.train_success > 0
    assert experience.train_return > batch.train_return


def test_exploring_starts_come_before_episodes_and_depend_on_nothing_else(batch: Experience) -> None:
    rules = EpisodeRules(HORIZON, exploration=ExplorationConfig(start_share=0.5, max_steps=30))
    explored = draw(rules=rules)
    assert explored is not None
    begins = np.vstack([np.ones((1, 5), np.bool_), explored.ends[:-1]])
    hands = explored.obs[begins][:, :3]
    start = batch.obs[0, 0, :3]  # a reset
    is_own = np.linalg.norm(hands - start, axis=1) < 1e-3
    assert 0 < is_own.sum() < len(hands)
    assert 0 < explored.exploring_steps <= 30 * (~is_own).sum()
    # Action and length depend on the environment, not on which others begin an episode or which rank steps it.
    again = draw(num_workers=2, num_slots=7, rules=rules)
    assert again is not None
    assert_equal(explored, again)
    rank_batch = draw(num_slots=3, rules=rules, slots=range(2, 5))
    assert rank_batch is not None
    assert np.array_equal(rank_batch.obs[0], explored.obs[0, 2:])
    assert batch.exploring_steps == 0


def test_perturbations_cut_segments_and_count_towards_the_horizon() -> None:
    rules = EpisodeRules(HORIZON, exploration=ExplorationConfig(step_rate=0.05, max_steps=12))
    perturbed = draw(rules=rules)
    assert perturbed is not None
    num_perturbations = 0
    for slot in range(CONFIG.num_envs):
        own_steps = 0  # of an episode
        for t in range(CONFIG.steps_per_env - 1):
            own_steps += 1
            assert own_steps <= HORIZON
            hand, next_hand = perturbed.next_obs[t, slot, :3], perturbed.obs[t + 1, slot, :3]
            is_same = np.array_equal(perturbed.next_obs[t, slot], perturbed.obs[t + 1, slot])
            assert is_same == (not perturbed.ends[t, slot])
            if np.linalg.norm(next_hand - perturbed.obs[0, slot, :3]) < 1e-3:  # a reset
                own_steps = 0
            elif not is_same:
                num_perturbations += 1
                assert 0 < np.linalg.norm(next_hand - hand) < 12 * 0.03
                # The last 18 components are the frame of the step before: within the perturbation, not before it.
                assert not np.array_equal(perturbed.obs[t + 1, slot, 18:36], perturbed.next_obs[t, slot, 18:36])
    assert num_perturbations > 5
    assert num_perturbations <= perturbed.exploring_steps <= 12 * num_perturbations
    again = draw(num_workers=2, num_slots=7, rules=rules)
    assert again is not None
    assert_equal(perturbed, again)
    rank_batch = draw(num_slots=2, rules=rules, slots=range(3, 5))
    assert rank_batch is not None
    assert np.array_equal(rank_batch.obs, perturbed.obs[:, 3:])


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_noise_has_unit_variance_and_the_given_correlation(correlation: float) -> None:
    noise = correlated_noise(400, 100, 4, correlation, np.random.default_rng(1))
    assert noise.dtype == np.float32
    assert abs(noise.mean()) < 0.05
    for steps in (noise[:10], noise[-10:]):  # stationary from the first step on
        assert steps.var() == pytest.approx(1.0, abs=0.1)
    for lag in (1, 2):
        product = (noise[lag:] * noise[:-lag]).mean()
        assert product == pytest.approx(correlation**lag, abs=0.03)


@pytest.mark.parametrize(("num_goals", "num_envs"), [(50, 25), (10, 5), (3, 8), (7, 3)])
def test_goals_are_dealt_evenly(num_goals: int, num_envs: int) -> None:
    goals = goal_set(TASK, "training", num_goals)
    dealer = GoalDealer(goals, num_envs, np.random.default_rng(0))
    first = [dealer.deal(slot).index for slot in range(num_envs)]
    assert len(set(first)) == min(num_goals, num_envs)
    walk = [first[0], *(dealer.deal(0).index for _ in range(num_goals - 1))]
    assert sorted(walk) == list(range(num_goals))


def test_walks_through_the_goals_do_not_meet_before_all_are_dealt() -> None:
    dealer = GoalDealer(goal_set(TASK, "training", 12), 4, np.random.default_rng(0))
    assert sorted(dealer.deal(slot).index for _ in range(3) for slot in range(4)) == list(range(12))


def test_actions_are_the_policys_with_correlated_noise_and_are_not_clipped(batch: Experience) -> None:
    mean, log_std = Shover().distribution(batch.obs.reshape(-1, 39))
    noise = ((batch.actions.reshape(-1, 4) - mean) / np.exp(log_std)).reshape(batch.actions.shape)
    assert noise.std() == pytest.approx(1.0, abs=0.1)
    assert np.corrcoef(noise[1:].ravel(), noise[:-1].ravel())[0, 1] == pytest.approx(0.5, abs=0.1)
    assert batch.actions.max() > 1.5


class Steps:
    """Stands in for an environment with many slots and records its calls."""

    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs
        self.suite = load_suite()
        self.tasks = self.suite.tasks[:1] * num_envs
        self.spaces = self.suite.spaces
        self.actions: list[np.ndarray] = []
        self.active: list[np.ndarray] = []

    def step(self, actions: np.ndarray, active: np.ndarray) -> None:
        self.actions.append(actions.copy())
        self.active.append(active.copy())


def test_exploring_starts_repeat_any_action_for_up_to_max_steps_in_their_share_of_episodes() -> None:
    envs, rngs = Steps(800), [np.random.default_rng(seed) for seed in range(800)]
    config = ExplorationConfig(start_share=0.25, max_steps=4)
    num_steps = random_starts(config, envs, range(0, 800, 2), rngs)  # type: ignore[arg-type]
    lengths = np.sum(envs.active, axis=0)
    assert num_steps == lengths.sum()
    assert not lengths[1::2].any(), "those that begin no episode"
    counts = np.bincount(lengths[::2], minlength=5)
    assert len(counts) == 5
    assert counts[0] / 400 == pytest.approx(0.75, abs=0.07)
    assert counts[1:].min() > 10
    for length, active in enumerate(envs.active):
        assert np.array_equal(active, lengths > length), "without a break, from the reset on"
    chosen = lengths > 0
    assert all(np.array_equal(actions, envs.actions[0]) for actions in envs.actions)
    assert np.abs(envs.actions[0]).max() <= 1.0
    np.testing.assert_allclose(envs.actions[0][chosen].mean(axis=0), 0.0, atol=0.25)
    np.testing.assert_allclose(envs.actions[0][chosen].std(axis=0), 3**-0.5, atol=0.1)


def test_perturbations_come_at_their_rate_keep_the_grippers_command_and_never_outlast_the_episode() -> None:
    envs, rngs = Steps(1000), [np.random.default_rng(seed) for seed in range(900)]
    max_steps, gripper = np.arange(900) % 6, np.linspace(-1, 1, 900).astype(np.float32)
    config = ExplorationConfig(step_rate=0.25, max_steps=4)
    commands = np.tile(gripper[:, None], 4)
    lengths = perturb(config, envs, max_steps, commands, rngs)  # type: ignore[arg-type]
    active = np.array(envs.active)
    assert np.array_equal(lengths, active.sum(axis=0)[:900])
    assert not active[:, 900:].any()
    assert (lengths <= max_steps).all(), "nor where none are left"
    perturbed = lengths > 0
    assert perturbed[max_steps > 0].mean() == pytest.approx(0.25, abs=0.05)
    counts = np.bincount(lengths[max_steps >= 4], minlength=5)
    assert counts[1:].min() > 10
    assert len(counts) == 5
    assert all(np.array_equal(actions, envs.actions[0]) for actions in envs.actions)
    executed = envs.actions[0][:900][perturbed]
    assert np.array_equal(executed[:, 3], gripper[perturbed])
    np.testing.assert_allclose(executed[:, :3].mean(axis=0), 0.0, atol=0.15)
    np.testing.assert_allclose(executed[:, :3].std(axis=0), 3**-0.5, atol=0.1)


def test_exploring_starts_differ_between_iterations() -> None:
    rules = EpisodeRules(HORIZON, exploration=ExplorationConfig(start_share=1.0, max_steps=30))
    first, second = (draw(rules=rules, iteration=iteration) for iteration in (0, 1))
    assert first is not None and second is not None
    assert (np.linalg.norm(first.obs[0, :, :3] - second.obs[0, :, :3], axis=1) > 1e-3).all()
