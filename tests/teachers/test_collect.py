"""Collected rollouts: contents, order, and what they do not depend on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpd.config import RolloutConfig
from cpd.envs.metaworld.task_env import TaskEnv
from cpd.envs.vector_env import make_vector_env
from cpd.run.interrupt import Interrupt, InterruptedBySignal
from cpd.run.shards.schema import Episode
from cpd.teachers import collect as collect_module
from cpd.teachers.collect import NOISE_HOLD, collect, plan_episode
from cpd.teachers.demonstrations import ScriptedPolicy
from tests.conftest import goal_set

TASK = "drawer-close-v3"
CONFIG = RolloutConfig(num_steps=700, steps_after_success=5, noise_scales=(0.2, 0.8))
HORIZON = 90
GOALS = 6


def gather(
    config: RolloutConfig = CONFIG, num_workers: int = 1, seed: int = 1, num_slots: int = 7
) -> list[Episode]:
    teacher = ScriptedPolicy(TASK, 0.1)
    goals = goal_set(TASK, "training", GOALS)
    with make_vector_env([TASK] * 7, num_workers) as envs:
        return list(collect(teacher, envs, goals, config, HORIZON, seed, Interrupt()))


@pytest.fixture(scope="module")
def episodes() -> list[Episode]:
    return gather()


def assert_equal(left: list[Episode], right: list[Episode]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        for field in fields(Episode):
            assert np.array_equal(getattr(a, field.name), getattr(b, field.name)), field.name


def test_there_are_exactly_as_many_steps_as_asked_for(episodes: list[Episode]) -> None:
    assert sum(map(len, episodes)) == CONFIG.num_steps
    assert len(episodes) > 7, "more than one round"


@pytest.mark.parametrize("num_steps", [1, 30, 333])
def test_other_budgets_are_prefixes(episodes: list[Episode], num_steps: int) -> None:
    """Episodes do not depend on the number of steps, except that the last one is cut."""
    cut_episodes = gather(replace(CONFIG, num_steps=num_steps))
    assert sum(map(len, cut_episodes)) == num_steps
    assert_equal(cut_episodes[:-1], episodes[: len(cut_episodes) - 1])
    whole, cut = episodes[len(cut_episodes) - 1], cut_episodes[-1]
    assert np.array_equal(cut.observations, whole.observations[: len(cut) + 1])
    assert np.array_equal(cut.teacher_mean, whole.teacher_mean[: len(cut)])


def test_the_number_of_workers_does_not_matter(episodes: list[Episode]) -> None:
    assert_equal(gather(num_workers=3), episodes)


def test_seeds_matter(episodes: list[Episode]) -> None:
    other = gather(seed=2)
    assert [episode.seed for episode in other[:5]] != [episode.seed for episode in episodes[:5]]
    assert [episode.goal_index for episode in other[:GOALS]] != [
        episode.goal_index for episode in episodes[:GOALS]
    ]


def test_goals_come_in_passes(episodes: list[Episode]) -> None:
    indices = [episode.goal_index for episode in episodes]
    for start in range(0, len(indices) - GOALS, GOALS):
        assert sorted(indices[start : start + GOALS]) == list(range(GOALS))


def test_episodes_end_soon_after_success_or_at_the_horizon(episodes: list[Episode]) -> None:
    assert any(episode.episode_success for episode in episodes)
    for episode in episodes[:-1]:
        if episode.episode_success:
            first = int(episode.successes.argmax())
            assert len(episode) == min(first + 1 + CONFIG.steps_after_success, HORIZON)
        else:
            assert len(episode) == HORIZON


def test_labels_are_the_clean_teacher_and_actions_carry_the_noise(episodes: list[Episode]) -> None:
    teacher = ScriptedPolicy(TASK, 0.1)
    kinds = set()
    for episode in episodes:
        raw_mean, log_std = teacher.distribution(episode.observations[:-1])
        assert np.array_equal(episode.teacher_raw_mean, raw_mean)
        assert np.array_equal(episode.teacher_mean, raw_mean.clip(-1, 1))
        assert np.array_equal(episode.teacher_log_std, log_std)
        (scale,) = set(episode.noise_scale.tolist())
        kinds.add(round(scale, 3))
        noise = episode.actions - episode.teacher_mean
        if scale == 0:
            assert not noise.any()
        else:
            inside = np.abs(episode.actions) < 1
            assert noise[inside].std() == pytest.approx(scale, rel=0.5)
    assert kinds == {0.0, 0.2, 0.8}


def test_episodes_follow_their_plans_one_after_another(episodes: list[Episode]) -> None:
    goals = goal_set(TASK, "training", GOALS)
    exceeds = False
    for number, episode in enumerate(episodes):
        plan = plan_episode(number, goals, CONFIG, 1)
        assert (episode.goal_index, episode.seed) == (plan.goal.index, plan.seed)
        assert (episode.noise_scale == np.float32(plan.noise_scale)).all()
        # Noise is added to what the teacher would execute, not to a mean far beyond the bounds.
        noise = plan.noise(HORIZON, 4)[: len(episode)]
        assert np.array_equal(episode.actions, (episode.teacher_mean + noise).clip(-1, 1))
        exceeds |= bool((np.abs(episode.teacher_raw_mean) > 1.5).any())
    assert exceeds


def test_it_is_what_a_single_environment_does(episodes: list[Episode]) -> None:
    env, goals = TaskEnv(TASK), goal_set(TASK, "training", GOALS)
    for episode in episodes[6:9]:
        obs = env.reset(goals[episode.goal_index])
        assert np.array_equal(episode.observations[0], obs.astype(np.float32))
        for t, action in enumerate(episode.actions):
            obs, reward, success = env.step(action)
            assert np.array_equal(episode.observations[t + 1], obs.astype(np.float32))
            assert (episode.rewards[t], episode.successes[t]) == (reward, success)


@given(
    share=st.floats(0, 1),
    scales=st.lists(st.floats(0.01, 2), min_size=1, max_size=4, unique=True).map(tuple),
    num_goals=st.integers(1, 20),
)
@settings(max_examples=40, deadline=None)
def test_plans_spread_the_noise(share: float, scales: tuple[float, ...], num_goals: int) -> None:
    config = RolloutConfig(noisy_share=share, noise_scales=scales)
    goals = goal_set(TASK, "training", num_goals)
    plans = [plan_episode(number, goals, config, 3) for number in range(120)]
    noisy = [plan for plan in plans if plan.noise_scale > 0]
    assert abs(len(noisy) - 120 * share) <= 1
    for position, plan in enumerate(noisy):
        assert plan.noise_scale == scales[position % len(scales)]
        assert plan.noise_hold == (NOISE_HOLD if position // len(scales) % 2 else 1)
    assert len({plan.seed for plan in plans}) == 120


def test_held_noise_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect_module, "NOISE_HOLD", 4)
    goals = goal_set(TASK, "training", 2)
    config = RolloutConfig(noisy_share=1.0, noise_scales=(0.5,))
    white, held = (plan_episode(number, goals, config, 1).noise(30, 4) for number in (0, 1))
    assert len(np.unique(white[:, 0])) == 30
    assert len(np.unique(held[:, 0])) == 8
    assert np.array_equal(held[:28:4], held[3:28:4])


def test_clean_rollouts_only() -> None:
    goals = goal_set(TASK, "training", 2)
    for config in (RolloutConfig(noisy_share=0.0), RolloutConfig(noise_scales=())):
        assert not any(plan_episode(number, goals, config, 1).noise_scale for number in range(20))


def test_it_stops_when_asked_to(counting_interrupt: Callable[[int], Interrupt]) -> None:
    teacher, goals = ScriptedPolicy(TASK, 0.1), goal_set(TASK, "training", 2)
    with make_vector_env([TASK] * 2, 1) as envs, pytest.raises(InterruptedBySignal, match="collecting"):
        list(collect(teacher, envs, goals, CONFIG, HORIZON, 1, counting_interrupt(17)))
