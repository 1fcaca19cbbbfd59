"""The table of a run's elements: its rows, and how they are fitted to a terminal."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cpd.cluster.queue import UNKNOWN, compact
from cpd.run.directory import Run
from cpd.run.progress import clock, number

#: Least width of a terminal, in columns, that shows all columns of the table.
WIDE = 120
#: Width of all columns but the names of elements, with the narrowest column for logs.
BESIDE_NAMES = 75
BAR_WIDTH = 8
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
    user: str = ""
    """Slurm only: who submitted the job, if another user did."""


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
        caption=Text("\n".join([*([f"not shown: {counts}"] if counts else []), *queue_lines(rows, is_wide)])),
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


def plain_lines(table: Table) -> list[str]:
    """Return the lines of a table without styles and at any width; rich takes seconds for a thousand rows."""
    columns = []
    for column in table.columns:
        cells = [str(cell) for cell in (column.header, *column.cells)]
        width = max(map(len, cells))
        columns.append([cell.rjust(width) if column.justify == "right" else cell.ljust(width) for cell in cells])
    lines = ("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))
    return [str(table.title), *lines, *str(table.caption or "").splitlines()]


def queue_lines(rows: Sequence[ElementStatus], is_wide: bool) -> list[str]:
    """Lines on what the queue says: reasons, where the table has no room for them, and what is to be done."""
    waiting = [row for row in rows if row.queue and row.state in ("queued", "killed")]
    reasons = Counter(
        row.queue for row in waiting if row.state == "queued" and (not is_wide or UNKNOWN in row.queue)
    )
    held = ",".join(compact(row.job for row in waiting if "(JobHeld" in row.queue))
    users = ", ".join(sorted({row.user for row in waiting if row.user}))
    return [
        *(f"{count} queued: {reason}" for reason, count in reasons.items()),
        *([f"held: scontrol release {held}"] if held else []),
        *([f"submitted by {users}, who alone can cancel or release it"] if users else []),
    ]


def _remark(row: ElementStatus) -> str:
    """Return an element's job and node, number of attempts, log, and last message."""
    job = f"job {row.job} {row.node or row.queue}" if row.job else ""
    message = "" if row.state == "done" else " ".join(row.message.split())
    attempt = f"attempt {row.attempts}" if row.attempts > 1 else ""
    return "  ".join(filter(None, (job, attempt, row.log, message)))


def _progress(row: ElementStatus, bar_width: int) -> Text:
    share = min(row.done / row.total, 1.0) if row.total else 0.0
    full = round(bar_width * share)
    return Text.assemble(
        ("━" * full, "green"), ("━" * (bar_width - full), "dim"), f"{' ' if bar_width else ''}{100 * share:3.0f} %"
    )
