"""Load TOML files into dataclasses and report all mistakes at once, each with its dotted path and a suggestion.

Command-line overrides (`--distill.lr 1e-3`) are merged into the tables of a recipe before anything is checked, so
that the mistakes of both are reported together.
"""

from __future__ import annotations

import copy
import difflib
import json
import textwrap
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict, is_typeddict

from cpd.config.retired import explain, upgrade
from cpd.reading import DamagedFileError, is_possible, read_text

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
#: Path in `problems` of a mistake that concerns several settings; it is not shown.
WHOLE = "(whole)"


class ConfigError(ValueError):
    """One or more mistakes in a recipe, profile or override; `str()` lists them, one per line."""

    def __init__(self, problems: Sequence[str], source: str) -> None:
        self.problems = list(problems)
        self.source = source
        lines = "\n".join(f"  {problem.removeprefix(f'{WHOLE}: ')}" for problem in problems)
        count = f"{len(problems)} mistakes" if len(problems) > 1 else "a mistake"
        super().__init__(f"{source} has {count}:\n{lines}")


def nearest(word: str, names: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` with the one or two most similar names, or an empty string."""
    close = difflib.get_close_matches(word, list(names), n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def suggestion(word: str, names: Iterable[str]) -> str:
    """Return the most similar names, and the whole list if it is short enough to read."""
    names = list(names)
    return nearest(word, names) + (f" (known: {', '.join(names)})" if len(names) <= 30 else "")


T = TypeVar("T")


def load(kind: type[T], data: Mapping[str, Any], source: str) -> T:
    """Convert `data`, which an earlier version may have written, to the dataclass `kind`.

    If `kind` has a method `implied_defaults`, it gets the tables and returns the defaults that depend on them.

    Raises:
        ConfigError: lists every mistake with its dotted path and a suggestion.
    """
    tables = upgrade(data)
    if implied := getattr(kind, "implied_defaults", None):
        tables = merge(implied(tables), tables)
    try:
        # Strict mode accepts a list for a tuple in JSON only. JSON has no dates: they become strings.
        return TypeAdapter(kind).validate_json(json.dumps(tables, default=str), strict=True)
    except ValidationError as error:
        items = error.errors(include_url=False)
        problems = [line for item in items if not _follows(item, items) for line in _problems(kind, item)]
        raise ConfigError(problems, source) from None


def overrides_of(kind: Any) -> Any:
    """Return a table type with all settings of the dataclass `kind` and its sections, none of them required."""
    hints = get_type_hints(kind, include_extras=True)
    entries = {name: overrides_of(hint) if is_dataclass(hint) else hint for name, hint in hints.items()}
    make: Any = TypedDict
    made = make(f"{kind.__name__}Overrides", entries, total=False)
    made.__pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    return made


def _follows(item: Any, items: Sequence[Any]) -> bool:
    """Whether one of pydantic's errors results from others: the length of a list excludes its invalid entries."""
    size, location = len(item["loc"]), item["loc"]
    inside = (other["loc"] for other in items if len(other["loc"]) > size)
    return item["type"] == "too_short" and any(other[:size] == location for other in inside)


def _members(owner: Any) -> Mapping[str, Any]:
    """Return the types of an owner's settings by name; empty for a table with free names."""
    return get_type_hints(owner) if is_dataclass(owner) or is_typeddict(owner) else {}


def _problems(kind: Any, item: Any) -> list[str]:
    """Convert one of pydantic's errors to lines; a ConfigError that a dataclass raised contains its own."""
    error, keys, value = item["type"], [str(key) for key in item["loc"] if key != "__root__"], item["input"]
    if isinstance(inner := item.get("ctx", {}).get("error"), ConfigError):
        return inner.problems
    path = ".".join(keys) or WHOLE
    if error in ("unexpected_keyword_argument", "extra_forbidden"):
        if explanation := explain(path):
            return [f"{path}: {explanation} (given: {value!r})"]
        owner = kind
        for key in keys[:-1]:
            values = get_args(owner)[1:] if get_origin(owner) in (dict, Mapping) else ()
            owner = values[0] if values else _members(owner).get(key, Any)
        return [f"{path}: unknown key{suggestion(keys[-1], _members(owner))}"]
    if error in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return [f"{path}: required, but not given"]
    line = f"{path}: {item['msg'].removeprefix('Value error, ')}"
    if error != "value_error":
        line += f" (given: {value!r})"
    if error in ("tuple_type", "list_type") and not isinstance(value, dict):
        line += f"; write a list: {listed(value)}"
    return [line + "; write true or false" if error == "bool_type" else line]


def listed(value: Any) -> list[Any]:
    """Guess the intended list from another value, such as the strings `1,2`, `1 2` and `[a]`."""
    if not isinstance(value, str):
        return [value]
    text = value.strip("[] ")
    # Words with spaces may be a single command.
    items = text.split(",") if "," in text or any(map(str.isalpha, text)) else text.split()
    return [_toml_value(item.strip()) for item in items if item.strip()]


def read_toml(path: Path, above: tuple[Path, ...] = (), *, shipped: Path | None = None) -> dict[str, Any]:
    """Read the tables of a TOML file and merge them into those of the file that it `extends`.

    Args:
        path: TOML file. Its `extends`, of which the suffix is optional, and its `teachers_from` are paths relative
            to its folder.
        above: files that extend this one, the first one first.
        shipped: folder to search for the file to extend if it does not exist beside `path`.

    Raises:
        ConfigError: a file cannot be read or parsed; names the file and line.
    """
    try:
        tables = copy.deepcopy(tomllib.loads(read_text(path, "name another file")))
    except OSError as error:
        raise ConfigError([f"cannot be read: {error.strerror}"], str(path)) from None
    except DamagedFileError as error:
        raise ConfigError([str(error)], str(path)) from None
    except RecursionError:  # of the parser, or of the copy, as later on
        raise ConfigError(["its tables or lists are nested too deeply"], str(path)) from None
    except ValueError as error:  # not only TOMLDecodeError: numbers may have too many digits
        raise ConfigError([f"not valid TOML: {error}"], str(path)) from None
    sources = tables.get("teachers_from")
    several = sources if isinstance(sources, list) else [sources]
    for key, name in (("extends", tables.get("extends")), *(("teachers_from", source) for source in several)):
        if isinstance(name, str) and not is_possible(Path(name)):
            raise ConfigError([f"{key}: {name!r} is no possible path; correct it"], str(path))
    placed = [str(path.parent / source) if isinstance(source, str) and source else source for source in several]
    if sources is not None:
        tables["teachers_from"] = placed if isinstance(sources, list) else placed[0]
    base = tables.pop("extends", None)
    if base is None:
        return upgrade(tables)
    if not isinstance(base, str):
        raise ConfigError([f"extends: {base!r} is not a string; write the name of one file"], str(path))
    base_path = _base_path(path, base, shipped)
    if base_path in (chain := (*above, path.resolve())):
        raise ConfigError([f"extends: {base!r} extends this file in turn"], str(path))
    # Upgrade each file before merging: if a setting has its old name in one and its new name in another, the
    # upper file wins.
    return merge(read_toml(base_path, chain, shipped=shipped), upgrade(tables))


def _base_path(path: Path, base: str, shipped: Path | None) -> Path:
    """Return the file named `base` beside `path`, or else in the folder `shipped`."""
    name = f"{base.removesuffix('.toml')}.toml"
    beside = (path.parent / name).resolve()
    if beside.exists():
        return beside
    names = sorted(file.stem for file in shipped.glob("*.toml")) if shipped else []
    if shipped and base.removesuffix(".toml") in names:
        return (shipped / name).resolve()
    neither = f", nor is it a name in {shipped}{suggestion(base, names)}" if shipped else ""
    problem = f"{base!r}: {beside} does not exist{neither}; write a path relative to the folder of this file"
    raise ConfigError([f"extends: {problem}"], str(path))


def _toml_value(text: str) -> Any:
    """Parse `text` as a TOML value; return it unchanged if that fails."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Convert `["--distill.lr", "1e-3", "--seeds=[1, 2]"]` to nested tables.

    Parses values as TOML; a value that is not TOML is a string.

    Raises:
        ConfigError: an argument does not have this form.
    """
    tables: dict[str, Any] = {}
    problems = []
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        key, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not key:
            problems.append(f"{argument!r}: expected --section.key VALUE")
            continue
        if not equals:
            if not queue or queue[0].startswith("--"):
                problems.append(f"--{key}: a value is missing")
                continue
            text = queue.pop(0)
        keys = key.split(".")
        # The labels of variants may contain dashes.
        *sections, last = [k if keys[:i] == ["variants"] else k.replace("-", "_") for i, k in enumerate(keys)]
        table: Any = tables
        for section in sections:
            table = table.setdefault(section, {}) if isinstance(table, dict) else None
        if not isinstance(table, dict) or isinstance(table.get(last), dict):
            problems.append(f"--{key}: is both a value and a table of settings; set one setting at a time")
        else:
            table[last] = _toml_value(text)
    if problems:
        raise ConfigError(problems, "the command line")
    return upgrade(tables)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base`, updated recursively by the entries of `over`."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a config to nested tables that JSON can represent."""
    result: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return result


def setting_lines(kind: Any, prefix: str = "") -> list[str]:
    """Return a help text for every setting: `--dotted.key`, the default, the meaning, and the allowed values."""
    lines = []
    for name, info in kind.__pydantic_fields__.items():
        if hasattr(info.annotation, "__pydantic_fields__"):
            lines += setting_lines(info.annotation, f"{prefix}{name}.")
        else:
            value = None if info.is_required() else info.get_default(call_default_factory=True)
            default = "(required)" if info.is_required() else repr(value)
            choices = get_args(info.annotation) if get_origin(info.annotation) is Literal else ()
            allowed = f" One of {', '.join(map(str, choices))}." if choices else ""
            text, indent = f"{info.description or ''}{allowed}".strip(), " " * 6
            meaning = textwrap.fill(text, 100, initial_indent=indent, subsequent_indent=indent)
            lines.append(f"  --{prefix + name} {default}\n{meaning}".rstrip())
    return lines


def first_few(names: Sequence[str]) -> str:
    """Join the first three names, and state the number of further ones."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
