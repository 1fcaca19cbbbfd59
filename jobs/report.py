"""Gather a run's results and draw its figures."""

from __future__ import annotations

from collections.abc import Sequence

from cpd.cluster.pickles import sweep_pickles
from cpd.comm import SerialComm
from cpd.run.attempt import begin_attempt
from cpd.run.command import exit_quietly
from cpd.run.files import sweep_temporaries
from jobs.common import ElementCommand, element_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line of `cpd report`; return the exit code."""
    parser = element_parser(
        "jobs.report",
        "Gather a finished run's results and draw its figures, once. `cpd build` does the same any "
        "number of times, also for an unfinished run.",
        ["cpd report runs/demo"],
    )
    command = ElementCommand(parser, parser.parse_args(argv), lambda run: [run.report()])
    if command.has_work:
        with command, begin_attempt(command.element, SerialComm(), command.log) as attempt:
            from analysis.build import build

            sweep_temporaries(command.run.figures)
            sweep_pickles(command.run)
            attempt.begin("figures", 1, unit="builds")
            build([command.run.root])
            attempt.check()
            command.element.complete.touch()
            attempt.advance(1)
            attempt.finish("done")
    return command.exit_code


if __name__ == "__main__":
    exit_quietly(main)
