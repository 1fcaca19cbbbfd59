"""Leases: one writer per element, also on shared file systems, where file locks are not reliable.

Every attempt at an element creates the next file `attempts/0001.json`, `0002.json`, ... exclusively; the highest
number holds the lease. A process takes over a stale lease by creating the next number, which only one process can
do; the old holder sees the higher number and stops. The files are also the history of attempts.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import TracebackType

from cpd.reading import DamagedFileError, number_in_environment, read_json
from cpd.run.files import UNSUPPORTED, create_exclusively, is_temporary, temporary_name, write_json
from cpd.run.shortage import naming

HEARTBEAT_SECONDS = 5.0
#: Names of attempts; a sync tool or an editor may leave others beside them.
ATTEMPT = re.compile(r"\d{4,}\.json")
#: A holder on another host that has been silent for this long counts as dead.
STALE_SECONDS = 90.0
#: A file that is younger may not hold its contents yet.
WRITING_SECONDS = 0.5
#: The commit that this process runs. A variable, since git is not to be asked after MPI has started.
CODE_VARIABLE = "CPD_CODE"


class LeaseHeldError(RuntimeError):
    """Another process is writing this element."""


class LeaseLostError(RuntimeError):
    """Another process has taken the lease over; this process must not write any more."""


@dataclass(frozen=True)
class Holder:
    """Who made an attempt: host, process and its start time (clock ticks since boot), Slurm job if any."""

    host: str
    process: int
    start_ticks: int
    job: str
    released: bool = False
    restart: int = 0
    """How often Slurm had restarted the job."""
    system: str = ""
    """Boot and process namespace, which tell containers and machines of one name apart; empty in old runs."""
    code: str = ""
    """The commit that it runs; empty in attempts of earlier versions."""

    @classmethod
    def current(cls) -> Holder:
        """Return the holder that stands for this process."""
        job, restart = os.environ.get("SLURM_JOB_ID", ""), int(number_in_environment("SLURM_RESTART_COUNT"))
        host, process, code = socket.gethostname(), os.getpid(), os.environ.get(CODE_VARIABLE, "")
        return cls(host, process, start_ticks(process), job, restart=restart, system=_system(), code=code)

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}{f' (job {self.job})' if self.job else ''}"

    @property
    def is_visible(self) -> bool:
        """Whether this process can see the holder; else only the age of its heartbeat tells whether it lives."""
        return self.host == socket.gethostname() and self.system in ("", _system())

    def is_succeeded_by(self, other: Holder) -> bool:
        """Whether `other` is a later start of the same Slurm job, in which case this holder has ended."""
        return bool(self.job) and self.job == other.job and self.restart < other.restart


@cache
def _system() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return ""


def start_ticks(process: int) -> int:
    """Return a process's start time in clock ticks since boot, which tells reused ids apart; 0 if it has ended."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    fields = text.rpartition(")")[2].split()
    return 0 if fields[0] in "ZX" else int(fields[19])


def is_alive(process: int, ticks: int) -> bool:
    """Whether the process that started at `ticks` still runs on this host."""
    return ticks != 0 and start_ticks(process) == ticks


class Lease:
    """The right to write one element's folder; use as a context manager."""

    def __init__(self, folder: Path) -> None:
        self._attempts = folder / "attempts"
        self._stop = threading.Event()
        self._lost = False
        self.number = 0

    @property
    def _file(self) -> Path:
        return self._attempts / f"{self.number:04d}.json"

    def acquire(self, wait_seconds: float = 0.0) -> Lease:
        """Take the lease; wait up to `wait_seconds` for a holder to release it.

        Raises:
            LeaseHeldError: if a living holder keeps it, naming host and process.
        """
        self._attempts.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + wait_seconds
        while True:
            holder, number = current_holder(self._attempts)
            if holder is None or holder.is_succeeded_by(Holder.current()):
                # Of several processes that see the stale lease, one alone can create the next number.
                self.number = number + 1
                with contextlib.suppress(FileExistsError):  # another process was first: check again
                    self._create()
                    self._sweep()
                    threading.Thread(target=self._beat, daemon=True, name="lease").start()
                    return self
            elif time.monotonic() >= deadline:
                lapse = "as soon as that process has ended"
                if not holder.is_visible:
                    seconds = STALE_SECONDS - _age_seconds(self._attempts / f"{number:04d}.json")
                    lapse = f"in {max(seconds, 0.0):.0f} s if that process is dead"
                raise LeaseHeldError(
                    f"{self._attempts.parent} is being written by {holder}; wait for it or end it first; the "
                    f"lease lapses {lapse}"
                )
            time.sleep(0.2)

    def _create(self) -> None:
        # A link publishes the complete file at once, and fails if the number exists, also on NFS.
        temporary = temporary_name(self._file)
        text = json.dumps(asdict(Holder.current()))
        with naming(self._file):
            try:
                _write_synced(temporary, text)
                os.link(temporary, self._file)
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
                _write_synced(self._file, text)
            finally:
                temporary.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Remove the temporary files of killed processes; those of living ones are there for milliseconds."""
        for path in self._attempts.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if is_temporary(path) and self._file.stat().st_mtime - path.lstat().st_mtime > STALE_SECONDS:
                    path.unlink()

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self._file)
            if self._superseded():
                self._lost = True
                return

    def _superseded(self) -> bool:
        return (self._attempts / f"{self.number + 1:04d}.json").exists()

    def check(self) -> None:
        """Check that this process still holds the lease; call before publishing anything.

        Raises:
            LeaseLostError: if another process has taken the lease over.
        """
        if self._lost or self._superseded():
            raise LeaseLostError(f"{self._attempts.parent} was taken over by another process; this one stops")

    def release(self) -> None:
        """Release the lease."""
        self._stop.set()
        if not self._superseded():  # otherwise the lease is the successor's
            holder = asdict(Holder.current()) | {"released": True}
            # A lease also ends with its process: no failure here may hide that of the work.
            with contextlib.suppress(OSError, DamagedFileError):
                write_json(self._file, holder)

    def __enter__(self) -> Lease:
        return self if self.number else self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _write_synced(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def current_holder(attempts: Path) -> tuple[Holder | None, int]:
    """Return the living holder of the lease, or None, and the number of the last attempt (0 if none)."""
    files = {int(path.stem): path for path in attempts.glob("*.json") if ATTEMPT.fullmatch(path.name)}
    if not files:
        return None, 0
    number, path = max(files.items())
    try:
        holder = read_json(path, Holder)
    except FileNotFoundError:
        return None, number
    except DamagedFileError:
        # Without links, its writer may not be done yet. A power failure cuts the file short and ends its writer.
        if path.exists() and _age_seconds(path) < WRITING_SECONDS:
            time.sleep(0.1)
            return current_holder(attempts)
        return None, number
    if holder.released:
        return None, number
    if holder.is_visible:
        alive = is_alive(holder.process, holder.start_ticks)
    else:
        alive = _age_seconds(path) < STALE_SECONDS
    return (holder if alive else None), number


def _age_seconds(path: Path) -> float:
    """Return a file's age by the file server's clock, which may differ from this machine's.

    On a read-only file system, this machine's clock is used.
    """
    probe = temporary_name(path)
    try:
        create_exclusively(probe)
        return probe.stat().st_mtime - path.stat().st_mtime
    except OSError:
        return time.time() - path.stat().st_mtime
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
