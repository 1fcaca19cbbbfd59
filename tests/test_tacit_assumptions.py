"""Assumptions about other packages that this project rests on. If one fails, an upgrade broke it."""

import gymnasium
import metaworld
import mujoco
import numpy as np
import pytest
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.policies import ENV_POLICY_MAP

from cpd.envs.metaworld.tasks import ACTION_SIZE, ALL_TASKS, OBSERVATION_SIZE

# Meta-World, MuJoCo and Gymnasium ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mt1():
    return metaworld.MT1("reach-v3", seed=3)


def make_env(benchmark, task_index=0):
    env = benchmark.train_classes["reach-v3"]()
    env.set_task(benchmark.train_tasks[task_index])
    return env


def test_the_tasks_are_the_fifty_that_are_listed():
    assert sorted(ALL_V3_ENVIRONMENTS) == list(ALL_TASKS)


def test_a_seed_gives_fifty_goals_and_another_seed_others(mt1):
    data = {task.data for task in mt1.train_tasks}
    assert len(data) == 50
    assert data == {task.data for task in metaworld.MT1("reach-v3", seed=3).train_tasks}
    assert not data & {task.data for task in metaworld.MT1("reach-v3", seed=4).train_tasks}


def test_the_seed_of_a_reset_is_ignored(mt1):
    env = make_env(mt1)
    np.testing.assert_array_equal(env.reset(seed=1)[0], env.reset(seed=2)[0])
    env._freeze_rand_vec = False
    assert (env.reset(seed=1)[0] != env.reset(seed=1)[0]).any()


def test_gym_make_draws_goals_with_replacement():
    env = gymnasium.make("Meta-World/MT1", env_name="reach-v3", seed=1, disable_env_checker=True)
    goals = {env.reset()[0][36:].tobytes() for _ in range(50)}
    assert len(goals) < 45


def test_the_501st_step_raises_and_the_500th_truncates(mt1):
    env = make_env(mt1)
    env.reset()
    for t in range(500):
        _, _, terminated, truncated, _ = env.step(np.zeros(4, np.float32))
        assert (terminated, truncated) == (False, t == 499)
    with pytest.raises(ValueError, match="must reset"):
        env.step(np.zeros(4, np.float32))


@pytest.mark.filterwarnings("ignore:Constant.s. may be too high:UserWarning")
def test_success_is_of_the_step_and_ends_nothing(mt1):
    env, policy = make_env(mt1), ENV_POLICY_MAP["reach-v3"]()
    obs, _ = env.reset()
    flags = []
    for t in range(160):
        action = policy.get_action(obs) if t < 100 else np.array([0, -1, 1, 0])
        obs, _, terminated, _, info = env.step(action.astype(np.float32))
        assert not terminated
        flags.append(bool(info["success"]))
    assert any(flags) and not flags[-1]


def test_the_goal_is_seen_in_multi_task_and_hidden_in_meta_learning(mt1):
    env = make_env(mt1)
    np.testing.assert_array_equal(env.reset()[0][36:], env._target_pos)
    hidden = metaworld.ML1("reach-v3", seed=3)
    env = make_env(hidden)
    assert not env.reset()[0][36:].any()


def test_observations_are_float64_and_actions_float32(mt1):
    env = make_env(mt1)
    assert env.reset()[0].dtype == np.float64
    assert env.action_space.dtype == np.float32
    assert env.reset()[0].shape == (OBSERVATION_SIZE,)
    assert env.action_space.shape == (ACTION_SIZE,)


def test_the_two_reward_versions_differ(mt1):
    rewards = []
    for version in ("v1", "v2"):
        env = mt1.train_classes["reach-v3"](reward_function_version=version)
        env.set_task(mt1.train_tasks[0])
        env.reset()
        rewards.append(env.step(np.ones(4, np.float32))[1])
    assert rewards[0] != rewards[1]
    assert mt1.train_classes["reach-v3"]().reward_function_version == "v2"


def test_a_reset_to_a_goal_is_deterministic_and_forgets_the_past(mt1):
    env, other = make_env(mt1, 5), make_env(mt1, 9)
    first, _ = env.reset()
    other.reset()
    for _ in range(20):
        other.step(np.array([1, 1, -1, 1], np.float32))
    other.set_task(mt1.train_tasks[5])
    np.testing.assert_array_equal(other.reset()[0], first)


def test_some_attributes_are_live_views_of_the_simulation(mt1):
    env = make_env(mt1)
    assert np.shares_memory(env.init_left_pad, env.data.xpos)


def test_the_default_model_clears_visualisation_flags_and_that_can_be_switched_off(mt1):
    model = make_env(mt1).model
    assert model.vis.global_.bvactive == 1
    assert model.nbvh > 100_000


def test_mj_forward_after_the_steps_is_part_of_the_dynamics(mt1):
    """It feeds the solver's warm start, so it cannot be dropped."""
    env = make_env(mt1)
    env.reset()
    warm_start = env.data.qacc_warmstart.copy()
    env.data.ctrl[:] = (1, -1)
    mujoco.mj_forward(env.model, env.data)
    assert (env.data.qacc_warmstart != warm_start).any()


def test_a_short_seed_sequence_is_padded_with_zeros():
    """So that streams of one name need paths of one length."""
    state = [np.random.SeedSequence(words).generate_state(4).tolist() for words in ([7, 1], [7, 1, 0], [7, 1, 1])]
    assert state[0] == state[1] != state[2]
