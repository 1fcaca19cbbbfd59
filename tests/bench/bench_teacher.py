"""Where a teacher's training time goes: simulator, policy, update; and what a second worker brings.

    python -m tests.bench.bench_teacher [--task window-close-v3] [--workers 1 2] [--iterations 4] [--json PATH]

Iterations are those of the default recipe. Everything runs in one process with one thread of tensor arithmetic
(and the sampler's workers); settings to be compared alternate, and of several repeats the fastest counts. Ratios
travel, absolute figures do not.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from cpd.config import PPOConfig
from cpd.envs.goals import goal_set
from cpd.envs.sampler import VectorEnv, make_vector_env
from cpd.teachers.ppo import Learner
from cpd.teachers.sampling import Batch, EpisodeRules, sample

CONFIG = PPOConfig()
HORIZON = 200


def timed(function: Any, *arguments: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def simulator_seconds(envs: VectorEnv, task: str, batch: Batch) -> float:
    """The batch's steps once more, without a policy; resets at its segments' ends."""
    goals = goal_set(task, "training", CONFIG.num_envs)
    actions = batch.actions.clip(-1, 1)
    start = time.perf_counter()
    envs.reset(range(CONFIG.num_envs), goals)
    for t in range(len(actions)):
        envs.step(actions[t])
        slots = batch.ends[t].nonzero()[0]
        if len(slots) and t < len(actions) - 1:
            envs.reset(slots, [goals[slot] for slot in slots])
    return time.perf_counter() - start


def measure_workers(task: str, workers: int, iterations: int) -> dict[str, float]:
    """Fastest iteration's times, after a first one that fills caches."""
    learner = Learner(CONFIG, seed=1)
    goals = goal_set(task, "training", 50)
    samples, simulators, updates = [], [], []
    with make_vector_env([task] * CONFIG.num_envs, workers) as envs:
        for iteration in range(iterations + 1):
            seconds, batch = timed(
                sample, learner.policy, envs, goals, CONFIG, EpisodeRules(HORIZON), 1, iteration
            )
            simulator = simulator_seconds(envs, task, batch)
            update, _ = timed(learner.update, batch, iteration)
            if iteration:
                samples.append(seconds)
                simulators.append(simulator)
                updates.append(update)
    sampling, simulator, update = min(samples), min(simulators), min(updates)
    return {
        "sample_seconds": sampling,
        "simulator_seconds": simulator,
        "update_seconds": update,
        "simulator_share": simulator / (sampling + update),
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
    for workers in arguments.workers:
        found = measure_workers(arguments.task, workers, arguments.iterations)
        results[f"workers_{workers}"] = found
        print(f"{workers} worker(s): " + ", ".join(f"{name} {value:.3g}" for name, value in found.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
