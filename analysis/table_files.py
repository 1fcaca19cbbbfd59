"""Files of a table: CSV with exact numbers; LaTeX (booktabs), laid out for a two-column paper, and Markdown."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cpd.run.files import write_text

Cell = str | int | float | None


class Form(NamedTuple):
    """A layout of a LaTeX table; all lengths are in points."""

    environment: str
    """`table` is as wide as a column of a two-column paper, `table*` as the page."""
    width: float
    font: str
    em_share: float
    """Size of a character relative to one of 10 points."""
    space: float
    """On each side of a column."""
    breaks: str
    """The pattern at which a cell is broken into lines, one below the other."""


#: Before an interval, or the task that a value is of, and after it.
BRACKETS = r" (?=[\[(])|(?<=[\])]) "
#: After a hyphen, but not within the argument of a command.
HYPHENS = r"(?<=[a-z]-)(?=[a-z])(?![^{]*\})"
LAYOUTS = (
    (r"\small", 0.93, 6.0, ""),
    (r"\footnotesize", 0.86, 3.0, ""),
    (r"\footnotesize", 0.86, 3.0, BRACKETS),
    (r"\scriptsize", 0.81, 1.5, BRACKETS),
    (r"\scriptsize", 0.81, 1.5, rf"{BRACKETS}|{HYPHENS}"),
)
#: From the most readable to the most compact; a table has the first form that it fits.
FORMS = [
    Form(environment, width, *layout)
    for environment, width in (("table", 229.0), ("table*", 469.0))
    for layout in LAYOUTS
]
#: Widths of the characters of Computer Modern at 10 points; capitals are 7.5 wide.
WIDTHS = {
    character: width
    for width, characters in {
        2.8: "ijl.,:;'[]",
        3.4: "f- ",
        3.9: "rst()",
        4.5: "cez",
        5.0: "ao0123456789–/",
        5.6: "bdghknpquvxy_",
        8.4: "mw%",
    }.items()
    for character in characters
}


@dataclass(frozen=True)
class Table:
    """One table: exact values for CSV, rounded ones for LaTeX and Markdown."""

    stem: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    """Exact values, for the CSV file."""
    tex_columns: tuple[str, ...] = ()
    """Without these, the table is only written as CSV."""
    tex_rows: tuple[tuple[str, ...], ...] = ()
    caption: str = ""


def write_csv(folder: Path, table: Table, labels: dict[str, str]) -> Path:
    """Write the exact values, with `labels` in every row."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*table.columns, *labels])
    writer.writerows([*("" if cell is None else cell for cell in row), *labels.values()] for row in table.rows)
    path = folder / f"{table.stem}.csv"
    write_text(path, text.getvalue())
    return path


def write_tex(folder: Path, table: Table, notes: str) -> Path:
    """Write the LaTeX table in the first form that it fits, with `notes` below it."""
    form = next((form for form in FORMS if table_width(table, form) <= form.width), FORMS[-1])
    sides = "l" + "r" * (len(table.tex_columns) - 1)
    header, *body = (
        " & ".join(_stack(map(_tex, lines), side) for lines, side in zip(row, sides, strict=True)) + r" \\"
        for row in _lines(table, form)
    )
    text = "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            rf"\begin{{{form.environment}}}",
            rf"  \centering{form.font}\setlength{{\tabcolsep}}{{{form.space}pt}}",
            rf"  \caption{{{escape(table.caption)}}}",
            rf"  \begin{{tabular}}{{@{{}}{sides}@{{}}}}",
            r"    \toprule",
            f"    {header}",
            r"    \midrule",
            *(f"    {row}" for row in body),
            r"    \bottomrule",
            r"  \end{tabular}",
            "",
            rf"  \footnotesize {escape(notes)}",
            rf"\end{{{form.environment}}}",
            "",
        ]
    )
    path = folder / f"{table.stem}.tex"
    write_text(path, text)
    return path


def _lines(table: Table, form: Form) -> list[list[list[str]]]:
    """Return the lines of every cell, by row; the header, which is broken between words, is the first row."""
    header = [text.split(" ") if form.breaks else [text] for text in table.tex_columns]
    cells = [[re.split(form.breaks, cell) if form.breaks else [cell] for cell in row] for row in table.tex_rows]
    return [header, *cells]


def table_width(table: Table, form: Form) -> float:
    """Return an estimate of the table's width in points."""
    columns = zip(*_lines(table, form), strict=True)
    widths = [
        max(sum(WIDTHS.get(c, 7.5) for c in plain(line)) for lines in column for line in lines)
        for column in columns
    ]
    return form.em_share * sum(widths) + 2 * form.space * (len(widths) - 1)


def _stack(lines: Iterable[str], side: str) -> str:
    """Return the lines of a cell below each other; the braces keep a bracket from being taken for an option."""
    first, *others = lines
    below = "".join(rf"\\{{}}{line}" for line in others)
    return rf"\shortstack[{side}]{{{first}{below}}}" if others else first


def write_markdown(folder: Path, table: Table, notes: str) -> Path:
    """Write the Markdown table with its caption and `notes`."""
    rows = [table.tex_columns, ("---", *["---:"] * (len(table.tex_columns) - 1)), *table.tex_rows]
    lines = ["| " + " | ".join(plain(cell, "*") for cell in row) + " |" for row in rows]
    path = folder / f"{table.stem}.md"
    write_text(path, "\n".join([*lines, "", f"{table.caption} {notes}", ""]))
    return path


def plain(text: str, emphasis: str = "") -> str:
    """Convert a LaTeX cell to plain text, with `emphasis` around what is emphasised: for Markdown, an asterisk."""
    return re.sub(r"\\emph\{(.*)\}", rf"{emphasis}\1{emphasis}", text).replace("\\", "")


def _tex(text: str) -> str:
    """Convert en dashes and minus signs to LaTeX; hyphens within names stay."""
    return re.sub(r"(?<!\w)-(?=\d)", "$-$", text).replace("–", "--")


def escape(text: str) -> str:
    """Return plain text as LaTeX."""
    for character in "&%#_$":
        text = text.replace(character, "\\" + character)
    return text.replace("–", "--")
