"""The JSON files beside policies: what each states about itself, and shapes of what is read again of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from cpd.config.types import Count, Positive, Share
from cpd.reading import DamagedFileError, read_json
from cpd.run.provenance import Labels


def check_identity(path: Path, **expected: Any) -> None:
    """Check what the JSON file `path` states about itself; files of earlier versions state less.

    Raises:
        DamagedFileError: if an entry is not as expected.
    """
    stated = read_json(path, dict[str, Any])
    for name, value in expected.items():
        if stated.get(name, value) != value:
            raise DamagedFileError(
                f"{path} does not belong here: it is of {name} {stated[name]!r}, not {value!r}; put the right "
                "file back, or remove it with all that was made from it, and launch again"
            )


class Weights(TypedDict):
    """The description of any policy: the hash of its weights."""

    sha256: str


class RlStart(TypedDict):
    """A teacher's policy at the start of RL."""

    validation_success: Share
    demonstration_env_steps: Count


class Training(TypedDict):
    """The training of a teacher by any recipe."""

    validation_success: Share
    stopped_by: NotRequired[str]
    env_steps: NotRequired[Count]


class RlTraining(TypedDict):
    """The training of a teacher by RL."""

    validation_success: Share
    stopped_by: str
    env_steps: Count
    iterations: Count
    selected_iteration: Count
    policy_updates: Count
    warm_start: RlStart | None
    """None for a teacher trained from scratch."""


class Policy(TypedDict):
    """The description of a teacher's policy."""

    task: str
    seed: int
    sha256: str
    labels: Labels
    training: Training


class RlPolicy(TypedDict):
    """The description of a policy that was trained by RL."""

    training: RlTraining


class StudentSize(TypedDict):
    """The description of a student: its size and what it stores."""

    task: str | None
    num_experts: Positive
    num_parameters: Count
    memory_steps: Count
    memory_bytes: Count
    labels: Labels


class StudentStream(TypedDict):
    """The description of a student: the tasks that it knows by position."""

    distinct_tasks: list[str]


class _SuiteLabel(TypedDict):
    suite: NotRequired[str | None]


class StudentPolicy(TypedDict):
    """The description of a student: what its weights need."""

    sha256: str
    student: dict[str, object]
    num_tasks: Positive
    num_experts: Positive
    dtype: Literal["float32", "float64"]
    obs_centre: list[float]
    obs_scale: list[float]
    labels: NotRequired[_SuiteLabel]
