"""Types of numbers and names for settings."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo
from pydantic_core import PydanticKnownError

from cpd.config.load import listed, suggestion
from cpd.envs.suite import DEFAULT_SUITE, Suite, is_task, load_suite

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]


def joined_suites(names: object) -> object:
    """Return the name of the mixture of several suites (`["metaworld", "gym-mujoco"]`)."""
    is_list = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    return "+".join(names) if is_list else names  # type: ignore[arg-type]


def check_suite_name(name: str) -> str:
    """Raise ValueError unless there is a suite of this name."""
    load_suite(name)
    return name


def _suite_of(info: ValidationInfo) -> Suite:
    """Return the suite of the table that is being checked; Meta-World if its name is wrong, which is reported."""
    return load_suite((info.data or {}).get("suite", DEFAULT_SUITE))


def expand_stream(value: object, info: ValidationInfo) -> object:
    """Replace the name of a stream (`"cw10"`) by its tasks."""
    if not isinstance(value, str):
        return tuple(value) if isinstance(value, list) else value
    suite = _suite_of(info)
    if value in suite.streams:
        return suite.streams[value]
    tasks = listed(value)
    if len(tasks) > 1 or value.startswith("[") or value in suite.tasks:
        raise ValueError(f"{value!r} is not a stream; write a list of tasks: {tasks}")
    raise ValueError(f"unknown stream {value!r}{suggestion(value, suite.streams)}")


def check_task_of_suite(task: str, info: ValidationInfo) -> str:
    """Raise ValueError unless the suite of the table has this task."""
    tasks = _suite_of(info).tasks
    if task not in tasks:
        raise ValueError(f"unknown task {task!r}{suggestion(task, tasks)}")
    return task


def check_horizon(steps: int, info: ValidationInfo) -> int:
    """Raise ValueError if episodes of the table's suite end earlier."""
    if steps > (limit := _suite_of(info).horizon):
        raise PydanticKnownError("less_than_equal", {"le": limit})
    return steps


def _check_task(task: str) -> str:
    if not is_task(task):
        raise ValueError(f"unknown task {task!r}{suggestion(task, load_suite().tasks)}")
    return task


def _check_distinct(values: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(values)) != len(values):
        raise ValueError("seeds must not repeat")
    return values


# Meta-World's custom-mt environments treat seed 0 as unseeded, so all seeds start from 1.
Seeds = Annotated[tuple[Positive, ...], Field(min_length=1), AfterValidator(_check_distinct)]
#: A task of any suite that this process uses.
Task = Annotated[str, AfterValidator(_check_task)]
#: One of the suite that `suite` in the same table names.
TaskOfSuite = Annotated[str, AfterValidator(check_task_of_suite)]
EpisodeChoice = Literal["successful", "all"]


def is_given(settings: Any, name: str) -> bool:
    """Whether a setting of a section differs from its default."""
    return bool(getattr(settings, name) != getattr(type(settings)(), name))


#: Where live learning curves go; empty: nowhere.
Tracker = Literal["", "tensorboard", "wandb"]
Role = Literal["teacher", "student", "evaluation", "report"]
