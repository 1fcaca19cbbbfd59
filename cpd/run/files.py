"""Atomic files: written under a temporary name, synced and renamed, so that no reader sees a partial file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpd.reading import accessing
from cpd.run.shortage import naming

TEMPORARY_SUFFIX = ".tmp"
#: Errors of file systems that cannot link files, or cannot sync folders.
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


@contextlib.contextmanager
def atomic_write(path: Path, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write to; on leaving, sync it and rename it to `path`.

    If the block raises, the temporary is removed and `path` stays as it was. Without `sync`, which takes
    milliseconds, a power failure may lose the file.

    Raises:
        DamagedFileError: if `path` is a directory.
        OSError: naming `path`, if there is no room, whichever library finds it.
    """
    # Not tempfile: its mode 0600 would defeat a group's umask on a shared file system.
    temporary = temporary_name(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        create_exclusively(temporary)
        try:
            yield temporary
            if sync:
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
            with accessing(path):
                temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        if sync:  # the folder, which holds the new name
            sync_folder(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill, which takes the place of the folder `path` on leaving.

    If the block raises, `path` stays as it was. What killed writers of `path` left is removed.

    Raises:
        OSError: naming `path`, if there is no room.
    """
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{path.name}.*{TEMPORARY_SUFFIX}"):
            shutil.rmtree(left)
        temporary, replaced = temporary_name(path), temporary_name(path)
        temporary.mkdir()
        try:
            yield temporary
            if path.exists():
                path.rename(replaced)
            temporary.rename(path)
        finally:
            for folder in (temporary, replaced):
                shutil.rmtree(folder, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable, on file systems that can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """Return a name beside `path` for a temporary file, which nobody can foresee."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")


def create_exclusively(path: Path) -> None:
    """Create an empty file, with the mode that the umask allows; never follow a link.

    Raises:
        FileExistsError: if anything has this name.
    """
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY, 0o666))


def copy(source: Path, target: Path) -> None:
    """Copy `source` to `target` with `atomic_write`.

    Raises:
        DamagedFileError: if one of them is a directory, or `source` a link to a file that does not exist.
    """
    with atomic_write(target) as temporary, accessing(source):
        shutil.copyfile(source, temporary)


def remove(path: Path) -> None:
    """Remove a file, if there is one.

    Raises:
        DamagedFileError: if it is a directory.
    """
    with accessing(path):
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str, sync: bool = True) -> None:
    """Write `text` to `path` with `atomic_write`."""
    with atomic_write(path, sync) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any, sync: bool = True) -> None:
    """Write `data` as indented JSON to `path` with `atomic_write`."""
    write_text(path, json.dumps(data, indent=2) + "\n", sync)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal digits.

    Raises:
        DamagedFileError: if it is a directory, or a link to a file that does not exist.
    """
    with accessing(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_temporary(path: Path) -> bool:
    """Whether `path` is a temporary file of `atomic_write`."""
    return path.name.startswith(".") and path.name.endswith(TEMPORARY_SUFFIX)


def sweep_element(folder: Path) -> None:
    """Remove the temporary files that killed writers left in an element's folder; call with its lease only.

    Other elements' folders in it are left, and `attempts`: other processes may be asking for the lease.
    """
    sweep_temporaries(folder)
    for path in folder.iterdir():
        if (
            path.is_dir()
            and not path.is_symlink()
            and path.name != "attempts"
            and not (path / "attempts").exists()
        ):
            sweep_element(path)


def sweep_temporaries(folder: Path) -> None:
    """Remove the temporary files of killed writers from `folder`; call only as its single writer."""
    for path in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        with contextlib.suppress(OSError):  # a leftover stops no work
            path.unlink()
