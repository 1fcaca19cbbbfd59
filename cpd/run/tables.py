"""The long-form tables of results: one dataclass per table, one CSV line per row.

Rows that are results carry the labels of their conditions, in the last columns.

Floats are written so that they read back exactly, flags as 1 and 0, and what was not measured as an empty cell.
A column whose field has a default is absent if no row has another value; tables of earlier versions lack it.

The type of a column is also its range, `AtMost` limits it by another column, and `KEY` names the columns in which
no two rows are equal. `read_rows` checks all of them.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache, lru_cache
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from pydantic import Field, PlainValidator, TypeAdapter, ValidationError

from cpd.config.types import Share, Task
from cpd.reading import DamagedFileError
from cpd.run.files import write_text
from cpd.run.progress import State
from cpd.run.provenance import Labels
from cpd.run.table_files import read_table

#: Beyond it, measures, which are floats, would not be exact.
LARGEST_INTEGER = 2**53


class AtMost(NamedTuple):
    """The annotation of a column that is at most another one, if neither is empty."""

    column: str


def _flag(cell: str) -> bool:
    if cell not in ("0", "1"):
        raise ValueError(f"{cell!r} is neither 0 nor 1")
    return cell == "1"


Flag = Annotated[bool, PlainValidator(_flag)]
Count = Annotated[int, Field(ge=0, le=LARGEST_INTEGER)]
Positive = Annotated[int, Field(ge=1, le=LARGEST_INTEGER)]
Stage = Annotated[int, Field(ge=-1, le=LARGEST_INTEGER)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
TeacherState = Literal["admitted"] | State
GoalSet = Literal["training", "validation", "held_out"]


class TableRow:
    """A row of any table."""

    KEY: ClassVar[tuple[str, ...]]


class ScoredRow(TableRow):
    """A row that counts successes, or has the mean normalised return of a task without a success measure."""

    episodes: int
    successes: int
    normalised_return: float | None

    @property
    def total(self) -> float:
        """Sum of the episodes' scores: of successes, or of normalised returns."""
        return self.successes if self.normalised_return is None else self.normalised_return * self.episodes


Row = TypeVar("Row", bound=TableRow)


@dataclass(frozen=True, kw_only=True)
class EvaluationRow(Labels, ScoredRow):
    """Success of one policy on one task and goal set, with the labels of its conditions."""

    KEY = ("method", "seed", "stage", "task", "goal_set")
    method: str
    """`teacher`, or the student's method."""
    seed: Positive
    stage: Stage | None
    """Stage after which a student was measured; -1 before any training, None for a teacher."""
    task: Task
    goal_set: GoalSet
    episodes: Positive
    successes: Annotated[Count, AtMost("episodes")]
    """Episodes in which the flag was set at any step."""
    successes_last: Annotated[Count | None, AtMost("successes")]
    """Episodes in which it was set at the last step; None where episodes ended at success."""
    mean_return: Finite
    """Undiscounted; comparable only among rows whose episodes ended alike."""
    normalised_return: Share | None = None
    """Mean over the episodes, for a task without a success measure; `successes` is 0 then."""
    random_return: Finite | None = None
    """The return that is normalised to 0, and in the next column to 1 (`cpd.envs.suite.Returns`)."""
    reference_return: Finite | None = None


@dataclass(frozen=True)
class EpisodeRow(TableRow):
    """One episode of an evaluation."""

    KEY = ("method", "seed", "stage", "task", "goal_set", "goal")
    method: str
    seed: Positive
    stage: Stage | None
    task: Task
    goal_set: GoalSet
    goal: Count
    """Index of the goal within its set."""
    success: Flag
    success_last: Annotated[Flag | None, AtMost("success")]
    length: Positive
    episode_return: Finite
    believed: Task | None = None
    """The task that the student inferred, with probability `confidence`; None for policies that infer none."""
    confidence: Share | None = None
    plan_first: Task | None = None
    """The task that the student acted for first; then for `plan_second`."""
    plan_second: Task | None = None
    normalised_return: Share | None = None
    """None for a task with a success measure."""


