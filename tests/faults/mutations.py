"""Damages one file of a run at a time, runs a command on it in this process, and says what came of it."""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Verdict = Literal["harmless", "refused", "traceback", "unnamed", "changed"]
#: What a test accepts. A command that recomputes what was damaged is harmless: its results are the same.
ACCEPTED = ("harmless", "refused")
HUGE = "1" + 30 * "0"


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values in nested JSON, tables and lists included."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from _leaves(inner, (*path, key))


def _in_json(change: Callable[[Any, Any, random.Random], None]) -> Callable[[bytes, random.Random], bytes]:
    """A mutation of one entry of a JSON file, or of one line of a JSON-lines file."""

    def mutate(content: bytes, rng: random.Random) -> bytes:
        try:
            text = content.decode()
            lines = [text] if text.startswith(("{\n", "[\n")) else text.splitlines(keepends=True)
            number = rng.randrange(len(lines))
            data = json.loads(lines[number])
            *above, key = rng.choice(list(_leaves(data)))
        except (ValueError, IndexError):
            return content
        table = data
        for step in above:
            table = table[step]
        change(table, key, rng)
        indent = 2 if len(lines) == 1 and lines[0].startswith(("{\n", "[\n")) else None
        lines[number] = json.dumps(data, indent=indent).replace(f'"{HUGE}"', HUGE) + "\n"
        return "".join(lines).encode()

    return mutate


def _set(value: Any) -> Callable[[Any, Any, random.Random], None]:
    def change(table: Any, key: Any, rng: random.Random) -> None:
        table[key] = value

    return change


def _set_number(value: Any) -> Callable[[Any, Any, random.Random], None]:
    def change(table: Any, key: Any, rng: random.Random) -> None:
        if isinstance(table[key], int | float):
            table[key] = value

    return change


def _other_type(table: Any, key: Any, rng: random.Random) -> None:
    table[key] = [str(table[key])] if isinstance(table[key], int | float | bool | None) else 7


def _negate(table: Any, key: Any, rng: random.Random) -> None:
    if isinstance(table[key], int | float):
        table[key] = -1 - abs(table[key])


def _rename(table: Any, key: Any, rng: random.Random) -> None:
    if isinstance(table, dict):
        table[f"{key}_"] = table.pop(key)


def _truncated(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))] if content else content


def _flipped(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    if changed:
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


#: Mutations of any file, by name.
WHOLE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "truncated": _truncated,
    "empty": lambda content, rng: b"",
    "noise": lambda content, rng: rng.randbytes(max(len(content), 40)),
}
TEXT = WHOLE | {
    "object": lambda content, rng: b"{}\n",
    "list": lambda content, rng: b"[]\n",
    "null": lambda content, rng: b"null\n",
    "number": lambda content, rng: b"7\n",
    "utf-16": lambda content, rng: content.decode().encode("utf-16"),
    "byte-order mark": lambda content, rng: b"\xef\xbb\xbf" + content,
    "latin-1": lambda content, rng: content.replace(b"e", b"\xe9", 3),
}
JSON = TEXT | {
    "other type": _in_json(_other_type),
    "null entry": _in_json(_set(None)),
    "not a number": _in_json(_set_number(float("nan"))),
    "huge": _in_json(_set_number(HUGE)),
    "huge float": _in_json(_set_number(1e308)),
    "negative": _in_json(_negate),
    "renamed key": _in_json(_rename),
    "empty table": _in_json(_set({})),
}
BINARY = WHOLE | {"flipped bit": _flipped}
#: Mutations that remove the file, replace it by something else, or set something beside it.
PLACES = ("missing", "directory", "dangling link", "link to itself", "stray copies")
STRAYS = (
    "{stem} (conflicted copy){suffix}",
    "{name}~",
    ".{name}.swp",
    ".nfs000000000123",
    ".DS_Store",
    "{stem}-1{suffix}",
)


def kinds(path: Path) -> list[str]:
    """The names of the mutations that suit a file."""
    # Any number may stand in a record of training, which may diverge.
    is_text = path.suffix in (".csv", ".toml") or path.name == "metrics.jsonl"
    table = TEXT if is_text else JSON if path.suffix in (".json", ".jsonl") else BINARY
    # Some methods have none of these tables, and published results of earlier versions lack others.
    is_optional = path.parent.name == "published" or path.name.endswith((".usage.csv", ".retrieval.csv"))
    return [*table, *(place for place in PLACES if not (is_optional and place == "missing"))]


def damage(path: Path, kind: str, rng: random.Random) -> bool:
    """Damage a file; returns whether anything has changed."""
    if kind == "missing":
        path.unlink()
    elif kind == "directory":
        path.unlink()
        path.mkdir()
    elif kind == "link to itself":
        path.unlink()
        path.symlink_to(path.name)
    elif kind == "dangling link":
        path.unlink()
        path.symlink_to(path.with_name("nowhere"))
    elif kind == "stray copies":
        for name in STRAYS:
            copy = path.with_name(name.format(name=path.name, stem=path.stem, suffix=path.suffix))
            copy.write_bytes(path.read_bytes()[: rng.randrange(1 + path.stat().st_size)])
    else:
        content = path.read_bytes()
        mutated = (JSON | BINARY)[kind](content, rng)
        path.write_bytes(mutated)
        return mutated != content
    return True


