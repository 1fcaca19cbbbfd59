"""Read a teacher's rollouts, mapped if they are large; refuse damaged, missing, stale or foreign shards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from cpd.envs.suite import DEFAULT_SUITE, Sizes, load_suite
from cpd.run.provenance import Labels
from cpd.run.shards.checked import Checked
from cpd.run.shards.mapped import MAX_COPIED_BYTES, MappedFile, MappedRows, Rows
from cpd.run.shards.schema import (
    EPISODE_FIELDS,
    INDEX_NAME,
    SCHEMA_VERSION,
    STEP_FIELDS,
    Episode,
    FloatArray,
    ShardEntry,
    ShardError,
    ShardIndex,
    read_index,
    remedy,
    shard_files,
)


@dataclass(frozen=True)
class Rollouts:
    """What distillation uses of a teacher's rollouts: N steps in E episodes, in the order of collection.

    Rows stay in the shards, which are mapped, unless all of them are small: do not truncate shards in use.

    Attributes:
        task: name of the task.
        observations: [N, O], what the teacher saw before each step.
        teacher_mean: [N, A], clipped to [-1, 1].
        teacher_log_std: [N, A].
        offsets: [E + 1]; episode e has steps offsets[e]:offsets[e + 1].
        episode_success: [E] bool.
    """

    task: str
    observations: Rows
    teacher_mean: Rows
    teacher_log_std: Rows
    offsets: npt.NDArray[np.int64]
    episode_success: npt.NDArray[np.bool_]

    @property
    def num_steps(self) -> int:
        """N."""
        return len(self.observations)


def read_rollouts(folder: Path, *, task: str, labels: Labels, policy_sha256: str | None = None) -> Rollouts:
    """Read all rollouts of the teacher whose shards lie in `folder`; check all shards first.

    Args:
        folder: the teacher's `shards`.
        task: the task that is wanted.
        labels: the run's labels; recipe, horizon, suite and versions must be those of the shards (the task
            identity does not concern them).
        policy_sha256: hash of the teacher's present policy.safetensors; None skips this check.

    Raises:
        ShardError: a shard or the index is missing, damaged, truncated, another teacher's, or stale. The
            message names the file, the cause and the remedy.
    """
    index = read_index(folder)
    _check_labels(folder / INDEX_NAME, index, task, labels, policy_sha256)
    listed = {entry.file for entry in index.shards}
    for path in shard_files(folder):
        if path.name not in listed:
            raise ShardError(f"{path} is stale: {INDEX_NAME} does not list it; remove it, or {remedy(folder)}")
    with Checked(folder) as checked:
        for entry in index.shards:
            _check_file(folder, entry, index, checked)
    return _read_all(folder, index)


def first_observations(folder: Path) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    """Return the first observation of every episode, [E, O], and the index of its goal, [E].

    Hashes and labels are not compared: distillation checks them.

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


def stream_episodes(folder: Path) -> Iterator[Episode]:
    """Yield a teacher's episodes in the order of collection; one shard at a time is checked and held in memory.

    Raises:
        ShardError: if the index or a shard is missing, damaged or foreign.
    """
    index, checked = read_index(folder), Checked(folder)
    for entry in index.shards:
        _check_file(folder, entry, index, checked)
        with _open_shard(folder, entry, index) as file:
            columns = {name: dataset[:] for name, dataset in file.items()}
        for episode in range(entry.num_episodes):
            start, end = columns["offsets"][episode : episode + 2]
            steps = {name: columns[name][start:end] for name in STEP_FIELDS}
            steps["rewards"] = steps["rewards"].astype(np.float64)
            steps["successes"] = steps["successes"].astype(np.bool_)
            yield Episode(
                observations=columns["observations"][start + episode : end + episode + 1],
                **steps,
                goal_index=int(columns["goal_index"][episode]),
                seed=int(columns["seed"][episode]),
            )


@contextlib.contextmanager
def _open_shard(folder: Path, entry: ShardEntry, index: ShardIndex) -> Iterator[Any]:
    """Open a shard whose hash has been checked; raise ShardError unless it has the index's labels and layout."""
    path = folder / entry.file
    with h5py.File(path, "r") as file:
        # The hash vouches for the index's entry only, and both may have been made for another task.
        if reason := _foreign_label(file, index):
            raise ShardError(f"{path} {reason}; {remedy(folder)}")
        _check_layout(path, file, entry, _sizes(index))
        yield file


def _sizes(index: ShardIndex) -> Sizes:
    return load_suite(index.attributes.suite or DEFAULT_SUITE).spaces.sizes


