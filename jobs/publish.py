"""Publish a run's finished teachers: tables, learning curves and compact policy files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cpd.run.command import EXIT_USAGE, exit_quietly
from cpd.run.directory import Run
from cpd.run.shortage import shortage
from jobs.common import log, parser_with_examples


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line of `cpd publish`; return the exit code."""
    parser = parser_with_examples(
        "jobs.publish",
        "Copy a run's tables and the policies of its finished teachers to a folder. Later runs can reuse the "
        "policies (--teachers-from), and `cpd build` draws the tables. Publishing again updates "
        "the folder.",
        ["cpd publish runs/cw10 analysis/results/teachers/cw10-demo_rl"],
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the run's directory")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="new, or published from the same experiment")
    arguments = parser.parse_args(argv)
    from cpd.evaluation.publish import publish_teachers

    try:
        run = Run(arguments.run_dir)
        files = publish_teachers(run, arguments.folder)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {shortage(error, arguments.folder) or error}", file=sys.stderr)
        return EXIT_USAGE
    log(f"{len(files)} of {len(run.teachers())} teachers published in {arguments.folder}")
    return 0


if __name__ == "__main__":
    exit_quietly(main)
