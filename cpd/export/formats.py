"""The formats that `cpd export` writes, by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple, cast

#: Writes what `source` (a run directory or a published folder) holds to the folder `output`; of elements, only
#: those with names in `only`, or in folders of these names, if there are any. Returns, or yields, what is written.
Exporter = Callable[[Path, Path, Sequence[str]], Iterable[Path]]


class Format(NamedTuple):
    """A format of another tool."""

    module: str
    """Of `cpd.export`; its function `export_<format>` is the exporter."""
    summary: str


FORMATS: Final = {
    "onnx": Format("onnx", "policies of students and teachers, to act without torch"),
    "hub": Format("hub", "policies as folders for a model hub, each with a model card"),
    "minari": Format("minari", "rollouts of teachers as Minari datasets"),
    "robomimic": Format("robomimic", "rollouts of teachers as HDF5 files of robomimic"),
    "tensorboard": Format("curves", "learning curves of teachers and students for TensorBoard"),
    "wandb": Format("curves", "the same as offline runs of Weights & Biases"),
}


def load_exporter(name: str) -> Exporter:
    """Import the exporter of a format, which may need libraries that the base install lacks."""
    module = importlib.import_module(f"cpd.export.{FORMATS[name].module}")
    return cast(Exporter, getattr(module, f"export_{name}"))
