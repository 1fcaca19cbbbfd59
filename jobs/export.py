"""Write what a run made in formats that other tools read."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cpd.export.formats import FORMATS, load_exporter
from cpd.run.claim import claim
from cpd.run.command import EXIT_USAGE, exit_quietly
from cpd.run.shortage import shortage
from jobs.common import log, parser_with_examples


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line of `cpd export`; return the exit code."""
    parser = parser_with_examples(
        "jobs.export",
        "Write what a run or a published folder holds in a format of other tools. Nothing is uploaded. Exporting "
        "again gives the same files.",
        [
            "cpd export runs/demo onnx --output onnx",
            "cpd export runs/cw10 onnx --output onnx --only students/cpd",
            "cpd export runs/demo minari --output datasets --only teachers/window-close-v3",
            "cpd export runs/demo tensorboard --output curves",
            "cpd export analysis/results/teachers/cw10-rl onnx --output onnx",
        ],
    )
    parser.add_argument("source", type=Path, metavar="DIR", help="run directory, or published teachers or results")
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT", title="formats")
    for name, of_format in FORMATS.items():
        summary = of_format.summary
        options = formats.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        options.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write to")
        options.add_argument(
            "--only",
            action="append",
            default=[],
            metavar="NAME",
            help="only this element or folder of elements, such as students/cpd; repeatable",
        )
    arguments = parser.parse_args(argv)
    try:
        claim(arguments.output, "exports")
        number = 0
        for path in load_exporter(arguments.format)(arguments.source, arguments.output, arguments.only):
            number += 1
            log(f"written: {path}")
        log(f"{number} written to {arguments.output}")
    except (ImportError, ValueError, OSError) as error:
        print(f"{parser.prog}: {shortage(error, arguments.output) or error}", file=sys.stderr)
        return EXIT_USAGE
    return 0


if __name__ == "__main__":
    exit_quietly(main)
