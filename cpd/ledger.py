"""The ledger of submitted jobs: which job worked on which element, and where its log is."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from cpd.runs import Element, Role, Run


@dataclass(frozen=True)
class LedgerEntry:
    """One submission."""

    element: str
    role: Role
    index: int
    job: str
    log: str
    """Relative to the run directory."""
    time: float


def enter(run: Run, element: Element, job_id: str, log: Path) -> None:
    """Append a submission to the ledger."""
    entry = LedgerEntry(
        element.name, element.role, element.index, job_id, str(log.relative_to(run.root)), time.time()
    )
    with run.ledger.open("a") as file:
        file.write(json.dumps(asdict(entry)) + "\n")


def ledger(run: Run) -> dict[str, list[LedgerEntry]]:
    """All submissions by element name, oldest first."""
    entries: dict[str, list[LedgerEntry]] = {}
    if run.ledger.exists():
        for line in run.ledger.read_text().splitlines():
            entry = LedgerEntry(**json.loads(line))
            entries.setdefault(entry.element, []).append(entry)
    return entries
