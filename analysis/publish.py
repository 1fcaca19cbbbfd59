"""Publishing results: copying their small tables to where they are kept, and keeping stand-ins apart."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from analysis.load import find_results
from cpd.files import publish as published_file
from cpd.result_tables import HELD_OUT, TEACHER, Tables, first_few, labels, read_tables
from cpd.results import GATHERED
from cpd.summary import summarize
from cpd.tables import EvaluationRow, read_rows
from cpd.teachers.published import check_place

#: Where published results of real teachers are kept, and below it those of stand-ins.
RESULTS = Path(__file__).resolve().parent / "results"
STAND_INS = RESULTS / "stand-ins"
#: Recipes of teachers that no policy gradient has touched.
STAND_IN_RECIPES = ("scripted",)
#: What else lies beside published tables.
OURS = {*GATHERED, "README.md", "figures"}
#: Folder for results on the goals that settings are chosen by.
TUNING = "tuning"


def check_stand_ins_place(teacher_recipe: str, folder: Path) -> None:
    """Raise ValueError if results with such teachers may not be kept, or drawn, in `folder`.

    Args:
        teacher_recipe: the label, several joined by slashes.
        folder: anywhere; only places below `RESULTS` are of concern.
    """
    place = folder.resolve()
    is_stand_in = any(recipe in STAND_IN_RECIPES for recipe in teacher_recipe.split("/"))
    if is_stand_in and place.is_relative_to(RESULTS) and not place.is_relative_to(STAND_INS):
        raise ValueError(
            f"results with stand-ins for teachers (recipe {teacher_recipe}) are kept apart, in {STAND_INS}, and "
            f"never beside those of RL teachers: {folder} is not there"
        )
    if teacher_recipe and not is_stand_in and place.is_relative_to(STAND_INS):
        raise ValueError(f"{STAND_INS} is for stand-ins, but these teachers are real (recipe {teacher_recipe})")


def publish(path: Path, folder: Path) -> Path:
    """Copy the results of a run (gathered first), or gathered results, to `folder`; figures are drawn there anew.

    Returns:
        `folder`, which everything can be rebuilt from offline.

    Raises:
        ValueError: if there are no results, or `folder` is not the place for them, or holds those of another
            experiment, or of students that these do not have.
    """
    results = find_results(path)
    tables = read_tables(results)
    _check_free(folder, tables.config)
    _check_no_less(tables, folder)
    recipe = labels(tables.evaluations)["teacher_recipe"] or tables.config["teacher"]["recipe"]
    check_stand_ins_place(recipe, folder)
    if tables.goal_set != HELD_OUT and folder.resolve().is_relative_to(RESULTS) and TUNING not in folder.parts:
        raise ValueError(
            f"{path} was evaluated on {tables.goal_set} goals, to choose settings by: it belongs in a folder "
            f"{TUNING}/, not beside results on held-out goals"
        )
    files = [results / name for name in sorted(GATHERED) if (results / name).exists()]
    for file in files:
        with published_file(folder / file.name) as temporary:
            shutil.copyfile(file, temporary)
    # Tables that are not there any more must not stay behind: they would be drawn as if they belonged to the rest.
    for name in GATHERED - {file.name for file in files}:
        (folder / name).unlink(missing_ok=True)
    return folder


def _check_free(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise ValueError if `folder` holds something else than results of this experiment, published before."""
    if not folder.exists():
        return
    if (folder / "policies").exists():
        raise ValueError(f"{folder} holds policies; publish {config['name']!r} to a folder of its own")
    check_place(folder, config, GATHERED)
    strangers = [path.name for path in folder.iterdir() if path.name not in OURS]
    if strangers:
        raise ValueError(
            f"{folder} holds what no results consist of ({', '.join(sorted(strangers)[:3])}); publish to a folder "
            "of its own"
        )


def _check_no_less(tables: Tables, folder: Path) -> None:
    """Raise ValueError if students whose results are published would be lost."""
    before = folder / "evaluations.csv"
    if not before.exists():
        return
    lost = _students(read_rows(before, EvaluationRow)) - _students(tables.evaluations)
    if lost:
        named = first_few([f"{method} (seed {seed})" for method, seed in sorted(lost)])
        missing = "; ".join(summarize(tables).missing[-3:])
        raise ValueError(
            f"the results published in {folder} have students that {tables.folder} has not: {named}"
            f"{f' ({missing})' if missing else ''}; finish the run first, or publish to a folder of its own "
            "(`python -m analysis.build DIR DIR --out FIGURES` draws several side by side)"
        )


def _students(rows: Iterable[EvaluationRow]) -> set[tuple[str, int]]:
    """Method and seed of each."""
    return {(row.method, row.seed) for row in rows if row.method != TEACHER}
