"""Evaluate one student after every stage; data-parallel under MPI."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cpd.comm import connect
from cpd.run.attempt import mpi_guard
from cpd.run.command import EXIT_FAILED, EXIT_USAGE, exit_quietly
from cpd.run.directory import Run
from cpd.run.folders import kind_of
from cpd.run.shortage import shortage
from jobs.common import ElementCommand, element_parser, log


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line of `cpd evaluate`; return the exit code."""
    parser = element_parser(
        "jobs.evaluate",
        "Evaluate a student after every stage on every task of its stream, on held-out goals. Existing rows of "
        "the success matrix are kept. A published student is evaluated after its last stage; exit code 1 if its "
        "success is not the published one.",
        [
            "mpiexec -n 2 cpd evaluate runs/demo",
            "cpd evaluate runs/cw10 students/moe/seed-2",
            "cpd evaluate analysis/results/cw10-rl/students/cpd-seed-1    # a published student, again",
            "cpd evaluate --told analysis/results/cw10-rl/students/cpd-seed-1    # what inferring the task costs",
        ],
    )
    parser.add_argument(
        "--partial", action="store_true", help="evaluate the finished stages of an unfinished student"
    )
    parser.add_argument(
        "--told", action="store_true", help="tell a published student the task that it would otherwise infer"
    )
    arguments = parser.parse_args(argv)
    if kind_of(arguments.run_dir) == "results":
        return _refuse_results(parser.prog, arguments.run_dir)
    if kind_of(arguments.run_dir) == "policy":
        return _evaluate_again(parser.prog, arguments.run_dir, told=arguments.told)
    if arguments.told:
        parser.error(f"--told is for published students, but {arguments.run_dir} is none")
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


def _refuse_results(prog: str, folder: Path) -> int:
    """Say which students the published results in `folder` hold; return the exit code."""
    students = [str(path.parent) for path in sorted(folder.glob("students/*/policy.safetensors"))]
    remedy = f"name one of its students: {', '.join(students)}" if students else "it has no student to evaluate"
    print(f"{prog}: {folder} holds published results; {remedy}", file=sys.stderr)
    return EXIT_USAGE


def _evaluate_again(prog: str, folder: Path, *, told: bool) -> int:
    """Evaluate the published student in `folder`; return the exit code."""
    comm = connect()
    try:
        from cpd.evaluation.evaluate_published import evaluate_published

        is_equal = evaluate_published(folder, comm, log if comm.rank == 0 else lambda line: None, told=told)
    except (ValueError, OSError, ImportError) as error:
        print(f"{prog}: {shortage(error, folder) or error}", file=sys.stderr)
        return EXIT_USAGE
    return 0 if is_equal else EXIT_FAILED


if __name__ == "__main__":
    exit_quietly(main)
