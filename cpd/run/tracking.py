"""Learning curves in TensorBoard and Weights & Biases, made of the records of metrics.jsonl."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from cpd.config.types import Tracker
from cpd.run.directory import Element, Run, StudentElement
from cpd.run.progress import MetricsLog, read_metrics
from cpd.run.shortage import describe_error

#: Entries that say where in training a record is, not what was measured there.
POSITIONS: Final = ("global_step", "stage", "step", "iteration", "env_steps")
#: Events that a curve shows. Of others there may be several in one step.
PLOTTED_EVENTS: Final = ("protection", "evaluation")
#: The step of a point, and its values by name.
Point = tuple[int, dict[str, float]]


def points(element: Element, records: Iterable[Mapping[str, Any]]) -> Iterator[Point]:
    """Yield a point for every record of an element, in the order of training.

    Steps are environment steps of a teacher, and optimisation steps of a student since the start of its stream.
    """
    steps_per_stage = element.config.distill.steps_per_stage if isinstance(element, StudentElement) else 0
    step = 0
    for record in records:
        if "global_step" in record or "env_steps" in record:
            step = record.get("global_step", record.get("env_steps"))
        elif "step" in record:  # files of earlier versions; their events have the step of the record before
            step = record["stage"] * steps_per_stage + record["step"]
        if record.get("event", PLOTTED_EVENTS[0]) in PLOTTED_EVENTS:
            yield (
                step,
                {
                    name.replace(".", "/", 1): float(value)
                    for name, value in record.items()
                    if name not in POSITIONS and isinstance(value, int | float) and math.isfinite(value)
                },
            )


class CurveWriter(Protocol):
    """Writes the curves of one element for a tool that plots them."""

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to the curve of every name in `values`."""

    def close(self) -> None:
        """Finish the files."""


class TensorBoardWriter:
    """Writes an event file to `folder`, which replaces those of earlier attempts."""

    def __init__(self, folder: Path, first: Iterable[Point] = (), now: Callable[[], float] = time.time) -> None:
        """Write the points `first`, so that no earlier file counts; `now` returns the Unix time of an event."""
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._now = event_pb2.Event, summary_pb2.Summary, now
        folder.mkdir(parents=True, exist_ok=True)
        earlier = sorted(folder.glob("events.out.tfevents.*"))
        number = int(earlier[-1].suffix[1:]) + 1 if earlier else 0
        self._writer = RecordWriter((folder / f"events.out.tfevents.{number:010d}").open("xb"))
        self._write(file_version="brain.Event:2")
        # A running TensorBoard drops the points of earlier attempts; those that still count follow again.
        self._write(step=0, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))
        for step, values in first:
            self.add(step, values)
        for path in earlier[:-1]:  # a running TensorBoard has the last one open
            path.unlink()

    def _write(self, **fields: Any) -> None:
        self._writer.write(self._event(wall_time=self._now(), **fields).SerializeToString(deterministic=True))
        self._writer.flush()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to the curve of every name in `values`."""
        entries = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step=step, summary=self._summary(value=entries))

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class WandbWriter:
    """Writes a run of Weights & Biases to `folder`: without network, in place of what earlier attempts wrote.

    With `mode="online"` it continues the run `run_id` on the server.
    """

    def __init__(
        self, folder: Path, run_id: str, name: str, group: str, first: Iterable[Point] = (), mode: str = "offline"
    ) -> None:
        """Remove the offline files of earlier attempts, and write the points `first`."""
        from wandb import Settings, init

        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f"wandb/offline-run-*-{run_id}"):  # all in it is in `first`, or counts no more
            shutil.rmtree(path)
        self._run = init(
            project=os.environ.get("WANDB_PROJECT", "cpd"),
            id=run_id,
            name=name,
            group=group,
            dir=folder,
            mode=mode,
            resume="allow",
            reinit="create_new",
            settings=Settings(console="off", silent=True, x_disable_stats=True, disable_git=True),
        )
        for step, values in first:
            self.add(step, values)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to the curve of every name in `values`."""
        if step >= self._run.step:  # the server has the earlier ones
            self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def run_id(element: Element) -> str:
    """Return the name of an element's run in Weights & Biases, the same for all of its attempts."""
    return f"{Run(element.root).digest}-{element.name.replace('/', '-')}"


def _live_curves(tracker: Tracker, element: Element, first: Iterable[Point]) -> CurveWriter:
    root = element.root
    if tracker == "tensorboard":
        return TensorBoardWriter(root / tracker / element.name, first)
    mode = os.environ.get("WANDB_MODE", "offline")
    return WandbWriter(root, run_id(element), element.name, Run(root).config.name, first, mode)


class TrackedMetricsLog(MetricsLog):
    """A metrics.jsonl whose records also go to live curves; their first error is a warning, and ends them."""

    def __init__(self, element: Element, size: int, tracker: Tracker, log: Callable[[str], None]) -> None:
        """Keep the first `size` bytes of the element's file, and begin the curves with the records in them."""
        super().__init__(element.metrics, size)
        self._element, self._tracker, self._log = element, tracker, log
        self._curves: CurveWriter | None = None
        with self._warning():
            self._curves = _live_curves(tracker, element, points(element, read_metrics(element.metrics)))

    @contextlib.contextmanager
    def _warning(self) -> Iterator[None]:
        """Let no error of a tracker stop the job."""
        try:
            yield
        except Exception as error:
            self._curves = None
            reason = describe_error(error, self._element.root)
            self._log(f"warning: no live curves of {self._tracker} from here on: {reason}")

    def append(self, **values: float | int | str | None) -> None:
        """Write one record, and its point to the curves."""
        super().append(**values)
        with self._warning():
            for point in points(self._element, [values]):
                if self._curves:
                    self._curves.add(*point)

    def close(self) -> None:
        """Close the file and the curves."""
        super().close()
        with self._warning():
            if self._curves:
                self._curves.close()
