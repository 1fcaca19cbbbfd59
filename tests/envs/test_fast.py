"""The accelerated classes against the installed Meta-World, bit for bit, for all fifty tasks."""

import gc
import sys
import types
import warnings

import numpy as np
import pytest
from metaworld.policies import ENV_POLICY_MAP
from metaworld.utils import reward_utils

from cpd.envs.metaworld.fast import helpers as fast_math
from cpd.envs.metaworld.fast import task_class as accelerated
from cpd.envs.metaworld.fast.model import keeps_geom
from cpd.envs.metaworld.fast.resets import RESET_CACHE
from cpd.envs.metaworld.fast.sawyer import FastData
from cpd.envs.metaworld.fast.task_class import UnverifiedError, accelerated_class, check_installation
from cpd.envs.metaworld.registry import GOAL_FIELDS, build_stock, metaworld_class
from cpd.envs.metaworld.task_env import TaskEnv
from cpd.envs.metaworld.tasks import ALL_TASKS
from tests.conftest import goal_set

pytestmark = pytest.mark.filterwarnings("ignore:Constant.s. may be too high:UserWarning")

#: Computed by mj_rnePostConstraint, which the accelerated classes leave out.
UNREAD_ARRAYS = {"cacc", "cfrc_int", "cfrc_ext"}


def set_goal(env, goal):
    env._set_task_called = True
    env._freeze_rand_vec = True
    env._last_rand_vec = goal.vector.copy()
    if env._partially_observable:
        env._partially_observable = False
        env.__dict__.pop("sawyer_observation_space", None)


def bits(value):
    return np.asarray(value, dtype=np.float64).tobytes()


def assert_same_step(stock, fast, where):
    for name, a, b in zip(("observation", "reward", "terminated", "truncated"), stock[:4], fast[:4], strict=True):
        assert bits(a) == bits(b), (*where, name, a, b)
    assert list(stock[4]) == list(fast[4])
    for key in stock[4]:
        assert bits(stock[4][key]) == bits(fast[4][key]), (*where, key, stock[4][key], fast[4][key])


def assert_same_episode(stock, fast, policy, goal, num_steps, mode, rng):
    """Reset both to the goal, step both with the same actions, and compare all that they return."""
    for env in (stock, fast):
        set_goal(env, goal)
    obs, fast_obs = stock.reset()[0], fast.reset()[0]
    assert bits(obs) == bits(fast_obs), (goal.index, mode, "reset")
    for t in range(num_steps):
        if mode == "random":
            action = rng.uniform(-1.3, 1.3, 4)
        else:
            action = policy.get_action(obs) + (mode == "noisy") * rng.normal(size=4) * 0.3
        action = action.astype(np.float64 if mode == "float64" else np.float32)
        expected = stock.step(action)
        obs = expected[0]
        assert_same_step(expected, fast.step(action), (goal.index, mode, t))


def numeric_arrays(owner):
    arrays = {}
    for name in dir(type(owner)):
        value = None if name.startswith("_") else getattr(owner, name)
        if isinstance(value, np.ndarray):
            arrays[name] = value
    return arrays


def differing(a, b):
    return {name for name in a if a[name].shape != b[name].shape or a[name].tobytes() != b[name].tobytes()}


def kept_geoms(model):
    """The geoms of a complete model that a light one has too."""
    rows = range(model.ngeom)
    filters = {(int(model.geom_contype[g]), int(model.geom_conaffinity[g])) for g in rows}
    return [
        g
        for g in rows
        if keeps_geom(model.geom(g).name, model.geom_contype[g], model.geom_conaffinity[g], filters)
    ]


def state_of(env, geoms=slice(None)):
    """Arrays of a simulation that are meaningful and deterministic: not the arena's, not for visualisation."""
    skipped = ("efc_", "contact", "island", "dof_island", "tendon_efcadr", "bvh_active")
    arrays = {k: v for k, v in numeric_arrays(env.data).items() if not k.startswith(skipped)}
    return {
        k: v[geoms if k.startswith("geom_") else ...].copy() for k, v in arrays.items() if k not in UNREAD_ARRAYS
    }


