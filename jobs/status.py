"""Show a run's elements in a table: state, progress, rate, time left, last loss and success, and log."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cpd.cluster.ledger import LedgerEntry, ledger
from cpd.cluster.queue import REMEDIES, JobState, QueueView, state_in_log
from cpd.run.claim import expect
from cpd.run.command import EXIT_CTRL_C, EXIT_FAILED, EXIT_USAGE, exit_quietly
from cpd.run.directory import Element, Run
from cpd.run.lease import Holder, current_holder
from cpd.run.progress import StatusRecord, clock, number, read_status
from cpd.terminal import plain_console, printable
from jobs.common import parser_with_examples

#: Least width of a terminal, in columns, that shows all columns of the table.
WIDE = 120
#: Width of all columns but the names of elements, with the narrowest column for logs.
BESIDE_NAMES = 75
#: Width where there is no terminal: rows never wrap.
UNLIMITED = 10_000
BAR_WIDTH = 8
#: How many of an element's last jobs are searched for a log: with the order `overlap`, several may be pending.
SEARCHED_JOBS = 60
#: Bytes read from the end of a log.
TAIL_BYTES = 16_384
#: `--watch` ends after this many polls without an active job: a new job may not be visible at once.
IDLE_POLLS = 5
#: The style of every state; if rows do not fit on the screen, states that come first here are shown first.
STYLES = {
    "running": "yellow",
    "starting": "yellow",
    "failed": "bold red",
    "killed": "red",
    "stopped": "cyan",
    "rejected": "magenta",
    "queued": "cyan",
    "waiting": "dim",
    "done": "green",
}


@dataclass(frozen=True)
class ElementStatus:
    """One row of the table."""

    element: str
    role: str
    state: str
    phase: str
    done: int
    total: int
    unit: str
    rate: float
    eta_seconds: float | None
    success: float | None
    loss: float | None
    attempts: int
    seconds: float
    message: str
    log: str
    job: str = ""
    """Slurm only: the last job's number, `12` or `12_3`."""
    queue: str = ""
    """Slurm only: the job's state in the queue, e.g. `PENDING (Dependency)`."""
    node: str = ""
    """Slurm only: the node that runs the job."""


def element_status(run: Run, element: Element, log: str, job: JobState | None = None) -> ElementStatus:
    """Read an element's state from markers, lease, Slurm job and status.json, the most reliable source first."""
    record = read_status(element.status)
    holder, attempts = current_holder(element.path / "attempts")
    state = _state(element, record, holder, job)
    if state == "queued" and not job and current_holder(run.root / "launcher" / "attempts")[0] is None:
        state = "waiting"  # the local launcher that queued it has ended
    message = printable(record.message)
    if job and state == "killed":
        log_state = state_in_log(log_tail(run.root / log) if log else ())
        message = f"{REMEDIES.get(log_state or job.state, '')}{f' (was on {job.node})' if job.node else ''}"
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
        queue=f"{job.state}{f' ({job.reason})' if job.reason else ''}" if job else "",
        node=job.node if job else "",
    )


def _state(element: Element, record: StatusRecord, holder: Holder | None, job: JobState | None) -> str:
    if element.rejected.exists():
        return "rejected"
    if element.complete.exists():
        return "done"
    started = ("RUNNING", "COMPLETING")
    if job and job.state not in started and holder and holder.job == job.number != "":
        holder = None  # Slurm has ended the job, although its last heartbeat is recent
    if holder:
        return "running"
    if job and job.is_active:
        return "queued" if job.state not in started else "starting" if job.state == "RUNNING" else record.state
    # A process was running, or was to run, and ended without recording a state.
    return "killed" if record.state == "running" or (job and record.state == "queued") else record.state


def run_status(run: Run, view: QueueView | None = None) -> list[ElementStatus]:
    """Return all rows, in the run's order; pass the same `view` again to query Slurm less often."""
    entries = ledger(run)
    elements = run.elements()
    unfinished = {e.name: entries[e.name][-1] for e in elements if e.name in entries and not e.finished}
    jobs = (view or QueueView()).states(unfinished)
    return [
        element_status(run, element, _log(run, entries.get(element.name, [])), jobs.get(element.name))
        for element in elements
    ]


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


def screen_table(console: Console, run: Run, rows: Sequence[ElementStatus]) -> Table:
    """Return the table for a live display, with as many rows as the terminal has room for."""
    max_lines = console.height - 1 if console.is_terminal else sys.maxsize
    num_rows = min(len(rows), max_lines)
    while True:
        table = status_table(run, rows, console.width, num_rows)
        # A row may take several lines.
        excess = len(console.render_lines(table)) - max_lines
        if excess <= 0 or num_rows <= 1:
            return table
        num_rows = max(num_rows - excess, 1)


