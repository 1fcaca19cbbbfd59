"""Time to 95 % success, and updates per second, side by side with stable-baselines3.

    make bench-teacher        or, with stable-baselines3 on the PYTHONPATH,
    python -m tests.bench.bench_learners [--tasks drawer-close-v3 ...] [--cap 300] [--json PATH]

stable-baselines3's PPO and SAC run as a user would run them: `MlpPolicy` with its default settings on
`gym.make("Meta-World/MT1")`. Our PPO runs with the defaults of `cpd.config`, on the accelerated environment. All
learn in one process with one thread. Every learner is evaluated in the same way: deterministic actions, our fifty
validation goals, success at any of 500 steps, after every `--every` seconds of training. Evaluations do not count
as training time, and end as soon as more than two of the fifty goals have failed.

The seconds are processor time of training, which other load changes little; the table also shows elapsed time.
Ratios compare across machines, absolute figures do not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium
import metaworld  # noqa: F401 - registers the Gymnasium ids
import numpy as np
import torch

from cpd.config import PPOConfig
from cpd.envs.episodes import Actor, run_episodes
from cpd.envs.vector_env import VectorEnv, make_vector_env
from cpd.teachers.policy import TeacherActor
from cpd.teachers.ppo import PPOLearner
from cpd.teachers.rollout import EpisodeRules, Experience, sample
from tests.conftest import goal_set

HORIZON, TRAINING_HORIZON = 500, 200
NUM_GOALS, CHUNK, MOST_FAILURES = 50, 10, 2


@dataclass
class Clock:
    """Training time, which stops while a policy is evaluated."""

    cap: float
    every: float
    cpu: float = 0.0
    elapsed: float = 0.0
    _next_evaluation: float = 0.0
    _started: tuple[float, float] | None = None

    def start(self) -> None:
        self._started = (time.process_time(), time.perf_counter())
        self._next_evaluation = self._next_evaluation or self.every

    def stop(self) -> None:
        assert self._started is not None
        self.cpu += time.process_time() - self._started[0]
        self.elapsed += time.perf_counter() - self._started[1]

    def is_due(self) -> bool:
        """Whether it is time to evaluate; restarts the clock to find out."""
        self.stop()
        self.start()
        return self.cpu >= self._next_evaluation

    def evaluated(self) -> None:
        self._next_evaluation = self.cpu + self.every


@dataclass
class Judge:
    """Evaluates whether a policy passes."""

    envs: VectorEnv
    task: str
    best: float = 0.0

    def passes(self, actor: Actor) -> bool:
        goals = goal_set(self.task, "validation", NUM_GOALS)
        failures = 0
        for start in range(0, NUM_GOALS, CHUNK):
            (outcomes,) = run_episodes(actor, [(self.envs, goals[start : start + CHUNK])], HORIZON)
            failures += sum(not outcome.success for outcome in outcomes)
            if failures > MOST_FAILURES:
                # Goals that were not evaluated count as failures.
                self.best = max(self.best, (start + CHUNK - failures) / NUM_GOALS)
                return False
        self.best = max(self.best, 1 - failures / NUM_GOALS)
        return True


@dataclass
class Result:
    """One learner on one task."""

    task: str
    learner: str
    seed: int
    passed: bool
    cpu_seconds: float
    elapsed_seconds: float
    env_steps: int
    best_success: float
    """A lower bound if an evaluation ended early."""


def train_ours(task: str, seed: int, clock: Clock, judge: Judge) -> tuple[bool, int]:
    """Train one learner; returns whether it passed, and its environment steps."""
    config = PPOConfig()
    clock.start()
    learner = PPOLearner(config, seed)
    goals = goal_set(task, "training")
    with make_vector_env([task] * config.num_envs, 1) as envs:
        iteration = 0
        while clock.cpu < clock.cap:
            batch = sample(learner.policy, envs, goals, config, EpisodeRules(TRAINING_HORIZON), seed, iteration)
            assert batch is not None
            learner.update(batch, iteration)
            iteration += 1
            if clock.is_due():
                clock.stop()
                passed = judge.passes(TeacherActor(learner.policy))
                clock.evaluated()
                if passed:
                    return True, iteration * config.num_envs * config.steps_per_env
                clock.start()
    clock.stop()
    return False, iteration * config.num_envs * config.steps_per_env


class TheirActor:
    """A stable-baselines3 model as `cpd.envs.episodes.Actor`."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def reset(self, tasks: Sequence[str]) -> None:
        """Do nothing: the policy has no memory."""

    def act(self, obs_BO: np.ndarray) -> np.ndarray:
        return np.clip(self._model.predict(obs_BO, deterministic=True)[0], -1, 1).astype(np.float32)


def train_theirs(kind: str, task: str, seed: int, clock: Clock, judge: Judge) -> tuple[bool, int]:
    """Train one learner; returns whether it passed, and its environment steps."""
    import stable_baselines3
    from stable_baselines3.common.callbacks import BaseCallback

    class Evaluation(BaseCallback):
        passed = False

        def _on_step(self) -> bool:
            if self.num_timesteps % 100:
                return True
            if clock.is_due():
                clock.stop()
                self.passed = judge.passes(TheirActor(self.model))
                clock.evaluated()
                clock.start()
            return not self.passed and clock.cpu < clock.cap

    clock.start()
    evaluation = Evaluation()
    env = gymnasium.make("Meta-World/MT1", env_name=task, seed=seed)
    make = {"ppo": stable_baselines3.PPO, "sac": stable_baselines3.SAC}[kind]
    model = make("MlpPolicy", env, seed=seed, device="cpu")
    model.learn(total_timesteps=10**9, callback=evaluation)
    clock.stop()
    env.close()
    return evaluation.passed, model.num_timesteps


