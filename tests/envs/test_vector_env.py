"""Vector environments: same results for any number of workers, nothing left behind, clear errors."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from cpd.envs.metaworld.task_env import TaskEnv
from cpd.envs.slots import SlotError
from cpd.envs.vector_env import make_vector_env
from tests.conftest import goal_set

TASKS = ("push-v3", "push-v3", "door-open-v3", "basketball-v3", "window-close-v3")


def goals_for(tasks, index):
    return [goal_set(task, "training")[(index + i) % 50] for i, task in enumerate(tasks)]


def record(num_workers):
    """Two episodes, with slots reset and active at different times."""
    rng = np.random.default_rng(3)
    rows = []
    with make_vector_env(TASKS, num_workers) as env:
        env.reset(range(env.num_envs), goals_for(TASKS, 0))
        for t in range(40):
            if t == 20:
                env.reset([3, 0], [goals_for(TASKS, 9)[3], goals_for(TASKS, 9)[0]])
            active = None if t % 3 else rng.random(env.num_envs) < 0.7
            env.step(rng.uniform(-1.5, 1.5, (env.num_envs, 4)).astype(np.float32), active)
            rows.append((env.observations.copy(), env.rewards.copy(), env.successes.copy()))
    return rows


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids, timeout=15.0):
    end = time.monotonic() + timeout
    while any(map(is_alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(is_alive, pids))


def worker_pids(env):
    return [process.pid for process in env._workers]


def test_any_number_of_workers_gives_the_same_bits():
    alone = record(1)
    for num_workers in (2, 3):
        for expected, got in zip(alone, record(num_workers), strict=True):
            for a, b in zip(expected, got, strict=True):
                np.testing.assert_array_equal(a, b)


def test_a_slot_is_a_task_env():
    rng = np.random.default_rng(5)
    goal = goal_set("hammer-v3", "validation")[4]
    single = TaskEnv("hammer-v3")
    with make_vector_env(["hammer-v3"], 1) as env:
        env.want_grasps(True)
        env.reset([0], [goal])
        np.testing.assert_array_equal(env.observations[0], single.reset(goal).astype(np.float32))
        for _ in range(30):
            actions = rng.uniform(-1, 1, (1, 4)).astype(np.float32)
            env.step(actions)
            obs, reward, success = single.step(actions[0])
            np.testing.assert_array_equal(env.observations[0], obs.astype(np.float32))
            assert (env.rewards[0], env.successes[0]) == (reward, success)
            assert env.grasps[0] == single.grasp(obs) > 0.0


@pytest.mark.parametrize("num_workers", [1, 2])
def test_inactive_slots_are_left_alone(num_workers):
    tasks = ["reach-v3"] * 3
    with make_vector_env(tasks, num_workers) as env:
        env.reset(range(3), goals_for(tasks, 0))
        assert env.rewards.tolist() == [0.0, 0.0, 0.0]
        first = env.observations.copy()
        env.step(np.ones((3, 4), np.float32), np.array([False, True, False]))
        assert (env.observations != first).any(axis=1).tolist() == [False, True, False]
        assert (env.rewards != 0).tolist() == [False, True, False]
        env.reset([1], [goals_for(tasks, 0)[1]])
        np.testing.assert_array_equal(env.observations, first)
        assert not env.rewards.any()
        # The action of an inactive slot is ignored.
        actions = np.zeros((3, 4), np.float32)
        actions[0] = np.nan
        env.step(actions, np.array([False, True, True]))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_mistakes_are_explained(num_workers):
    tasks = ["reach-v3", "push-v3"]
    reach, push = goals_for(tasks, 0)
    with make_vector_env(tasks, num_workers) as env:
        for slots, goals, facts in [
            ([0], [push], "slot 0.*reach-v3.*push-v3"),
            ([0, 1], [reach], "2 slots.*1 goal"),
            ([2], [reach], "slot 2"),
            ([0, 0], [reach, reach], "slot 0"),
        ]:
            with pytest.raises(ValueError, match=facts):
                env.reset(slots, goals)
        env.reset([0, 1], [reach, push])
        for actions, active, facts in [
            (np.zeros((1, 4), np.float32), None, r"actions.*\(1, 4\).*\(2, 4\)"),
            (np.zeros((2, 4), np.float32), np.ones(3, bool), r"active.*\(3,\).*\(2,\)"),
            (np.full((2, 4), np.nan, np.float32), np.array([False, True]), r"slot 1 \(push-v3\)"),
        ]:
            with pytest.raises(ValueError, match=facts):
                env.step(actions, active)
    with pytest.raises(ValueError, match="closed"):
        env.step(np.zeros((2, 4), np.float32))
    env.close()
    with pytest.raises(ValueError, match="task"):
        make_vector_env([], num_workers)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_exception_arrives_with_its_traceback_and_task(num_workers):
    tasks = ["reach-v3", "push-v3"]
    with make_vector_env(tasks, num_workers) as env:
        env.reset([0], [goals_for(tasks, 0)[0]])
        with pytest.raises(SlotError, match=r"(?s)slot 1 \(push-v3\).*Traceback.*ValueError: push-v3"):
            env.step(np.zeros((2, 4), np.float32))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_environment_that_cannot_be_made_is_named(num_workers):
    with pytest.raises(SlotError, match=r"(?s)slot 1 \(puhs-v3\).*'push-v3'"):
        make_vector_env(["push-v3", "puhs-v3"], num_workers)


def test_a_killed_worker_is_reported():
    tasks = ["reach-v3", "push-v3", "door-open-v3"]
    with make_vector_env(tasks, 3) as env:
        env.reset(range(3), goals_for(tasks, 0))
        pids = worker_pids(env)
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises(SlotError, match=r"worker 1.*slots 1: push-v3.* -9"):
            for _ in range(100):
                env.step(np.zeros((3, 4), np.float32))
        assert wait_until_gone(pids)


def test_the_first_slots_are_spread_over_all_workers():
    with make_vector_env(["reach-v3"] * 5, 3) as env:
        assert [list(slots) for slots in env._slots] == [[0, 3], [1, 4], [2]]


def test_workers_leave_signals_to_their_parent():
    tasks = ["reach-v3", "push-v3"]
    with make_vector_env(tasks, 2) as env:
        for pid in worker_pids(env):
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
                os.kill(pid, signum)
        env.reset(range(2), goals_for(tasks, 0))
        env.step(np.zeros((2, 4), np.float32))


def test_an_interrupted_step_closes_the_environment():
    class Interrupted(Exception):
        pass

    def interrupt(*_):
        raise Interrupted

    tasks = ["reach-v3", "push-v3"]
    with make_vector_env(tasks, 2) as env:
        pids = worker_pids(env)
        env.reset(range(2), goals_for(tasks, 0))
        previous = signal.signal(signal.SIGALRM, interrupt)
        os.kill(pids[0], signal.SIGSTOP)  # so that the interrupt finds the parent waiting
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        threading.Timer(0.3, os.kill, (pids[0], signal.SIGCONT)).start()
        try:
            with pytest.raises(Interrupted):
                env.step(np.zeros((2, 4), np.float32))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        with pytest.raises(ValueError, match="closed"):
            env.step(np.zeros((2, 4), np.float32))
        assert wait_until_gone(pids)


def test_a_forgotten_environment_ends_its_workers():
    env = make_vector_env(["reach-v3", "push-v3"], 2)
    pids = worker_pids(env)
    assert all(map(is_alive, pids))
    del env
    gc.collect()
    assert wait_until_gone(pids)


def test_workers_end_when_their_parent_is_killed():
    code = (
        "import os, signal, numpy as np\n"
        "from cpd.envs.vector_env import make_vector_env\n"
        "env = make_vector_env(['reach-v3', 'push-v3'], 2)\n"
        "print(*[process.pid for process in env._workers], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    pids = [int(pid) for pid in ended.stdout.split()]
    assert len(pids) == 2
    assert wait_until_gone(pids)