@dataclass(frozen=True, kw_only=True)
class CurveRow(Labels, ScoredRow):
    """Success of a student on the current task within a stage."""

    KEY = ("method", "seed", "stage", "step")
    method: str
    seed: Positive
    stage: Count
    step: Positive
    """Optimisation steps done in this stage."""
    task: Task
    goal_set: GoalSet
    episodes: Positive
    successes: Annotated[Count, AtMost("episodes")]
    normalised_return: Share | None = None


@dataclass(frozen=True)
class LossRow(TableRow):
    """The losses of a student, as means over the records of a short stretch of a stage."""

    KEY = ("method", "seed", "stage", "step")
    method: str
    seed: Positive
    stage: Count
    step: Positive
    """The stretch's last optimisation step in this stage."""
    task: Task
    loss: float
    """The loss that is minimised."""
    current: float | None
    """Its term for the current task's teacher."""
    replay: float | None
    """Its term for replayed steps; None without replay."""


@dataclass(frozen=True, kw_only=True)
class StageRow(Labels, TableRow):
    """The size of a student and of what it stores after a stage."""

    KEY = ("method", "seed", "stage")
    method: str
    seed: Positive
    stage: Stage
    """-1 before any training."""
    task: Task | None
    experts: Count
    """In each layer."""
    parameters: Count
    memory_steps: Count
    """Distinct time steps that are stored."""
    memory_bytes: Count
    masked_share: Share | None
    """Share of the parameters that could not move freely in this stage; None for methods without masking."""


@dataclass(frozen=True, kw_only=True)
class UsageRow(Labels, TableRow):
    """How often one expert was chosen while a student acted in episodes of one task."""

    KEY = ("method", "seed", "stage", "task", "layer", "expert")
    method: str
    seed: Positive
    stage: Stage
    task: Task
    layer: Count
    expert: Count
    chosen: Count
    """Time steps at which it was among the chosen experts; with top-k routing every step counts k times."""


@dataclass(frozen=True, kw_only=True)
class RetrievalRow(Labels, TableRow):
    """In how many episodes a student that infers the task inferred the right one, at one step."""

    KEY = ("method", "seed", "stage", "task", "step")
    method: str
    seed: Positive
    stage: Stage
    task: Task
    step: Positive
    """Observations seen so far in the episode, from 1."""
    episodes: Positive
    correct: Annotated[Count, AtMost("episodes")]


@dataclass(frozen=True)
class PlanRow(ScoredRow):
    """Success on training goals of the plan to act for one task first and then for another, after `stage`."""

    KEY = ("method", "seed", "stage", "plan_first", "plan_second", "task")
    method: str
    seed: Positive
    stage: Count
    plan_first: Task
    plan_second: Task
    task: Task
    episodes: Positive
    successes: Annotated[Count, AtMost("episodes")]
    env_steps: Positive
    normalised_return: Share | None = None


@dataclass(frozen=True)
class StartRow(TableRow):
    """In how many of a teacher's episodes the first observation looks most like one of task `other`."""

    KEY = ("task", "seed", "other")
    task: Task
    seed: Positive
    """Of the teacher."""
    other: Task
    episodes: Positive
    nearest: Annotated[Count, AtMost("episodes")]
    """Episodes whose first observation has its nearest neighbour, among those on other goals, in `other`."""


@dataclass(frozen=True)
class TeacherRow(TableRow):
    """The outcome of one teacher."""

    KEY = ("task", "seed")
    task: Task
    seed: Positive
    state: TeacherState
    """`admitted`, `rejected`, or the state of its job."""
    env_steps: Count | None
    """Training steps in the environment; None for recipes without training."""
    iterations: Count | None
    validation_success: Share | None
    """Last success rate, or mean normalised return, on validation goals."""