def most_important(rows: Sequence[ElementStatus], num_rows: int) -> list[ElementStatus]:
    """Return the `num_rows` most important rows in their order.

    States rank as in `STYLES`. Among elements that are done, the last ones rank first, else the first ones.
    """
    ranks = list(STYLES)

    def rank(place: int) -> tuple[int, int]:
        state = rows[place].state
        return ranks.index(state), -place if state == "done" else place

    return [rows[place] for place in sorted(sorted(range(len(rows)), key=rank)[:num_rows])]


def status_table(run: Run, rows: Sequence[ElementStatus], width: int = 120, num_rows: int | None = None) -> Table:
    """Return the table for a terminal of `width` columns; a narrow one omits rate, bar, loss and log.

    Args:
        run: the run.
        rows: all elements of the run.
        width: in columns.
        num_rows: how many rows are shown, the most important ones; the others are counted. Default: all.
    """
    finished = sum(row.state in ("done", "rejected") for row in rows)
    shown = list(rows) if num_rows is None else most_important(rows, num_rows)
    hidden = Counter(row.state for row in rows) - Counter(row.state for row in shown)
    counts = ", ".join(f"{count} {state}" for state, count in hidden.items())
    is_wide = width >= max(WIDE, BESIDE_NAMES + max((len(row.element) for row in rows), default=0))
    table = Table(
        title=f"{run.root}: {finished} of {len(rows)} elements finished",
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        header_style="bold",
        caption=f"not shown: {counts}" if counts else None,
        caption_justify="left",
    )
    # A narrow terminal wraps the names of elements, which stay legible, and never states or progress.
    table.add_column("element", no_wrap=is_wide, overflow="fold")
    table.add_column("state", no_wrap=True)
    table.add_column("progress", no_wrap=True)
    for name in ("rate", "left", "loss", "success", "time") if is_wide else ("left", "success", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    if is_wide:
        table.add_column("log, or what happened", overflow="fold", style="dim")
    for row in shown:
        is_active = row.state in ("running", "stopped", "killed", "failed") or (row.state == "queued" and row.done)
        state = row.phase if row.state == "running" and row.phase else row.state
        cells = [
            row.element,
            Text(state, style=STYLES[row.state]),
            _progress(row, BAR_WIDTH if is_wide else 0) if is_active else "",
            *([f"{number(row.rate)}/s" if row.rate else ""] if is_wide else []),
            clock(row.eta_seconds) if row.eta_seconds is not None else "",
            *([f"{row.loss:.3g}" if row.loss is not None else ""] if is_wide else []),
            f"{row.success:.2f}" if row.success is not None else "",
            clock(row.seconds) if row.seconds else "",
            *([_remark(row)] if is_wide else []),
        ]
        table.add_row(*cells)
    return table


def _remark(row: ElementStatus) -> str:
    """Return an element's job and node, number of attempts, log, and last message."""
    job = f"job {row.job} {row.node or row.queue}" if row.job else ""
    message = "" if row.state == "done" else " ".join(row.message.split())
    attempt = f"attempt {row.attempts}" if row.attempts > 1 else ""
    return "  ".join(filter(None, (job, attempt, row.log, message)))


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


def _progress(row: ElementStatus, bar_width: int) -> Text:
    share = min(row.done / row.total, 1.0) if row.total else 0.0
    full = round(bar_width * share)
    return Text.assemble(
        ("━" * full, "green"), ("━" * (bar_width - full), "dim"), f"{' ' if bar_width else ''}{100 * share:3.0f} %"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line of `python -m jobs.status`; return the exit code."""
    parser = parser_with_examples(
        "jobs.status",
        __doc__ or "",
        [
            "python -m jobs.status runs/demo",
            "python -m jobs.status runs/demo --watch",
            "python -m jobs.status runs/demo --json | jq '.[] | select(.state == \"failed\")'",
        ],
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the run's directory")
    parser.add_argument(
        "--watch",
        action="store_true",
        help="redraw every second until the run is finished (exit code 0), no job is active (1), or Ctrl-C (130)",
    )
    parser.add_argument("--json", action="store_true", help="print the rows as a JSON list of objects")
    arguments = parser.parse_args(argv)
    try:
        run = Run(arguments.run_dir)
        expect(run.root, "run", "name a directory that `jobs.launch` made")
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
        console.print(status_table(run, rows, console.width))
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
    with Live(console=console, auto_refresh=False) as live:
        try:
            while True:
                rows = run_status(run, view)
                live.update(screen_table(console, run, rows), refresh=True)
                is_active = any(row.state in ("queued", "starting", "running") for row in rows)
                idle = 0 if is_active else idle + 1
                if all(element.finished for element in run.elements()) or idle > IDLE_POLLS:
                    break
                time.sleep(1.0)
        except KeyboardInterrupt:
            return EXIT_CTRL_C
    print_failures(console, run, rows)
    if all(element.finished for element in run.elements()):
        return 0
    console.print("no job is active on this run: launch it again to resume")
    return EXIT_FAILED


if __name__ == "__main__":
    exit_quietly(main)
