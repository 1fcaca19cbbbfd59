"""Hashes of shards that this machine has computed: large files are read for it once, not in every job."""

from __future__ import annotations

import contextlib
import platform
import time
from pathlib import Path
from types import TracebackType
from typing import Final

from cpd.reading import DamagedFileError, read_for_display
from cpd.run.files import sha256, write_json

#: Seconds: a file that was just changed may be changed again without a new time of modification.
SETTLED_AFTER: Final = 2.0


class Checked:
    """The hashes of the shards in a folder, remembered in a hidden file beside them, one for each machine.

    A hash counts while inode, size, time of modification and time of change are those of the file.
    Where that file cannot be read or written, hashes are computed again every time.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / f".checked-{platform.node()}.json"
        self._hashes = read_for_display(self._path, dict[str, tuple[str, int, int, int, int]], {})
        self._is_new = False

    def has_hash(self, path: Path, expected: str) -> bool:
        """Whether the SHA-256 of a file of the folder is `expected`.

        Raises:
            DamagedFileError: if it is a directory, or a link to a file that does not exist.
        """
        status = path.stat()
        stamp = status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        if self._hashes.get(path.name) == (expected, *stamp):
            return True
        if (computed := sha256(path)) != expected:
            return False
        if time.time() - max(status.st_mtime, status.st_ctime) > SETTLED_AFTER:
            self._hashes[path.name], self._is_new = (computed, *stamp), True
        return True

    def __enter__(self) -> Checked:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remember the hashes that were computed."""
        if self._is_new:
            with contextlib.suppress(OSError, DamagedFileError):
                write_json(self._path, self._hashes, sync=False)
