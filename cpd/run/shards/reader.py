"""Reading a teacher's rollouts into contiguous arrays, and refusing by name what is not sound."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from cpd.envs.tasks import OBSERVATION_SIZE
from cpd.run.files import read_json, sha256
from cpd.run.provenance import Labels
from cpd.run.shards.schema import (
    ATTRIBUTE_NAMES,
    EPISODE_FIELDS,
    INDEX_NAME,
    SCHEMA_VERSION,
    SHARD_PATTERN,
    STEP_FIELDS,
    FloatArray,
    ShardEntry,
    ShardError,
    ShardIndex,
    remedy,
)


@dataclass(frozen=True)
class Rollouts:
    """All rollouts of one teacher: N steps in E episodes, contiguous and in the order of collection.

    Attributes:
        task: Meta-World task name.
        recipe: the teacher's recipe label.
        policy_sha256: hash of the teacher's weights; empty for a teacher without any.
        std_source: "policy", or "assumed" for the constant of a deterministic teacher.
        observations: [N, 39], what the teacher saw before each step.
        actions: [N, 4], executed, in [-1, 1].
        teacher_mean: [N, 4], clipped to [-1, 1].
        teacher_raw_mean: [N, 4].
        teacher_log_std: [N, 4].
        rewards: [N].
        successes: [N] bool, not latched.
        noise_scale: [N], 0 where the action was clean.
        offsets: [E + 1]; episode e has steps offsets[e]:offsets[e + 1].
        final_observations: [E, 39], the observation after each episode's last step.
        goal_index: [E], among the training goals.
        seed: [E], of each episode's noise.
        episode_return: [E] float64.
        episode_success: [E] bool.
    """

    task: str
    recipe: str
    policy_sha256: str
    std_source: str
    observations: FloatArray
    actions: FloatArray
    teacher_mean: FloatArray
    teacher_raw_mean: FloatArray
    teacher_log_std: FloatArray
    rewards: FloatArray
    successes: npt.NDArray[np.bool_]
    noise_scale: FloatArray
    offsets: npt.NDArray[np.int64]
    final_observations: FloatArray
    goal_index: npt.NDArray[np.int64]
    seed: npt.NDArray[np.int64]
    episode_return: npt.NDArray[np.float64]
    episode_success: npt.NDArray[np.bool_]

    @property
    def num_steps(self) -> int:
        """N."""
        return len(self.actions)

    @property
    def num_episodes(self) -> int:
        """E."""
        return len(self.goal_index)


def read_index(folder: Path) -> ShardIndex:
    """The index of a teacher's shards.

    Raises:
        ShardError: if it is missing or damaged.
    """
    path = folder / INDEX_NAME
    if not path.exists():
        raise ShardError(
            f"{folder} has no {INDEX_NAME}: its rollouts are missing or were not finished; {remedy(folder)}"
        )
    try:
        data = read_json(path)
    except ValueError as error:
        raise ShardError(f"{path} is damaged; {remedy(folder)}") from error
    return ShardIndex.from_dict(data, path)


def read_rollouts(folder: Path, *, task: str, labels: Labels, policy_sha256: str | None = None) -> Rollouts:
    """All rollouts of the teacher whose shards lie in `folder`, checked before any of them is used.

    Args:
        folder: the teacher's `shards`.
        task: the task that is wanted.
        labels: the run's labels; recipe, horizon, reward version and the versions of metaworld and mujoco
            must be those of the shards (the task identity does not concern them).
        policy_sha256: hash of the teacher's present policy.safetensors; None skips this check.

    Raises:
        ShardError: a shard or the index is missing, damaged, truncated, another teacher's, or stale. The
            message names the file, the cause and the remedy.
    """
    index = read_index(folder)
    _check_labels(folder / INDEX_NAME, index, task, labels, policy_sha256)
    listed = {entry.file for entry in index.shards}
    for path in sorted(folder.glob(SHARD_PATTERN)):
        if path.name not in listed:
            raise ShardError(f"{path} is stale: {INDEX_NAME} does not list it; remove it, or {remedy(folder)}")
    for entry in index.shards:
        _check_file(folder, entry, index)
    return _read_all(folder, index)


def first_observations(folder: Path) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    """What the teacher saw first in every episode, [E, 39], and the index of the episode's goal, [E].

    For a look at rollouts that were checked when they were used: hashes and labels are not compared.

    Raises:
        ShardError: if the index is missing or damaged.
        OSError: if a shard is missing or not readable.
    """
    index = read_index(folder)
    observations, goals = [], []
    for entry in index.shards:
        with h5py.File(folder / entry.file, "r") as file:
            # Every episode has one observation more than it has steps.
            first = file["offsets"][:-1] + np.arange(entry.num_episodes)
            observations.append(file["observations"][:][first])
            goals.append(file["goal_index"][:])
    return np.concatenate(observations), np.concatenate(goals)


def _check_labels(path: Path, index: ShardIndex, task: str, labels: Labels, policy_sha256: str | None) -> None:
    """Compare the index's labels with what is wanted."""
    attributes = index.attributes
    wanted: dict[str, Any] = {
        "task": task,
        "teacher_recipe": labels.teacher_recipe,
        "horizon": labels.horizon,
        "reward_version": labels.reward_version,
        "metaworld": labels.metaworld,
        "mujoco": labels.mujoco,
    }
    for name, value in wanted.items():
        found = getattr(attributes, name)
        if found != value:
            raise ShardError(
                f"{path}: these rollouts are foreign: {name} is {found!r}, but {value!r} is wanted; "
                + remedy(path.parent)
            )
    if policy_sha256 is not None and attributes.policy_sha256 != policy_sha256:
        raise ShardError(
            f"{path}: these rollouts are stale: they were collected by policy {attributes.policy_sha256[:12]}, "
            f"but the teacher's policy is now {policy_sha256[:12]}; {remedy(path.parent)}"
        )