class Workspace:
    """A copy of a folder in which files change, and which is the original again after each case."""

    def __init__(self, original: Path, copy: Path) -> None:
        self.original, self.root = original, copy
        shutil.copytree(original, copy, symlinks=True)
        self._clean = self._state()

    def _state(self) -> dict[str, tuple[int, int, int]]:
        state = {}
        folders = [str(self.root)]
        while folders:
            for entry in os.scandir(folders.pop()):
                info = entry.stat(follow_symlinks=False)
                is_folder = entry.is_dir(follow_symlinks=False)
                folders += [entry.path] if is_folder else []
                name = entry.path[len(str(self.root)) + 1 :]
                state[name] = (0, 0, info.st_mode) if is_folder else (info.st_mtime_ns, info.st_size, info.st_ino)
        return state

    def restore(self) -> None:
        """Undo all changes; only what has changed is copied."""
        state = self._state()
        for name in sorted(state.keys() - self._clean.keys(), reverse=True):
            path = self.root / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        changed = [name for name in sorted(self._clean) if state.get(name) != self._clean[name]]
        for name in changed:
            source, target = self.original / name, self.root / name
            if target.is_dir() and not target.is_symlink() and not source.is_dir():
                shutil.rmtree(target)
            elif target.is_symlink() or (target.exists() and source.is_dir() and not target.is_dir()):
                target.unlink()
            if source.is_dir():
                target.mkdir(exist_ok=True)
            else:
                shutil.copy2(source, target)
        if changed:
            self._clean = self._state()


def _digest(path: Path) -> str:
    """A hash of a file's content, with or without a byte-order mark."""
    return hashlib.sha256(path.read_bytes().removeprefix(codecs.BOM_UTF8)).hexdigest()


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    output: str
    error: str
    results: dict[str, str]


@dataclass(frozen=True)
class Scene:
    """A command in a folder.

    Attributes:
        name: of the command.
        run: the command's main function with its arguments.
        results: the files that must not change, as patterns; none for a command that only displays.
        damaged: the files that are damaged, as patterns.
    """

    name: str
    workspace: Workspace
    run: Callable[[Path], int]
    results: tuple[str, ...]
    damaged: tuple[str, ...]

    def files(self) -> list[str]:
        """The files that are damaged."""
        root = self.workspace.root
        paths = {path for pattern in self.damaged for path in root.glob(pattern) if path.is_file()}
        return sorted(path.relative_to(root).as_posix() for path in paths)

    def play(self) -> Outcome:
        """Run the command as it is now, without restoring anything."""
        output, error = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
            try:
                code = self.run(self.workspace.root)
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 1
            except Exception:
                code = -1
                traceback.print_exc()
        root = self.workspace.root
        files = sorted({path for pattern in self.results for path in root.glob(pattern) if path.is_file()})
        hashes = {path.relative_to(root).as_posix(): _digest(path) for path in files}
        return Outcome(code, output.getvalue(), error.getvalue(), hashes)

    def judge(self, file: str, kind: str, seed: int, wanted: Outcome) -> tuple[Verdict, str]:
        """Damage one file, run the command, restore everything; returns the verdict and what was said."""
        path = self.workspace.root / file
        try:
            damage(path, kind, random.Random(f"{file} {kind} {seed}"))
            outcome = self.play()
        finally:
            self.workspace.restore()
        return self._verdict(path, outcome, wanted), f"code {outcome.code}\n{outcome.error}{outcome.output[-500:]}"

    def _verdict(self, path: Path, outcome: Outcome, wanted: Outcome) -> Verdict:
        if outcome.code == -1 or "Traceback" in outcome.error:
            return "traceback"
        if outcome.code == wanted.code:
            # A command leaves a damaged result that it does not read as it is; whatever reads it next refuses it.
            wrong = {file for file, digest in wanted.results.items() if outcome.results.get(file) != digest}
            wrong.discard(path.relative_to(self.workspace.root).as_posix())
            # What is done anew later may be missing if the command says so.
            is_told = not wrong & outcome.results.keys() and path.parent.parent.name in outcome.output
            is_told |= "has not been evaluated after" in outcome.output
            return "harmless" if not wrong or is_told else "changed"
        told = outcome.error + outcome.output
        names = (path.name, path.stem, path.parent.name, path.parent.parent.name)
        return "refused" if any(name in told for name in names) else "unnamed"


def cases(scenes: Sequence[Scene], count: int, seed: int) -> list[tuple[Scene, str, str, int]]:
    """Choose `count` cases evenly from all scenes, files and mutations."""
    rng = random.Random(seed)
    chosen: list[tuple[Scene, str, str, int]] = []
    decks: dict[str, list[tuple[str, str]]] = {}
    while len(chosen) < count:
        for scene in scenes:
            deck = decks.setdefault(scene.name, [])
            if not deck:
                root = scene.workspace.root
                deck += [(file, kind) for file in scene.files() for kind in kinds(root / file)]
                rng.shuffle(deck)
            chosen.append((scene, *deck.pop(), rng.randrange(10**6)))
    return chosen[:count]
