"""Files of tables, plain or compressed: a published folder may hold `<name>.csv.gz` in place of `<name>.csv`."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from cpd.reading import DamagedFileError, decode, read_bytes
from cpd.run.files import atomic_write, remove

#: Bytes from which `compress_tables` compresses a table.
LARGE_TABLE = 50_000


def _compressed(path: Path) -> Path:
    return path.with_name(f"{path.name}.gz")


def find_table(path: Path) -> Path | None:
    """Return the file that holds the table `path`, plain or compressed; None if neither exists."""
    return next((file for file in (path, _compressed(path)) if file.exists() or file.is_symlink()), None)


def read_table(path: Path) -> str:
    """Return the text of the table `path`, plain or compressed.

    Raises:
        FileNotFoundError: if there is neither form.
        DamagedFileError: if it cannot be decompressed, or is not UTF-8.
    """
    file = find_table(path) or path
    content = read_bytes(file)
    if file == path:
        return decode(content, file)
    try:
        return decode(gzip.decompress(content), file)
    except (OSError, EOFError, zlib.error) as error:
        raise DamagedFileError(f"{file} is damaged ({error}): restore it, or publish the run again") from None


def compress_tables(folder: Path) -> None:
    """Compress every large table of `folder` and remove its plain form; equal tables give equal bytes."""
    for path in sorted(folder.glob("*.csv")):
        if path.stat().st_size < LARGE_TABLE:
            remove(_compressed(path))  # of an earlier, larger table
            continue
        with atomic_write(_compressed(path)) as temporary:
            temporary.write_bytes(gzip.compress(path.read_bytes(), 9, mtime=0))
        remove(path)
