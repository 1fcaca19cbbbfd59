"""Show a run's elements in a table: state, progress, rate, time left, last loss and success, and log."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.live import Live

from cpd.cluster.ledger import LedgerEntry, ledger
from cpd.cluster.queue import CLUSTERS_VARIABLE, REMEDIES, UNKNOWN, JobState, QueueView, state_in_log
from cpd.config.profile import SETUP_FAILED, Line
from cpd.run.command import EXIT_CTRL_C, EXIT_FAILED, EXIT_USAGE, exit_quietly
from cpd.run.directory import Element, Run
from cpd.run.lease import Holder, current_holder
from cpd.run.progress import SLURM_SECONDS, StatusRecord, read_status
from cpd.terminal import plain_console, printable
from jobs.common import parser_with_examples
from jobs.status_table import ElementStatus, plain_lines, screen_table, status_table

#: Width where there is no terminal: rows never wrap.
UNLIMITED = 10_000
#: How many of an element's last jobs are searched for a log: with the order `overlap`, several may be pending.
SEARCHED_JOBS = 60
#: Bytes read from the end of a log.
TAIL_BYTES = 16_384
#: `--watch` ends after this many polls without an active job: a new job may not be visible at once.
IDLE_POLLS = 5
#: Rows that are printed to a terminal at once, the most important ones; it takes seconds to lay out a thousand.
MAX_ROWS = 100


def element_status(
    run: Run, element: Element, log: str, job: JobState | None = None, user: str = ""
) -> ElementStatus:
    """Read an element's state from markers, lease, Slurm job and status.json, the most reliable source first."""
    record = read_status(element.status)
    holder, attempts = current_holder(element.path / "attempts")
    state = _state(element, record, holder, job)
    if state == "queued" and not job and current_holder(run.root / "launcher" / "attempts")[0] is None:
        state = "waiting"  # the local launcher that queued it has ended
    message = printable(record.message)
    if job and state == "killed":
        lines = log_tail(run.root / log) if log else []
        failed_setup = [line for line in lines if line.startswith(SETUP_FAILED)][-1:]
        message = ": ".join([*failed_setup, REMEDIES.get(state_in_log(lines) or job.state, "")])
        message += f" (was on {job.node})" if job.node else ""
    return ElementStatus(
        element=element.name,
        role=element.role,
        state=state,
        phase=printable(record.phase),
        done=record.done,
        total=record.total,
        unit=record.unit,
        rate=record.rate if state == "running" else 0.0,
        eta_seconds=record.eta_seconds if state == "running" else None,
        success=record.success,
        loss=record.loss,
        attempts=attempts,
        seconds=sum(record.seconds.values()),
        message=message,
        log=log,
        job=job.job if job else "",
        queue=_queue_text(job),
        node=job.node if job else "",
        user=user,
    )


def _state(element: Element, record: StatusRecord, holder: Holder | None, job: JobState | None) -> str:
    if element.finished:
        return "rejected" if element.is_rejected else "done"
    started = ("RUNNING", "COMPLETING")
    if job and job.state not in started and holder and holder.job == job.number != "":
        holder = None  # Slurm has ended the job, although its last heartbeat is recent
    if holder:
        return "running"
    if job and job.state == UNKNOWN:
        job = None
    if job and job.is_active:
        return "queued" if job.state not in started else "starting" if job.state == "RUNNING" else record.state
    # A process was running, or was to run, and ended without recording a state.
    return "killed" if record.state == "running" or (job and record.state == "queued") else record.state


def run_status(
    run: Run, view: QueueView | None = None, previous: Sequence[ElementStatus] = ()
) -> list[ElementStatus]:
    """Return all rows, in the run's order.

    Args:
        run: the run.
        view: the same again queries Slurm less often.
        previous: rows of the last call; files of elements that are finished or still pending are not read again.
    """
    entries = ledger(run)
    finished = {row.element: row for row in previous if row.state in ("done", "rejected")}
    pending = {row.element: row for row in previous if row.queue.startswith("PENDING")}
    elements = run.elements()
    unfinished = {
        e.name: entries[e.name][-1]
        for e in elements
        if e.name in entries and e.name not in finished and (e.name in pending or not e.finished)
    }
    jobs = (view or QueueView()).states(unfinished)
    rows = []
    for element in elements:
        job = jobs.get(element.name)
        row = finished.get(element.name) or pending.get(element.name)
        if row is None or (row.job, row.queue) != (job.job if job else "", _queue_text(job)):
            submissions = entries.get(element.name, [])
            user = submissions[-1].user if job and submissions[-1].is_foreign else ""
            row = element_status(run, element, _log(run, submissions), job, user)
        rows.append(row)
    return rows


