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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

from cpd.run.files import DamagedFileError, atomic_write, write_text
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
    """The losses of a student on the way, the mean over the records of a short stretch of a stage."""

    method: str
    seed: int
    stage: int
    step: int
    """The stretch's last optimisation step in this stage."""
    task: str
    loss: float
    """What is minimised."""
    current: float | None
    """Imitation of the current task's teacher."""
    replay: float | None
    """Imitation on what is replayed; None where nothing is."""


@dataclass(frozen=True, kw_only=True)
class StageRow(Labels):
    """What a student is made of and holds after a stage."""

    method: str
    seed: int
    stage: int
    """-1 before any training."""
    task: str | None
    experts: int
    """In each layer."""
    parameters: int
    memory_steps: int
    """Distinct time steps stored anywhere."""
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
    """In how many episodes a student that is told nothing believed in the right task, at one step."""

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
    """In how many of a teacher's episodes the first observation is nearest to one of another task."""

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
    """The rows of a table of dataclass `kind`.

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
            f"{','.join(parsers)}; it was written by another version or damaged: make it anew"
        )
    return list(_parsed(path, kind, parsers, reader))


def _compressed(path: Path) -> Path:
    return path.with_name(f"{path.name}.gz")


def find_table(path: Path) -> Path | None:
    """The file that holds the table `path`: `path` itself or else its compressed form; None if neither exists."""
    return next((file for file in (path, _compressed(path)) if file.exists()), None)


def read_table(path: Path) -> str:
    """The text of the table `path`, plain or compressed.

    Raises:
        FileNotFoundError: if there is neither form.
        DamagedFileError: if the compressed form cannot be decompressed.
    """
    file = find_table(path) or path
    content = file.read_bytes()
    if file == path:
        return content.decode()
    try:
        return gzip.decompress(content).decode()
    except (OSError, EOFError, zlib.error) as error:
        raise DamagedFileError(f"{file} is damaged ({error}): restore it, or publish the run again") from None


def compress_tables(folder: Path) -> None:
    """Replace every table of `folder` that is large by its compressed form; equal tables give equal bytes."""
    for path in sorted(folder.glob("*.csv")):
        if path.stat().st_size < LARGE_TABLE:
            _compressed(path).unlink(missing_ok=True)
            continue
        with atomic_write(_compressed(path)) as temporary:
            temporary.write_bytes(gzip.compress(path.read_bytes(), 9, mtime=0))
        path.unlink()


def _columns(kind: type[Any]) -> list[str]:
    """A row's own fields, then its labels."""
    names = [field.name for field in fields(kind)]
    shared = [field.name for field in fields(Labels)] if issubclass(kind, Labels) else []
    return [name for name in names if name not in shared] + shared


def _parsed(
    path: Path, kind: type[Row], parsers: dict[str, Callable[[str], Any]], lines: Iterable[list[str]]
) -> Iterable[Row]:
    for number, cells in enumerate(lines, start=2):
        try:
            if len(cells) != len(parsers):
                raise ValueError(f"{len(cells)} values for {len(parsers)} columns")
            values = {name: parsers[name](cell) for name, cell in zip(parsers, cells, strict=True)}
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}; the file was damaged: make it anew") from None
        yield kind(**values)


def _cell(value: str | int | float | bool | None) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    return repr(float(value)) if isinstance(value, float) else str(value)


def _parser(hint: Any) -> Callable[[str], Any]:
    """The inverse of `_cell` for a field of type `hint`."""
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not NoneType]
    optional = NoneType in get_args(hint)
    parse = _flag if kinds == [bool] else kinds[0]

    def parsed(cell: str) -> Any:
        return None if optional and cell == "" else parse(cell)

    return parsed


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
    """`admitted`, `rejected`, or the state in which its job stands."""
    env_steps: int | None
    """Training steps in the environment; None for recipes without training."""
    iterations: int | None
    validation_success: float | None
    """Last success rate on validation goals."""
