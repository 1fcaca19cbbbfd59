"""What a folder holds, and which command may write to it.

Every command calls `claim` before it writes, so that a mistyped path never costs results.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Literal, get_args

from cpd.config import Config, changes, differences
from cpd.config.load import first_few
from cpd.config.retired import upgrade
from cpd.programs import ROOT
from cpd.reading import read_json
from cpd.run.directory import Run, RunError
from cpd.run.folders import CONTENTS, Kind, collected, kind_of, names_in
from cpd.run.reuse import EXEMPT

#: The files of gathered or published results; `status.json` is the report's own.
RESULT_FILES: Final = frozenset(
    {
        *("config.json", "metrics.json", "status.json", "timings.json"),
        *("evaluations.csv", "episodes.csv", "curves.csv", "teachers.csv", "teacher_curves.csv", "losses.csv"),
        *("stages.csv", "plans.csv", "usage.csv", "retrieval.csv", "starts.csv"),
    }
)
#: The entries of a folder of published teachers.
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
    "results": RESULT_FILES | {"README.md", "figures", "report.html", "students", "videos"},
}
#: Folders of a run directory in which nothing else may be written.
RUN_FOLDERS: Final = ("launcher", "logs", "results", "students", "teachers", "tensorboard", "wandb")
#: Settings that must agree before a publication replaces another, even if only one of them has the setting.
IDENTITY: Final = ("name:", "stream:", "stream.tasks:", "teacher:")
#: The repository's published results, with subfolders for scripted stand-ins and for the tuning of settings.
REPOSITORY_RESULTS = ROOT / "analysis" / "results"
STAND_INS: Final = "stand-ins"
TUNING: Final = "tuning"


def expect(folder: Path, kind: Kind, remedy: str) -> None:
    """Raise RunError unless `folder` holds a `kind`; `remedy` says what to do."""
    if (held := kind_of(folder)) != kind:
        raise RunError(f"{folder} holds {CONTENTS[held]}, not {CONTENTS[kind]}: {remedy}")


def claim(
    folder: Path, kind: Kind | Literal["figures", "exports"], experiment: Config | Mapping[str, Any] | None = None
) -> None:
    """Raise RunError unless a command may write a `kind` of `experiment` to `folder`, which need not exist.

    Args:
        folder: where to write.
        kind: what to write.
        experiment: the configuration; a `Config` for a run, the contents of config.json for teachers and results,
            None for figures and exports.
    """
    name = experiment.name if isinstance(experiment, Config) else experiment["name"] if experiment else ""
    purpose = f"{'a run' if kind == 'run' else kind}{f' of {name!r}' if name else ''}"

    def refuse(reason: str, remedy: str = "") -> RunError:
        other = "another --run-dir" if kind == "run" else "another folder"
        return RunError(f"{folder} cannot take {purpose}: {reason}; {remedy or f'choose {other}'}")

    if (held := kind_of(folder)) in ("link", "name"):
        raise refuse(f"it is {CONTENTS[held]}")
    resolved = folder.resolve()
    for path in (resolved, *resolved.parents):
        if path.exists() and not path.is_dir():
            raise refuse(f"{path} is a file")
    for root in resolved.parents:
        is_inside = resolved.relative_to(root).parts[0] in RUN_FOLDERS
        # Looked for first, since a folder above may be large, or may not be listed by this user.
        has_record = (root / "config.json").exists() or (root / "provenance.json").exists()
        if is_inside and has_record and kind_of(root) == "run":
            raise refuse(f"it belongs to the run directory {root}")
    names = names_in(folder)
    if kind in ("figures", "exports"):
        if "config.json" in names:
            raise refuse(f"it holds {CONTENTS[held]}", f"choose one for {kind}, such as {folder / kind}")
        return
    if kind == "run":
        if "config.json" in names:
            _check_run(folder, experiment, refuse(f"it holds {CONTENTS[held]}"))
            return
    elif held in (*get_args(Kind), "collection") and held != kind:
        hint = f" ({collected(folder)[0]} is one), such as {folder / name}" if held == "collection" else ""
        raise refuse(f"it holds {CONTENTS[held]}", f"choose a folder of its own{hint}")
    if foreign := sorted(names - ENTRIES[kind]):
        raise refuse(f"it holds {first_few(foreign)}, which do not belong there")
    if kind == "run":
        return
    assert isinstance(experiment, Mapping)
    if "config.json" in names:
        if differing := _published_differences(read_json(folder / "config.json", dict[str, Any]), experiment):
            shown = "; ".join(textwrap.shorten(line, 160, placeholder=" ...") for line in differing[:3])
            raise refuse(f"it holds another experiment, which would be lost (there -> here: {shown})")
    elif tables := sorted(names & (RESULT_FILES | TEACHER_FILES)):
        raise refuse(f"it has no config.json that names the experiment of its {first_few(tables)}")


def _check_run(root: Path, config: Config | Mapping[str, Any] | None, refusal: RunError) -> None:
    """Raise RunError unless the directory `root`, which has a config.json, is a launched run of `config`.

    `refusal` is raised if the directory holds something other than a run.
    """
    assert isinstance(config, Config)
    if kind_of(root) != "run":
        raise refusal
    if not (root / "provenance.json").exists():
        raise RunError(
            f"{root} is a run without its provenance.json, which records the code that made it: copy the run "
            "again with that file, or choose another --run-dir"
        )
    if changed := differences(Run(root).config, config):
        lines = "\n".join(f"  {line}" for line in changed)
        raise RunError(
            f"{root} holds a run with other settings (there -> here):\n{lines}\nChoose another --run-dir (with "
            f"--teachers-from {root} it reuses the teachers whose settings agree), or remove {root} to start over"
        )


def _published_differences(published: Any, new: Mapping[str, Any]) -> list[str]:
    """Return the differences that forbid replacing results of `published` by results of `new`.

    Both are contents of config.json. More seeds or steps in `new` are allowed.
    """
    if not isinstance(published, dict):
        return ["config.json is not a configuration"]
    published, tables = upgrade(published), ("name", "stream", "teacher")
    lines = changes({name: published.get(name) for name in tables}, {name: new[name] for name in tables})
    differing = [
        line
        for line in lines
        # A setting that only one of them has was added between the two versions of the code.
        if line.startswith(IDENTITY)
        or not (line.startswith(EXEMPT) or ": None -> " in line or line.endswith(" -> None"))
    ]
    if differing:
        return differing
    # More seeds or steps continue an experiment. With fewer of them, published teachers would be lost.
    old, teacher = published["teacher"], new["teacher"]
    if (
        set(old.get("seeds", ())) <= set(teacher["seeds"])
        and old.get("max_env_steps", 0) <= teacher["max_env_steps"]
    ):
        return []
    return [line for line in lines if line.startswith(("teacher.seeds:", "teacher.max_env_steps:"))]


def check_none_lost(folder: Path, old: Iterable[str], new: Iterable[str], remedy: str) -> None:
    """Raise RunError if `folder` holds results `old` that are not all in `new`, which would replace them."""
    if lost := sorted(set(old) - set(new)):
        raise RunError(f"{folder} holds results of {first_few(lost)}, which would be lost: {remedy}")


def check_repository_place(folder: Path, teacher_recipe: str, goal_set: str = "held_out") -> None:
    """Raise RunError if results do not belong in `folder`; only folders in `REPOSITORY_RESULTS` are restricted.

    Args:
        folder: where results or figures of them are written.
        teacher_recipe: the label; several are joined by slashes.
        goal_set: the goals of the evaluation.
    """
    resolved, root = folder.resolve(), REPOSITORY_RESULTS
    if not resolved.is_relative_to(root):
        return
    has_stand_ins = "scripted" in teacher_recipe.split("/")
    if teacher_recipe and has_stand_ins != resolved.is_relative_to(root / STAND_INS):
        wanted = "in" if has_stand_ins else "outside"
        raise RunError(
            f"{folder} is the wrong place for results of teachers with recipe {teacher_recipe}: scripted "
            f"stand-ins and RL teachers are kept apart; choose a folder {wanted} {root / STAND_INS}"
        )
    if goal_set != "held_out" and TUNING not in folder.parts:
        raise RunError(
            f"{folder} is the wrong place for results on {goal_set} goals, on which settings are tuned; choose a "
            f"folder in {TUNING}/"
        )
