"""Progress of a job: metrics.jsonl for figures, status.json for tables, plain lines for its log."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import AfterValidator, ConfigDict, FiniteFloat, TypeAdapter
from typing_extensions import TypedDict

from cpd.reading import DamagedFileError, accessing, number_in_environment, read_for_display, read_json_lines
from cpd.run.files import write_json
from cpd.run.shortage import error_number, naming

State = Literal["waiting", "queued", "running", "done", "rejected", "stopped", "failed"]

#: Seconds between two writes of status.json: by many jobs on a cluster, they load its file system. The variable is
#: for those who want to see more.
SLURM_SECONDS = 10.0
WRITE_SECONDS = number_in_environment("CPD_STATUS_SECONDS") or (
    SLURM_SECONDS if "SLURM_JOB_ID" in os.environ else 1.0
)
LINE_SECONDS = 15.0


class MetricsLog:
    """Append-only metrics.jsonl, one JSON object a line, truncated on resume to its size at the checkpoint."""

    def __init__(self, path: Path, size: int = 0) -> None:
        """Open `path` and keep its first `size` bytes."""
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with accessing(path):
            self._file: BinaryIO = path.open("ab")
        size = min(size, self._file.seek(0, os.SEEK_END))  # truncating beyond the end would pad with zeros
        self._file.truncate(size)
        self._file.seek(size)

    def append(self, **values: float | int | str | None) -> None:
        """Write one record; floats are kept to 6 significant digits."""
        rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
        with naming(self._path):
            self._file.write(json.dumps(rounded).encode() + b"\n")
            self._file.flush()

    @property
    def size(self) -> int:
        """Bytes written so far, for the checkpoint."""
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # `append` has raised it, or flushed everything
            self._file.close()


@dataclass
class StatusRecord:
    """The contents of status.json; every field but `state` is for display only."""

    __pydantic_config__ = ConfigDict(allow_inf_nan=False)
    state: State = "waiting"
    phase: str = ""
    done: int = 0
    total: int = 0
    unit: str = "steps"
    rate: float = 0.0
    """Units per second in the current phase of this attempt."""
    success: float | None = None
    measure: str = "success"
    """What `success` is: of a task without a success measure, the normalised return."""
    loss: float | None = None
    message: str = ""
    started: float = 0.0
    """Unix time of this attempt's start."""
    updated: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall seconds by phase, added up over attempts."""
    cpu_seconds: float = 0.0
    """Processor seconds of all ranks and of their children that have ended, added up over attempts.

    Ranks other than the writing one are added when an attempt ends without a failure.
    """
    spans: list[tuple[str, float, float]] = field(default_factory=list)
    """Phase, start and end (Unix time) of every stretch of work."""

    @property
    def eta_seconds(self) -> float | None:
        """Seconds until the current phase ends at its present rate."""
        return (self.total - self.done) / self.rate if self.rate > 0 and self.total else None


def read_status(path: Path) -> StatusRecord:
    """Return the record in `path`, or an empty one if it is missing or damaged: it is for display only."""
    return read_for_display(path, StatusRecord, StatusRecord())


def write_status(path: Path, record: StatusRecord, sync: bool = True) -> None:
    """Write a status.json; where there is no room for a second file, over the first, so that it tells why."""
    try:
        write_json(path, asdict(record), sync)
    except (DamagedFileError, OSError) as error:
        if not error_number(error):
            return  # a display that cannot be written never stops work
        if not path.exists():
            raise
        text = json.dumps(asdict(record)).encode()
        with path.open("r+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            file.write(text.ljust(size))  # blocks that the file has already
            file.truncate(len(text))


class Status:
    """Keeps a job's status.json up to date and logs a line of progress every 15 seconds."""

    def __init__(
        self, path: Path, log: Callable[[str], None] = lambda line: None, measure: str = "success"
    ) -> None:
        """Continue the record in `path`; `log` receives a line of progress every 15 seconds."""
        self.path = path
        self.record = read_status(path)
        self.record.measure = measure
        self.record.started = time.time()
        self.record.message = ""
        self._log = log
        self._cpu_base = self.record.cpu_seconds - cpu_seconds()
        self._phase_base = 0.0
        self._phase_start = time.monotonic()
        self._phase_first = 0
        self._last_write = 0.0
        self._last_line = time.monotonic()

    def begin(self, phase: str, total: int, done: int = 0, unit: str = "steps") -> None:
        """Enter a phase of `total` units, `done` of which are finished."""
        record = self.record
        self._phase_base = record.seconds.get(phase, 0.0)
        self._phase_start, self._phase_first = time.monotonic(), done
        record.state, record.phase = "running", phase
        record.total, record.unit, record.rate = total, unit, 0.0
        record.spans.append((phase, time.time(), time.time()))
        self.advance(done, force=True)

    def advance(
        self, done: int, *, success: float | None = None, loss: float | None = None, force: bool = False
    ) -> None:
        """Record the progress of the phase; write it at most every `WRITE_SECONDS` unless `force`."""
        record, now = self.record, time.monotonic()
        record.done = done
        record.success = record.success if success is None else success
        record.loss = record.loss if loss is None else loss
        elapsed = now - self._phase_start
        if record.spans:
            record.seconds[record.phase] = self._phase_base + elapsed
            record.spans[-1] = (*record.spans[-1][:2], time.time())
        record.rate = (done - self._phase_first) / elapsed if elapsed > 0 else 0.0
        if force or now - self._last_write >= WRITE_SECONDS:
            self._last_write = now
            self._write(sync=False)  # nothing but a display depends on it
        if now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            self._log(progress_line(record))

    def finish(self, state: State, message: str = "", others: float = 0.0, **values: float | None) -> None:
        """Leave the job in `state` with a last message; `others`: processor seconds of the other ranks."""
        self._cpu_base += others
        self.advance(self.record.done, force=True, **values)
        self.record.state, self.record.message, self.record.rate = state, message, 0.0
        self._write(sync=True)
        self._log(f"{state}{f': {message}' if message else ''}")

    def _write(self, *, sync: bool) -> None:
        self.record.updated = time.time()
        self.record.cpu_seconds = self._cpu_base + cpu_seconds()
        try:
            write_status(self.path, self.record, sync)
        except OSError as error:
            if not error_number(error):  # else the work goes on until it lacks room itself
                raise


