"""The tasks and streams that Gymnasium knows: they pass its checks and give Meta-World's bits."""

from __future__ import annotations

import re

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import cpd.envs.gym  # noqa: F401
from cpd.envs.metaworld.registry import build_stock, metaworld_class
from cpd.envs.metaworld.tasks import ALL_TASKS, STREAMS
from tests.conftest import ROOT, goal_set


def test_all_are_registered() -> None:
    assert {f"cpd/{task}" for task in ALL_TASKS} | {"cpd/CW10", "cpd/CW20"} <= set(gymnasium.registry)
    assert gymnasium.spec("cpd/CW20").kwargs["tasks"] == STREAMS["cw20"]


@pytest.mark.filterwarnings("error:.*:UserWarning:gymnasium.utils", "ignore:.*infinity.*:UserWarning")
@pytest.mark.parametrize("name", ["push-v3", "CW10"])
def test_they_pass_gymnasiums_checks(name: str) -> None:
    check_env(gymnasium.make(f"cpd/{name}").unwrapped)


@pytest.mark.parametrize("task", ["push-v3", "stick-pull-v3", "window-close-v3"])
def test_an_episode_has_meta_worlds_bits(task: str) -> None:
    ours, stock = gymnasium.make(f"cpd/{task}"), build_stock(metaworld_class(task))
    stock._set_task_called = stock._freeze_rand_vec = True
    stock._partially_observable = False
    stock.__dict__.pop("sawyer_observation_space", None)
    stock._last_rand_vec = goal_set(task, "training")[4].vector.copy()
    first, info = ours.reset(seed=1, options={"goal": 4})
    assert info == {"task": task, "stage": 0, "goal": 4}
    assert first.tobytes() == stock.reset()[0].tobytes()
    for action in np.random.default_rng(1).uniform(-1, 1, (40, 4)).astype(np.float32):
        (obs, *rest), (stock_obs, *stock_rest) = ours.step(action), stock.step(action)
        assert obs.tobytes() == stock_obs.tobytes() and rest == stock_rest
    ours.close()


def test_a_seed_chooses_the_goals() -> None:
    env = gymnasium.make("cpd/reach-v3", split="held_out")
    goals = [env.reset(seed=seed)[1]["goal"] for seed in (1, 1, 2, None, None)]
    assert goals[0] == goals[1] and len(set(goals)) > 2
    assert np.array_equal(env.reset(seed=1)[0][36:], goal_set("reach-v3", "held_out")[goals[0]].vector[3:])


def test_a_stream_goes_on_at_the_first_reset_after_a_task_s_steps() -> None:
    tasks = ("reach-v3", "push-v3", "reach-v3")
    env = gymnasium.make("cpd/CW20", tasks=tasks, steps_per_task=3, num_goals=1)
    names = []
    for _ in range(4):
        names.append(env.reset()[1]["task"])
        for _ in range(3):
            env.step(env.action_space.sample())
    assert names == [*tasks, tasks[-1]]


def test_several_step_at_once_and_episodes_are_truncated_at_the_horizon() -> None:
    envs = gymnasium.make_vec("cpd/push-v3", num_envs=2, vectorization_mode="sync", max_episode_steps=3)
    obs, _ = envs.reset(seed=1)
    assert obs.shape == (2, 39) and not np.array_equal(obs[0], obs[1])
    for step in range(3):
        _, _, terminated, truncated, info = envs.step(envs.action_space.sample())
        assert not terminated.any() and (truncated == (step == 2)).all() and info["success"].shape == (2,)
    envs.close()


def test_an_episode_ends_at_meta_worlds_limit() -> None:
    env = gymnasium.make("cpd/reach-v3").unwrapped
    env.reset(seed=1)
    truncated = [env.step(np.zeros(4, np.float32))[3] for _ in range(500)]
    assert truncated.index(True) == 499


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="steps_per_task"):
        gymnasium.make("cpd/CW10", steps_per_task=0)
    with pytest.raises(ValueError, match="test"):
        gymnasium.make("cpd/push-v3", split="test")


@pytest.mark.parametrize("number", [0, 1])
def test_the_examples_of_the_documentation_run(number: int) -> None:
    if number == 1:
        pytest.importorskip("stable_baselines3")
    page = (ROOT / "docs" / "gymnasium.md").read_text(encoding="utf-8")
    example = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[number]
    exec(compile(example, f"example {number}", "exec"), {})
