"""Draws the figures and writes the tables of published teachers, for `analysis.build`."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

from analysis.figures import fig_teacher_comparison, fig_teacher_gain, fig_teacher_panels
from analysis.published_teachers import PublishedTeachers, find_published, load_published, markdown, score_rows
from analysis.style import paper_style, save_figure
from cpd.run.files import write_text


def build_teachers(path: Path, out: Path | None = None) -> list[Path]:
    """Draw every folder of published teachers that `path` is or holds.

    Args:
        path: a folder of published teachers, or of such folders.
        out: folder to write to, by default `figures` in `path`.

    Returns:
        The files written: two figures and a Markdown table per folder, a figure for every group of folders with
        the same stream, and one long-form table of all scores.

    Raises:
        ValueError: if there are no published teachers, or a file of them is damaged.
    """
    folders = find_published(path)
    if not folders:
        raise ValueError(f"{path} holds no published teachers; `cpd publish` writes them")
    target = out or path / "figures"
    written: list[Path] = []
    scores: list[dict[str, Any]] = []
    groups: dict[tuple[str, ...], dict[str, PublishedTeachers]] = {}
    with paper_style():
        for folder in folders:
            published = load_published(folder)
            name = folder.resolve().name
            for kind, module in (("gain", fig_teacher_gain), ("curves", fig_teacher_panels)):
                written += save_figure(
                    module.draw(published), target / f"{name}_{kind}", module.caption(published)
                )
            written.append(target / f"{name}_scores.md")
            write_text(written[-1], markdown(published))
            scores += [{"folder": name, **row} for row in score_rows(published)]
            groups.setdefault(published.stream, {})[name] = published
        for group in groups.values():
            if len(group) > 1:
                module = fig_teacher_comparison
                written += save_figure(module.draw(group), target / _comparison(group), module.caption(group))
    text = io.StringIO()
    table = csv.DictWriter(text, list(scores[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(scores)
    written.append(target / "scores.csv")
    write_text(written[-1], text.getvalue())
    return written


def _comparison(group: Mapping[str, PublishedTeachers]) -> str:
    """Return the name of the figure that compares folders, with the words that all their names begin with."""
    words = zip(*(name.split("-") for name in group), strict=False)
    shared = takewhile(lambda position: len(set(position)) == 1, words)
    return "-".join([*(word for word, *_ in shared), "comparison"])
