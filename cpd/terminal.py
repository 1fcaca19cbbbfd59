"""The terminal: texts that are not ours are shown as they are."""

from __future__ import annotations

from typing import Any

from rich.console import Console


def plain_console(**options: Any) -> Console:
    """Return a console that takes no text, such as a path or an error message, for markup or emoji codes."""
    return Console(markup=False, emoji=False, highlight=False, **options)


def printable(text: str) -> str:
    """Return `text` with spaces for the characters that control a terminal, except newlines."""
    return "".join(letter if letter.isprintable() or letter == "\n" else " " for letter in text)
