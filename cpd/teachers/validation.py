"""Success of a teacher on validation goals, on which policies are selected and admitted."""

from __future__ import annotations

from cpd.comm import Comm, SerialComm
from cpd.config import Config
from cpd.envs.cells import Cell, EnvPool, evaluate_cells
from cpd.envs.episodes import Outcome, mean_of_scores
from cpd.run.interrupt import Interrupt, InterruptedBySignal
from cpd.teachers.policy import Teacher, TeacherActor


def validate(
    teacher: Teacher, config: Config, task: str, pool: EnvPool, interrupt: Interrupt, comm: Comm | None = None
) -> float:
    """Mean score (`Outcome.score`) on validation goals, deterministic, at the stream's horizon; a collective.

    Raises:
        InterruptedBySignal: if asked to stop.
    """
    return mean_of_scores(validation_episodes(teacher, config, task, pool, interrupt, comm))


def validation_episodes(
    teacher: Teacher,
    config: Config,
    task: str,
    pool: EnvPool,
    interrupt: Interrupt,
    comm: Comm | None = None,
    *,
    to_the_end: bool = False,
) -> list[Outcome]:
    """Run the episodes of `validate`; with `to_the_end` they continue after success."""
    outcomes = evaluate_cells(
        TeacherActor(teacher),
        [Cell(task, "validation", config.teacher.num_validation_goals, to_the_end)],
        config.stream.horizon,
        pool,
        comm or SerialComm(),
        should_stop=lambda: interrupt.requested,
    )
    if outcomes is None:
        raise InterruptedBySignal("asked to stop while validating; launch again to continue")
    return outcomes[0]
