"""The ledger of submitted jobs: which job worked on which element, and where its log is.

A submission to Slurm is entered twice: under its unique name before sbatch is called, and with the job's number
afterwards. If the launcher dies in between, the next launch finds the job in the queue by its name.
"""

from __future__ import annotations

import json
import os
import pwd
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

from cpd.config.types import Role
from cpd.reading import parse_json, read_text
from cpd.run.directory import Run
from cpd.run.shortage import naming


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
    """Slurm only: index in the array; None for a single job."""
    partial: bool = False
    """Slurm only: whether the job may start before all dependencies of the element are finished."""
    user: str = ""
    """Slurm only: who submitted it; empty in ledgers of earlier versions."""
    code: str = ""
    """The commit at submission; empty in ledgers of earlier versions."""

    @property
    def is_foreign(self) -> bool:
        """Whether another user submitted it."""
        return self.user not in ("", user_name())


def user_name() -> str:
    """Return the name of the user who runs this process, or the number of one without a name."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def append(run: Run, entries: Iterable[LedgerEntry]) -> None:
    """Append submissions to the ledger and sync it to disk."""
    with naming(run.ledger), run.ledger.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a writer that was killed may have left half a line
                file.write(b"\n")
        file.write("".join(json.dumps(asdict(entry)) + "\n" for entry in entries).encode())
        file.flush()
        os.fsync(file.fileno())


def ledger(run: Run) -> dict[str, list[LedgerEntry]]:
    """Return all submissions by element name, oldest first; a submission's second line replaces its first.

    Raises:
        DamagedFileError: if a line is damaged: without the jobs that it names, work would be submitted twice.
    """
    entries: dict[str, list[LedgerEntry]] = {}
    if run.ledger.exists():
        for number, line in enumerate(read_text(run.ledger).splitlines(), start=1):
            if line.startswith("{") and not line.endswith("}"):
                continue  # a kill cut the line off; sbatch is called after the line is synced, so no job is lost
            remedy = "remove this line if no job of the run is in the queue"
            entry = parse_json(line, LedgerEntry, f"{run.ledger}, line {number}", remedy)
            earlier = entries.setdefault(entry.element, [])
            if entry.name and earlier and earlier[-1].name == entry.name:
                earlier.pop()
            earlier.append(entry)
    return entries
