"""LaTeX tables fit a column, or the page, of a two-column paper."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from analysis.table_files import FORMS, Table, table_width, write_tex

TASKS = ("handle-press-side", "drawer-close", "peg-unplug-side")
METHODS = ("no-replay", "experts-on-demand", "packnet-with-known-tasks")
NOTES = "Teachers: reinforcement learning from scratch (recipe rl), seeds 1. Horizon 500 steps; Meta-World 3.1.1."
TABLES = {
    "table": Table(
        "table_tasks",
        (),
        (),
        ("Task", "Teacher", "Own stage", "Final", "Forgetting", "Recovery"),
        (
            (r"\emph{no-replay}", "", "", "", "", ""),
            *((task, "96 [87, 99] rejected", "80 [67, 89]", "93 (90 to 100)", "-10", "100") for task in TASKS),
        ),
        "Success in per cent by task on cw10_rl & more: brackets are Wilson 95 % intervals.",
    ),
    "table*": Table(
        "table_methods",
        (),
        (),
        ("Method", "Seeds", "Memory", "AP", "worst task", "Recovery", "worst task", "Forgetting", "worst task"),
        tuple((method, "5", "2,000", *("93.1 [90.2, 100.0]", "52 (handle-press-side)") * 3) for method in METHODS),
        "Average performance (AP), recovery and forgetting – in per cent.",
    ),
}


@pytest.mark.parametrize("environment", TABLES)
def test_a_table_takes_the_narrowest_form_that_it_fits(tmp_path: Path, environment: str) -> None:
    text = write_tex(tmp_path, TABLES[environment], NOTES).read_text()
    assert rf"\begin{{{environment}}}" in text
    assert table_width(TABLES[environment], FORMS[-1]) <= FORMS[-1].width
    narrow = Table("t", (), (), ("Task", "AP"), (("reach", "96 [87, 99]"),))
    assert r"\centering\small" in write_tex(tmp_path, narrow, NOTES).read_text()


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="there is no TeX")
def test_the_estimates_oftable_widths_hold_in_a_real_paper(tmp_path: Path) -> None:
    files = [write_tex(tmp_path, table, NOTES).name for table in TABLES.values()]
    (tmp_path / "paper.tex").write_text(
        "\\documentclass[twocolumn]{article}\n\\usepackage{booktabs}\n\\begin{document}\n"
        + "".join(f"\\input{{{name}}}\n" for name in files)
        + "\\end{document}\n"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    log = (tmp_path / "paper.log").read_text(errors="replace")
    assert done.returncode == 0, log[-3000:]
    assert not re.findall(r"Overfull \\hbox.*", log)
