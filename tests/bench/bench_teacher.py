"""Where a teacher's training time goes: simulator, policy, update; and how much a second worker saves.

    python -m tests.bench.bench_teacher [--task window-close-v3] [--workers 1 2] [--iterations 4] [--json PATH]

Iterations have the default settings. Everything runs in one process with one thread of tensor arithmetic (and the
workers of the environments). Numbers of workers alternate, and the fastest of several repeats counts. Ratios
compare across machines, absolute figures do not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cpd.config import PPOConfig
from cpd.envs.vector_env import VectorEnv, make_vector_env
from cpd.teachers.ppo import PPOLearner
from cpd.teachers.rollout import EpisodeRules, Experience, sample
from tests.conftest import goal_set

CONFIG = PPOConfig()
HORIZON = 200


def timed(function: Any, *arguments: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def simulator_seconds(envs: VectorEnv, task: str, experience: Experience) -> float:
    """Time the same steps without a policy, with resets at the ends of segments."""
    goals = goal_set(task, "training", CONFIG.num_envs)
    actions = experience.actions.clip(-1, 1)
    start = time.perf_counter()
    envs.reset(range(CONFIG.num_envs), goals)
    for t in range(len(actions)):
        envs.step(actions[t])
        slots = experience.ends[t].nonzero()[0]
        if len(slots) and t < len(actions) - 1:
            envs.reset(slots, [goals[slot] for slot in slots])
    return time.perf_counter() - start


class Iteration(NamedTuple):
    """Seconds of an iteration's parts."""

    sample: float
    simulator: float
    update: float


def measure(task: str, workers: Sequence[int], iterations: int) -> dict[int, list[Iteration]]:
    """Time iterations by number of workers, alternating; the first one, which fills caches, is left out."""
    goals = goal_set(task, "training", 50)
    learners = {count: PPOLearner(CONFIG, seed=1) for count in workers}
    iterations_by_workers: dict[int, list[Iteration]] = {count: [] for count in workers}
    with contextlib.ExitStack() as stack:
        all_envs = {
            count: stack.enter_context(make_vector_env([task] * CONFIG.num_envs, count)) for count in workers
        }
        for iteration in range(iterations + 1):
            for count, envs in all_envs.items():
                learner = learners[count]
                sampling, experience = timed(
                    sample, learner.policy, envs, goals, CONFIG, EpisodeRules(HORIZON), 1, iteration
                )
                simulator = simulator_seconds(envs, task, experience)
                update, _ = timed(learner.update, experience, iteration)
                iterations_by_workers[count].append(Iteration(sampling, simulator, update))
    return {count: times[1:] for count, times in iterations_by_workers.items()}


def summary(times: Sequence[Iteration]) -> dict[str, float]:
    """The fastest of every part, and the median of the iterations' shares of the simulator."""
    sampling, simulator, update = (min(parts) for parts in zip(*times, strict=True))
    return {
        "sample_seconds": sampling,
        "simulator_seconds": simulator,
        "update_seconds": update,
        "simulator_share": statistics.median(t.simulator / (t.sample + t.update) for t in times),
        "env_steps_per_second": CONFIG.num_envs * CONFIG.steps_per_env / (sampling + update),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="window-close-v3")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"task": arguments.task}
    for workers, times in measure(arguments.task, arguments.workers, arguments.iterations).items():
        results[f"workers_{workers}"] = figures = summary(times)
        print(f"{workers} worker(s): " + ", ".join(f"{name} {value:.3g}" for name, value in figures.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