def time_to_success(task: str, seed: int, cap: float, every: float, names: list[str]) -> Iterator[Result]:
    """One learner after another."""
    with make_vector_env([task] * CHUNK, 1) as envs:
        for name in names:
            whose, kind = name.split("-")
            clock, judge = Clock(cap, every), Judge(envs, task)
            arguments = (task, seed, clock, judge)
            passed, steps = train_ours(*arguments) if whose == "ours" else train_theirs(kind, *arguments)
            yield Result(task, name, seed, passed, clock.cpu, clock.elapsed, steps, judge.best)


def synthetic_batch(num_steps: int, num_envs: int) -> Experience:
    rng = np.random.default_rng(0)
    shape = (num_steps, num_envs)
    obs, next_obs = rng.normal(size=(2, *shape, 39)).astype(np.float32)
    ends = np.zeros(shape, np.bool_)
    ends[-1] = True
    actions = np.tanh(rng.normal(size=(*shape, 4))).astype(np.float32)
    return Experience(
        obs, next_obs, actions, np.ones(shape, np.float32), np.zeros(shape, np.bool_), ends, 0.0, 0.0
    )


def fastest(runs: dict[str, Callable[[], None]], num_repeats: int = 3) -> dict[str, float]:
    """The fewest CPU seconds of each, in alternating runs; the first round warms up."""
    best = dict.fromkeys(runs, float("inf"))
    for repeat in range(num_repeats + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if repeat:
                best[name] = min(best[name], time.process_time() - start)
    return best


def discard(result: object) -> None:
    """Make a lambda return None."""


def ppo_samples() -> dict[str, float]:
    """PPO samples per second (rows through a gradient step) at stable-baselines3's own settings for both."""
    from stable_baselines3 import PPO

    batch = synthetic_batch(256, 8)
    config = PPOConfig(
        hidden_sizes=(64, 64), num_envs=8, steps_per_env=256, minibatch_size=64, num_epochs=10, target_kl=1e9
    )
    ours, wide = PPOLearner(config, 1), PPOLearner(replace(config, minibatch_size=512), 1)
    env = gymnasium.make("Meta-World/MT1", env_name="reach-v3", seed=1)
    theirs = PPO("MlpPolicy", env, device="cpu")
    theirs.learn(total_timesteps=2048, log_interval=None)
    runs = {
        "ours": lambda: discard(ours.update(batch, 0)),
        "ours_minibatch_512": lambda: discard(wide.update(batch, 0)),
        "sb3": theirs.train,
    }
    return {name: 20_480 / seconds for name, seconds in fastest(runs, 2).items()}


LEARNERS = ["ours-ppo", "sb3-ppo", "sb3-sac"]


def ratios_of(results: list[Result]) -> dict[str, str]:
    """For every task: how much longer the better of theirs took than ours."""
    ratios = {}
    for task in dict.fromkeys(result.task for result in results):
        ours = [r for r in results if r.task == task and r.learner.startswith("ours") and r.passed]
        theirs = [r for r in results if r.task == task and r.learner.startswith("sb3")]
        if not ours or not theirs:
            continue
        passed = [r.cpu_seconds for r in theirs if r.passed]
        mark, seconds = ("", min(passed)) if passed else ("> ", min(r.cpu_seconds for r in theirs))
        ratios[task] = f"{mark}{seconds / min(r.cpu_seconds for r in ours):.1f}"
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", default=["drawer-close-v3", "window-close-v3"])
    parser.add_argument("--learners", nargs="+", choices=LEARNERS, default=LEARNERS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cap", type=float, default=300.0, help="CPU seconds of training per learner at most")
    parser.add_argument("--every", type=float, default=5.0, help="CPU seconds of training between evaluations")
    parser.add_argument("--no-throughput", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    record: dict[str, Any] = {"machine": machine, "cap_seconds": arguments.cap, "every_seconds": arguments.every}

    def save() -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(record, indent=1) + "\n")

    if not arguments.no_throughput:
        record["per_second"] = {"ppo_samples": ppo_samples()}
        for name, rates in record["per_second"].items():
            text = ", ".join(f"{who} {rate:.0f}" for who, rate in rates.items())
            print(f"{name:28s} {text} per second: {rates['ours'] / rates['sb3']:.1f} x", flush=True)
        save()
    results: list[Result] = []
    print(f"\n{'task':24s}{'learner':12s}{'CPU s':>8s}{'elapsed':>9s}{'env steps':>11s}{'success':>9s}")
    for task in arguments.tasks:
        for result in time_to_success(task, arguments.seed, arguments.cap, arguments.every, arguments.learners):
            results.append(result)
            seconds = f"{'' if result.passed else '> '}{result.cpu_seconds:.0f}"
            line = (
                f"{task:24s}{result.learner:12s}{seconds:>8s}{result.elapsed_seconds:9.0f}{result.env_steps:11d}"
            )
            print(f"{line}{result.best_success:9.2f}", flush=True)
            record["time_to_success"] = [asdict(one) for one in results]
            save()
    record["ratios"] = ratios_of(results)
    for task, ratio in record["ratios"].items():
        print(f"{task}: stable-baselines3's better learner takes {ratio} x as long as ours")
    save()


if __name__ == "__main__":
    main()