@pytest.mark.parametrize("task", ALL_TASKS)
def test_episodes_equal_metaworld(task):
    stock = build_stock(metaworld_class(task))
    fast = accelerated_class(task)()
    rng = np.random.default_rng(11)
    goals, policy = goal_set(task, "training"), ENV_POLICY_MAP[task]()
    RESET_CACHE.clear()
    for index, mode, num_steps in [(0, "random", 40), (1, "noisy", 60), (0, "float64", 20)]:
        assert_same_episode(stock, fast, policy, goals[index], num_steps, mode, rng)
    assert len(RESET_CACHE) == 2


@pytest.mark.slow
@pytest.mark.parametrize("reward_version", ["v1", "v2"])
@pytest.mark.parametrize("task", ALL_TASKS)
def test_long_episodes_equal_metaworld(task, reward_version):
    stock = build_stock(metaworld_class(task), reward_function_version=reward_version)
    fast = accelerated_class(task)(reward_function_version=reward_version)
    rng = np.random.default_rng(12)
    goals, policy = goal_set(task, "validation"), ENV_POLICY_MAP[task]()
    for index, mode in enumerate(["scripted", "noisy", "random", "scripted", "noisy", "float64"]):
        assert_same_episode(stock, fast, policy, goals[index % 4], 500, mode, rng)


@pytest.mark.parametrize("task", ALL_TASKS)
def test_a_restored_reset_is_a_real_one(task):
    """It also checks that resets write no model fields but GOAL_FIELDS, which sharing a model depends on."""
    goals = goal_set(task, "training")
    stock = build_stock(metaworld_class(task))
    fields = {name: array.copy() for name, array in numeric_arrays(stock.model).items()}
    set_goal(stock, goals[0])
    stock.reset()
    assert differing(fields, numeric_arrays(stock.model)) <= set(GOAL_FIELDS)

    fast = accelerated_class(task)()
    for goal in (goals[0], goals[1], goals[0]):
        set_goal(fast, goal)
        fast.reset()
        if goal is goals[1]:
            for _ in range(5):
                fast.step(np.array([0.4, -0.3, -0.6, 0.8], np.float32))
    assert differing(state_of(stock, kept_geoms(stock.model)), state_of(fast)) == set()
    for name in GOAL_FIELDS:
        np.testing.assert_array_equal(getattr(stock.model, name), getattr(fast.model, name))
    for name, value in vars(stock).items():
        if isinstance(value, (float, int, np.generic, np.ndarray)):
            assert bits(value) == bits(getattr(fast, name)), name


@pytest.mark.parametrize("task", ALL_TASKS)
def test_a_light_model_simulates_what_the_complete_one_does(task):
    complete, light = build_stock(metaworld_class(task)).model, accelerated_class(task)().model
    geoms = kept_geoms(complete)
    assert len(geoms) == light.ngeom < 0.6 * complete.ngeom
    assert [complete.geom(g).name for g in geoms] == [light.geom(g).name for g in range(light.ngeom)]
    a, b = numeric_arrays(complete), numeric_arrays(light)
    for name in a:
        if name.startswith("geom_"):
            a[name] = a[name][geoms]
    # These fields number geoms and assets or summarise collisions; no equation of motion contains them.
    assets = ("mesh_", "bvh_", "mat_", "tex_", "name_", "names", "paths", "text_", "geom_matid", "geom_dataid")
    different = {name for name in differing(a, b) if not name.startswith(assets)}
    sums = {"body_contype", "body_conaffinity"}
    assert different <= {"body_geomnum", "body_geomadr", "body_bvhadr", "body_bvhnum"} | sums
    for g, complete_g in enumerate(geoms):
        if light.geom_dataid[g] >= 0:
            mesh, twin = light.mesh(light.geom_dataid[g]), complete.mesh(complete.geom_dataid[complete_g])
            vertices = [
                model.mesh_vert[int(m.vertadr[0]) : int(m.vertadr[0]) + int(m.vertnum[0])]
                for model, m in ((light, mesh), (complete, twin))
            ]
            np.testing.assert_array_equal(*vertices)


