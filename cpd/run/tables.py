"""The long-form tables of results: one dataclass per table, one CSV line per row.

Rows that are results carry the labels of their conditions, in the last columns.

Floats are written so that they read back exactly, flags as 1 and 0, and what was not measured as an empty cell.
A published folder may hold a table in compressed form, `<name>.csv.gz`; readers accept both.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from cpd.reading import DamagedFileError, decode, read_bytes
from cpd.run.files import atomic_write, write_text
from cpd.run.provenance import Labels

Row = TypeVar("Row")
#: Bytes from which `compress_tables` compresses a table.
LARGE_TABLE = 100_000


@dataclass(frozen=True, kw_only=True)
class EvaluationRow(Labels):
    """Success of one policy on one task and goal set, with the labels of its conditions."""

    method: str
    """`teacher`, or the student's method."""
    seed: int
    stage: int | None
    """Stage after which a student was measured; -1 before any training, None for a teacher."""
    task: str
    goal_set: str
    """`training`, `validation` or `held_out`."""
    episodes: int
    successes: int
    """Episodes in which the flag was set at any step."""
    successes_last: int | None
    """Episodes in which it was set at the last step; None where episodes ended at success."""
    mean_return: float
    """Undiscounted; comparable only among rows whose episodes ended alike."""


@dataclass(frozen=True)
class EpisodeRow:
    """One episode of an evaluation."""

    method: str
    seed: int
    stage: int | None
    task: str
    goal_set: str
    goal: int
    """Index of the goal within its set."""
    success: bool
    success_last: bool | None
    length: int
    episode_return: float


@dataclass(frozen=True, kw_only=True)
class CurveRow(Labels):
    """Success of a student on the current task within a stage."""

    method: str
    seed: int
    stage: int
    step: int
    """Optimisation steps done in this stage."""
    task: str
    goal_set: str
    episodes: int
    successes: int


@dataclass(frozen=True)
class LossRow:
    """The losses of a student, as means over the records of a short stretch of a stage."""

    method: str
    seed: int
    stage: int
    step: int
    """The stretch's last optimisation step in this stage."""
    task: str
    loss: float
    """The loss that is minimised."""
    current: float | None
    """Its term for the current task's teacher."""
    replay: float | None
    """Its term for replayed steps; None without replay."""


@dataclass(frozen=True, kw_only=True)
class StageRow(Labels):
    """The size of a student and of what it stores after a stage."""

    method: str
    seed: int
    stage: int
    """-1 before any training."""
    task: str | None
    experts: int
    """In each layer."""
    parameters: int
    memory_steps: int
    """Distinct time steps that are stored."""
    memory_bytes: int
    masked_share: float | None
    """Share of the parameters that could not move freely in this stage; None for methods without masking."""


@dataclass(frozen=True, kw_only=True)
class UsageRow(Labels):
    """How often one expert was chosen while a student acted in episodes of one task."""

    method: str
    seed: int
    stage: int
    task: str
    layer: int
    expert: int
    chosen: int
    """Time steps at which it was among the chosen experts; with top-k routing every step counts k times."""


@dataclass(frozen=True, kw_only=True)
class RetrievalRow(Labels):
    """In how many episodes a student that infers the task inferred the right one, at one step."""

    method: str
    seed: int
    stage: int
    task: str
    step: int
    """Observations seen so far in the episode, from 1."""
    episodes: int
    correct: int


@dataclass(frozen=True)
class StartRow:
    """In how many of a teacher's episodes the first observation looks most like one of task `other`."""

    task: str
    seed: int
    """Of the teacher."""
    other: str
    episodes: int
    nearest: int
    """Episodes whose first observation has its nearest neighbour, among those on other goals, in `other`."""


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """Publish `rows`, at least one and all of one dataclass, as a CSV file with a header."""
    assert rows and all(type(row) is type(rows[0]) for row in rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = _columns(type(rows[0]))
    writer.writerow(columns)
    writer.writerows([_cell(getattr(row, column)) for column in columns] for row in rows)
    write_text(path, text.getvalue())


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """Read a table whose rows are of the dataclass `kind`.

    Raises:
        ValueError: if a column or a value is not as `kind` has it, naming the file and the line.
    """
    hints = get_type_hints(kind)
    parsers = {name: _parser(hints[name]) for name in _columns(kind)}
    reader = csv.reader(io.StringIO(read_table(path), newline=""))
    header = next(reader, [])
    if header != list(parsers):
        raise ValueError(
            f"{path}: the columns are {','.join(header)}, but a table of {kind.__name__} has "
            f"{','.join(parsers)}; it was written by another version or damaged: make it again"
        )
    rows = []
    for number, cells in enumerate(reader, start=2):
        try:
            if len(cells) != len(parsers):
                raise ValueError(f"{len(cells)} values for {len(parsers)} columns")
            values = {name: parsers[name](cell) for name, cell in zip(parsers, cells, strict=True)}
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}; the file was damaged: make it again") from None
        rows.append(kind(**values))
    return rows


def _compressed(path: Path) -> Path:
    return path.with_name(f"{path.name}.gz")


def find_table(path: Path) -> Path | None:
    """Return the file that holds the table `path`, plain or compressed; None if neither exists."""
    return next((file for file in (path, _compressed(path)) if file.exists() or file.is_symlink()), None)


def read_table(path: Path) -> str:
    """Return the text of the table `path`, plain or compressed.

    Raises:
        FileNotFoundError: if there is neither form.
        DamagedFileError: if the compressed form cannot be decompressed.
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
            _compressed(path).unlink(missing_ok=True)  # of an earlier, larger table
            continue
        with atomic_write(_compressed(path)) as temporary:
            temporary.write_bytes(gzip.compress(path.read_bytes(), 9, mtime=0))
        path.unlink()


def _columns(kind: type[Any]) -> list[str]:
    """Return the names of the row's fields, then those of its labels."""
    names = [field.name for field in fields(kind)]
    shared = [field.name for field in fields(Labels)] if issubclass(kind, Labels) else []
    return [name for name in names if name not in shared] + shared


def _cell(value: str | int | float | bool | None) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    return repr(float(value)) if isinstance(value, float) else str(value)


def _parser(hint: Any) -> Callable[[str], Any]:
    """Return the inverse of `_cell` for a field of type `hint`."""
    kind, *none = get_args(hint) or (hint,)
    parse = _flag if kind is bool else kind
    return lambda cell: None if none and cell == "" else parse(cell)


def _flag(cell: str) -> bool:
    if cell not in ("0", "1"):
        raise ValueError(f"{cell!r} is neither 0 nor 1")
    return cell == "1"


@dataclass(frozen=True)
class TeacherRow:
    """The outcome of one teacher."""

    task: str
    seed: int
    state: str
    """`admitted`, `rejected`, or the state of its job."""
    env_steps: int | None
    """Training steps in the environment; None for recipes without training."""
    iterations: int | None
    validation_success: float | None
    """Last success rate on validation goals."""
