"""Train one teacher, judge it, and collect its rollouts: one element of the job array."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cpd.interrupt import Interrupt
from cpd.runs import Element, Run, TeacherElement
from jobs.common import available_cpus, element_main, element_tell, parser_with_examples


def work(run: Run, element: Element, interrupt: Interrupt) -> None:
    """Do the element's work on all cores given."""
    from cpd.teachers.element import run_teacher

    assert isinstance(element, TeacherElement)
    run_teacher(run, element, num_workers=available_cpus(), interrupt=interrupt, tell=element_tell(element))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `python -m jobs.teacher`; returns the exit code."""
    parser = parser_with_examples(
        "jobs.teacher",
        "Train one teacher with RL, evaluate it on held-out goals, and write its rollouts to shards. "
        "A finished teacher is left as it is; an interrupted one goes on where it stopped.",
        ["python -m jobs.teacher runs/demo --index 2", "srun python -m jobs.teacher runs/cw10   # in a job array"],
    )
    return element_main("teacher", parser, argv, work)


if __name__ == "__main__":
    sys.exit(main())
