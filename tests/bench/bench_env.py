"""Steps per second of the accelerated environments, side by side with Meta-World's own and the physics alone.

    python -m tests.bench.bench_env [--tasks push-v3 reach-v3] [--quick] [--json PATH]

One run measures everything, interleaved, with uniformly random actions; the fastest of several repeats counts.
Single environments are measured in CPU time of one thread, which other load disturbs little, and vector
environments in elapsed time. Ratios hold on other machines; absolute figures do not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import metaworld  # noqa: F401 - registers the Gymnasium ids
import mujoco
import numpy as np

from cpd.envs.metaworld.task_env import TaskEnv
from cpd.envs.metaworld.tasks import ALL_TASKS
from cpd.envs.vector_env import make_vector_env
from tests.conftest import goal_set

EPISODE = 200


def random_actions(num_steps: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (num_steps, 4)).astype(np.float32)


class GymTask:
    """`gym.make` as in Meta-World's documentation: with its wrappers, random goals and 500-step episodes."""

    def __init__(self, task: str) -> None:
        self.env = gymnasium.make("Meta-World/MT1", env_name=task, seed=1)

    def reset(self) -> None:
        self.env.reset()

    def step(self, action: np.ndarray) -> None:
        self.env.step(action)


class AcceleratedTask:
    """`TaskEnv`, with the goals in turn."""

    def __init__(self, task: str) -> None:
        self.env = TaskEnv(task)
        self.goals = goal_set(task, "training")
        self.index = 0
        for goal in self.goals:  # the first reset to a goal is a real one
            self.env.reset(goal)

    def reset(self) -> None:
        self.env.reset(self.goals[self.index % len(self.goals)])
        self.index += 1

    def step(self, action: np.ndarray) -> None:
        self.env.step(action)


class PhysicsOnly:
    """The simulation that every step needs: mj_step x 5 and mj_forward, on Meta-World's own or a light model."""

    def __init__(self, task: str, *, light: bool) -> None:
        self.task_env = TaskEnv(task, accelerated=light)
        self.goal = goal_set(task, "training")[0]
        self.task_env.reset(self.goal)
        env = self.task_env.unwrapped
        self.model, self.data, self.low, self.high = env.model, env.data, env.mocap_low, env.mocap_high
        self.mocap, self.ctrl = self.data.mocap_pos[0], self.data.ctrl

    def reset(self) -> None:
        self.task_env.reset(self.goal)

    def step(self, action: np.ndarray) -> None:
        self.mocap[:] = np.clip(self.mocap + action[:3] * 0.01, self.low, self.high)
        self.ctrl[:] = (action[3], -action[3])
        mujoco.mj_step(self.model, self.data, 5)
        mujoco.mj_forward(self.model, self.data)


def seconds(subject: Any, actions: np.ndarray, episode: int) -> float:
    """CPU time of `actions`, with a reset before each `episode` steps; an episode of 0 resets once, untimed."""
    if not episode:
        subject.reset()
    start = time.thread_time()
    for t, action in enumerate(actions):
        if episode and t % episode == 0:
            subject.reset()
        subject.step(action)
    return time.thread_time() - start


def bench_task(task: str, num_steps: int, num_repeats: int) -> dict[str, float]:
    """Steps per second of the four, without resets and with one every 200 steps."""
    subjects: dict[str, Any] = {
        "gym": GymTask(task),
        "accelerated": AcceleratedTask(task),
        "physics": PhysicsOnly(task, light=False),
        "light": PhysicsOnly(task, light=True),
    }
    result: dict[str, float] = {}
    for label, episode, steps in (("", 0, min(num_steps, 490)), ("_resets", EPISODE, max(num_steps, EPISODE))):
        best = dict.fromkeys(subjects, float("inf"))
        for repeat in range(num_repeats):
            actions = random_actions(steps, repeat)
            for name, subject in subjects.items():
                best[name] = min(best[name], seconds(subject, actions, episode))
        result |= {name + label: steps / best[name] for name in subjects}
    return result


