"""One table of every element of a run: state, progress, rate, time left, success, and where its log is."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cpd.lease import current_holder
from cpd.ledger import ledger
from cpd.record import StatusRecord, clock, number, read_status
from cpd.runs import Element, Run
from jobs.common import EXIT_USAGE, parser_with_examples

#: Columns from which a terminal shows everything.
WIDE = 112
STYLES = {
    "waiting": "dim",
    "queued": "cyan",
    "running": "yellow",
    "done": "green",
    "rejected": "magenta",
    "stopped": "cyan",
    "killed": "red",
    "failed": "bold red",
}


@dataclass(frozen=True)
class ElementStatus:
    """One row."""

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


def element_status(element: Element, log: str) -> ElementStatus:
    """What the element's markers, lease and status.json say, in this order of trust."""
    record = read_status(element.status)
    holder, attempts = current_holder(element.path / "attempts")
    state = _state(element, record, holder is not None)
    return ElementStatus(
        element=element.name,
        role=element.role,
        state=state,
        phase=record.phase,
        done=record.done,
        total=record.total,
        unit=record.unit,
        rate=record.rate if state == "running" else 0.0,
        eta_seconds=record.eta_seconds if state == "running" else None,
        success=record.success,
        loss=record.loss,
        attempts=attempts,
        seconds=sum(record.seconds.values()),
        message=record.message,
        log=log,
    )


def _state(element: Element, record: StatusRecord, is_held: bool) -> str:
    if element.rejected.exists():
        return "rejected"
    if element.complete.exists():
        return "done"
    if is_held:
        return "running"
    # Somebody was at work and neither finished nor said good-bye.
    return "killed" if record.state == "running" else record.state


def run_status(run: Run) -> list[ElementStatus]:
    """All rows, in the run's order."""
    entries = ledger(run)
    return [
        element_status(element, entries[element.name][-1].log if element.name in entries else "")
        for element in run.elements()
    ]


def status_table(run: Run, rows: Sequence[ElementStatus], width: int = 120) -> Table:
    """The rows for a terminal of `width` columns; a narrow one is spared the rate, the bar and the log."""
    finished = sum(row.state in ("done", "rejected") for row in rows)
    is_wide = width >= WIDE
    table = Table(
        title=f"{run.root}: {finished} of {len(rows)} elements finished",
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        header_style="bold",
    )
    table.add_column("element", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("progress", no_wrap=True)
    for name in (*(["rate"] if is_wide else []), "left", "success", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    if is_wide:
        table.add_column("log, or what happened", overflow="fold", style="dim")
    for row in rows:
        is_active = row.state in ("running", "stopped", "killed", "failed")
        state = row.phase if row.state == "running" and row.phase else row.state
        cells = [
            row.element,
            Text(state, style=STYLES[row.state]),
            _progress(row, bar_width=12 if is_wide else 0) if is_active else "",
            *([f"{number(row.rate)}/s" if row.rate else ""] if is_wide else []),
            clock(row.eta_seconds) if row.eta_seconds is not None else "",
            f"{row.success:.2f}" if row.success is not None else "",
            clock(row.seconds) if row.seconds else "",
            *([f"{row.log}  {row.message}".strip()] if is_wide else []),
        ]
        table.add_row(*cells)
    return table


def _progress(row: ElementStatus, bar_width: int) -> Text:
    share = min(row.done / row.total, 1.0) if row.total else 0.0
    full = round(bar_width * share)
    return Text.assemble(
        ("━" * full, "green"), ("━" * (bar_width - full), "dim"), f"{' ' if bar_width else ''}{100 * share:3.0f} %"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `python -m jobs.status`; returns the exit code."""
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
    parser.add_argument("--watch", action="store_true", help="redraw every second until all is finished")
    parser.add_argument("--json", action="store_true", help="for programs: a list of objects")
    arguments = parser.parse_args(argv)
    try:
        run = Run(arguments.run_dir)
        rows = run_status(run)
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return EXIT_USAGE
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    elif arguments.watch:
        watch(run)
    else:
        console = Console()
        console.print(status_table(run, rows, console.width))
    return 0


def watch(run: Run) -> None:
    """Redraw the table until every element is finished or the user has seen enough."""
    console = Console()
    with Live(console=console, auto_refresh=False) as live:
        try:
            while True:
                live.update(status_table(run, run_status(run), console.width), refresh=True)
                if all(element.finished for element in run.elements()):
                    return
                time.sleep(1.0)
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    sys.exit(main())
