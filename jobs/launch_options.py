"""The launcher's command line: options, recipe, settings, profile and run directory."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cpd.config import Config
from cpd.config.load import WHOLE, ConfigError, load, merge, parse_overrides, read_toml, suggestion
from cpd.config.profile import Profile, load_profile
from cpd.run.claim import claim
from cpd.run.directory import RunError
from cpd.run.files import read_json
from jobs.common import parser_with_examples

RECIPES = Path(__file__).resolve().parent / "recipes"
COMMAND_LINE = "the command line"


def build_parser() -> argparse.ArgumentParser:
    """The command line; settings (`--section.key VALUE`) are taken from what it leaves over."""
    parser = parser_with_examples(
        "jobs.launch",
        "Launch an experiment or resume it: the same command skips finished elements.\n"
        "Every setting of a recipe is also an option (--settings lists them); - and _ in its name are the same.",
        [
            "python -m jobs.launch demo",
            "python -m jobs.launch demo --profile local --dry-run",
            "python -m jobs.launch cw10 --profile generic --dry-run    # every sbatch text, and what it will cost",
            "python -m jobs.launch cw10 --profile generic --only teachers/push-v3",
            "python -m jobs.launch my-recipe.toml --run-dir runs/trial --distill.lr 5e-4 --seeds '[1, 2, 3]'",
            "python -m jobs.launch ablation --teachers-from runs/cw10 --only students/ewc",
            "python -m jobs.launch --settings          # every setting with its default",
        ],
    )
    parser.usage = "%(prog)s RECIPE [options] [--section.key VALUE ...]"
    parser.add_argument("recipe", nargs="?", help="a recipe of jobs/recipes by name, or a .toml file")
    parser.add_argument(
        "--profile", help="a profile of slurm/profiles, or a .toml file (default: local, this machine)"
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
    slurm = parser.add_argument_group("with a Slurm profile")
    slurm.add_argument(
        "--retry-failed", action="store_true", help="submit only what failed and what depends on it"
    )
    slurm.add_argument("--cancel", action="store_true", help="cancel the run's jobs (running ones save first)")
    parser.add_argument("--settings", action="store_true", help="list every setting, its default and meaning")
    return parser


def check_options(parser: argparse.ArgumentParser, left_over: Sequence[str]) -> None:
    """Raise ConfigError for what is neither an option of `parser` nor a setting, and means one of them."""
    settings = [f"--{field.name}" for field in dataclasses.fields(Config)]
    options = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
    words = [word.partition("=")[0] for word in left_over if word.startswith("--")]
    unknown = [w for w in words if "." not in w and f"--{w[2:].replace('-', '_')}" not in settings]
    if unknown:
        valid = [*options, *settings]
        raise ConfigError([f"unknown option {word}{suggestion(word, valid)}" for word in unknown], COMMAND_LINE)


def load_recipe(name: str, overrides: Sequence[str]) -> Config:
    """Load a recipe with overrides on top.

    Raises:
        ConfigError: with all mistakes of both.
    """
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    if not path.exists():
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
        # Whoever mistypes a setting looks for it in vain in the recipe.
        asked = set(_paths(tables))
        values = tuple(f"{path}." for path in asked if not any(other.startswith(f"{path}.") for other in asked))

        def is_typed(problem: str) -> bool:
            path = problem.partition(": ")[0]
            return path in asked or path.startswith(values)  # such as stream.tasks.0

        typed = [problem for problem in error.problems if is_typed(problem)]
        if len(typed) == len(error.problems):
            raise ConfigError([f"--{problem}" for problem in typed], COMMAND_LINE) from None
        problems = [f"{COMMAND_LINE}: --{p}" if p in typed else p for p in error.problems]
        raise ConfigError(problems, str(path)) from None


def _paths(tables: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """The dotted names of all tables and values."""
    for key, value in tables.items():
        yield (dotted := f"{path}.{key}".lstrip("."))
        if isinstance(value, Mapping):
            yield from _paths(value, dotted)


def check_run_dir(root: Path, config: Config, profile: str | None) -> None:
    """Refuse a directory that cannot become, or is not, the run of this experiment, before anything is written.

    Raises:
        RunError: if it cannot; or if the run was launched on Slurm and no `profile` is named.
    """
    claim(root, "run", config)
    recorded = root / "profile.json"
    if profile is None and recorded.exists() and read_json(recorded)["cluster"] == "slurm":
        raise RunError(
            f"{root} was launched with a Slurm profile: name it again (--profile NAME), or use --profile local to "
            "continue on this machine"
        )


def load_both(recipe: str, overrides: Sequence[str], profile: str) -> tuple[Config, Profile]:
    """Load recipe and profile.

    Raises:
        ConfigError: the mistakes of both together.
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
