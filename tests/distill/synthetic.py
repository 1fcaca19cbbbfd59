"""Synthetic teachers: smooth functions of the observation on smooth random walks, as fast stand-ins for tests."""

from __future__ import annotations

import numpy as np
import torch

from cpd.comm import Comm
from cpd.config import Config
from cpd.distill.stage_data import StageData
from cpd.distill.trainer import StudentTrainer
from cpd.envs.metaworld.scaling import observation_scaling
from cpd.run.directory import Run, StudentElement
from cpd.run.files import sha256
from cpd.run.provenance import labels
from cpd.run.shards.schema import Episode, ShardAttributes
from cpd.run.shards.writer import write_shards
from cpd.seeding import generator


def episode(task: int, number: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Observations [T + 1, 39] and teacher means [T, 4] of one episode."""
    centre, scale = observation_scaling()
    rng = generator(7, "synthetic", task, number)
    place = generator(7, "place", task).standard_normal(39)
    walk = 0.1 * rng.standard_normal((length + 1, 39)).cumsum(0)
    scaled = place + 0.3 * rng.standard_normal(39) + walk
    weights = generator(7, "teacher", task).standard_normal((39, 4)) / 6
    mean = np.tanh(scaled[:-1] @ weights)
    return (centre + scale * scaled).astype(np.float32), mean.astype(np.float32)


def synthetic_episode(task: int, number: int, steps: int) -> Episode:
    """The same as a recorded episode."""
    obs, mean = episode(task, number, steps)
    return Episode(
        observations=obs,
        actions=mean,
        teacher_mean=mean,
        teacher_raw_mean=mean,
        teacher_log_std=np.full((steps, 4), -2.0, np.float32),
        rewards=np.zeros(steps),
        successes=np.zeros(steps, bool),
        noise_scale=np.zeros(steps, np.float32),
        goal_index=number,
        seed=number,
    )


def stage_data(task: int, num_episodes: int = 12, length: int = 25) -> StageData:
    """Rollouts of the synthetic teacher of `task`; episodes differ in length."""
    lengths = [length - (number % 4) for number in range(num_episodes)]
    parts = [episode(task, number, steps) for number, steps in enumerate(lengths)]
    return StageData(
        task,
        np.cumsum([0, *lengths]).astype(np.int64),
        np.concatenate([obs[:-1] for obs, _ in parts]),
        np.concatenate([mean for _, mean in parts]),
        np.full((sum(lengths), 4), -2.0, np.float32),
    )


def third_stage(config: Config, comm: Comm, device: torch.device) -> StudentTrainer:
    """A trainer in its third stage, with experts of three tasks and a full memory of two; for benchmarks."""
    trainer, episodes = StudentTrainer(config, 1, comm, device), config.rollouts.num_steps // 100
    for task in range(3):
        data = stage_data(task % len(config.stream.distinct_tasks), episodes, 100)
        trainer.begin_stage(data)
        trainer.train_step()
        if task < 2:
            trainer.end_stage(data)
    return trainer


def shard_attributes(config: Config, task: str, policy_sha256: str = "") -> ShardAttributes:
    """Those of shards of `synthetic_episode`s."""
    label = labels(config)
    return ShardAttributes(
        task=task,
        teacher_recipe=label.teacher_recipe,
        policy_sha256=policy_sha256,
        std_source="assumed",
        metaworld=label.metaworld,
        mujoco=label.mujoco,
        reward_version=label.reward_version,
        horizon=label.horizon,
        steps_after_success=0,
        suite=label.suite,
        suite_versions=label.suite_versions,
    )


def write_teachers(run: Run, element: StudentElement, num_episodes: int = 12, length: int = 25) -> None:
    """Finished teachers with real shards for every task of the run that has none yet."""
    for index, task in enumerate(run.config.stream.distinct_tasks):
        teacher = run.teacher_of(task, element.seed)
        if teacher.complete.exists():
            continue
        policy_sha256 = sha256(teacher.policy) if teacher.policy.exists() else ""
        attributes = shard_attributes(run.config, task, policy_sha256)
        episodes = [synthetic_episode(index, number, length - (number % 4)) for number in range(num_episodes)]
        write_shards(teacher.shards, attributes, episodes, shard_steps=200)
        teacher.complete.touch()