def cpu_seconds() -> float:
    """Return the processor seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])


def progress_line(record: StatusRecord) -> str:
    """Return one line, such as `train  45 % | 90000/200000 steps | 2100 steps/s | eta 0:52 | success 0.84`."""
    parts = [f"{record.phase} {100 * record.done / max(record.total, 1):3.0f} %"]
    parts.append(f"{record.done}/{record.total} {record.unit}")
    if record.rate:
        parts.append(f"{number(record.rate)} {record.unit}/s")
    if record.eta_seconds is not None:
        parts.append(f"eta {clock(record.eta_seconds)}")
    if record.success is not None:
        parts.append(f"{record.measure} {record.success:.2f}")
    if record.loss is not None:
        parts.append(f"loss {record.loss:.4g}")
    return " | ".join(parts)


def number(value: float) -> str:
    """Format a rate with three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def clock(seconds: float) -> str:
    """Format seconds as `m:ss` or `h:mm:ss`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


class _UsedMetrics(TypedDict, total=False):
    """The entries of metrics records that results are made from."""

    stage: int
    step: int
    task: str | None
    loss: float | None
    current: float | None
    replay: float | None
    masked_share: FiniteFloat
    iteration: int
    env_steps: FiniteFloat
    train_success: float | None
    validation_success: FiniteFloat | None


_USED_METRICS = TypeAdapter(_UsedMetrics)


def _check_metrics(record: dict[str, Any]) -> dict[str, Any]:
    _USED_METRICS.validate_python(record, strict=True)
    if not record.keys() & {"stage", "iteration"}:
        raise ValueError("required, but not given: stage of a student, or iteration of a teacher")
    needed = {"stage", "step", "task"} if "loss" in record else {"stage"} if "masked_share" in record else set()
    if missing := needed - record.keys():
        raise ValueError(f"required, but not given: {', '.join(sorted(missing))}")
    return record


MetricsRecord = Annotated[dict[str, float | int | str | None], AfterValidator(_check_metrics)]


def read_metrics(path: Path, *, is_finished: bool = False) -> list[dict[str, Any]]:
    """Return all complete records of a metrics.jsonl; skip a line that a kill cut off.

    Args:
        path: the file; no records if it does not exist.
        is_finished: whether its element is, so that no line may be cut off.

    Raises:
        DamagedFileError: if a line is damaged, or the file is a link to one that does not exist.
    """
    shape: Any = MetricsRecord
    return list(read_json_lines(path, shape, is_finished=is_finished)) if os.path.lexists(path) else []
