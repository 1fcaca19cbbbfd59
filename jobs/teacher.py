"""Train one teacher, judge it, and collect its rollouts: one element of the job array."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing

from cpd.cluster.element_job import available_cpus
from cpd.comm import asked_size, connect
from cpd.run.directory import Element, Run, TeacherElement
from cpd.run.interrupt import Interrupt
from jobs.common import element_main, element_parser, element_tell, mpi_guard


def work(run: Run, element: Element, interrupt: Interrupt) -> None:
    """Do this rank's part of the element's work on all cores that the rank was given."""
    from cpd.teachers.run_teacher import env_pool, run_teacher

    assert isinstance(element, TeacherElement)
    num_workers, num_ranks = available_cpus(), asked_size()
    with closing(env_pool(run.config, num_workers, num_ranks)) as pool:
        if num_ranks > 1 and num_workers > 1:
            pool.get(element.task)  # starts the workers: once MPI is up, nothing may fork
        comm = connect()
        with mpi_guard(element, comm):
            run_teacher(run, element, pool, interrupt=interrupt, tell=element_tell(element), comm=comm)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `python -m jobs.teacher`; returns the exit code."""
    parser = element_parser(
        "jobs.teacher",
        "Train one teacher with RL, evaluate it on held-out goals, and write its rollouts to shards. "
        "A finished teacher is left as it is; an interrupted one goes on where it stopped. Under mpiexec or srun "
        "the ranks share the environments of every iteration, and all of them learn the same.",
        [
            "python -m jobs.teacher runs/demo teachers/drawer-close-v3/seed-1",
            "srun python -m jobs.teacher runs/cw10   # in a job array",
            "mpiexec -n 2 python -m jobs.teacher runs/cw10 0   # two ranks share the environments",
        ],
    )
    return element_main("teacher", parser, argv, work)


if __name__ == "__main__":
    sys.exit(main())
