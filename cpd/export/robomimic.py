"""Rollouts as HDF5 files of robomimic, one per teacher."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np

from cpd.export.sources import teachers_with_rollouts
from cpd.run.directory import Run, TeacherElement
from cpd.run.files import atomic_write
from cpd.run.shards.reader import stream_episodes
from cpd.run.shards.schema import Episode

#: The name that robomimic gives to the observations of Gym's environments, and its number for these.
OBSERVATION_KEY: Final = "flat"
GYM_TYPE: Final = 2
#: Every so many episodes, one is in the mask `valid`; the others are in `train`.
VALID_EVERY: Final = 10


def export_robomimic(source: Path, output: Path, only: Sequence[str]) -> Iterator[Path]:
    """Write the rollouts of every finished teacher to a file in `output`, as `Exporter` describes."""
    config = Run(source).config
    for teacher in teachers_with_rollouts(source, only):
        environment = {
            "env_name": f"cpd/{teacher.task}",
            "type": GYM_TYPE,
            "env_kwargs": {
                "max_episode_steps": config.stream.horizon,
                "num_goals": config.teacher.num_training_goals,
            },
        }
        path = output / teacher.task / f"seed-{teacher.seed}.hdf5"
        with atomic_write(path) as temporary, h5py.File(temporary, "w") as file:
            _write(file, teacher, environment)
        yield path


def _write(file: Any, teacher: TeacherElement, environment: dict[str, Any]) -> None:
    data, total = file.create_group("data"), 0
    masks: dict[str, list[str]] = {"train": [], "valid": [], "successful": []}
    for number, episode in enumerate(stream_episodes(teacher.shards)):
        demo = data.create_group(f"demo_{number}")
        for name, values in _datasets(episode).items():
            demo.create_dataset(name, data=values)
        demo.attrs.update(
            num_samples=len(episode), task=teacher.task, goal_index=episode.goal_index, seed=episode.seed
        )
        total += len(episode)
        masks["valid" if number % VALID_EVERY == VALID_EVERY - 1 else "train"].append(f"demo_{number}")
        masks["successful"] += [f"demo_{number}"] if episode.episode_success else []
    data.attrs.update(total=total, env_args=json.dumps(environment))
    for name, demos in masks.items():
        file.create_dataset(f"mask/{name}", data=np.array(demos, "S"))


def _datasets(episode: Episode) -> dict[str, Any]:
    dones = np.zeros(len(episode), np.int64)
    dones[-1] = 1
    return {
        f"obs/{OBSERVATION_KEY}": episode.observations[:-1],
        f"next_obs/{OBSERVATION_KEY}": episode.observations[1:],
        "actions": episode.actions,
        "rewards": episode.rewards.astype(np.float32),
        "dones": dones,
        "successes": episode.successes.astype(np.int64),
        "teacher_mean": episode.teacher_mean,
        "teacher_log_std": episode.teacher_log_std,
        "noise_scale": episode.noise_scale,
    }
