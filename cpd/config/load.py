"""Strict loading of TOML into dataclasses: all mistakes at once, each with its dotted path and a suggestion.

Command-line overrides (`--distill.lr 1e-3`) are merged into a recipe's tables before anything is checked, so
that the mistakes of both are reported together.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict, is_typeddict

from cpd.config.retired import explain, upgrade

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
#: Stands in `problems` for the path of a mistake of several settings together, and is not shown.
WHOLE = "(whole)"


class ConfigError(ValueError):
    """One or more mistakes in a recipe, profile or override; `str()` lists them all, one a line."""

    def __init__(self, problems: Sequence[str], source: str) -> None:
        self.problems = list(problems)
        self.source = source
        lines = "\n".join(f"  {problem.removeprefix(f'{WHOLE}: ')}" for problem in problems)
        count = f"{len(problems)} mistakes" if len(problems) > 1 else "a mistake"
        super().__init__(f"{source} has {count}:\n{lines}")


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the one or two nearest known words; empty if there are none like it."""
    close = difflib.get_close_matches(word, list(known), n=2, cutoff=0.6)
    return "; did you mean " + " or ".join(repr(match) for match in close) + "?" if close else ""


def suggestion(word: str, known: Iterable[str]) -> str:
    """The nearest known words, and all of them if they are few enough to read."""
    known = list(known)
    return nearest(word, known) + (f" (known: {', '.join(known)})" if len(known) <= 30 else "")


T = TypeVar("T")


def load(kind: type[T], data: Mapping[str, Any], source: str) -> T:
    """Check `data`, which an earlier version may have written, against the dataclass `kind`.

    Raises:
        ConfigError: with every mistake, each as dotted path, what is wrong, and a suggestion.
    """
    try:
        # By way of JSON, since its strict mode still takes a list for a tuple; dates, which JSON has not, as text.
        return TypeAdapter(kind).validate_json(json.dumps(upgrade(data), default=str), strict=True)
    except ValidationError as error:
        items = error.errors(include_url=False)
        problems = [line for item in items if not _follows(item, items) for line in _problems(kind, item)]
        raise ConfigError(problems, source) from None


def overrides_of(kind: Any) -> Any:
    """The type of tables that hold any of the settings of dataclass `kind` and of its sections, and no others."""
    hints = get_type_hints(kind, include_extras=True)
    entries = {name: overrides_of(hint) if is_dataclass(hint) else hint for name, hint in hints.items()}
    make: Any = TypedDict
    made = make(f"{kind.__name__}Overrides", entries, total=False)
    made.__pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    return made


def _follows(item: Any, items: Sequence[Any]) -> bool:
    """Whether one of pydantic's errors only follows from others: it does not count a list's wrong entries."""
    where = item["loc"]
    inside = (other["loc"] for other in items if len(other["loc"]) > len(where))
    return item["type"] == "too_short" and any(location[: len(where)] == where for location in inside)


def _problems(kind: Any, item: Any) -> list[str]:
    """The lines for one of pydantic's errors; a ConfigError raised by a dataclass itself has lines of its own."""
    inner = item.get("ctx", {}).get("error")
    return inner.problems if isinstance(inner, ConfigError) else [_problem(kind, item)]


def _members(owner: Any) -> Mapping[str, Any]:
    """The types of an owner's settings by name; those of a table with names of the user's choice are unknown."""
    return get_type_hints(owner) if is_dataclass(owner) or is_typeddict(owner) else {}