def _queue_text(job: JobState | None) -> str:
    return f"{job.state}{f' ({job.reason})' if job.reason else ''}" if job else ""


def _log(run: Run, entries: Sequence[LedgerEntry]) -> str:
    """Return the log of an element's last job that has started; if none has, of its last job."""
    logs = [entry.log for entry in entries[-SEARCHED_JOBS:] if entry.log]
    return next((log for log in reversed(logs) if (run.root / log).exists()), logs[-1] if logs else "")


def _log_with_exception(log: Path) -> Path:
    """Return the first log of any rank that ends with an exception, else `log`, which is rank 0's."""
    ranks = sorted(log.parent.glob(log.name.replace("_0_log.out", "_*_log.out")))
    with_exception = (path for path in (log, *ranks) if any("Traceback" in line for line in log_tail(path, 40)))
    return next(with_exception, log)


def log_tail(path: Path, num_lines: int = 12) -> list[str]:
    """Return the last lines of a job's log, without reading all of it; empty if the log does not exist."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return file.read().decode(errors="replace").splitlines()[-num_lines:]


def failure_lines(run: Run, rows: Sequence[ElementStatus], num_lines: int = 6) -> list[str]:
    """Return the name, message and last log lines of every failed element, then what to do."""
    lines = []
    for row in rows:
        if row.state in ("failed", "killed"):
            lines.append(
                f"{row.state.upper()} {row.element}: {row.message or 'its job ended without an error message'}"
            )
            log = _log_with_exception(run.root / row.log)
            if row.log and log.is_file():
                lines += [*(f"    {line}" for line in log_tail(log, num_lines)), f"  full log: {log}"]
    if lines:
        lines.append("fix the causes and launch again: the same command resumes the run")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line of `cpd status`; return the exit code."""
    parser = parser_with_examples(
        "jobs.status",
        __doc__ or "",
        [
            "cpd status runs/demo",
            "cpd status runs/demo --watch",
            "cpd status runs/demo --json | jq '.[] | select(.state == \"failed\")'",
        ],
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the run's directory")
    parser.add_argument(
        "--watch",
        action="store_true",
        help="redraw every second (on Slurm every ten) until the run is finished (exit code 0), no job is active "
        "(1), or Ctrl-C (130)",
    )
    parser.add_argument("--json", action="store_true", help="print the rows as a JSON list of objects")
    arguments = parser.parse_args(argv)
    try:
        run = Run(arguments.run_dir)
        os.environ[CLUSTERS_VARIABLE] = run.launched_with(Line, "", "clusters")
        rows = run_status(run)
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return EXIT_USAGE
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    elif arguments.watch:
        return watch(run)
    else:
        console = console_for_table()
        table = status_table(run, rows, console.width, MAX_ROWS if console.is_terminal else None)
        if console.width == UNLIMITED:
            print("\n".join(plain_lines(table)))
        else:
            console.print(table)
        if console.is_terminal and len(rows) > MAX_ROWS:
            console.print(f"all rows: {parser.prog} {run.root} | less", soft_wrap=True)
        print_failures(console, run, rows)
    return 0


def console_for_table() -> Console:
    """Return a console as wide as the terminal or COLUMNS; for a file, one so wide that no row wraps."""
    has_width = sys.stdout.isatty() or "COLUMNS" in os.environ
    return plain_console(width=None if has_width else UNLIMITED)


def print_failures(console: Console, run: Run, rows: Sequence[ElementStatus]) -> None:
    """Print `failure_lines` without wrapping them to the terminal."""
    for line in failure_lines(run, rows):
        console.print(line, soft_wrap=True)


def watch(run: Run) -> int:
    """Redraw the table until every element is finished, no job is active, or the user stops it.

    Returns:
        The exit code.
    """
    console, view, idle = console_for_table(), QueueView(), 0
    rows: list[ElementStatus] = []
    with Live(console=console, auto_refresh=False) as live:
        try:
            while True:
                rows = run_status(run, view, rows)
                live.update(screen_table(console, run, rows), refresh=True)
                active = ("queued", "starting", "running")
                is_active = any(row.state in active or row.queue.startswith(UNKNOWN) for row in rows)
                idle = 0 if is_active else idle + 1
                if all(element.finished for element in run.elements()) or idle > IDLE_POLLS:
                    break
                time.sleep(SLURM_SECONDS if is_active and any(row.job for row in rows) else 1.0)
        except KeyboardInterrupt:
            return EXIT_CTRL_C
    print_failures(console, run, rows)
    if all(element.finished for element in run.elements()):
        return 0
    console.print("no job is active on this run: launch it again to resume")
    return EXIT_FAILED


if __name__ == "__main__":
    exit_quietly(main)
