"""The launcher's command line: options, recipe, settings, profile and run directory."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from typing_extensions import TypedDict

from cpd.config import Config
from cpd.config.load import WHOLE, ConfigError, load, merge, parse_overrides, read_toml, suggestion
from cpd.config.profile import Profile, load_profile
from cpd.config.types import Tracker
from cpd.programs import ROOT
from cpd.reading import is_possible, read_json
from cpd.run.claim import claim
from cpd.run.directory import RunError
from jobs.common import parser_with_examples

RECIPES = ROOT / "jobs" / "recipes"
COMMAND_LINE = "the command line"


def build_parser() -> argparse.ArgumentParser:
    """Return the launcher's parser; settings (`--section.key VALUE`) are among the words that it does not know."""
    parser = parser_with_examples(
        "jobs.launch",
        "Launch an experiment or resume it: the same command skips finished elements.\n"
        "Every setting of a recipe is also an option (--settings lists them); - and _ are equivalent in its name.",
        [
            "cpd launch demo",
            "cpd launch demo --profile local --dry-run",
            "cpd launch cw10 --profile generic --dry-run    # every sbatch text, and the expected cost",
            "cpd launch cw10 --profile generic --only teachers/push-v3",
            "cpd launch my-recipe.toml --run-dir runs/trial --distill.lr 5e-4 --seeds '[1, 2, 3]'",
            "cpd launch ablation --teachers-from runs/cw10 --only students/ewc",
            "cpd launch --settings          # every setting with its default",
        ],
    )
    parser.usage = "%(prog)s RECIPE [options] [--section.key VALUE ...]"
    parser.add_argument("recipe", nargs="?", help="name of a recipe in jobs/recipes, or a .toml file")
    parser.add_argument(
        "--profile", help="name of a profile in slurm/profiles, or a .toml file (default: local, this machine)"
    )
    parser.add_argument("--run-dir", type=Path, help="the run's directory (default: runs/<name of the recipe>)")
    parser.add_argument("--dry-run", action="store_true", help="print what would run; create and start nothing")
    parser.add_argument("--prepare", action="store_true", help="make the run directory and start nothing")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="only this element or folder of elements, such as students/ewc; repeatable",
    )
    parser.add_argument(
        "--track",
        choices=get_args(Tracker)[1:],
        help="show learning curves in this tool while jobs run, from files in the run directory",
    )
    slurm = parser.add_argument_group("with a Slurm profile")
    slurm.add_argument(
        "--retry-failed", action="store_true", help="submit only failed elements and those that depend on them"
    )
    slurm.add_argument(
        "--probe",
        action="store_true",
        help="submit no element, but a job of two minutes per role that checks the profile, and wait for them",
    )
    slurm.add_argument("--cancel", action="store_true", help="cancel the run's jobs (running ones save first)")
    parser.add_argument("--settings", action="store_true", help="list every setting, its default and meaning")
    return parser


def check_options(parser: argparse.ArgumentParser, left_over: Sequence[str]) -> None:
    """Raise ConfigError if a word of `left_over` looks like an option, but is neither an option nor a setting."""
    settings = [f"--{field.name}" for field in dataclasses.fields(Config)]
    options = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
    words = [word.partition("=")[0] for word in left_over if word.startswith("--")]
    unknown = [w for w in words if "." not in w and f"--{w[2:].replace('-', '_')}" not in settings]
    if unknown:
        valid = [*options, *settings]
        raise ConfigError([f"unknown option {word}{suggestion(word, valid)}" for word in unknown], COMMAND_LINE)


def load_recipe(name: str, overrides: Sequence[str]) -> Config:
    """Load a recipe and apply the overrides of the command line.

    Raises:
        ConfigError: with all mistakes of both; those of the command line are named as such.
    """
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    if not (is_possible(path) and path.exists()):
        recipes = sorted(file.stem for file in RECIPES.glob("*.toml"))
        unknown = f"unknown recipe{suggestion(name, recipes)}"
        problem = "there is no such file" if name.endswith(".toml") else unknown
        hint = "; the recipe comes before the settings" if overrides else ""
        hint = f"; did you mean {name}.toml?" if Path(f"{name}.toml").exists() else hint
        raise ConfigError([f"{name}: {problem}{hint}"], COMMAND_LINE)
    tables = parse_overrides(overrides)
    try:
        return load(Config, merge(read_toml(path, shipped=RECIPES), tables), str(path))
    except ConfigError as error:
        if error.source != str(path):
            raise
        # A mistake on the command line is not in the recipe, so its message must not name the recipe.
        overridden = set(_paths(tables))
        leaves = [path for path in overridden if not any(other.startswith(f"{path}.") for other in overridden)]
        prefixes = tuple(f"{path}." for path in leaves)

        def is_override(problem: str) -> bool:
            path = problem.partition(": ")[0]
            return path in overridden or path.startswith(prefixes)  # such as stream.tasks.0

        wrong_overrides = [problem for problem in error.problems if is_override(problem)]
        if len(wrong_overrides) == len(error.problems):
            raise ConfigError([f"--{problem}" for problem in wrong_overrides], COMMAND_LINE) from None
        problems = [f"{COMMAND_LINE}: --{p}" if p in wrong_overrides else p for p in error.problems]
        raise ConfigError(problems, str(path)) from None


def _paths(tables: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Yield the dotted names of all tables and values."""
    for key, value in tables.items():
        yield (dotted := f"{path}.{key}".lstrip("."))
        if isinstance(value, Mapping):
            yield from _paths(value, dotted)


class _Recorded(TypedDict):
    """What is read of the profile of a run's last launch."""

    cluster: Literal["local", "slurm"]


def check_run_dir(root: Path, config: Config, profile: str | None) -> None:
    """Check, before anything is written, that `root` can hold the run of this experiment.

    Raises:
        RunError: if it cannot; or if the run was launched on Slurm and no `profile` is named, since another
            launch on this machine would work on elements whose jobs are in the queue.
    """
    claim(root, "run", config)
    recorded = root / "profile.json"
    if profile is None and recorded.exists() and read_json(recorded, _Recorded)["cluster"] == "slurm":
        raise RunError(
            f"{root} was launched with a Slurm profile: name it again (--profile NAME), or use --profile local to "
            "continue on this machine"
        )


def load_recipe_and_profile(recipe: str, overrides: Sequence[str], profile: str) -> tuple[Config, Profile]:
    """Load a recipe with overrides, and a profile.

    Raises:
        ConfigError: with the mistakes of both together.
    """
    errors: list[ConfigError] = []
    config = loaded_profile = None
    try:
        config = load_recipe(recipe, overrides)
    except ConfigError as error:
        errors.append(error)
    try:
        loaded_profile = load_profile(profile)
    except ConfigError as error:
        errors.append(error)
    if config is None or loaded_profile is None:
        problems = [f"{e.source}: {problem.removeprefix(f'{WHOLE}: ')}" for e in errors for problem in e.problems]
        raise ConfigError(problems, f"launching {recipe!r} with profile {profile!r}")
    return config, loaded_profile
