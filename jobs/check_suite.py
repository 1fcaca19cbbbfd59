"""Find mistakes in a suite of tasks before a run does."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cpd.config.load import suggestion
from cpd.envs.suite import load_suite
from cpd.run.command import EXIT_FAILED, EXIT_USAGE, exit_quietly
from jobs.common import log, parser_with_examples


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line of `cpd check-suite`; return the exit code, 1 if there are mistakes."""
    parser = parser_with_examples(
        "jobs.check_suite",
        "Run episodes of every task of a suite and look for mistakes: wrong shapes, NaN, a reset that ignores its "
        "goal or remembers earlier episodes, goal sets that overlap, a success that is always True, returns that "
        "never vary.",
        ["cpd check-suite my_package.module:MySuite", "cpd check-suite metaworld --only push-v3"],
    )
    parser.add_argument("suite", metavar="NAME", help="an entry point of the group cpd.suites, or module:Class")
    parser.add_argument(
        "--only", action="append", default=[], metavar="TASK", help="only this task; repeatable (default: all)"
    )
    arguments = parser.parse_args(argv)
    try:
        suite = load_suite(arguments.suite)
        if unknown := [task for task in arguments.only if task not in suite.tasks]:
            raise ValueError(f"--only {unknown[0]}: no such task{suggestion(unknown[0], suite.tasks)}")
        from cpd.envs.suite_check import suite_mistakes, task_mistakes
    except (ValueError, ImportError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return EXIT_USAGE
    mistakes, notes = suite_mistakes(suite), list[str]()
    for task in [] if mistakes else arguments.only or suite.tasks:
        mistakes_of_task = task_mistakes(suite, task, notes)
        log(f"{task}: {'has mistakes' if mistakes_of_task else 'checked'}")
        mistakes += mistakes_of_task
    for note in notes:
        print(f"note: {note}")
    print("\n".join(mistakes) or f"the suite {arguments.suite} has no mistakes that this command finds")
    return EXIT_FAILED if mistakes else 0


if __name__ == "__main__":
    exit_quietly(main)
