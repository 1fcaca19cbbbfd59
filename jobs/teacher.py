"""Train one teacher, evaluate it, and collect its rollouts: one element of the job array."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

from cpd.cluster.element_job import available_cpus
from cpd.comm import asked_size, connect
from cpd.run.attempt import mpi_guard
from cpd.run.command import exit_quietly
from cpd.run.directory import Run
from jobs.common import ElementCommand, element_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line of `cpd teacher`; return the exit code."""
    parser = element_parser(
        "jobs.teacher",
        "Train one teacher with RL, evaluate it on held-out goals, and write its rollouts to shards. An "
        "interrupted teacher resumes; a finished one is not changed. Under mpiexec or srun the ranks share the "
        "environments of every iteration and hold the same policy.",
        [
            "cpd teacher runs/demo teachers/drawer-close-v3/seed-1",
            "srun cpd teacher runs/cw10   # in a job array",
            "mpiexec -n 2 cpd teacher runs/cw10 0   # two ranks share the environments",
        ],
    )
    command = ElementCommand(parser, parser.parse_args(argv), Run.teachers)
    if command.has_work:
        with command:
            from cpd.teachers.run_teacher import env_pool, run_teacher

            num_workers, num_ranks = available_cpus(), asked_size()
            with closing(env_pool(command.run.config, num_workers, num_ranks)) as pool:
                if num_ranks > 1 and num_workers > 1:
                    pool.get(command.element.task)  # start the workers now: a fork after MPI_Init may hang
                comm = connect()
                with mpi_guard(command.element, comm):
                    run_teacher(
                        command.run,
                        command.element,
                        pool,
                        interrupt=command.interrupt,
                        log=command.log,
                        comm=comm,
                    )
    return command.exit_code


if __name__ == "__main__":
    exit_quietly(main)