def _check_labels(path: Path, index: ShardIndex, task: str, labels: Labels, policy_sha256: str | None) -> None:
    """Raise ShardError unless the index's labels are the wanted ones."""
    attributes = index.attributes
    # The task's identity is a label of students; it does not concern a teacher's rollouts.
    wanted = {"task": task, **asdict(labels)}
    del wanted["task_identity"]
    for name, value in wanted.items():
        if (stored := getattr(attributes, name)) != value:
            raise ShardError(
                f"{path}: these rollouts are foreign: {name} is {stored!r}, but {value!r} is wanted; "
                + remedy(path.parent)
            )
    if policy_sha256 is not None and attributes.policy_sha256 != policy_sha256:
        raise ShardError(
            f"{path}: these rollouts are stale: they were collected by policy {attributes.policy_sha256[:12]}, "
            f"but the teacher's policy is now {policy_sha256[:12]}; {remedy(path.parent)}"
        )


def _check_file(folder: Path, entry: ShardEntry, index: ShardIndex, checked: Checked) -> None:
    """Raise ShardError unless the shard is the one that the index describes."""
    path = folder / entry.file
    if not path.is_file():
        raise ShardError(f"{path} is missing, but {INDEX_NAME} lists it; {remedy(folder)}")
    if checked.has_hash(path, entry.sha256):
        return
    num_bytes = path.stat().st_size
    if num_bytes < entry.num_bytes:
        raise ShardError(f"{path} is truncated: {num_bytes} bytes instead of {entry.num_bytes}; {remedy(folder)}")
    raise ShardError(f"{path} {_difference(path, index)}; {remedy(folder)}")


def _difference(path: Path, index: ShardIndex) -> str:
    """Say why a shard's hash is not the recorded one, as far as possible."""
    try:
        with h5py.File(path, "r") as file:
            return _foreign_label(file, index) or f"is damaged: its hash is not the one in {INDEX_NAME}"
    except Exception:  # h5py raises many types of errors on damaged files
        return "is damaged: not a readable HDF5 file"


def _foreign_label(file: Any, index: ShardIndex) -> str:
    """Describe the first root attribute that is not the index's; return an empty string if all agree."""
    for name, value in index.attributes.as_dict().items():
        if name not in file.attrs:
            return f"is foreign: an HDF5 file without the attribute {name!r}"
        stored = file.attrs[name]
        if isinstance(stored, bytes):
            stored = stored.decode()
        elif isinstance(stored, np.integer):
            stored = int(stored)
        if stored != value:
            return f"is foreign: its {name} is {stored!r}, but {INDEX_NAME} says {value!r}"
    return ""


def _read_all(folder: Path, index: ShardIndex) -> Rollouts:
    """Map the shards, whose hashes have been checked; copy what is small."""
    fields = ("observations", "teacher_mean", "teacher_log_std")
    arrays: dict[str, list[FloatArray]] = {name: [] for name in fields}
    files, offsets, success = [], [np.zeros(1, np.int64)], []
    first_rows: dict[str, list[npt.NDArray[np.int64]]] = {name: [] for name in fields}
    for entry in index.shards:
        with _open_shard(folder, entry, index) as file:
            files.append(mapped := MappedFile(folder / entry.file))
            for name in fields:
                arrays[name].append(mapped.array(file[name]))
            begin, success_E = file["offsets"][:], file["episode_success"][:].astype(np.bool_)
        first_rows["observations"].append(begin[:-1] + np.arange(entry.num_episodes))  # one more row per episode
        first_rows["teacher_mean"].append(begin[:-1])
        first_rows["teacher_log_std"].append(begin[:-1])
        offsets.append(begin[1:] + offsets[-1][-1])
        success.append(success_E)
    file_E = np.repeat(np.arange(len(files)), [entry.num_episodes for entry in index.shards])
    ends = np.concatenate(offsets)
    rows: list[Rows] = [
        MappedRows(files, arrays[name], ends, file_E, np.concatenate(first_rows[name])) for name in fields
    ]
    if sum(array.nbytes for name in fields for array in arrays[name]) <= MAX_COPIED_BYTES:
        rows = [np.asarray(mapped) for mapped in rows]
    observations, mean, log_std = rows
    return Rollouts(index.attributes.task, observations, mean, log_std, ends, np.concatenate(success))


def _check_layout(path: Path, file: Any, entry: ShardEntry, sizes: Sizes) -> None:
    """Raise ShardError unless the datasets are those of the schema, with the index's counts."""
    num_steps, num_episodes = entry.num_steps, entry.num_episodes
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {
        "offsets": ("int64", (num_episodes + 1,)),
        "observations": ("float32", (num_steps + num_episodes, sizes.observation)),
        **{
            name: (dtype, (num_steps, sizes.action) if is_action else (num_steps,))
            for name, (dtype, is_action) in STEP_FIELDS.items()
        },
        **{name: (dtype, (num_episodes, *shape)) for name, (dtype, shape) in EPISODE_FIELDS.items()},
    }
    for name, (dtype, shape) in wanted.items():
        dataset = file.get(name)
        if dataset is None or dataset.dtype != dtype or dataset.shape != shape:
            stored = "nothing" if dataset is None else f"{dataset.dtype} {dataset.shape}"
            raise ShardError(
                f"{path} is foreign: {name} is {stored}, but schema version {SCHEMA_VERSION} and {INDEX_NAME} "
                f"want {dtype} {shape}; {remedy(path.parent)}"
            )
