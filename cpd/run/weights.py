"""Files of weights: complete, or only what changed since the file of an earlier stage.

A file of changes holds, of every tensor that changed, the rows from the first to the last that did. Its metadata
names the file beside it that it builds on, with its hash: the hash of the newest file therefore covers all of
them. Earlier stages with their own copies of everything would take space that grows with the square of the stream.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from pydantic import Field
from safetensors import SafetensorError
from typing_extensions import TypedDict

from cpd.reading import DamagedFileError, parse_json, read_bytes, read_json
from cpd.run.descriptions import Weights
from cpd.run.files import atomic_write, write_json

#: The one entry of the metadata: a file with several would not have the same bytes every time.
METADATA_KEY: Final = "changes"
#: Bytes of a file and all that it builds on, relative to the complete file. Where more would be needed, as without
#: frozen parameters, the complete file is written, so that reading takes no longer than the student is large.
MAX_CHAIN: Final = 1.5

Arrays = Mapping[str, npt.NDArray[Any]]


class Changes(TypedDict):
    """What a file of changes says of itself."""

    builds_on: Annotated[str, Field(pattern=r"^[\w-]+\.safetensors$")]
    sha256: str
    rows: dict[str, tuple[int, int]]
    """By tensor in this file, the row of the student's tensor that comes first, and how many rows that has."""


class _File(NamedTuple):
    arrays: Arrays
    rows: dict[str, tuple[int, int]]
    content: bytes


def described_weights(path: Path) -> bytes:
    """Return the complete file of the weights at `path`, which the description beside it states the hash of.

    Raises:
        DamagedFileError: if this file or one that it builds on is damaged, missing or another.
    """
    description = path.with_suffix(".json")
    files = _read(path, read_json(description, Weights)["sha256"], description.name)
    return files[0].content if len(files) == 1 else safetensors.numpy.save(dict(_put_together(files)))


def copy_policy(source: Path, target: Path) -> None:
    """Copy complete weights, checked, and their description.

    Raises:
        DamagedFileError: like `described_weights`.
    """
    content = described_weights(source)
    description = read_json(source.with_suffix(".json"), dict[str, Any])
    with atomic_write(target) as temporary:
        temporary.write_bytes(content)
    description["sha256"] = hashlib.sha256(content).hexdigest()
    write_json(target.with_suffix(".json"), description)


def changes_since(base: Path, complete: bytes) -> bytes:
    """Return what to write for the weights of the file content `complete`, if the file `base` stays.

    Returns:
        The content of a file of changes for the folder of `base`; `complete` if that is better, see `MAX_CHAIN`.

    Raises:
        DamagedFileError: if `base` or a file that it builds on is damaged, missing or another.
    """
    description = base.with_suffix(".json")
    sha256 = read_json(description, Weights)["sha256"]
    files = _read(base, sha256, description.name)
    old, new = _put_together(files), safetensors.numpy.load(complete)
    if any(name not in new or not _extends(new[name], array) for name, array in old.items()):
        return complete
    rows: dict[str, tuple[int, int]] = {}
    changed: dict[str, npt.NDArray[Any]] = {}
    for name, array in sorted(new.items()):  # in an order that is the same every time
        first, stop = _changed_rows(array, old.get(name, array[:0]))
        if first < stop:
            rows[name] = first, len(array)
            changed[name] = array[first:stop]
    entry = Changes(builds_on=base.name, sha256=sha256, rows=rows)
    content: bytes = safetensors.numpy.save(changed, {METADATA_KEY: json.dumps(entry)})
    chain = len(content) + sum(len(file.content) for file in files)
    return content if chain <= MAX_CHAIN * len(complete) else complete


def _read(path: Path, sha256: str, named_in: str) -> list[_File]:
    """Read a file and all that it builds on; the complete one comes first."""
    files: list[_File] = []
    remedy = "restore it, or remove the folder of the student or teacher and launch again to train it again"
    while True:
        needed = f"{named_in} needs it; {remedy}" if files else remedy
        content = read_bytes(path, needed)
        if hashlib.sha256(content).hexdigest() != sha256:
            raise DamagedFileError(f"{path} is damaged: its hash is not the one in {named_in}; {remedy}")
        try:
            arrays = safetensors.numpy.load(content)
        except SafetensorError as error:
            raise DamagedFileError(f"{path} is not a file of tensors ({error}); {remedy}") from None
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        entry = header.get("__metadata__", {}).get(METADATA_KEY)
        changes = parse_json(entry, Changes, f"{path}, metadata", remedy) if entry else None
        files.append(_File(arrays, changes["rows"] if changes else {}, content))
        if changes is None:
            return files[::-1]
        path, sha256, named_in = path.with_name(changes["builds_on"]), changes["sha256"], path.name


def _put_together(files: list[_File]) -> Arrays:
    """The tensors of the newest of files that build on each other, which come in order."""
    arrays = dict(files[0].arrays)
    num_rows = {name: total for file in files for name, (_, total) in file.rows.items()}
    for name, total in num_rows.items():  # allocated once: appending would copy experts once per stage
        one = next(file.arrays[name] for file in files if name in file.arrays)
        whole = np.empty((total, *one.shape[1:]), one.dtype)
        if name in arrays:
            whole[: len(arrays[name])] = arrays[name]
        arrays[name] = whole
    for file in files[1:]:
        for name, array in file.arrays.items():
            first, _ = file.rows[name]
            arrays[name][first : first + len(array)] = array
    return arrays


def _extends(new: npt.NDArray[Any], old: npt.NDArray[Any]) -> bool:
    """Whether rows of `new` can take the place of those of `old`, and more can follow."""
    is_same_kind = new.dtype == old.dtype and new.shape[1:] == old.shape[1:]
    return is_same_kind and new.ndim > 0 and len(new) >= len(old)


def _changed_rows(new: npt.NDArray[Any], old: npt.NDArray[Any]) -> tuple[int, int]:
    """The first row whose bits differ, and the row after the last; rows that `old` lacks count."""
    num_old = len(old)
    both = (array[:num_old].reshape(num_old, -1).view(np.uint8) for array in (new, old))
    differs = np.ones(len(new), np.bool_)
    differs[:num_old] = np.not_equal(*both).any(1)
    changed = np.flatnonzero(differs)
    return (int(changed[0]), int(changed[-1]) + 1) if len(changed) else (0, 0)
