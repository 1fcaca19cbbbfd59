"""What a folder holds, and which command may write to it.

Every command calls `claim` before it writes, so that a mistyped path never costs results.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Literal

from cpd.config import Config, changes, differences
from cpd.config.load import first_few
from cpd.config.retired import upgrade
from cpd.run.directory import Run, RunError
from cpd.run.files import is_temporary, read_json
from cpd.run.reuse import LATER

Kind = Literal["run", "teachers", "results", "figures"]
#: The contents of a folder by what `kind_of` returns.
CONTENTS: Final = {
    "file": "a file",
    "run": "a run directory",
    "teachers": "published teachers",
    "results": "published results",
    "collection": "several folders with results",
    "other": "other files",
    "empty": "nothing",
}
#: The files of gathered or published results; `status.json` is the report's own.
RESULT_FILES: Final = frozenset(
    {
        *("config.json", "metrics.json", "status.json", "timings.json"),
        *("evaluations.csv", "episodes.csv", "curves.csv", "teachers.csv", "teacher_curves.csv", "losses.csv"),
        *("stages.csv", "usage.csv", "retrieval.csv", "starts.csv"),
    }
)
#: What published teachers consist of.
TEACHER_FILES: Final = frozenset(
    {
        *("config.json", "metrics.json", "timings.json", "policies"),
        *("evaluations.csv", "episodes.csv", "teachers.csv", "teacher_curves.csv"),
    }
)
#: By kind, the entries that a folder of that kind may hold before it is claimed.
ENTRIES: Final = {
    # A launch that was killed before it wrote config.json starts over.
    "run": frozenset({"launcher", "provenance.json", "profile.json"}),
    "teachers": TEACHER_FILES | {"README.md", "figures"},
    "results": RESULT_FILES | {"README.md", "figures"},
}
#: Folders of a run directory in which nothing else may be written.
RUN_FOLDERS: Final = ("launcher", "logs", "results", "students", "teachers")
#: Settings that two publications in one folder must share, even if one of them does not have it.
IDENTITY: Final = ("name:", "stream:", "stream.tasks:", "teacher:")
#: The repository's published results; in it, the folders of stand-ins and of results that settings are chosen by.
REPOSITORY_RESULTS = Path(__file__).resolve().parents[2] / "analysis" / "results"
STAND_INS: Final = "stand-ins"
TUNING: Final = "tuning"


def kind_of(folder: Path) -> str:
    """Recognise what `folder` holds; returns a key of `CONTENTS`."""
    if folder.exists() and not folder.is_dir():
        return "file"
    names = _names(folder)
    if _is_run(folder):
        return "run"
    if "policies" in names:
        return "teachers"
    if "config.json" in names:
        return "results" if names & {"teachers.csv", "metrics.json"} else "run"
    if collected(folder):
        return "collection"
    return "other" if names else "empty"


def _names(folder: Path) -> set[str]:
    # Large tables are compressed, and a killed writer may have left temporary files.
    files = folder.iterdir() if folder.is_dir() else ()
    return {path.name.removesuffix(".gz") for path in files if not is_temporary(path)}


def _is_run(folder: Path) -> bool:
    has_elements = any((folder / name).is_dir() for name in ("teachers", "students"))
    return (folder / "provenance.json").exists() or (has_elements and (folder / "config.json").exists())


def collected(folder: Path) -> list[str]:
    """Return the subfolders, up to two levels down, that hold runs, results or published teachers."""
    configs = sorted([*folder.glob("*/config.json"), *folder.glob("*/*/config.json")])
    return [
        config.parent.relative_to(folder).as_posix()
        for config in configs
        # A run stands for its own results.
        if not (config.parent.name == "results" and (config.parent.parent / "config.json").exists())
    ]


def expect(folder: Path, kind: Kind, remedy: str) -> None:
    """Raise RunError unless `folder` holds a `kind`; `remedy` says what to do."""
    if (held := kind_of(folder)) != kind:
        raise RunError(f"{folder} holds {CONTENTS[held]}, not {CONTENTS[kind]}: {remedy}")


def claim(folder: Path, kind: Kind, experiment: Config | Mapping[str, Any] | None = None) -> None:
    """Raise RunError unless a command may write a `kind` of `experiment` to `folder`, which need not exist.

    Args:
        folder: where to write.
        kind: what to write.
        experiment: the configuration; a `Config` for a run, the contents of config.json for teachers and results,
            None for figures.
    """
    name = experiment.name if isinstance(experiment, Config) else experiment["name"] if experiment else ""
    purpose = f"{'a run' if kind == 'run' else kind}{f' of {name!r}' if name else ''}"

    def refuse(reason: str, remedy: str = "") -> RunError:
        other = "another --run-dir" if kind == "run" else "another folder"
        return RunError(f"{folder} cannot take {purpose}: {reason}; {remedy or f'choose {other}'}")

    place = folder.resolve()
    for obstacle in (place, *place.parents):
        if obstacle.exists() and not obstacle.is_dir():
            raise refuse(f"{obstacle} is a file")
    for root in place.parents:
        if place.relative_to(root).parts[0] in RUN_FOLDERS and _is_run(root):
            raise refuse(f"it belongs to the run directory {root}")
    held, names = kind_of(folder), _names(folder)
    if kind == "figures":
        if "config.json" in names:
            raise refuse(f"it holds {CONTENTS[held]}", f"choose one for figures, such as {folder / 'figures'}")
        return
    if kind == "run":
        if "config.json" in names:
            _check_run(folder, experiment, refuse(f"it holds {CONTENTS[held]}"))
            return
    elif held in ("run", "collection"):
        hint = f" ({collected(folder)[0]} is one), such as {folder / name}" if held == "collection" else ""
        raise refuse(f"it holds {CONTENTS[held]}", f"choose a folder of its own{hint}")
    if strangers := sorted(names - ENTRIES[kind]):
        raise refuse(f"it holds {first_few(strangers)}, which are no part of that")
    if kind == "run":
        return
    assert isinstance(experiment, Mapping)
    if "config.json" in names:
        if differing := _published_differences(read_json(folder / "config.json"), experiment):
            shown = "; ".join(textwrap.shorten(line, 160, placeholder=" ...") for line in differing[:3])
            raise refuse(f"it holds another experiment, which would be lost (there -> here: {shown})")
    elif tables := sorted(names & (RESULT_FILES | TEACHER_FILES)):
        raise refuse(f"it has no config.json that says of which experiment its {first_few(tables)} are")


def _check_run(root: Path, config: Config | Mapping[str, Any] | None, is_no_run: RunError) -> None:
    """Raise RunError unless the directory `root`, which has a config.json, is a launched run of `config`."""
    assert isinstance(config, Config)
    if kind_of(root) != "run":
        raise is_no_run
    if not (root / "provenance.json").exists():
        raise RunError(
            f"{root} is a run without its provenance.json, which says which code made it: copy the run again "
            "with that file, or choose another --run-dir"
        )
    if changed := differences(Run(root).config, config):
        lines = "\n".join(f"  {line}" for line in changed)
        raise RunError(
            f"{root} holds a run with other settings (there -> here):\n{lines}\nChoose another --run-dir (with "
            f"--teachers-from {root} it reuses the teachers whose settings agree), or remove {root} to start over"
        )


def _published_differences(theirs: Any, ours: Mapping[str, Any]) -> list[str]:
    """Return why the published configuration `theirs` is not of `ours`, or of a shorter version of it."""
    if not isinstance(theirs, dict):
        return ["config.json is not a configuration"]
    theirs, tables = upgrade(theirs), ("name", "stream", "teacher")
    lines = changes({name: theirs.get(name) for name in tables}, {name: ours[name] for name in tables})
    differing = [
        line
        for line in lines
        # A setting that one of them does not have did not exist yet.
        if line.startswith(IDENTITY)
        or not (line.startswith(LATER) or ": None -> " in line or line.endswith(" -> None"))
    ]
    if differing:
        return differing
    # More seeds or steps continue an experiment. With fewer of them, published teachers would be lost.
    old, new = theirs["teacher"], ours["teacher"]
    if set(old.get("seeds", ())) <= set(new["seeds"]) and old.get("max_env_steps", 0) <= new["max_env_steps"]:
        return []
    return [line for line in lines if line.startswith(("teacher.seeds:", "teacher.max_env_steps:"))]


def check_none_lost(folder: Path, old: Iterable[str], new: Iterable[str], remedy: str) -> None:
    """Raise RunError if `folder` holds results `old` of which some are not in `new`, which would replace them."""
    if lost := sorted(set(old) - set(new)):
        raise RunError(f"{folder} holds results of {first_few(lost)}, which would be lost: {remedy}")


def check_repository_place(folder: Path, teacher_recipe: str, goal_set: str = "held_out") -> None:
    """Raise RunError if results do not belong in `folder`; only folders in `REPOSITORY_RESULTS` are restricted.

    Args:
        folder: where results or figures of them are written.
        teacher_recipe: the label; several are joined by slashes.
        goal_set: the goals of the evaluation.
    """
    place, root = folder.resolve(), REPOSITORY_RESULTS
    if not place.is_relative_to(root):
        return
    has_stand_ins = "scripted" in teacher_recipe.split("/")
    if teacher_recipe and has_stand_ins != place.is_relative_to(root / STAND_INS):
        wanted = "in" if has_stand_ins else "outside"
        raise RunError(
            f"{folder} is the wrong place for results of teachers with recipe {teacher_recipe}: scripted "
            f"stand-ins and RL teachers are kept apart; choose a folder {wanted} {root / STAND_INS}"
        )
    if goal_set != "held_out" and TUNING not in folder.parts:
        raise RunError(
            f"{folder} is the wrong place for results on {goal_set} goals, by which settings are chosen; choose a "
            f"folder {TUNING}/"
        )
