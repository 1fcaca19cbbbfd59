"""What README, docs and CONTRIBUTING say about files, modules, recipes and settings is true."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot

from cpd.config import Config
from cpd.config.load import setting_lines
from jobs.__main__ import verbs
from jobs.launch_options import RECIPES, load_recipe

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "docs" / "results.ipynb"
HISTORY = ROOT / "CHANGELOG.md"  # names what is gone, too
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("analysis/results/**/README.md")])
PRESENT = [page for page in PAGES if page != HISTORY]
PACKAGES = ("jobs", "cpd", "slurm", "analysis", "tests")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
every_present_page = pytest.mark.parametrize("page", PRESENT, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code blocks of a page in one language; "" for those without a language."""
    text = page.read_text(encoding="utf-8")
    every = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for its, block in every if its == language]


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """All command lines, with continued lines joined and comments cut off; also those in inline code."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines() + codes(page)
    return [re.sub(r"(^|\s)#.*", "", line) for line in lines]


def codes(page: Path) -> list[str]:
    """The contents of inline code, which may be wrapped."""
    return [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", prose(page))]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def source_folders() -> set[str]:
    """The top-level folders, and those below them that hold source or recipes; none of the tests'."""
    top = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    files = (path for package in top - {"tests"} for path in (ROOT / package).rglob("*.*"))
    below = {str(path.parent.relative_to(ROOT)) for path in files if path.suffix in (".py", ".toml")}
    results = "analysis/results"
    return {*top, *(folder for folder in below if not folder.startswith(results)), results, "docs"}


def tree() -> dict[str, list[str]]:
    """The folders of the README's annotated tree, each with the Python files that its line names."""
    (drawn,) = [block for block in blocks(ROOT / "README.md", "") if "\ncpd/ " in block]
    found: dict[str, list[str]] = {}
    above: list[tuple[int, str]] = []
    for line in drawn.splitlines():
        indent, name, note = re.fullmatch(r"( *)(\w+)/ +(.*)", line).groups()  # type: ignore[union-attr]
        above = [(depth, folder) for depth, folder in above if depth < len(indent)] + [(len(indent), name)]
        found["/".join(folder for _, folder in above)] = re.findall(r"\w+\.py", note)
    return found


def test_the_tree_names_the_folders_that_exist_and_files_in_them() -> None:
    drawn = tree()
    assert sorted(drawn) == sorted(source_folders())
    named = [ROOT / folder / file for folder, files in drawn.items() for file in files]
    assert [str(path) for path in named if not path.exists()] == []


@every_page
def test_links_to_headings_lead_to_one(page: Path) -> None:
    for path, anchor in re.findall(r"\]\(([\w./-]*)#([^)]+)\)", prose(page)):
        assert anchor in anchors((page.parent / path).resolve() if path else page), anchor


@every_present_page
def test_named_paths_exist(page: Path) -> None:
    for code in codes(page):
        if re.fullmatch(rf"({'|'.join(PACKAGES)}|docs)/[\w./-]*", code):
            assert (ROOT / code).exists(), code
        if re.fullmatch(r"\.\./[\w./-]+", code):
            assert (page.parent / code).exists(), code


@every_present_page
def test_named_modules_and_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in commands(page):
        for module in re.findall(r"python -m ([\w.]+)", command):
            assert module.split(".")[0] not in PACKAGES or importlib.util.find_spec(module), module
        for verb in re.findall(r"\bcpd ([a-z]\w*)", command):
            assert verb in verbs(), verb
        for target in re.findall(r"^\s*make ([a-z][\w-]*)", command):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@every_present_page
def test_named_recipes_and_profiles_exist(page: Path) -> None:
    for command in commands(page):
        for recipe in re.findall(r"(?:jobs\.|\bcpd )launch ([\w./-]+)", command):
            path = ROOT / recipe if "/" in recipe else RECIPES / f"{recipe.removesuffix('.toml')}.toml"
            assert path.exists() or recipe.startswith(("--", "my-")), recipe
        for profile in re.findall(r"--profile ([\w.-]+)", command):
            assert profile == "mysite.toml" or (ROOT / "slurm" / "profiles" / f"{profile}.toml").exists(), profile


@every_present_page
def test_named_settings_exist(page: Path) -> None:
    settings = {line.split()[0].removeprefix("--") for line in setting_lines(Config)}
    sections = {setting.rpartition(".")[0] for setting in settings} - {""}
    for code in codes(page):
        name = re.fullmatch(r"\[?([a-z_]+(\.[a-z_]+)+)\]?( = .*)?", code)
        if name and name[1].split(".")[0] in sections and not name[1].endswith((".py", ".csv", ".json", ".toml")):
            assert name[1] in settings | sections, code
    for command in commands(page):
        for option in re.findall(r"--([\w-]+\.[\w.-]+)", command):
            assert option.replace("-", "_") in settings, option


@every_present_page
def test_examples_in_toml_load(page: Path, tmp_path: Path) -> None:
    for number, block in enumerate(blocks(page, "toml")):
        tomllib.loads(block)
        if "extends" in block:
            (tmp_path / f"{number}.toml").write_text(block, encoding="utf-8")
            load_recipe(str(tmp_path / f"{number}.toml"), [])


@every_present_page
def test_examples_in_python_import_what_exists(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")
        for module, names in re.findall(r"^from ((?:cpd|jobs|analysis)[\w.]*) import (.*)$", block, re.MULTILINE):
            for name in names.split(", "):
                assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_the_notebook_draws_three_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells run in order, in the folder that it lies in, and its outputs are not committed."""
    pyplot.switch_backend("Agg")
    monkeypatch.chdir(ROOT / "docs")
    monkeypatch.setattr("sys.path", [*sys.path])
    cells = [
        cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"
    ]
    names: dict[str, Any] = {}
    for cell in cells:
        assert cell["outputs"] == [] and cell["execution_count"] is None
        exec("".join(cell["source"]), names)
    figures = [pyplot.figure(number) for number in pyplot.get_fignums()]
    assert len(figures) == 3
    for figure in figures:
        figure.canvas.draw()
        assert any(axes.has_data() for axes in figure.axes)
    pyplot.close("all")
    assert "results.ipynb" in (ROOT / "README.md").read_text(encoding="utf-8")
