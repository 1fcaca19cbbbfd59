"""Writes results as one HTML page, which needs no other file and no network: equal results give equal bytes."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from analysis.captions import conditions
from analysis.dataset import Dataset
from analysis.paper_tables import method_table, start_table, task_table
from analysis.table_files import Table, plain
from analysis.terminal import belief_texts, time_rows, usage_lines
from cpd.cluster.ledger import ledger
from cpd.reading import read_for_display
from cpd.run.directory import Run
from cpd.run.files import write_text
from cpd.run.progress import clock, read_status
from cpd.terminal import printable

TEMPLATE: Final = "report.html.jinja"
#: Longer videos are linked.
MAX_VIDEO_BYTES: Final = 4_000_000
#: Videos in the page, together.
MAX_VIDEOS: Final = 8


class _Job(NamedTuple):
    """An element of the run."""

    name: str
    state: str
    time: str
    message: str
    log: str
    """Relative to the page."""


def write_page(
    path: Path, data: Dataset, captions: Mapping[Path, str], sources: Sequence[Path], run: Run | None
) -> Path:
    """Write the page and return its path.

    Args:
        path: the page.
        data: the results.
        captions: of the figures, by their PNG files.
        sources: the folders of results.
        run: the run that the results are of; None for published results.
    """
    jobs = list(_jobs(run)) if run else []
    # Rejected teachers and unfinished elements are among what the results lack.
    problems = [f"{job.name} {job.state}: {job.message}" for job in jobs if job.state in ("failed", "stopped")]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names, messages and settings are not ours
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    tasks = task_table(data)
    text = environment.get_template(TEMPLATE).render(
        name=data.name,
        methods=data.method_names,
        conditions=conditions(data),
        problems=[*problems, *data.missing],
        headline=_rows(method_table(data)),
        further=[_rows(table) for table in (start_table(data),) if table],
        notes=[(method, *text) for method in data.method_names for text in belief_texts(data, method)],
        figures=[_figure(path, caption) for path, caption in captions.items()],
        tasks=_rows(tasks),
        videos=list(_videos(path.parent)),
        times=time_rows(data.timings),
        usage=usage_lines(data.timings),
        jobs=jobs,
        sources=[_source(folder) for folder in sources],
    )
    write_text(path, text)
    return path


def _rows(table: Table) -> dict[str, Any]:
    """Return the readable cells of a table."""
    return {
        "caption": table.caption,
        "columns": table.tex_columns,
        "rows": [[plain(cell).replace("--", "–") for cell in row] for row in table.tex_rows],
    }


def _figure(path: Path, caption: str) -> dict[str, str]:
    title = caption.partition(". ")[0].partition(": ")[0]
    return {"name": path.stem, "caption": caption, "alt": title, "source": _inline(path, "image/png")}


def _inline(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _videos(folder: Path) -> Iterator[dict[str, str]]:
    """Yield the videos of `cpd video` beside the page."""
    for number, path in enumerate(sorted((folder / "videos").glob("*.mp4"))):
        is_short = number < MAX_VIDEOS and path.stat().st_size <= MAX_VIDEO_BYTES
        link = f"videos/{path.name}"
        yield {"name": path.stem, "link": link, "source": _inline(path, "video/mp4") if is_short else ""}


def _jobs(run: Run) -> Iterator[_Job]:
    """Yield all elements but the report, which is still running while it writes the page."""
    submitted = ledger(run)
    for element in run.elements():
        if element.role == "report":
            continue
        record = read_status(element.status)
        state = ("rejected" if element.is_rejected else "done") if element.finished else record.state
        entries = submitted.get(element.name, [])
        logs = [entry.log for entry in entries if entry.log and (run.root / entry.log).exists()]
        seconds = sum(record.seconds.values())
        message = "" if state == "done" else printable(record.message)
        yield _Job(element.name, state, clock(seconds) if seconds else "", message, logs[-1] if logs else "")


def _source(folder: Path) -> dict[str, Any]:
    """Return the settings of results and the versions that made them."""
    config = read_for_display(folder / "config.json", dict[str, Any], {})
    provenance = read_for_display(folder / "metrics.json", dict[str, Any], {}).get("provenance")
    provenance = provenance if isinstance(provenance, dict) else {}
    versions = {key: value for key, value in provenance.items() if isinstance(value, str)}
    packages = provenance.get("packages")
    return {
        "name": str(config.get("name", folder.name)),
        "settings": list(_flat(config)),
        "versions": [*versions.items(), *(packages.items() if isinstance(packages, Mapping) else ())],
    }


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Yield settings by their dotted names, those without a section first."""
    for key, value in sorted(table.items(), key=lambda item: isinstance(item[1], dict)):
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value, ensure_ascii=False)
