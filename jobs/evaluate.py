"""Evaluate one student after every stage; data-parallel under MPI."""

from __future__ import annotations

from collections.abc import Sequence

from cpd.comm import connect
from cpd.run.attempt import mpi_guard
from cpd.run.command import exit_quietly
from cpd.run.directory import Run
from jobs.common import ElementCommand, element_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line of `cpd evaluate`; return the exit code."""
    parser = element_parser(
        "jobs.evaluate",
        "Evaluate a student after every stage on every task of its stream, on held-out goals. Existing rows of "
        "the success matrix are kept.",
        [
            "mpiexec -n 2 cpd evaluate runs/demo",
            "cpd evaluate runs/cw10 students/moe/seed-2",
        ],
    )
    parser.add_argument(
        "--partial", action="store_true", help="evaluate the finished stages of an unfinished student"
    )
    arguments = parser.parse_args(argv)
    command = ElementCommand(parser, arguments, Run.evaluations, partial=arguments.partial)
    if command.has_work:
        with command:
            from cpd.evaluation.run_evaluation import run_evaluation
            from cpd.teachers.policy import TeacherActor
            from cpd.teachers.run_teacher import load_teacher

            comm = connect()
            with mpi_guard(command.element, comm):
                run_evaluation(
                    command.run,
                    command.element,
                    comm,
                    make_teacher=lambda teacher: TeacherActor(load_teacher(command.run.config, teacher)),
                    interrupt=command.interrupt,
                    log=command.log,
                )
    return command.exit_code


if __name__ == "__main__":
    exit_quietly(main)
