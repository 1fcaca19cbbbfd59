"""The format of shards: field names, types, shapes and labels, and the index beside the shards.

A shard is one HDF5 file with one contiguous dataset per field over all of its episodes; `offsets` holds where
each episode's steps begin. Observations have one row more per episode than the other step fields: the
observation after the last step. Episode `e` has steps `offsets[e]:offsets[e + 1]` and observation rows
`offsets[e] + e : offsets[e + 1] + e + 1`.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field
from typing_extensions import TypedDict

from cpd.config.types import Count
from cpd.reading import DamagedFileError, read_json

#: Increased whenever fields or their meaning change; a reader accepts its own version only.
SCHEMA_VERSION: Final = 1

FloatArray = npt.NDArray[np.float32]

#: Per step: dtype, and whether a row is an action [A] or one number. Observations are apart, with T + 1 rows per
#: episode.
STEP_FIELDS: Final[dict[str, tuple[str, bool]]] = {
    "actions": ("float32", True),
    "teacher_mean": ("float32", True),
    "teacher_raw_mean": ("float32", True),
    "teacher_log_std": ("float32", True),
    "rewards": ("float32", False),
    "successes": ("uint8", False),
    "noise_scale": ("float32", False),
}
EPISODE_FIELDS: Final[dict[str, tuple[str, tuple[int, ...]]]] = {
    "goal_index": ("int64", ()),
    "seed": ("int64", ()),
    "episode_return": ("float64", ()),
    "episode_success": ("uint8", ()),
}
INDEX_NAME: Final = "index.json"
#: Names of shards; a sync tool or an editor may leave others beside them.
SHARD_NAME: Final = r"^shard-\d{5,}\.h5$"


class ShardError(DamagedFileError):
    """Rollouts that are damaged, missing, stale, or another teacher's; the message says which and what to do."""


def remedy(folder: Path) -> str:
    """Say what to do about a teacher's shards that cannot be used; a complete teacher collects no more."""
    return f"remove {folder} and {folder.parent / 'COMPLETE'}, and launch again to collect the rollouts again"


@dataclass(frozen=True)
class ShardAttributes:
    """The labels of a teacher's rollouts: root attributes of every shard, repeated in the index."""

    task: str
    teacher_recipe: str
    """How the teacher was made: `rl`, `scripted`, ..."""
    policy_sha256: str
    """Hash of the teacher's policy.safetensors; empty for a teacher without weights."""
    std_source: Literal["policy", "assumed"]
    """Whether `teacher_log_std` is the policy's own or a constant declared for a deterministic teacher."""
    metaworld: str
    mujoco: str
    reward_version: str
    horizon: int
    """Longest episode, in environment steps."""
    steps_after_success: int
    """Steps that an episode lasts beyond its first success."""
    schema_version: int = SCHEMA_VERSION
    suite: str | None = None
    """Like the next, as in `Labels`: absent for Meta-World."""
    suite_versions: str | None = None
    task_observation_size: int | None = None
    """Where the task's observations, and in the next field its actions, are smaller than the suite's largest: how
    many components the task has. Zeros follow them."""
    task_action_size: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the attributes that are not None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Episode:
    """One recorded episode of T steps.

    Attributes:
        observations: [T + 1, O] float32; row t is what the teacher saw before step t.
        actions: [T, A] float32, executed, in [-1, 1].
        teacher_mean: [T, A] float32, the teacher's mean as it would be executed, clipped to [-1, 1].
        teacher_raw_mean: [T, A] float32, the same before clipping.
        teacher_log_std: [T, A] float32.
        rewards: [T] float64, after each step.
        successes: [T] bool, the task's flag after each step, not latched.
        noise_scale: [T] float32, standard deviation of the noise added to the action; 0 where none was.
        goal_index: position of the goal among the training goals.
        seed: seed of this episode's noise, in 0 .. 2^63 - 1.
    """

    observations: FloatArray
    actions: FloatArray
    teacher_mean: FloatArray
    teacher_raw_mean: FloatArray
    teacher_log_std: FloatArray
    rewards: npt.NDArray[np.float64]
    successes: npt.NDArray[np.bool_]
    noise_scale: FloatArray
    goal_index: int
    seed: int

    def __post_init__(self) -> None:
        num_steps, action_size = self.actions.shape
        assert num_steps > 0
        assert len(self.observations) == num_steps + 1
        for name, (_, is_action) in STEP_FIELDS.items():
            assert getattr(self, name).shape == ((num_steps, action_size) if is_action else (num_steps,)), name

    def __len__(self) -> int:
        """Number of steps, T."""
        return len(self.actions)

    @property
    def episode_return(self) -> float:
        """Undiscounted sum of rewards."""
        return float(np.sum(self.rewards, dtype=np.float64))

    @property
    def episode_success(self) -> bool:
        """Whether the flag was set at any step."""
        return bool(self.successes.any())


@dataclass(frozen=True)
class ShardEntry:
    """The index's entry of one shard."""

    file: Annotated[str, Field(pattern=SHARD_NAME)]
    sha256: str
    num_bytes: Count
    num_steps: Count
    num_episodes: Count


@dataclass(frozen=True)
class ShardIndex:
    """The contents of index.json, written last: only what it lists has been published."""

    attributes: ShardAttributes
    shards: tuple[ShardEntry, ...]

    @property
    def num_steps(self) -> int:
        """Steps in all shards, N."""
        return sum(entry.num_steps for entry in self.shards)

    @property
    def num_episodes(self) -> int:
        """Episodes in all shards, E."""
        return sum(entry.num_episodes for entry in self.shards)

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "attributes": self.attributes.as_dict(),
            "num_steps": self.num_steps,
            "num_episodes": self.num_episodes,
            "shards": [asdict(entry) for entry in self.shards],
        }


class _Version(TypedDict):
    schema_version: int


class _AnyIndex(TypedDict):
    """What the indices of all versions have."""

    attributes: _Version


class _Totals(TypedDict):
    num_steps: int
    num_episodes: int


def shard_files(folder: Path) -> list[Path]:
    """Return the shards in `folder`, sorted, whether or not the index lists them."""
    return sorted(path for path in folder.glob("shard-*.h5") if re.search(SHARD_NAME, path.name))


def read_index(folder: Path) -> ShardIndex:
    """Read the index of a teacher's shards.

    Raises:
        ShardError: if it is missing, damaged or of another schema version.
    """
    path = folder / INDEX_NAME
    if not path.exists():
        raise ShardError(
            f"{folder} has no {INDEX_NAME}: its rollouts are missing or were not finished; {remedy(folder)}"
        )
    try:
        version = read_json(path, _AnyIndex, remedy(folder))["attributes"]["schema_version"]
        if version != SCHEMA_VERSION:
            raise ShardError(
                f"{path}: shards of schema version {version}, but this code reads version {SCHEMA_VERSION}; "
                + remedy(folder)
            )
        index = read_json(path, ShardIndex, remedy(folder))
        totals = read_json(path, _Totals, remedy(folder))
    except DamagedFileError as error:
        raise ShardError(str(error)) from None
    counts = totals["num_steps"], totals["num_episodes"]
    if counts != (index.num_steps, index.num_episodes):
        raise ShardError(
            f"{path} is damaged: its totals {counts} are not the sums over its shards; {remedy(folder)}"
        )
    return index
