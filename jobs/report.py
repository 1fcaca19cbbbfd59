"""Gather a run's results and draw its figures."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cpd.comm import SerialComm
from cpd.run.attempt import begin_attempt
from cpd.run.directory import Element, Run
from cpd.run.interrupt import Interrupt
from jobs.common import element_main, element_parser, element_tell


def work(run: Run, element: Element, interrupt: Interrupt) -> None:
    """Build everything in results/ and figures/."""
    from analysis.build import build

    with begin_attempt(element, SerialComm(), element_tell(element)) as attempt:
        attempt.begin("figures", 1, unit="builds")
        build([run.root])
        attempt.check()
        element.complete.touch()
        attempt.advance(1)
        attempt.finish("done")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `python -m jobs.report`; returns the exit code."""
    parser = element_parser(
        "jobs.report",
        "Gather a finished run's results and draw its figures, once; `python -m analysis.build` does the same as "
        "often as you like, also for a run that is still going.",
        ["python -m jobs.report runs/demo"],
    )
    return element_main("report", parser, argv, work)


if __name__ == "__main__":
    sys.exit(main())