def _check_file(folder: Path, entry: ShardEntry, index: ShardIndex) -> None:
    """Raise ShardError unless the shard is the one that the index describes."""
    path = folder / entry.file
    if not path.is_file():
        raise ShardError(f"{path} is missing, but {INDEX_NAME} lists it; {remedy(folder)}")
    if sha256(path) == entry.sha256:
        return
    num_bytes = path.stat().st_size
    if num_bytes < entry.num_bytes:
        raise ShardError(f"{path} is truncated: {num_bytes} bytes instead of {entry.num_bytes}; {remedy(folder)}")
    raise ShardError(f"{path} {_difference(path, index)}; {remedy(folder)}")


def _difference(path: Path, index: ShardIndex) -> str:
    """Why a shard's hash is not the recorded one, as far as can be told."""
    try:
        with h5py.File(path, "r") as file:
            return _foreign_label(file, index) or f"is damaged: its hash is not the one in {INDEX_NAME}"
    except Exception:  # the library raises all kinds of errors on damaged files
        return "is damaged: not a readable HDF5 file"


def _foreign_label(file: Any, index: ShardIndex) -> str:
    """The first root attribute that is not the index's, in words; empty if all agree."""
    found = {name: _plain(file.attrs[name]) for name in ATTRIBUTE_NAMES if name in file.attrs}
    for name, value in index.attributes.as_dict().items():
        if name not in found:
            return f"is foreign: an HDF5 file without the attribute {name!r}"
        if found[name] != value:
            return f"is foreign: its {name} is {found[name]!r}, but {INDEX_NAME} says {value!r}"
    return ""


def _plain(value: Any) -> str | int:
    return value.decode() if isinstance(value, bytes) else int(value) if isinstance(value, np.integer) else value


def _read_all(folder: Path, index: ShardIndex) -> Rollouts:
    """Concatenate the shards, whose hashes were found right."""
    num_steps, num_episodes = index.num_steps, index.num_episodes
    steps: dict[str, npt.NDArray[Any]] = {
        name: np.empty((num_steps, *shape), dtype) for name, (dtype, shape) in STEP_FIELDS.items()
    }
    episodes: dict[str, npt.NDArray[Any]] = {
        name: np.empty((num_episodes, *shape), dtype) for name, (dtype, shape) in EPISODE_FIELDS.items()
    }
    observations = np.empty((num_steps, OBSERVATION_SIZE), np.float32)
    final_observations = np.empty((num_episodes, OBSERVATION_SIZE), np.float32)
    offsets = np.zeros(num_episodes + 1, np.int64)
    step, episode = 0, 0
    for entry in index.shards:
        path = folder / entry.file
        next_step, next_episode = step + entry.num_steps, episode + entry.num_episodes
        with h5py.File(path, "r") as file:
            if reason := _foreign_label(file, index):
                raise ShardError(f"{path} {reason}; {remedy(folder)}")
            _check_layout(path, file, entry)
            own_offsets = file["offsets"][:]
            for name, array in steps.items():
                array[step:next_step] = file[name][:]
            for name, array in episodes.items():
                array[episode:next_episode] = file[name][:]
            rows = file["observations"][:]
        final = own_offsets[1:] + np.arange(entry.num_episodes)
        final_observations[episode:next_episode] = rows[final]
        observations[step:next_step] = np.delete(rows, final, axis=0)
        offsets[episode + 1 : next_episode + 1] = own_offsets[1:] + step
        step, episode = next_step, next_episode
    attributes = index.attributes
    return Rollouts(
        task=attributes.task,
        recipe=attributes.teacher_recipe,
        policy_sha256=attributes.policy_sha256,
        std_source=attributes.std_source,
        observations=observations,
        offsets=offsets,
        final_observations=final_observations,
        **{**steps, "successes": steps["successes"].view(np.bool_)},
        **{**episodes, "episode_success": episodes["episode_success"].view(np.bool_)},
    )


def _check_layout(path: Path, file: Any, entry: ShardEntry) -> None:
    """Raise ShardError unless the datasets are those of the schema, with the index's counts."""
    num_steps, num_episodes = entry.num_steps, entry.num_episodes
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {
        "offsets": ("int64", (num_episodes + 1,)),
        "observations": ("float32", (num_steps + num_episodes, OBSERVATION_SIZE)),
        **{name: (dtype, (num_steps, *shape)) for name, (dtype, shape) in STEP_FIELDS.items()},
        **{name: (dtype, (num_episodes, *shape)) for name, (dtype, shape) in EPISODE_FIELDS.items()},
    }
    for name, (dtype, shape) in wanted.items():
        dataset = file.get(name)
        if dataset is None or dataset.dtype != dtype or dataset.shape != shape:
            found = "nothing" if dataset is None else f"{dataset.dtype} {dataset.shape}"
            raise ShardError(
                f"{path} is foreign: {name} is {found}, but schema version {SCHEMA_VERSION} and {INDEX_NAME} "
                f"want {dtype} {shape}; {remedy(path.parent)}"
            )
