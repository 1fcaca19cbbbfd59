"""What is committed: a light tree, no picture that nobody sees, no dead link."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: Teachers take 27 MB, students 9 MB.
MAX_BYTES = 55_000_000


def tracked() -> list[Path]:
    try:
        listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listing.stdout.split("\0") if name]
    return [file for file in files if file.exists()]


def links(page: Path) -> set[Path]:
    """The files that a Markdown page links to or shows."""
    targets = re.findall(r"\]\(([^)\s#]+)[^)]*\)", page.read_text())
    return {(page.parent / target).resolve() for target in targets if "://" not in target}


def pages() -> list[Path]:
    return [file for file in tracked() if file.suffix == ".md"]


def test_the_tracked_tree_is_light() -> None:
    assert sum(file.stat().st_size for file in tracked()) <= MAX_BYTES


def test_every_link_of_a_page_leads_to_a_file() -> None:
    assert not [(page.relative_to(ROOT), link) for page in pages() for link in links(page) if not link.exists()]


def test_of_published_figures_exactly_those_that_a_page_shows_are_committed() -> None:
    shown = {link for page in pages() for link in links(page)}
    committed = {file for file in tracked() if "figures" in file.relative_to(ROOT).parts[2:]}
    committed = {file for file in committed if (ROOT / "analysis" / "results") in file.parents}
    assert committed
    assert not committed - shown
    assert not {link for link in shown if link.suffix == ".png"} - set(tracked())


def test_text_files_are_opened_with_their_encoding() -> None:
    """The locale's own encoding may be Latin-1: text is UTF-8 wherever a program reads or writes it."""
    wrong = []
    for path in [path for top in ("cpd", "jobs", "analysis", "slurm") for path in (ROOT / top).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or any(word.arg == "encoding" for word in node.keywords):
                continue
            function = ast.unparse(node.func)
            name = "" if function == "os.open" else function.rpartition(".")[2] if "." in function else ""
            modes = [word.value for word in node.args if isinstance(word, ast.Constant)] or ["r"]
            if name in ("read_text", "write_text") or (name == "open" and "b" not in str(modes[0])):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong
