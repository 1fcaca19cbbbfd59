"""Distil a run's teachers, task by task, into one student; data-parallel under MPI."""

from __future__ import annotations

from collections.abc import Sequence

from cpd.comm import connect
from cpd.run.attempt import mpi_guard
from cpd.run.command import exit_quietly
from cpd.run.directory import Run
from jobs.common import ElementCommand, element_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line of `cpd distill`; return the exit code."""
    parser = element_parser(
        "jobs.distill",
        "Distil a run's teachers into one student. Under mpiexec or srun all ranks share the work; their number "
        "may change from one attempt to the next.",
        [
            "mpiexec -n 2 cpd distill runs/demo",
            "srun --mpi=pmi2 -n 8 cpd distill runs/cw10 students/moe/seed-2",
        ],
    )
    parser.add_argument(
        "--partial", action="store_true", help="stop before the first stage whose teacher is not finished"
    )
    arguments = parser.parse_args(argv)
    command = ElementCommand(parser, arguments, Run.students, partial=arguments.partial)
    if command.has_work:
        with command:
            from cpd.distill.run_student import run_student

            comm = connect()
            planned_ranks = command.run.launched_with(int, comm.size, "student", "ranks")
            if comm.rank == 0 and planned_ranks != comm.size:
                command.log(f"note: {comm.size} ranks, but {planned_ranks} in the profile: other bits")
            with mpi_guard(command.element, comm):
                run_student(
                    command.run,
                    command.element,
                    comm,
                    interrupt=command.interrupt,
                    log=command.log,
                    partial=arguments.partial,
                )
    return command.exit_code


if __name__ == "__main__":
    exit_quietly(main)
