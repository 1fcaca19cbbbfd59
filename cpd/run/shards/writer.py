"""Writing rollouts: one writer per folder, immutable shards published by rename, the index last.

The same episodes and labels give the same bytes: no wall times, hosts or paths are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

import h5py
import numpy as np

from cpd.run.files import atomic_write, sha256, sweep_temporaries, write_json
from cpd.run.shards.schema import (
    EPISODE_FIELDS,
    INDEX_NAME,
    SHARD_PATTERN,
    STEP_FIELDS,
    Episode,
    ShardAttributes,
    ShardEntry,
    ShardIndex,
    shard_name,
)


def clear_shards(folder: Path) -> None:
    """Remove a teacher's shards, the index first, so that a half-cleared folder is never taken for a whole one."""
    if not folder.exists():
        return
    (folder / INDEX_NAME).unlink(missing_ok=True)
    sweep_temporaries(folder)
    for path in folder.glob(SHARD_PATTERN):
        path.unlink()


def write_shard(path: Path, episodes: Sequence[Episode], attributes: ShardAttributes) -> ShardEntry:
    """Publish one shard at `path` and describe it.

    Contiguous and uncompressed float32: the layout that reads fastest, since a reader takes whole shards.
    """
    offsets = np.cumsum([0, *(len(episode) for episode in episodes)], dtype=np.int64)
    with atomic_write(path) as temporary:
        with h5py.File(temporary, "w") as file:
            for name, value in asdict(attributes).items():
                # Fixed-length strings: variable ones live in a heap that other tools read less well.
                file.attrs[name] = np.bytes_(value) if isinstance(value, str) else np.int64(value)
            file.create_dataset("offsets", data=offsets)
            observations = np.concatenate([episode.observations for episode in episodes])
            file.create_dataset("observations", data=observations.astype(np.float32, copy=False))
            for name, (dtype, _) in STEP_FIELDS.items():
                rows = np.concatenate([getattr(episode, name) for episode in episodes])
                file.create_dataset(name, data=rows.astype(dtype, copy=False))
            for name, (dtype, _) in EPISODE_FIELDS.items():
                values = np.array([getattr(episode, name) for episode in episodes], dtype=dtype)
                file.create_dataset(name, data=values)
        return ShardEntry(path.name, sha256(temporary), temporary.stat().st_size, int(offsets[-1]), len(episodes))


class ShardWriter:
    """Writes a teacher's episodes to `folder`; use as a context manager, which ends with the index.

    Entering clears what an earlier, unfinished attempt left. Leaving by an exception publishes no index, so
    that nothing of what was written counts.

    Args:
        folder: the teacher's shards; this process must be its single writer.
        attributes: labels of all shards.
        shard_steps: a shard is closed once it holds this many steps; an episode is never divided.
        before_publish: called before every publication, to raise if this process must not write any more.
    """

    def __init__(
        self,
        folder: Path,
        attributes: ShardAttributes,
        shard_steps: int,
        before_publish: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = folder
        self.attributes = attributes
        self._shard_steps = shard_steps
        self._before_publish = before_publish
        self._entries: list[ShardEntry] = []
        self._episodes: list[Episode] = []

    def __enter__(self) -> Self:
        self._before_publish()
        self.folder.mkdir(parents=True, exist_ok=True)
        clear_shards(self.folder)
        return self

    def append(self, episode: Episode) -> None:
        """Add an episode, and publish the shard if it is full."""
        self._episodes.append(episode)
        if sum(len(waiting) for waiting in self._episodes) >= self._shard_steps:
            self._publish_shard()

    def _publish_shard(self) -> None:
        self._before_publish()
        path = self.folder / shard_name(len(self._entries))
        self._entries.append(write_shard(path, self._episodes, self.attributes))
        self._episodes = []

    def _finish(self) -> None:
        if self._episodes:
            self._publish_shard()
        assert self._entries, "no episodes were written"
        self._before_publish()
        write_json(self.folder / INDEX_NAME, ShardIndex(self.attributes, tuple(self._entries)).as_dict())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
