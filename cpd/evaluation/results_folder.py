"""A results folder: the long-form tables that everything in a report derives from.

Needs nothing but the folder, so that results which were copied or published without their run can be read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

from cpd.config.load import merge
from cpd.config.retired import upgrade
from cpd.run.files import read_json
from cpd.run.provenance import Labels
from cpd.run.tables import (
    CurveRow,
    EvaluationRow,
    LossRow,
    RetrievalRow,
    StageRow,
    StartRow,
    TeacherRow,
    UsageRow,
    find_table,
    read_rows,
)

#: The tables that are read, by the name of the field and of the file.
TABLES: Final[dict[str, type[Any]]] = {
    "evaluations": EvaluationRow,
    "curves": CurveRow,
    "teachers": TeacherRow,
    "losses": LossRow,
    "stages": StageRow,
    "usage": UsageRow,
    "retrieval": RetrievalRow,
    "starts": StartRow,
}
TEACHER = "teacher"
HELD_OUT = "held_out"


@dataclass(frozen=True)
class Tables:
    """The contents of a results folder."""

    folder: Path
    config: dict[str, Any]
    """config.json, upgraded but not checked, since older results must stay readable."""
    evaluations: list[EvaluationRow]
    curves: list[CurveRow]
    teachers: list[TeacherRow]
    losses: list[LossRow]
    stages: list[StageRow]
    usage: list[UsageRow]
    retrieval: list[RetrievalRow]
    starts: list[StartRow]

    @property
    def stream(self) -> tuple[str, ...]:
        """The task of every stage."""
        return tuple(self.config["stream"]["tasks"])

    @property
    def goal_set(self) -> str:
        """The goals that success was measured on; results from before there was a choice are of held-out ones."""
        return str(self.config["evaluation"].get("goal_set", HELD_OUT))

    @property
    def methods(self) -> tuple[str, ...]:
        """The labels of the run's methods."""
        own = () if self.config.get("variants_only") else (self.config["method"],)
        return (*own, *self.config.get("variants", {}))

    def method_config(self, method: str) -> dict[str, Any]:
        """config.json with what a method changes in it."""
        return merge(self.config, self.config.get("variants", {}).get(method, {}))

    def teacher_seed(self, student_seed: int) -> int:
        """The seed of the teachers that a student learns from."""
        seeds: list[int] = self.config["teacher"]["seeds"]
        position: int = self.config["seeds"].index(student_seed)
        return seeds[position % len(seeds)]


def read_tables(folder: Path) -> Tables:
    """Read a results folder; a table that is not there is empty.

    Raises:
        ValueError: if the folder lacks config.json, or a file in it is damaged.
    """
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"{folder} is not a results folder: it has no config.json; give a run or its results/")

    def rows(name: str, kind: type[Any]) -> list[Any]:
        return read_rows(folder / name, kind) if find_table(folder / name) else []

    return Tables(
        folder,
        upgrade(read_json(path)),
        **{name: rows(f"{name}.csv", kind) for name, kind in TABLES.items()},
    )


def merge_tables(tables: Sequence[Tables]) -> Tables:
    """The first of `tables`, with the rows of all; a row that several of them share occurs once."""
    rows: dict[str, Any] = {
        name: list(dict.fromkeys(row for table in tables for row in getattr(table, name))) for name in TABLES
    }
    return replace(tables[0], **rows)


def labels_of(rows: Iterable[EvaluationRow]) -> dict[str, str]:
    """The conditions that the rows carry; differing values are joined by a slash."""
    found: dict[str, dict[str, None]] = {field.name: {} for field in fields(Labels)}
    for row in rows:
        for name, values in found.items():
            values[str(getattr(row, name))] = None
    return {name: "/".join(values) for name, values in found.items()}