@dataclass(frozen=True)
class TrainingRow(TableRow):
    """One iteration of a teacher's training; its table may hold further columns."""

    KEY = ("task", "seed", "iteration")
    task: Task
    seed: Positive
    iteration: Count
    env_steps: Count | None
    train_success: Share | None
    validation_success: Share | None


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """Publish `rows`, at least one and all of one dataclass, as a CSV file with a header."""
    assert rows and all(type(row) is type(rows[0]) for row in rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    kind = type(rows[0])
    absent = {name for name in _optional(kind) if all(getattr(row, name) is None for row in rows)}
    columns = [column for column in _columns(kind) if column not in absent]
    writer.writerow(columns)
    writer.writerows([_cell(getattr(row, column)) for column in columns] for row in rows)
    write_text(path, text.getvalue())


def read_rows(path: Path, kind: type[Row], *, is_open: bool = False, **expected: Any) -> list[Row]:
    """Read a table whose rows are of the dataclass `kind`.

    Args:
        path: the table, plain or compressed.
        kind: the type of its rows.
        is_open: whether further columns, which are ignored, and other orders of columns are allowed.
        expected: values that every row must have, by column.

    Raises:
        DamagedFileError: if columns, a value or the key of a row are not as `kind` and `expected` have them; names
            the file, the line and the column.
    """
    parsers, limits = _schema(kind)  # type: ignore[arg-type]  # mypy takes a class for not hashable
    text = read_table(path)
    reader = csv.reader(io.StringIO(text, newline=""))
    header = next(reader, [])
    due = [column for column in parsers if column in header or column not in _optional(kind)]
    if not set(header).issuperset(kind.KEY) if is_open else header != due:
        raise DamagedFileError(
            f"{path}: the columns are {','.join(header)}, but a table of {kind.__name__} has "
            f"{','.join(parsers)}; it was written by another version or damaged: make it again"
        )
    rows: dict[tuple[Any, ...], Row] = {}
    try:
        for cells in reader:
            if len(cells) != len(header):
                raise ValueError(f"{len(cells)} values for {len(header)} columns")
            named = dict(zip(header, cells, strict=True))
            values = {column: parse(named.get(column, "")) for column, parse in parsers.items()}
            for column, limit in limits:
                if values[column] is not None and values[column] > values[limit]:
                    raise ValueError(f"{column} is {values[column]}, but {limit} is only {values[limit]}")
            for column, value in expected.items():
                if values[column] != value:
                    raise ValueError(f"{column} is {values[column]!r}, but this file is of {column} {value!r}")
            key = tuple(values[column] for column in kind.KEY)
            if key in rows:
                raise ValueError(f"a second row with the same {', '.join(kind.KEY)}")
            rows[key] = kind(**values)
        if not text.endswith("\n"):
            raise ValueError("the end is cut off")
    except (ValueError, csv.Error) as error:
        raise DamagedFileError(
            f"{path}, line {reader.line_num}: {error}; the file was damaged: make it again"
        ) from None
    return list(rows.values())


@cache
def _schema(kind: Any) -> tuple[dict[str, Callable[[str], Any]], list[tuple[str, str]]]:
    """Return the parser of every column, and the pairs of columns of which the first is at most the second."""
    hints = get_type_hints(kind, include_extras=True)
    columns = _columns(kind)
    limits = [(name, m.column) for name in columns for m in get_args(hints[name]) if isinstance(m, AtMost)]
    return {name: _parser(name, hints[name]) for name in columns}, limits


def _parser(column: str, hint: Any) -> Callable[[str], Any]:
    """Return the inverse of `_cell` for a column whose type is `hint`."""
    adapter: TypeAdapter[Any] = TypeAdapter(hint)
    accepts_none = NoneType in get_args(get_args(hint)[0] if get_origin(hint) is Annotated else hint)

    @lru_cache  # most columns have few distinct values
    def parse(cell: str) -> Any:
        try:
            return None if accepts_none and cell == "" else adapter.validate_strings(cell)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ValueError(f"{column}: {reason} (given: {cell!r})") from None

    return parse


def _columns(kind: type[Any]) -> list[str]:
    """Return the names of the row's fields, then those of its labels."""
    names = [field.name for field in fields(kind)]
    shared = [field.name for field in fields(Labels)] if issubclass(kind, Labels) else []
    return [name for name in names if name not in shared] + shared


def _optional(kind: type[Any]) -> set[str]:
    """Return the columns that a table may lack; their default is None."""
    return {field.name for field in fields(kind) if field.default is None}


def _cell(value: str | int | float | bool | None) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    return repr(float(value)) if isinstance(value, float) else str(value)
