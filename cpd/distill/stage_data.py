"""The data of a stage: which teachers were admitted, and their rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from cpd.comm import Comm
from cpd.config.types import EpisodeChoice
from cpd.distill.memory.segments import Segments
from cpd.reading import DamagedFileError, read_json
from cpd.run.descriptions import Weights, check_identity
from cpd.run.directory import Run, StudentElement, TeacherElement, identity
from cpd.run.files import sha256
from cpd.run.provenance import labels
from cpd.run.shards.mapped import MappedRows, Rows
from cpd.run.shards.reader import Rollouts, read_rollouts
from cpd.run.shards.schema import INDEX_NAME

#: There may be a segment for every step of a stage, and stages larger than memory; memories hold int64.
SEGMENT_TYPE: Final = np.int32


@dataclass(frozen=True)
class StageData:
    """The data of a stage: rollouts of one teacher, N steps in E episodes."""

    task: int
    """Position of the task among the stream's distinct ones."""
    offsets: npt.NDArray[np.int64]
    """[E + 1] int64; episode e has steps offsets[e]:offsets[e + 1]."""
    observations: Rows
    """[N, O] float32, raw."""
    teacher_mean: Rows
    """[N, A] float32, clipped to [-1, 1] like executed actions."""
    teacher_log_std: Rows
    """[N, A] float32."""
    others: tuple[StageData, ...] = ()
    """Data of other tasks that the stage distils together with it (protocol `joint`)."""

    @classmethod
    def from_rollouts(cls, rollouts: Rollouts, tasks: Sequence[str], episodes: EpisodeChoice = "all") -> StageData:
        """Select what distillation uses of `rollouts`.

        Args:
            rollouts: all rollouts of the teacher.
            tasks: the distinct tasks of the stream.
            episodes: `successful` drops failed episodes, unless all failed.
        """
        lengths = np.diff(rollouts.offsets)
        kept = rollouts.episode_success if episodes == "successful" else np.ones(len(lengths), np.bool_)
        if not kept.any():
            kept = np.ones_like(kept)

        def chosen(rows: Rows) -> Rows:
            if kept.all():
                return rows
            return rows.of_episodes(kept) if isinstance(rows, MappedRows) else rows[np.repeat(kept, lengths)]

        return cls(
            tasks.index(rollouts.task),
            np.concatenate([[0], np.cumsum(lengths[kept])]),
            chosen(rollouts.observations),
            chosen(rollouts.teacher_mean),
            chosen(rollouts.teacher_log_std),
        )

    @property
    def num_steps(self) -> int:
        """N."""
        return len(self.observations)

    def segments(self, length: int) -> Segments:
        """Cut all steps on a fixed grid into segments, from which the memory selects.

        Args:
            length: steps of a segment; an episode's last one may be shorter. Every step lies in one segment.
        """
        counts_E = -(-np.diff(self.offsets) // length)
        begins_E = np.cumsum(counts_E) - counts_E
        first_step = np.arange(counts_E.sum(), dtype=SEGMENT_TYPE)
        first_step *= length
        first_step += np.repeat((self.offsets[:-1] - begins_E * length).astype(SEGMENT_TYPE), counts_E)
        opens_episode = np.zeros(len(first_step), np.bool_)
        opens_episode[begins_E] = True
        return Segments(
            np.broadcast_to(np.int64(self.task), len(first_step)),
            first_step,
            np.diff(first_step, append=SEGMENT_TYPE(self.offsets[-1])),
            opens_episode,
            self.observations,
            self.teacher_mean,
            self.teacher_log_std,
        )


def admitted_teachers(
    run: Run, element: StudentElement, comm: Comm, *, partial: bool = False
) -> tuple[dict[str, TeacherElement], frozenset[str]]:
    """Return the student's admitted teachers by task, and the tasks whose teachers are not finished.

    A collective. Without `partial`, every teacher must be finished.

    Raises:
        ValueError: on every rank, if a teacher is not finished, if one was rejected and the recipe says to stop,
            or if all were rejected.
    """
    teachers = [run.teacher_of(task, element.seed) for task in run.config.stream.distinct_tasks]
    markers = comm.broadcast([teacher.marker for teacher in teachers])
    admitted = {t.task: t for t, marker in zip(teachers, markers, strict=True) if marker == t.complete}
    unfinished = [t for t, marker in zip(teachers, markers, strict=True) if marker is None]
    pending = frozenset(t.task for t in unfinished)
    rejected = [t.name for t in teachers if t.task not in admitted and t.task not in pending]
    if unfinished and not partial:
        raise ValueError(
            f"{run.root}: teachers without COMPLETE or REJECTED: {', '.join(t.name for t in unfinished)}; launch "
            "the run again to finish their training"
        )
    if rejected and run.config.teacher.on_rejected == "stop":
        raise ValueError(
            f"{run.root}: rejected teachers: {', '.join(rejected)} (they missed teacher.gate = "
            f"{run.config.teacher.gate}), and teacher.on_rejected is 'stop'; raise teacher.max_env_steps, lower "
            "the gate, or set it to 'skip'"
        )
    if not (admitted or pending):
        raise ValueError(f"{run.root}: all teachers were rejected ({', '.join(rejected)}): nothing to distil")
    return admitted, pending


def read_stage(run: Run, teacher: TeacherElement, comm: Comm, episodes: EpisodeChoice = "all") -> StageData:
    """Read and check the rollouts of a teacher on every rank; a collective.

    Raises:
        ShardError: if the rollouts are damaged or those of another teacher.
        DamagedFileError: if the policy is damaged.
        ValueError: if the ranks read different rollouts.
    """
    policy = sha256(teacher.policy) if teacher.policy.exists() else None
    description = teacher.policy.with_suffix(".json")
    if policy and description.exists():
        check_identity(description, **identity(run.config, teacher))
        if read_json(description, Weights)["sha256"] != policy:
            raise DamagedFileError(
                f"{teacher.policy} is damaged: it is not the file that {description.name} describes; restore it, "
                f"or remove {teacher.path} and launch again to train this teacher again"
            )
    for is_turn in (comm.rank == 0, comm.rank > 0):  # one rank first, which remembers the hashes for the others
        if is_turn:
            rollouts = read_rollouts(
                teacher.shards, task=teacher.task, labels=labels(run.config), policy_sha256=policy
            )
        comm.barrier()
    digests = comm.gather(sha256(teacher.shards / INDEX_NAME))
    if comm.any(len(set(digests)) > 1):
        raise ValueError(
            f"the ranks see different contents of {teacher.shards}: move the run directory to a file system that "
            "all nodes share"
        )
    return StageData.from_rollouts(rollouts, run.config.stream.distinct_tasks, episodes)
