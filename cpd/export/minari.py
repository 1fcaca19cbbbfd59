"""Rollouts as Minari datasets, one per teacher."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import minari
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box
from minari.data_collector.episode_buffer import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage

from cpd.config import Config
from cpd.envs.suite import ACTION_CLIP, DEFAULT_SUITE
from cpd.export.sources import teachers_with_rollouts
from cpd.run.directory import Run, TeacherElement
from cpd.run.files import atomic_folder
from cpd.run.shards.reader import stream_episodes
from cpd.run.shards.schema import Episode, read_index


def export_minari(source: Path, output: Path, only: Sequence[str]) -> Iterator[Path]:
    """Write the rollouts of every finished teacher to a dataset in `output`, as `Exporter` describes."""
    config = Run(source).config
    sizes = config.stream.suite_object.spaces.sizes
    for teacher in teachers_with_rollouts(source, only):
        dataset = dataset_id(config, teacher)
        with atomic_folder(output / dataset) as folder:
            storage = MinariStorage.new(
                folder.resolve() / "data",  # Minari measures relative folders wrongly
                observation_space=Box(-np.inf, np.inf, (sizes.observation,), np.float32),
                action_space=Box(-ACTION_CLIP, ACTION_CLIP, (sizes.action,), np.float32),
                env_spec=env_spec(config, teacher.task),
            )
            conditions = read_index(teacher.shards).attributes.as_dict()
            storage.update_metadata(
                {
                    "dataset_id": dataset,
                    "minari_version": minari.__version__,
                    "algorithm_name": conditions["teacher_recipe"],
                    "description": f"Rollouts of a teacher of {teacher.task}, some of them with noise",
                    "conditions": conditions,
                }
            )
            storage.update_episodes(map(_buffer, stream_episodes(teacher.shards)))
        yield output / dataset


def dataset_id(config: Config, teacher: TeacherElement) -> str:
    """Return the name of a teacher's dataset."""
    namespace = re.sub(r"[^-\w]", "-", config.name)  # of all that names of folders may have
    return f"{namespace}/{teacher.task}/seed-{teacher.seed}-v0"


def env_spec(config: Config, task: str) -> EnvSpec:
    """Return the registered environment of a task, with the horizon and the goals of the rollouts."""
    suite = {} if config.stream.suite == DEFAULT_SUITE else {"suite": config.stream.suite}
    return EnvSpec(
        f"cpd/{task}",
        entry_point="cpd.envs.gym:StreamEnv",
        max_episode_steps=config.stream.horizon,
        kwargs={"tasks": [task], "num_goals": config.teacher.num_training_goals, **suite},
    )


def _buffer(episode: Episode) -> EpisodeBuffer:
    truncations = np.zeros(len(episode), np.bool_)
    truncations[-1] = True  # cut off: the environment itself never ends an episode
    return EpisodeBuffer(
        seed=episode.seed,
        options={"goal": episode.goal_index},
        observations=episode.observations,
        actions=episode.actions,
        rewards=episode.rewards.astype(np.float32),
        terminations=np.zeros(len(episode), np.bool_),
        truncations=truncations,
        infos={
            "success": episode.successes,
            "teacher_mean": episode.teacher_mean,
            "teacher_log_std": episode.teacher_log_std,
            "noise_scale": episode.noise_scale,
        },
    )
