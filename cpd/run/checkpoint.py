"""Checkpoints: folders with `state.pt` and `meta.json`. The latter is written last and makes a checkpoint valid.

The state is a nested dict of tensors and plain values, written by `torch.save` and read with
`weights_only=True`, so that no checkpoint can run code.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from typing_extensions import TypedDict

from cpd.reading import DamagedFileError, read_json
from cpd.run.descriptions import check_identity
from cpd.run.files import atomic_write, remove, sha256, sweep_temporaries, write_json

#: Names such as `stage-03-step-004000` or `iteration-000002-1`; folders of other names are not checkpoints.
CHECKPOINT = re.compile(r"[a-z]+-\d+(-([a-z]+-)?\d+)*")


class CheckpointError(DamagedFileError):
    """A checkpoint that was damaged from outside."""


class Meta(TypedDict):
    """What is read of meta.json."""

    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint."""

    path: Path

    def load(self, **expected: Any) -> dict[str, Any]:
        """Load the state to the CPU.

        Args:
            expected: entries of meta.json, which those of earlier versions may lack.

        Raises:
            DamagedFileError: if the file's hash is not the recorded one, or meta.json is not as expected.
        """
        file, remedy = self.path / "state.pt", f"remove {self.path}"
        meta = read_json(self.path / "meta.json", Meta, remedy)
        check_identity(self.path / "meta.json", **expected)
        if not file.is_file() or sha256(file) != meta["sha256"]:
            raise CheckpointError(f"{file} is missing, or damaged: its hash is not the one in meta.json; {remedy}")
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        return state


def save(folder: Path, name: str, state: dict[str, Any], *, keep: int = 2, **meta: Any) -> Checkpoint:
    """Publish `state` as `folder/name`, then remove all but the `keep` newest checkpoints.

    Args:
        folder: the element's checkpoints; this process must be its single writer.
        name: sorts by progress, by the numbers in it, e.g. `stage-03-step-004000`.
        state: nested dict of tensors and plain values.
        keep: number of checkpoints that stay.
        meta: further entries of meta.json, for display.
    """
    assert CHECKPOINT.fullmatch(name), f"{name} is no name of a checkpoint: it would never be read"
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    remove(path / "meta.json")  # an old hash beside a new state would count as damage
    sweep_temporaries(path)
    # Through a file of Python's, which gives errors their numbers: torch's own writer does not.
    with atomic_write(path / "state.pt") as temporary, temporary.open("wb") as file:
        torch.save(state, file)
    write_json(path / "meta.json", {**meta, "sha256": sha256(path / "state.pt")})
    prune(folder, keep)
    return Checkpoint(path)


def published(folder: Path) -> list[Checkpoint]:
    """Return all complete checkpoints in `folder`, oldest first."""
    paths = [path.parent for path in folder.glob("*/meta.json") if CHECKPOINT.fullmatch(path.parent.name)]
    # Sort by number: a step may have more digits than the name is padded to.
    paths.sort(key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])
    return [Checkpoint(path) for path in paths]


def latest(folder: Path) -> Checkpoint | None:
    """Return the newest complete checkpoint, if any."""
    return next(reversed(published(folder)), None)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints, and the temporary files of killed writers."""
    newest = {checkpoint.path for checkpoint in published(folder)[-keep:]} if keep else set()
    for path in folder.iterdir() if folder.exists() else ():
        if CHECKPOINT.fullmatch(path.name) and path.is_dir() and path not in newest:
            # Unmark first, so that a half-removed checkpoint is never taken for a complete one.
            remove(path / "meta.json")
            shutil.rmtree(path, ignore_errors=True)
    sweep_temporaries(folder)
