"""Figures and tables of published teachers; what `python -m analysis.build` does with a folder of them."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from analysis.figures import fig_teacher_gain, fig_teacher_panels
from analysis.style import paper_style, save
from analysis.teachers import find_published, load_published, markdown, score_rows
from cpd.files import write_text


def build_teachers(path: Path, out: Path | None = None) -> list[Path]:
    """Draw every folder of published teachers that `path` is or holds.

    Args:
        path: a folder of published teachers, or of such folders.
        out: where to write to; `figures` in `path` unless told otherwise.

    Returns:
        The files written: two figures and a Markdown table per folder, and one long-form table of all scores.

    Raises:
        ValueError: if there are no published teachers, or a file of them is damaged.
    """
    folders = find_published(path)
    if not folders:
        raise ValueError(f"{path} holds no published teachers; `python -m jobs.publish` writes them")
    target = out or path / "figures"
    written: list[Path] = []
    scores: list[dict[str, Any]] = []
    with paper_style():
        for folder in folders:
            published = load_published(folder)
            name = folder.resolve().name
            for part, module in (("gain", fig_teacher_gain), ("curves", fig_teacher_panels)):
                written += save(module.draw(published), target / f"{name}_{part}", module.caption(published))
            written.append(target / f"{name}_scores.md")
            write_text(written[-1], markdown(published))
            scores += [{"folder": name, **row} for row in score_rows(published)]
    text = io.StringIO()
    table = csv.DictWriter(text, list(scores[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(scores)
    written.append(target / "scores.csv")
    write_text(written[-1], text.getvalue())
    return written
