"""The page of a run: complete in one file, well formed, and honest about what failed."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from analysis.build import build
from cpd.cluster.ledger import LedgerEntry, append
from cpd.envs.metaworld.tasks import STREAMS
from cpd.evaluation.publish import publish_results
from cpd.run.directory import Run
from cpd.run.files import write_json
from tests.synthetic_run import write_run

TASKS = STREAMS["demo"]
RATES = np.array([[0.1, 0.0, 0.0], [0.9, 0.1, 0.0], [0.7, 0.8, 0.2], [0.5, 0.9, 0.96]])
MESSAGE = "OSError: <script>alert('&')</script> \x1b[31m"
EMPTY = {"meta", "link", "img", "br", "hr"}


class Page(HTMLParser):
    """The elements and texts of a page; every element must be closed in its turn."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(path.read_text())
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run whose teacher of the second task was rejected, and whose evaluation failed before the last row."""
    rates = RATES.copy()
    rates[3] = np.nan
    run = write_run(tmp_path / "run", stream=TASKS, students={1: rates}, teachers={TASKS[0]: 1.0, TASKS[2]: 0.9})
    evaluation = run.evaluations()[0]
    evaluation.complete.unlink()
    status = json.loads(evaluation.status.read_text())
    write_json(evaluation.status, {**status, "state": "failed", "message": MESSAGE})
    run.logs.mkdir()
    (run.logs / "7_log.out").write_text("log")
    append(run, [LedgerEntry(evaluation.name, "evaluation", "7", "logs/7_log.out", 0.0)])
    (run.root / "videos").mkdir()
    (run.root / "videos" / "moe.mp4").write_bytes(b"film")
    return run


def test_the_page_is_one_file_that_tells_what_failed_and_draws_the_same_again(run: Run, tmp_path: Path) -> None:
    path = build([run.root])[-1]
    page = Page(path)
    assert path == run.root / "report.html"
    for failure in (
        "students/moe/seed-1/evaluation failed",
        "<script>alert",
        f"{TASKS[1]} (seed 1) missed its gate",
    ):
        assert failure in page.words
    assert not page.all("script") and "\x1b" not in path.read_text()
    sources = [attributes["src"] or "" for tag in ("img", "video") for attributes in page.all(tag)]
    assert len(sources) >= 4 and all(source.startswith("data:") for source in sources)
    assert all(image["alt"] for image in page.all("img"))
    assert all("scope" in attributes for attributes in page.all("th"))
    links = [attributes["href"] or "" for attributes in page.all("a")]
    identifiers = {attributes.get("id") for _, attributes in page.elements}
    assert {"logs/7_log.out", "videos/moe.mp4"} <= set(links)
    for link in links:
        assert (link[1:] in identifiers) if link.startswith("#") else (run.root / link).is_file()
    for text in ("3.3.0", "stream.tasks", "distill.lr", "numpy"):
        assert text in page.words

    first = path.read_bytes()
    assert build([run.root])[-1].read_bytes() == first
    published = publish_results(run.results, tmp_path / "published")
    copy = build([published])[-1]
    assert copy == published / "report.html" and "students/moe/seed-1/evaluation failed" not in Page(copy).words
    assert publish_results(run.results, published) == published, "its page does not stand in the way"
