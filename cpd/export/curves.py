"""Learning curves of teachers and students for tools that plot them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from cpd.export.sources import elements_with_metrics
from cpd.run.directory import Run
from cpd.run.files import atomic_folder
from cpd.run.progress import read_metrics, read_status
from cpd.run.tracking import TensorBoardWriter, WandbWriter, points, run_id


def export_tensorboard(source: Path, output: Path, only: Sequence[str]) -> Iterator[Path]:
    """Write the curves of every element that has some to a folder of its name, as `Exporter` describes."""
    for element in elements_with_metrics(source, only):
        # One time for all: records have none, and the same run gives the same bytes.
        updated = read_status(element.status).updated
        with atomic_folder(output / element.name) as folder:
            curves = points(element, read_metrics(element.metrics))
            TensorBoardWriter(folder, curves, now=lambda: updated).close()  # noqa: B023
        yield output / element.name


def export_wandb(source: Path, output: Path, only: Sequence[str]) -> Iterator[Path]:
    """Write the curves of every element that has some to an offline run, as `Exporter` describes."""
    name = Run(source).config.name
    for element in elements_with_metrics(source, only):
        curves = points(element, read_metrics(element.metrics))
        WandbWriter(output, run_id(element), element.name, name, curves).close()
        yield from output.glob(f"wandb/offline-run-*-{run_id(element)}")