def test_live_views_stay_live_when_restored():
    env = accelerated_class("basketball-v3")()
    goals = goal_set("basketball-v3", "training")
    for index in (0, 1, 0):
        set_goal(env, goals[index])
        env.reset()
        assert np.shares_memory(env.init_left_pad, env.data.xpos)
        assert np.shares_memory(env._target_pos, env.data.site_xpos)


def test_forgotten_environments_are_freed():
    def count():
        gc.collect()
        return sum(isinstance(thing, FastData) for thing in gc.get_objects())

    goal, num_kept = goal_set("reach-v3", "training")[0], count()
    env = TaskEnv("reach-v3")
    env.reset(goal)
    env.step(np.zeros(4))
    assert count() == num_kept + 1
    del env
    assert count() == num_kept


def test_environments_of_a_task_do_not_see_each_other():
    goals = goal_set("door-open-v3", "training")
    actions = np.random.default_rng(2).uniform(-1, 1, (30, 4)).astype(np.float32)

    def rows(env, goal):
        yield env.reset(goal)
        for action in actions:
            obs, reward, success = env.step(action)
            yield np.array([*obs, reward, success])

    alone = [list(rows(TaskEnv("door-open-v3"), goal)) for goal in goals[:2]]
    interleaved = zip(*(rows(TaskEnv("door-open-v3"), goal) for goal in goals[:2]), strict=True)
    for t, together in enumerate(interleaved):
        for i in range(2):
            np.testing.assert_array_equal(together[i], alone[i][t])


@pytest.mark.parametrize("changed", ["qpos", "qvel"])
def test_a_changed_state_is_simulated_from_the_start(changed):
    """A step builds on the last one's mj_forward only if nobody moved the simulation in between."""
    stock, fast = build_stock(metaworld_class("push-v3")), accelerated_class("push-v3")()
    goal = goal_set("push-v3", "training")[2]
    for env in (stock, fast):
        set_goal(env, goal)
        env.reset()
    for t in range(20):
        action = np.array([0.5, 0.1, -0.5, 0.3], np.float32)
        assert_same_step(stock.step(action), fast.step(action), (t,))
        if t % 5 == 4:
            for env in (stock, fast):
                getattr(env.data, changed)[9] += 0.01


def test_metaworld_itself_is_left_alone():
    task = "door-open-v3"
    stock = metaworld_class(task)
    made = accelerated_class(task)
    assert issubclass(made, stock) and made is not stock and accelerated_class(task) is made
    module = sys.modules[stock.__module__]
    assert module.np is np and module.reward_utils is reward_utils
    assert reward_utils.tolerance is not fast_math.tolerance
    for member in vars(stock).values():
        if isinstance(member, types.FunctionType) and member.__module__ == stock.__module__:
            assert member.__globals__["np"] is np if "np" in member.__globals__ else True
    # A static method that is called by the class's name finds the accelerated one.
    assert made.compute_reward.__globals__["SawyerDoorEnvV3"] is made


@pytest.mark.parametrize(("package", "installed"), [("metaworld", "3.1.1"), ("mujoco", "3.3.0")])
def test_unverified_versions_are_refused_by_name(package, installed, monkeypatch):
    monkeypatch.setitem(accelerated.VERIFIED_VERSIONS, package, ("0.0.1",))
    with pytest.raises(UnverifiedError, match=f"{package} 0.0.1.*{installed}"):
        accelerated_class("push-v3")
    goal = goal_set("push-v3", "training")[0]
    with pytest.warns(UserWarning, match=f"{package} 0.0.1"):
        fallback = TaskEnv("push-v3")
    assert type(fallback.unwrapped).__mro__[1] is metaworld_class("push-v3")
    monkeypatch.undo()
    np.testing.assert_array_equal(fallback.reset(goal), TaskEnv("push-v3").reset(goal))


def test_inexact_arithmetic_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(accelerated, "first_inexact_helper", lambda: "tolerance")
    with pytest.raises(UnverifiedError, match=r"tolerance.*numpy"):
        check_installation()


def test_this_installation_is_accelerated():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TaskEnv("reach-v3")