def _problem(kind: Any, item: Any) -> str:
    location = [part for part in item["loc"] if part != "__root__"]
    path = ".".join(str(part) for part in location) or WHOLE
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        if explanation := explain(path):
            return f"{path}: {explanation} (given: {item['input']!r})"
        owner = kind
        for part in location[:-1]:
            values = get_args(owner)[1:] if get_origin(owner) in (dict, Mapping) else ()
            owner = values[0] if values else _members(owner).get(str(part), Any)
        return f"{path}: unknown key{suggestion(str(location[-1]), _members(owner))}"
    if item["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{path}: required, but not given"
    message = item["msg"].removeprefix("Value error, ")
    given = "" if item["type"] == "value_error" else f" (given: {item['input']!r})"
    return f"{path}: {message}{given}{_remedy(item)}"


def _remedy(item: Any) -> str:
    """What to write in place of a value of a wrong type, where pydantic's words leave that open."""
    if item["type"] in ("tuple_type", "list_type") and not isinstance(item["input"], dict):
        return f"; write a list: {listed(item['input'])}"
    return "; write true or false" if item["type"] == "bool_type" else ""


def listed(value: Any) -> list[Any]:
    """The list that was meant by a value which is none: by `1,2`, `1 2` and `[a]` without its quotes, too."""
    if not isinstance(value, str):
        return [value]
    text = value.strip("[] ")
    # Not at the spaces of words, which may be a single command.
    parts = text.split(",") if "," in text or any(map(str.isalpha, text)) else text.split()
    return [_toml_value(part.strip()) for part in parts if part.strip()]


def read_toml(path: Path, above: tuple[Path, ...] = (), *, shipped: Path | None = None) -> dict[str, Any]:
    """The tables of a TOML file, on top of those of the file that it `extends`.

    Args:
        path: the file. Its `extends` is another one's path from its own folder; the suffix may be left out.
        above: files that extend this one, from the first on.
        shipped: a folder in which the name of a file to extend is looked for if there is none such beside `path`.

    Raises:
        ConfigError: if one of them cannot be read or parsed, naming the file and line.
    """
    try:
        tables = tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise ConfigError([f"cannot be read: {error.strerror}"], str(path)) from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        told = f"byte {error.object[error.start]:#04x} at position {error.start} (line {line})"
        raise ConfigError([f"not UTF-8: {told}; save the file as UTF-8"], str(path)) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f"not valid TOML: {error}"], str(path)) from None
    base = tables.pop("extends", None)
    if base is None:
        return upgrade(tables)
    if not isinstance(base, str):
        raise ConfigError([f"extends: the name of one file is expected (given: {base!r})"], str(path))
    base_path = _base_path(path, base, shipped)
    if base_path in (chain := (*above, path.resolve())):
        raise ConfigError([f"extends: {base!r} extends this file in turn"], str(path))
    # Each file on its own: of two names of one setting, the one in the upper file counts.
    return merge(read_toml(base_path, chain, shipped=shipped), upgrade(tables))


def _base_path(path: Path, base: str, shipped: Path | None) -> Path:
    """The file that `path` extends by the name of `base`: beside it, or else in the folder `shipped`."""
    name = f"{base.removesuffix('.toml')}.toml"
    beside = (path.parent / name).resolve()
    if beside.exists():
        return beside
    known = sorted(file.stem for file in shipped.glob("*.toml")) if shipped else []
    if shipped and base.removesuffix(".toml") in known:
        return (shipped / name).resolve()
    neither = f", nor is it a name in {shipped}{suggestion(base, known)}" if shipped else ""
    raise ConfigError(
        [
            f"extends: {base!r}: there is no {beside}{neither}; write the path of the file to extend, relative to "
            "the folder of this one"
        ],
        str(path),
    )


def _toml_value(text: str) -> Any:
    """What `text` is as a value in TOML; itself if it is none."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Turn `["--distill.lr", "1e-3", "--seeds=[1, 2]"]` into nested tables.

    A value is read as TOML, and as a plain string where that fails.

    Raises:
        ConfigError: for an argument that is not of that form.
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
        parts = key.split(".")
        # Not in the labels of variants, which are the user's own.
        *sections, last = [p if parts[:i] == ["variants"] else p.replace("-", "_") for i, p in enumerate(parts)]
        table: Any = tables
        for section in sections:
            table = table.setdefault(section, {}) if isinstance(table, dict) else None
        if not isinstance(table, dict) or isinstance(table.get(last), dict):
            problems.append(
                f"--{key}: given both as a value and as a table of settings; name one setting at a time"
            )
            continue
        table[last] = _toml_value(text)
    if problems:
        raise ConfigError(problems, "the command line")
    return upgrade(tables)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the entries of `over` laid on top, table by table."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain tables, ready for JSON."""
    result: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return result


def setting_lines(kind: Any, prefix: str = "") -> list[str]:
    """Every setting as `--dotted.key  default  meaning`, for help; the meaning ends with the values allowed."""
    lines = []
    for name, info in kind.__pydantic_fields__.items():
        if hasattr(info.annotation, "__pydantic_fields__"):
            lines += setting_lines(info.annotation, f"{prefix}{name}.")
        else:
            value = None if info.is_required() else info.get_default(call_default_factory=True)
            default = "(required)" if info.is_required() else repr(value)
            choices = get_args(info.annotation) if get_origin(info.annotation) is Literal else ()
            allowed = f" One of {', '.join(map(str, choices))}." if choices else ""
            meaning = " ".join(f"{info.description or ''}{allowed}".split())
            lines.append(f"  --{prefix + name:<36} {default:<16} {meaning}".rstrip())
    return lines


def first_few(names: Sequence[str]) -> str:
    """The first three, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
