"""Distil the teachers, one task after another, into one student; data-parallel under MPI."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence

from cpd.comm import connect
from cpd.run.directory import Element, Run, StudentElement
from cpd.run.interrupt import Interrupt
from jobs.common import element_main, element_parser, element_tell, mpi_guard


def work(run: Run, element: Element, interrupt: Interrupt, partial: bool = False) -> None:
    """Do this rank's part of the element's work."""
    from cpd.distill.run_student import run_student

    assert isinstance(element, StudentElement)
    comm = connect()
    with mpi_guard(element, comm):
        tell = element_tell(element)
        run_student(run, element, comm, interrupt=interrupt, tell=tell, partial=partial)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `python -m jobs.distill`; returns the exit code."""
    parser = element_parser(
        "jobs.distill",
        "Distil a run's teachers into one student. Under mpiexec or srun the work is shared by all ranks; the "
        "number of ranks may change from one attempt to the next.",
        [
            "mpiexec -n 2 python -m jobs.distill runs/demo",
            "srun --mpi=pmi2 -n 8 python -m jobs.distill runs/cw10 students/moe/seed-2",
        ],
    )
    parser.add_argument(
        "--partial", action="store_true", help="learn as far as there are teachers, if not all are finished"
    )
    partial = parser.parse_args(argv).partial
    return element_main("student", parser, argv, functools.partial(work, partial=partial), needs_all=not partial)


if __name__ == "__main__":
    sys.exit(main())
