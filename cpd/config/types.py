"""Types of numbers and names for settings."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from cpd.config.load import listed, suggestion
from cpd.envs.metaworld.tasks import ALL_TASKS, STREAMS

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]


def expand_stream(value: object) -> object:
    """Replace the name of a stream (`"cw10"`) by its tasks."""
    if not isinstance(value, str):
        return tuple(value) if isinstance(value, list) else value
    if value in STREAMS:
        return STREAMS[value]
    tasks = listed(value)
    if len(tasks) > 1 or value.startswith("[") or value in ALL_TASKS:
        raise ValueError(f"{value!r} is not a stream; write a list of tasks: {tasks}")
    raise ValueError(f"unknown stream {value!r}{suggestion(value, STREAMS)}")


def _check_task(task: str) -> str:
    if task not in ALL_TASKS:
        raise ValueError(f"unknown task {task!r}{suggestion(task, ALL_TASKS)}")
    return task


def _check_distinct(values: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(values)) != len(values):
        raise ValueError("seeds must not repeat")
    return values


# Meta-World's custom-mt environments treat seed 0 as unseeded, so all seeds start from 1.
Seeds = Annotated[tuple[Positive, ...], Field(min_length=1), AfterValidator(_check_distinct)]
Task = Annotated[str, AfterValidator(_check_task)]
EpisodeChoice = Literal["successful", "all"]


def is_given(settings: Any, name: str) -> bool:
    """Whether a setting of a section differs from its default."""
    return bool(getattr(settings, name) != getattr(type(settings)(), name))


#: Where live learning curves go; empty: nowhere.
Tracker = Literal["", "tensorboard", "wandb"]
Role = Literal["teacher", "student", "evaluation", "report"]