def bench_vector_env(task: str, num_workers: int, slots_per_worker: int, num_repeats: int) -> dict[str, float]:
    """Steps per second of all slots together, in episodes of 200 steps with their resets, at equal processes.

    Gymnasium's asynchronous vector environment has one environment per process, ours any number of slots. So
    Gymnasium's gets `num_workers` environments, and both keep the same number of processes busy.
    """
    goals = goal_set(task, "training")
    actions = random_actions(EPISODE * num_workers * slots_per_worker).reshape(EPISODE, -1, 4)
    stock = gymnasium.make_vec(
        "Meta-World/MT1", env_name=task, num_envs=num_workers, vectorization_mode="async", seed=1
    )
    with contextlib.ExitStack() as stack:
        stack.callback(stock.close)

        def run_stock() -> None:
            stock.reset()
            for action in actions:
                stock.step(action[:num_workers])

        def runner(num_envs: int) -> Callable[[], None]:
            env = stack.enter_context(make_vector_env([task] * num_envs, num_workers))

            def run() -> None:
                env.reset(range(num_envs), [goals[i % 50] for i in range(num_envs)])
                for action in actions:
                    env.step(action[:num_envs])

            return run

        subjects: dict[str, tuple[int, Callable[[], None]]] = {"gym_async": (num_workers, run_stock)}
        for slots in (1, slots_per_worker):
            subjects[f"ours_{slots}_per_worker"] = (num_workers * slots, runner(num_workers * slots))
        best: dict[str, float] = dict.fromkeys(subjects, 0.0)
        for repeat in range(num_repeats + 1):
            for name, (num_envs, run) in subjects.items():
                start = time.perf_counter()
                run()
                rate = EPISODE * num_envs / (time.perf_counter() - start)
                if repeat:  # the first fills the cache of resets
                    best[name] = max(best[name], rate)
    return best


def table_row(task: str, rates: dict[str, float]) -> str:
    return (
        f"{task:30s}{rates['gym']:8.0f}{rates['accelerated']:8.0f}{rates['physics']:9.0f}{rates['light']:8.0f}"
        f"{rates['accelerated'] / rates['gym']:8.2f}{rates['accelerated'] / rates['physics']:9.0%}"
        f"{rates['accelerated'] / rates['light']:9.0%}"
        f"{rates['gym_resets']:10.0f}{rates['accelerated_resets']:8.0f}"
        f"{rates['accelerated_resets'] / rates['gym_resets']:8.2f}{rates['physics'] / rates['gym_resets']:9.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=list(ALL_TASKS), metavar="TASK")
    parser.add_argument("--quick", action="store_true", help="fewer steps and repeats, noisier")
    parser.add_argument("--workers", type=int, default=2, help="processes of the vector environments")
    parser.add_argument("--json", type=Path, help="write the raw rates here")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    num_steps, num_repeats = (EPISODE, 2) if arguments.quick else (2 * EPISODE, 5)

    print("steps per second; resets: one every 200 steps; phys/gym: physics without a reset over gym with them")
    print(f"{'task':30s}{'gym':>8s}{'accel':>8s}{'physics':>9s}{'light':>8s}", end="")
    print(f"{'x gym':>8s}{'of phys':>9s}{'of light':>9s}", end="")
    print(f"{'gym+res':>10s}{'accel':>8s}{'x gym':>8s}{'phys/gym':>9s}")
    rates = {}
    for task in arguments.tasks:
        rates[task] = bench_task(task, num_steps, num_repeats)
        print(table_row(task, rates[task]), flush=True)
    medians = {
        "accelerated / gym": statistics.median(r["accelerated"] / r["gym"] for r in rates.values()),
        "accelerated / physics": statistics.median(r["accelerated"] / r["physics"] for r in rates.values()),
        "accelerated / light physics": statistics.median(r["accelerated"] / r["light"] for r in rates.values()),
        "with resets": statistics.median(r["accelerated_resets"] / r["gym_resets"] for r in rates.values()),
        "physics / gym with resets": statistics.median(r["physics"] / r["gym_resets"] for r in rates.values()),
    }
    print("medians: " + ", ".join(f"{name} {value:.2f}" for name, value in medians.items()))

    vector_task = arguments.tasks[0] if len(arguments.tasks) == 1 else "push-v3"
    vector_rates = bench_vector_env(vector_task, arguments.workers, 8, num_repeats)
    print(f"\nvector environments, {vector_task}, {arguments.workers} processes, steps per second of all slots")
    for name, rate in vector_rates.items():
        print(f"{name:24s}{rate:8.0f}{rate / vector_rates['gym_async']:8.2f} x")
    if arguments.json:
        results = {"tasks": rates, "medians": medians, "sampler": {"task": vector_task, **vector_rates}}
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
