"""The formats that `cpd export` writes, by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, cast

#: Writes what `source` (a run directory or a published folder) holds to the folder `output`; of elements, only
#: those with names in `only`, or in folders of these names, if there are any. Returns the files written.
Exporter = Callable[[Path, Path, Sequence[str]], list[Path]]

#: By format, a line of help. The function `export_<format>` of the module `cpd.export.<format>` writes it.
FORMATS: Final = {
    "onnx": "policies of students and teachers, to act without torch",
}


def load_exporter(name: str) -> Exporter:
    """Import the exporter of a format, which may need libraries that the base install lacks."""
    return cast(Exporter, getattr(importlib.import_module(f"cpd.export.{name}"), f"export_{name}"))
