"""The style of all figures, and the function that writes them as PDF and PNG: equal data give equal bytes."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure

from cpd.run.files import atomic_write, write_text

STYLE = Path(__file__).resolve().parent / "paper.mplstyle"

#: Widths of one column of text, and of both.
COLUMN_INCHES = 3.3
PAGE_INCHES = 6.9
#: Width of the margin that holds the conditions.
STAMP_INCHES = 0.11
DPI = 300

# Readers with any colour vision can tell these apart (Okabe and Ito 2008).
TEACHER_COLOUR = "#8c8c8c"
METHOD_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = ("-", (0, (4, 1.5)), (0, (1.2, 1.2)))
ACCENT = "#D55E00"
SECOND_ACCENT = "#009E73"
GUIDE = "#9a9a9a"
STAMP_COLOUR = "#555555"


def method_colour(index: int) -> str:
    """Return the colour of the method at `index`; colours repeat after seven methods."""
    return METHOD_COLOURS[index % len(METHOD_COLOURS)]


def method_line(index: int) -> dict[str, Any]:
    """Return the colour and dashes of the line of the method at `index`; they repeat after 21 methods."""
    dashes = LINE_STYLES[index // len(METHOD_COLOURS) % len(LINE_STYLES)]
    return {"color": method_colour(index), "linestyle": dashes}


@contextlib.contextmanager
def paper_style() -> Iterator[None]:
    """Use matplotlib's defaults and the style sheet of this package in a context, not the user's settings."""
    with matplotlib.style.context(["default", STYLE]):
        yield


def stamp(figure: Figure, text: str) -> None:
    """Write the conditions of the results along the right edge, and make room for them.

    Args:
        figure: a figure that was created inside `paper_style`.
        text: the conditions, from `analysis.captions.short_conditions`.
    """
    width = STAMP_INCHES / figure.get_figwidth()
    engine = figure.get_layout_engine()
    assert engine is not None, "figures are laid out by paper_style()"
    engine.set(rect=(0, 0, 1 - width, 1))  # type: ignore[call-arg]
    label = figure.text(
        1 - 0.1 * width, 0.01, text, rotation=90, size=5, color=STAMP_COLOUR, ha="right", va="bottom"
    )
    label.set_in_layout(False)
    length = label.get_window_extent().height / figure.dpi
    figure.set_figheight(max(figure.get_figheight(), 1.03 * length))


def save_figure(figure: Figure, stem: Path, caption: str) -> list[Path]:
    """Write `stem`.pdf, `stem`.png and the caption as `stem`.txt, without dates; return the three paths."""
    engine = figure.get_layout_engine()
    if engine is not None:  # the layout is computed once, so that both formats agree
        engine.execute(figure)
        figure.set_layout_engine("none")
    written = []
    for suffix, metadata in (
        (".pdf", {"CreationDate": None, "Title": stem.name, "Subject": caption}),
        (".png", {"Software": None, "Title": stem.name, "Description": caption}),
    ):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix[1:], dpi=DPI, metadata=metadata)
        path = stem.with_name(stem.name + suffix)
        with atomic_write(path) as temporary:
            temporary.write_bytes(buffer.getvalue())
        written.append(path)
    path = stem.with_name(stem.name + ".txt")
    write_text(path, caption + "\n")
    return [*written, path]
