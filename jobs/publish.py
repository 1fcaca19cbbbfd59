"""Publish a run's finished teachers: tables, learning curves and small policy files that can be kept for good."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cpd.run.directory import Run
from jobs.common import EXIT_USAGE, log, parser_with_examples


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line of `python -m jobs.publish`; return the exit code."""
    parser = parser_with_examples(
        "jobs.publish",
        "Copy a run's tables and the policies of its finished teachers to a folder, which later runs can start "
        "from and `python -m analysis.build` draws. Doing it again brings the folder up to date.",
        ["python -m jobs.publish runs/cw10 analysis/results/teachers/cw10-demo_rl"],
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    arguments = parser.parse_args(argv)
    from cpd.evaluation.publish import publish_teachers

    try:
        run = Run(arguments.run_dir)
        files = publish_teachers(run, arguments.folder)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return EXIT_USAGE
    log(f"{len(files)} of {len(run.teachers())} teachers published in {arguments.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
