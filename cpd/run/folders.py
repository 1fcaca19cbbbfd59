"""What a folder holds: a run directory, published teachers, results or policies, or something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal, get_args

from cpd.reading import is_possible, read_for_display
from cpd.run.files import is_temporary

Kind = Literal["run", "teachers", "results"]
#: The contents of a folder by what `kind_of` returns.
CONTENTS: Final = {
    "file": "a file",
    "link": "a link that leads nowhere",
    "name": "no possible name of a folder",
    "run": "a run directory",
    "teachers": "published teachers",
    "results": "published results",
    "policy": "a published policy",
    "collection": "several folders with results",
    "other": "other files",
    "empty": "nothing",
}
#: The files that state the kind of their folder, under this key. Those of earlier versions do not.
STATING: Final = ("provenance.json", "metrics.json")
KIND_KEY: Final = "kind"


def kind_of(folder: Path) -> str:
    """Return what `folder` holds, as a key of `CONTENTS`."""
    if not is_possible(folder):
        return "name"
    if any(path.is_symlink() and not path.exists() for path in (folder, *folder.parents)):
        return "link"
    if folder.exists() and not folder.is_dir():
        return "file"
    names = names_in(folder)
    if stated := _stated(folder):
        return stated
    if "policies" in names:
        return "teachers"
    if "config.json" in names and names & {"teachers.csv", "metrics.json"}:
        return "results"
    if names & {"config.json", "provenance.json"}:
        return "run"
    if {"policy.safetensors", "policy.json"} <= names and "status.json" not in names:
        return "policy"
    if collected(folder):
        return "collection"
    return "other" if names else "empty"


def _stated(folder: Path) -> str | None:
    """Return the kind that a file of `folder` states, if one does and is readable."""
    for name in STATING:
        stated = read_for_display(folder / name, dict[str, Any], {}).get(KIND_KEY)
        if stated in get_args(Kind):
            return str(stated)
    return None


def names_in(folder: Path) -> set[str]:
    """Return the names of the entries; a compressed table has the name of the plain one."""
    # Large tables are compressed, and a killed writer may have left temporary files.
    files = folder.iterdir() if folder.is_dir() else ()
    return {path.name.removesuffix(".gz") for path in files if not is_temporary(path)}


def collected(folder: Path) -> list[str]:
    """Return the subfolders, up to two levels down, that hold runs, results or published teachers."""
    configs = sorted([*folder.glob("*/config.json"), *folder.glob("*/*/config.json")])
    return [
        config.parent.relative_to(folder).as_posix()
        for config in configs
        # A run is listed once, not also as its own results.
        if not (config.parent.name == "results" and (config.parent.parent / "config.json").exists())
    ]
