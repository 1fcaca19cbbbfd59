"""Distillation and acting on the CPU and on CUDA, side by side.

    OMP_NUM_THREADS=1 python -m tests.bench.bench_device [--batch-sizes 256 4096] [--json PATH] [recipe.toml]

The student is the recipe's (default: cw10) at its third stage, with memory; data are synthetic. Medians over
calls, in wall milliseconds, devices in turn, and the CPU with the recipe's number of threads. Such networks are
small for an accelerator: each of its operations is short, and what counts is how many there are. PPO is not here:
it runs on the CPU everywhere (see `cpd.teachers.ppo`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cpd.comm import TORCH_THREADS, SerialComm
from cpd.config import Config
from cpd.config.load import load, merge, read_toml
from cpd.distill.trainer import StudentTrainer
from cpd.student.actor import StudentActor
from jobs.launch_options import RECIPES
from tests.distill.synthetic import stage_data, third_stage

CALLS = 60


def acting(config: Config, trainer: StudentTrainer, num_envs: int) -> Callable[[], Any]:
    """One step of `num_envs` episodes at once, past the student's context."""
    actor = StudentActor(trainer.learner.student, config.stream.distinct_tasks)
    actor.reset(config.stream.tasks[:1] * num_envs)
    obs_BO = np.repeat(stage_data(0, 1, 10).observations[:1], num_envs, axis=0)
    return lambda: actor.act(obs_BO)


def medians(calls: dict[str, Callable[[], Any]], num_calls: int) -> dict[str, float]:
    """Median wall milliseconds of each call, alternating, with synchronised devices."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(num_calls + 3):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if index >= 3:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Time everything on every available device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", type=Path, default=RECIPES / "cw10.toml")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[256, 4096])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    devices = {"cpu": torch.device("cpu")}
    if torch.cuda.is_available():
        devices["cuda"] = torch.device("cuda", 0)
        print(f"cuda is {torch.cuda.get_device_name(0)}, torch {torch.__version__}")
    else:
        print("no CUDA device is visible: only the CPU is timed")

    results: dict[str, dict[str, float]] = {}

    def compare(name: str, make: Callable[[torch.device], Callable[[], Any]], num_calls: int = CALLS) -> None:
        results[name] = times = medians({label: make(device) for label, device in devices.items()}, num_calls)
        line = ", ".join(f"{label} {milliseconds:8.2f} ms" for label, milliseconds in times.items())
        ratio = f", cpu / cuda {times['cpu'] / times['cuda']:5.2f}" if "cuda" in times else ""
        print(f"  {name:36s} {line}{ratio}", flush=True)

    raw = read_toml(arguments.recipe)
    for batch_size in arguments.batch_sizes:
        config = load(Config, merge(raw, {"distill": {"batch_size": batch_size}}), str(arguments.recipe))
        torch.set_num_threads(TORCH_THREADS)
        compare(
            f"distillation step, {batch_size} windows",
            lambda on, c=config: third_stage(c, SerialComm(), on).train_step,
        )
    config = load(Config, raw, str(arguments.recipe))
    for num_envs in (10, 50):
        compare(
            f"act, {num_envs} episodes",
            lambda on, n=num_envs: acting(config, third_stage(config, SerialComm(), on), n),
        )
    if arguments.json:
        cuda = torch.cuda.get_device_name(0) if "cuda" in devices else None
        record = {"cuda": cuda, "torch": torch.__version__, "milliseconds": results}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
