"""The command `cpd`, also as `python -m cpd`: runs one verb of jobs/."""

from __future__ import annotations

import sys

from cpd.programs import load_program


def main() -> None:
    """Run the command line of `cpd VERB ...`; exit with its code."""
    sys.argv[0] = "cpd"  # jobs/ prepares the process of a command, and names it in messages
    command_line = load_program("jobs.__main__")
    command_line.exit_quietly(command_line.main)


if __name__ == "__main__":
    main()
