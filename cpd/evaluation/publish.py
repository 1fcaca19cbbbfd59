"""Teachers outside of their run: small results and policy files that can be kept, and that later runs start from.

A folder of published teachers holds the long-form tables of `cpd.evaluation.gather`, the frozen configuration, and
`policies/<task>-seed-<n>.safetensors` with its description beside it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from cpd.config import changes
from cpd.config.load import first_few, to_dict
from cpd.config.retired import upgrade
from cpd.evaluation.gather import GATHERED, find_results, gather
from cpd.evaluation.results_folder import HELD_OUT, TEACHER, Tables, labels_of, read_tables
from cpd.evaluation.summary import summarize
from cpd.run.directory import Run, TeacherElement, published_policy
from cpd.run.files import DamagedFileError, copy, read_json, sha256, write_json
from cpd.run.reuse import LATER
from cpd.run.tables import EpisodeRow, EvaluationRow, compress_tables, find_table, read_rows, write_rows

#: The tables that tell of teachers alone.
TABLES = ("config.json", "teachers.csv", "teacher_curves.csv")
#: All that publishing writes, or removes.
WRITTEN = frozenset({*TABLES, "evaluations.csv", "episodes.csv", "timings.json", "metrics.json", "policies"})
#: What a run directory is known by.
RUN_PARTS = ("teachers", "students", "provenance.json")
#: What an experiment is known by, whatever else its configuration says.
IDENTITY = ("name:", "stream:", "stream.tasks:", "teacher:")


def publish_teachers(run: Run, folder: Path) -> list[Path]:
    """Copy what a run tells of its finished teachers, admitted or rejected, and their policies to `folder`.

    Returns:
        The policy files.

    Raises:
        RunError: if the run holds no teacher at all.
        ValueError: if no teacher is finished, or not by held-out goals, or they are stand-ins, or `folder` holds
            something else than what was published of this experiment before.
    """
    if run.config.teacher.recipe == "scripted":
        raise ValueError(
            f"{run.root} has scripted stand-ins for teachers, which come with Meta-World: nothing to keep"
        )
    if run.config.evaluation.goal_set != "held_out":
        raise ValueError(
            f"{run.root} was evaluated on goals by which its teachers were chosen (evaluation.goal_set = "
            f"{run.config.evaluation.goal_set!r}); publish a run that reports on held-out ones"
        )
    finished = [teacher for teacher in run.teachers() if teacher.finished]
    if not finished:
        raise ValueError(f"{run.root} has no finished teacher yet; launch it again to go on")
    _check_free(run, folder)
    _check_none_lost(run, folder)
    for teacher in finished:
        _check_whole(teacher)
    report = gather(run)
    for name in TABLES:
        if (run.results / name).exists():
            copy(run.results / name, folder / name)
        else:
            _remove(folder, name)
    evaluations = read_rows(run.results / "evaluations.csv", EvaluationRow)
    episodes = read_rows(run.results / "episodes.csv", EpisodeRow)
    write_rows(folder / "evaluations.csv", [row for row in evaluations if row.method == TEACHER])
    write_rows(folder / "episodes.csv", [row for row in episodes if row.method == TEACHER])
    timings = [entry for entry in read_json(run.results / "timings.json") if entry["role"] == "teacher"]
    write_json(folder / "timings.json", timings)
    measures = summarize(read_tables(folder)).to_json()
    write_json(folder / "metrics.json", {**measures, "provenance": report["provenance"]})
    compress_tables(folder)
    published = []
    for teacher in finished:
        target = published_policy(folder, teacher.task, teacher.seed)
        copy(teacher.policy, target)
        copy(teacher.policy.with_suffix(".json"), target.with_suffix(".json"))
        published.append(target)
    # What an earlier publication left would pass for policies that this config.json made.
    for stale in set((folder / "policies").glob("*.safetensors")) - set(published):
        stale.unlink()
        stale.with_suffix(".json").unlink(missing_ok=True)
    return published


def _check_whole(teacher: TeacherElement) -> None:
    """Raise DamagedFileError unless the policy is the one that its description tells of."""
    path = teacher.policy.with_suffix(".json")
    if read_description(path, ("sha256",))["sha256"] != sha256(teacher.policy):
        raise DamagedFileError(
            f"{teacher.policy} is not what {path.name} describes: it was damaged; remove {teacher.path} and "
            "launch again to train it anew"
        )


def read_description(path: Path, needed: Iterable[str]) -> dict[str, Any]:
    """What lies beside a policy.

    Args:
        path: the policy's `.json`.
        needed: entries that must be there, those of a table in it, unless that is null, as `table.entry`.

    Raises:
        DamagedFileError: if any is not.
    """
    description: dict[str, Any] = read_json(path)
    missing = [key for key in needed if _lacks(description, key)]
    if missing:
        raise DamagedFileError(
            f"{path} lacks {', '.join(missing)}: it does not describe a policy; publish the run again "
            "(`python -m jobs.publish`)"
        )
    return description


def _lacks(table: Any, key: str) -> bool:
    name, _, rest = key.partition(".")
    if not isinstance(table, dict) or name not in table:
        return True
    return bool(rest) and table[name] is not None and _lacks(table[name], rest)


def _check_free(run: Run, folder: Path) -> None:
    config = to_dict(run.config)
    check_place(folder, config, WRITTEN)
    others = sorted(name for name in GATHERED - WRITTEN if find_table(folder / name))
    if others:
        raise ValueError(
            f"{folder} holds results of students ({', '.join(others[:3])}), which the teachers of "
            f"{config['name']!r} would spoil: choose a folder of their own"
        )


def _check_none_lost(run: Run, folder: Path) -> None:
    """Raise ValueError if `folder` holds policies of teachers that `run` is to have, but has not finished yet."""
    lost = [t.name for t in run.teachers() if not t.finished and published_policy(folder, t.task, t.seed).exists()]
    if lost:
        raise ValueError(
            f"{folder} holds policies of {first_few(lost)}, which {run.root} has not finished: they would be "
            "lost; launch it again to finish them, or choose a folder of its own"
        )


def check_place(folder: Path, config: Mapping[str, Any], written: Collection[str]) -> None:
    """Raise ValueError if publishing to `folder` would overwrite anything but the same experiment's results.

    Args:
        folder: where to publish; it need not exist.
        config: the configuration of what is to be published.
        written: the names of what publishing writes or removes.
    """
    name = config["name"]
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: choose another place for {name!r}")
    place = folder.resolve()
    for root in (place, place.parent) if place.name == "results" else (place,):
        part = next((part for part in RUN_PARTS if (root / part).exists()), None)
        if part:
            raise ValueError(
                f"{folder} {'is' if root == place else 'belongs to'} a run directory (there is {root / part}): "
                f"choose a folder of its own for what is published of {name!r}"
            )
    if (folder / "config.json").exists():
        _check_same_experiment(folder / "config.json", config)
        return
    if inside := sorted(folder.glob("*/config.json")):
        raise ValueError(
            f"{folder} is a folder of folders ({inside[0].parent.name} is one) with results of their own: give "
            f"{name!r} one too, such as {folder / name}"
        )
    found = sorted(file for file in written if find_table(folder / file))
    if found:
        raise ValueError(
            f"{folder} has no config.json, so nobody knows what its {', '.join(found[:3])} are of, and publishing "
            f"{name!r} would overwrite them: choose a folder of its own"
        )


def _check_same_experiment(path: Path, ours: Mapping[str, Any]) -> None:
    """Raise ValueError unless the published config.json at `path` is of `ours`, or of a shorter version of it."""
    theirs = read_json(path)
    if not isinstance(theirs, dict):
        raise ValueError(
            f"{path} is not a configuration: choose another folder for what is published of {ours['name']!r}"
        )
    theirs = upgrade(theirs)
    parts = ("name", "stream", "teacher")
    differing = [
        line
        for line in changes({part: theirs.get(part) for part in parts}, {part: ours[part] for part in parts})
        # What one of them says nothing of was no setting yet.
        if line.startswith(IDENTITY)
        or not (line.startswith(LATER) or ": None -> " in line or line.endswith(" -> None"))
    ]
    if not differing:
        # Seeds and steps may be added; with fewer, teachers that are kept there would be lost.
        before, now = theirs["teacher"], ours["teacher"]
        fewer_seeds = not set(before.get("seeds", ())) <= set(now["seeds"])
        if fewer_seeds or before.get("max_env_steps", 0) > now["max_env_steps"]:
            lines = changes(before, now, "teacher")
            differing = [line for line in lines if line.startswith(("teacher.seeds:", "teacher.max_env_steps:"))]
    if differing:
        shown = "; ".join(textwrap.shorten(line, 160, placeholder=" ...") for line in differing[:3])
        raise ValueError(
            f"{path.parent} holds published results of another experiment, {theirs.get('name')!r}, which those of "
            f"{ours['name']!r} would replace; they differ (there -> here) in {shown}: choose a folder of its own"
        )


#: Where published results of real teachers are kept, and below it those of stand-ins.
RESULTS = Path(__file__).resolve().parents[2] / "analysis" / "results"
STAND_INS = RESULTS / "stand-ins"
#: Recipes of teachers that no policy gradient has touched.
STAND_IN_RECIPES = ("scripted",)
#: What may lie in a folder of published results.
RESULT_FILES = {*GATHERED, "README.md", "figures"}
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


def publish_results(path: Path, folder: Path) -> Path:
    """Copy the results of a run (gathered first), or gathered results, to `folder`; figures are drawn there anew.

    Returns:
        `folder`, which everything can be rebuilt from offline.

    Raises:
        ValueError: if there are no results, or `folder` is not the place for them, or holds those of another
            experiment, or of students that these do not have.
    """
    results = find_results(path)
    tables = read_tables(results)
    _check_free_for_results(folder, tables.config)
    _check_no_student_lost(tables, folder)
    recipe = labels_of(tables.evaluations)["teacher_recipe"] or tables.config["teacher"]["recipe"]
    check_stand_ins_place(recipe, folder)
    if tables.goal_set != HELD_OUT and folder.resolve().is_relative_to(RESULTS) and TUNING not in folder.parts:
        raise ValueError(
            f"{path} was evaluated on {tables.goal_set} goals, to choose settings by: it belongs in a folder "
            f"{TUNING}/, not beside results on held-out goals"
        )
    for name in sorted(GATHERED):
        file = find_table(results / name)
        # A stale table, or a stale form of one, would be drawn as if it belonged to the rest.
        if file is None or file.name != name:
            _remove(folder, name)
        if file is not None:
            copy(file, folder / file.name)
    compress_tables(folder)
    return folder


def _remove(folder: Path, name: str) -> None:
    """Remove a published file in whichever form it is there."""
    while file := find_table(folder / name):
        file.unlink()


def _check_free_for_results(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise ValueError if `folder` holds something else than results of this experiment, published before."""
    if not folder.exists():
        return
    if (folder / "policies").exists():
        raise ValueError(f"{folder} holds policies; publish {config['name']!r} to a folder of its own")
    check_place(folder, config, GATHERED)
    strangers = [path.name for path in folder.iterdir() if path.name.removesuffix(".gz") not in RESULT_FILES]
    if strangers:
        raise ValueError(
            f"{folder} holds what no results consist of ({', '.join(sorted(strangers)[:3])}); publish to a folder "
            "of its own"
        )


def _check_no_student_lost(tables: Tables, folder: Path) -> None:
    """Raise ValueError if students whose results are published would be lost."""
    before = folder / "evaluations.csv"
    if not find_table(before):
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
