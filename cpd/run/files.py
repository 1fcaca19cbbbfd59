"""Atomic files: written under a temporary name, synced and renamed, so that no reader sees a partial file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEMPORARY_SUFFIX = ".tmp"


@contextlib.contextmanager
def atomic_write(path: Path, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write to; on leaving, sync it and rename it to `path`.

    If the block raises, the temporary is removed and `path` stays as it was. Without `sync`, which takes
    milliseconds, a power failure may lose the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: its mode 0600 would defeat a group's umask on a shared file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        yield temporary
        if sync:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if sync:  # the folder, which holds the new name
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def copy(source: Path, target: Path) -> None:
    """Copy `source` to `target` with `atomic_write`."""
    with atomic_write(target) as temporary:
        shutil.copyfile(source, temporary)


def write_text(path: Path, text: str, sync: bool = True) -> None:
    """Write `text` to `path` with `atomic_write`."""
    with atomic_write(path, sync) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any, sync: bool = True) -> None:
    """Write `data` as indented JSON to `path` with `atomic_write`."""
    write_text(path, json.dumps(data, indent=2) + "\n", sync)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_temporary(path: Path) -> bool:
    """Whether `path` is a temporary file of `atomic_write`."""
    return path.name.startswith(".") and path.name.endswith(TEMPORARY_SUFFIX)


def sweep_temporaries(folder: Path) -> None:
    """Remove the temporary files of killed writers from `folder`; call only as its single writer."""
    for path in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)
