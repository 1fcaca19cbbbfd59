"""Write rollouts: one writer per folder, immutable shards published by rename, the index last.

The same episodes and labels give the same bytes: no wall times, hosts or paths are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import h5py
import numpy as np

from cpd.run.files import atomic_write, remove, sha256, sweep_temporaries, write_json
from cpd.run.shards.schema import (
    EPISODE_FIELDS,
    INDEX_NAME,
    STEP_FIELDS,
    Episode,
    ShardAttributes,
    ShardEntry,
    ShardIndex,
    shard_files,
)


def clear_shards(folder: Path) -> None:
    """Remove a teacher's shards, the index first: a folder that is half cleared then does not count."""
    if not folder.exists():
        return
    remove(folder / INDEX_NAME)
    sweep_temporaries(folder)
    for path in shard_files(folder):
        remove(path)


def write_shard(path: Path, episodes: Sequence[Episode], attributes: ShardAttributes) -> ShardEntry:
    """Publish one shard at `path`; return its entry of the index."""
    # Contiguous and uncompressed: the layout that reads fastest, since a reader takes whole shards.
    offsets = np.cumsum([0, *(len(episode) for episode in episodes)], dtype=np.int64)
    with atomic_write(path) as temporary:
        with h5py.File(temporary, "w") as file:
            for name, value in attributes.as_dict().items():
                # Fixed-length strings: other tools read variable ones, which HDF5 keeps in a heap, less well.
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


def write_shards(
    folder: Path,
    attributes: ShardAttributes,
    episodes: Iterable[Episode],
    shard_steps: int,
    before_publish: Callable[[], None] = lambda: None,
) -> None:
    """Write a teacher's episodes, at least one, as they come; the index is written last.

    The shards of an earlier, unfinished attempt are removed first. If `episodes` raises, no index is published,
    and none of the shards counts.

    Args:
        folder: the teacher's shards; this process must be its single writer.
        attributes: labels of all shards.
        episodes: what is written.
        shard_steps: a shard is closed once it holds this many steps; an episode is never divided.
        before_publish: called before every publication; it raises if this process must not write any more.
    """
    before_publish()
    folder.mkdir(parents=True, exist_ok=True)
    clear_shards(folder)
    entries: list[ShardEntry] = []
    pending: list[Episode] = []

    def publish_shard() -> None:
        before_publish()
        entries.append(write_shard(folder / f"shard-{len(entries):05d}.h5", pending, attributes))
        pending.clear()

    for episode in episodes:
        pending.append(episode)
        if sum(map(len, pending)) >= shard_steps:
            publish_shard()
    if pending:
        publish_shard()
    assert entries, "no episodes were written"
    before_publish()
    write_json(folder / INDEX_NAME, ShardIndex(attributes, tuple(entries)).as_dict())
