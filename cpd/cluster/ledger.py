"""The ledger of submitted jobs: which job worked on which element, and where its log is.

A submission to Slurm is entered twice: under its unique name before sbatch is called, and with the job's number
afterwards. If the launcher dies in between, the next launch finds the job in the queue by its name.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import BinaryIO, Literal

from cpd.config.types import Role
from cpd.run.directory import Element, Run


@dataclass(frozen=True)
class LedgerEntry:
    """One submission."""

    element: str
    role: Role
    job: str
    """Number of the job; empty until sbatch has returned it."""
    log: str
    """Relative to the run directory; empty if `job` is."""
    time: float
    cluster: Literal["local", "slurm"] = "local"
    name: str = ""
    """Slurm only: the job's unique name, shared by the elements of an array."""
    place: int | None = None
    """Slurm only: place in the array, if it is one."""
    partial: bool = False
    """Slurm only: whether the job does what can be done before all that the element needs is finished."""


def enter(run: Run, element: Element, job_id: str, log: Path) -> None:
    """Append a submission on this machine to the ledger."""
    entry = LedgerEntry(element.name, element.role, job_id, str(log.relative_to(run.root)), time.time())
    append(run, [entry])


def append(run: Run, entries: Iterable[LedgerEntry]) -> None:
    """Append submissions to the ledger, durably."""
    with run.ledger.open("ab+") as file:
        # A writer that was killed may have left half a line.
        whole = file.tell() == 0 or _last_byte(file) == b"\n"
        lines = "".join(json.dumps(asdict(entry)) + "\n" for entry in entries)
        file.write(("" if whole else "\n").encode() + lines.encode())
        file.flush()
        os.fsync(file.fileno())


def _last_byte(file: BinaryIO) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def ledger(run: Run) -> dict[str, list[LedgerEntry]]:
    """All submissions by element name, oldest first; the second line of a submission replaces its first."""
    entries: dict[str, list[LedgerEntry]] = {}
    known = {field.name for field in fields(LedgerEntry)}  # ledgers of other versions may hold more
    if run.ledger.exists():
        for line in run.ledger.read_text().splitlines():
            try:
                entry = LedgerEntry(**{key: value for key, value in json.loads(line).items() if key in known})
            except json.JSONDecodeError:
                continue  # cut off by a kill; what it announced was not submitted yet
            earlier = entries.setdefault(entry.element, [])
            if entry.name and earlier and earlier[-1].name == entry.name:
                earlier.pop()
            earlier.append(entry)
    return entries
