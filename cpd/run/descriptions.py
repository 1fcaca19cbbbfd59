"""The shapes of the JSON files beside policies, as far as they are read again; the files hold more."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict

from cpd.config.types import Count, Positive, Share
from cpd.run.provenance import Labels


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
    num_parameters: Positive
    memory_steps: Count
    memory_bytes: Count
    labels: Labels


class StudentPolicy(TypedDict):
    """The description of a student: what its weights need."""

    sha256: str
    student: dict[str, object]
    num_tasks: Positive
    num_experts: Positive
    dtype: Literal["float32", "float64"]
    obs_centre: list[float]
    obs_scale: list[float]
