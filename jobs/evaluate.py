"""Fill the success matrix of one student; shared over ranks under MPI."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cpd.comm import connect
from cpd.run.directory import Element, Run, StudentElement
from cpd.run.interrupt import Interrupt
from jobs.common import element_main, element_parser, element_tell, mpi_guard


def work(run: Run, element: Element, interrupt: Interrupt) -> None:
    """Do this rank's part of the element's work."""
    from cpd.evaluation.run_evaluation import run_evaluation

    assert isinstance(element, StudentElement)
    comm = connect()
    with mpi_guard(element, comm):
        run_evaluation(run, element, comm, interrupt=interrupt, tell=element_tell(element))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `python -m jobs.evaluate`; returns the exit code."""
    parser = element_parser(
        "jobs.evaluate",
        "Measure a student after every stage on every task of its stream, on held-out goals. Rows that were "
        "measured already are kept.",
        [
            "mpiexec -n 2 python -m jobs.evaluate runs/demo",
            "python -m jobs.evaluate runs/cw10 students/moe/seed-2",
        ],
    )
    parser.add_argument(
        "--partial", action="store_true", help="measure what there is, if the student is still learning"
    )
    partial = parser.parse_args(argv).partial
    return element_main("evaluation", parser, argv, work, needs_all=not partial)


if __name__ == "__main__":
    sys.exit(main())
