"""The long-form tables of a results folder, from which all measures derive.

Only the folder is needed, so results that were copied or published without their run can be read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Final, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from cpd.config.load import merge
from cpd.config.retired import upgrade
from cpd.config.types import Positive, Share
from cpd.reading import check_shape, read_json
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

#: The row type of every table, by the name of its field and file.
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


class _StreamConfig(TypedDict):
    tasks: Annotated[list[str], Field(min_length=1)]


class _TeacherConfig(TypedDict):
    recipe: str
    seeds: Annotated[list[int], Field(min_length=1)]
    gate: Share
    num_validation_goals: Positive


class _DistillConfig(TypedDict):
    protocol: str
    steps_per_stage: Positive
    batch_size: Positive


class _EvaluationConfig(TypedDict, total=False):
    goal_set: str


class _Variant(TypedDict, total=False):
    distill: dict[str, Any]


class ResultsConfig(TypedDict):
    """What is read of the config.json of results, of all versions."""

    name: str
    method: str
    seeds: Annotated[list[int], Field(min_length=1)]
    variants: NotRequired[dict[str, _Variant]]
    variants_only: NotRequired[bool]
    stream: _StreamConfig
    teacher: _TeacherConfig
    distill: _DistillConfig
    evaluation: _EvaluationConfig


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
        """The goals that success was measured on; older results without this setting are on held-out goals."""
        return str(self.config["evaluation"].get("goal_set", HELD_OUT))

    @property
    def methods(self) -> tuple[str, ...]:
        """The labels of the run's methods."""
        base = () if self.config.get("variants_only") else (self.config["method"],)
        return (*base, *self.config.get("variants", {}))

    def method_config(self, method: str) -> dict[str, Any]:
        """Return config.json with the settings of a method."""
        return merge(self.config, self.config.get("variants", {}).get(method, {}))

    def teacher_seed(self, student_seed: int) -> int:
        """Return the seed of a student's teachers."""
        seeds: list[int] = self.config["teacher"]["seeds"]
        position: int = self.config["seeds"].index(student_seed)
        return seeds[position % len(seeds)]


def read_tables(folder: Path) -> Tables:
    """Read a results folder; a missing table is read as empty.

    Raises:
        ValueError: if the folder lacks config.json, or a file in it is damaged.
    """
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(
            f"{folder} is not a results folder: it has no config.json; name a run or its results folder"
        )

    config = upgrade(read_json(path, dict[str, Any]))
    check_shape(config, ResultsConfig, str(path))

    def rows(name: str, kind: type[Any]) -> list[Any]:
        return read_rows(folder / name, kind) if find_table(folder / name) else []

    return Tables(
        folder,
        config,
        **{name: rows(f"{name}.csv", kind) for name, kind in TABLES.items()},
    )


def merge_tables(tables: Sequence[Tables]) -> Tables:
    """Return the first of `tables` with the rows of all; equal rows occur once."""
    rows: dict[str, Any] = {
        name: list(dict.fromkeys(row for table in tables for row in getattr(table, name))) for name in TABLES
    }
    return replace(tables[0], **rows)


def labels_of(rows: Iterable[EvaluationRow]) -> dict[str, str]:
    """Return the labels of the rows; different values are joined by a slash."""
    rows = list(rows)
    return {
        field.name: "/".join(dict.fromkeys(str(getattr(row, field.name)) for row in rows))
        for field in fields(Labels)
    }
