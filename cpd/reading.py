"""The reader of text files: UTF-8 with or without a byte-order mark, and JSON whose shape is checked.

A shape is any type that pydantic knows, such as a dataclass, a TypedDict or `dict[str, float]`. Further entries of
a file are ignored, since other versions may write more.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")
#: The longest name of a file, in bytes, on common file systems.
MAX_NAME_BYTES = 255
RESTORE = "restore the file, or remove it"


class DamagedFileError(ValueError):
    """A file that was damaged or replaced from outside; the message names it and what is wrong in it."""


class MissingFileError(DamagedFileError, FileNotFoundError):
    """A file that does not exist."""


def is_possible(path: Path) -> bool:
    """Whether a file system can hold the path: UTF-8, and no name too long."""
    names = [os.fsencode(name) for name in path.parts]  # in the encoding of the locale, which may not be UTF-8
    try:
        return all(len(name) <= MAX_NAME_BYTES and b"\0" not in name and bool(name.decode()) for name in names)
    except UnicodeDecodeError:
        return False


def number_in_environment(*names: str) -> float:
    """Return the first of these environment variables that holds a positive number; 0 if none does."""
    for name in names:
        with contextlib.suppress(ValueError):
            number = float(os.environ.get(name, ""))
            if 0.0 < number < float("inf"):
                return number
    return 0.0


def read_text(path: Path, remedy: str = RESTORE) -> str:
    """Read a text file.

    Raises:
        DamagedFileError: if it is a directory or not UTF-8.
        MissingFileError: if it is missing.
        OSError: if it is not readable.
    """
    return decode(read_bytes(path, remedy), path, remedy)


def read_bytes(path: Path, remedy: str = RESTORE) -> bytes:
    """Read a file.

    Raises:
        DamagedFileError: if it is a directory, or a link to a file that does not exist.
        MissingFileError: if it is missing.
        OSError: if it is not readable.
    """
    with accessing(path, remedy):
        return path.read_bytes()


@contextlib.contextmanager
def accessing(path: Path, remedy: str = RESTORE) -> Iterator[None]:
    """Refuse `path`, which the block reads or replaces, if it is no file.

    Raises:
        DamagedFileError: if it is a directory, or a link to a file that does not exist.
        MissingFileError: if it is missing.
    """
    try:
        yield
    except IsADirectoryError:
        raise DamagedFileError(f"{path} is a directory, not a file; {remedy}") from None
    except OSError as error:
        if error.errno == errno.ELOOP or (error.errno == errno.ENOENT and path.is_symlink()):
            raise DamagedFileError(f"{path} is a link to a file that does not exist; {remedy}") from None
        if error.errno == errno.ENOENT:
            raise MissingFileError(f"{path} is missing; {'restore it' if remedy == RESTORE else remedy}") from None
        raise


def decode(content: bytes, path: Path, remedy: str = RESTORE) -> str:
    """Decode the content of a text file.

    Raises:
        DamagedFileError: if it is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte, line = error.object[error.start], error.object.count(b"\n", 0, error.start) + 1
        raise DamagedFileError(
            f"{path} is not UTF-8: byte {byte:#04x} at position {error.start} (line {line}); save the file as "
            f"UTF-8, or {remedy}"
        ) from None


def read_json(path: Path, shape: type[T], remedy: str = RESTORE) -> T:
    """Read a JSON file of the given shape.

    Raises:
        DamagedFileError: if it is not UTF-8 or not JSON, or has another shape; names the first wrong entry.
        MissingFileError: if it is missing.
        OSError: if it is not readable.
    """
    return parse_json(read_text(path, remedy), shape, str(path), remedy)


def read_json_lines(
    path: Path, shape: type[T], *, is_finished: bool = False, remedy: str = RESTORE
) -> Iterator[T]:
    """Read a file with one JSON value per line; ignore a last line without its end, which a kill has cut off.

    Args:
        path: the file.
        shape: of a line.
        is_finished: whether its writer has finished, so that the file may be neither empty nor cut off.
        remedy: what to do about a damaged file.

    Raises:
        DamagedFileError: if a line is not JSON, or has another shape; names the line.
        MissingFileError: if it is missing.
        OSError: if it is not readable.
    """
    *lines, last_line = read_text(path, remedy).split("\n")
    if is_finished and (last_line or not lines):
        raise DamagedFileError(f"{path} ends early: its last line is missing or cut off; {remedy}")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield parse_json(line, shape, f"{path}, line {number}", remedy)


def parse_json(text: str, shape: type[T], place: str, remedy: str = RESTORE) -> T:
    """Convert JSON text from `place` to the given shape.

    Raises:
        DamagedFileError: if it is not JSON, or has another shape.
    """
    value: T = _checked(shape, "validate_json", text, place, remedy)
    return value


def check_shape(value: Any, shape: type[T], place: str, remedy: str = RESTORE) -> T:
    """Return a value that was read from `place` in the given shape.

    Raises:
        DamagedFileError: if it has another shape.
    """
    checked: T = _checked(shape, "validate_python", value, place, remedy)
    return checked


def _checked(shape: Any, method: str, value: Any, place: str, remedy: str) -> Any:
    try:
        return getattr(_adapter(shape), method)(value, strict=True)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        if problem["type"] == "json_invalid":
            raise DamagedFileError(f"{place} is not valid JSON ({problem['msg']}); {remedy}") from None
        path, message = ".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ")
        raise DamagedFileError(f"{place}: {f'{path}: ' if path else ''}{message}; {remedy}") from None


def read_for_display(path: Path, shape: type[T], default: T) -> T:
    """Read a JSON file that is only displayed; return `default` if it is missing or damaged."""
    try:
        return read_json(path, shape)
    except (DamagedFileError, OSError):
        return default


@cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    # Made once per shape: making one takes longer than reading a file.
    return TypeAdapter(shape)
