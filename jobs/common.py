"""Shared by all commands: argument parsers, exit codes, lines of progress, and the work on one element."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Generic, Self, TypeVar

from cpd.cluster.requeue import (
    check_code,
    describe_unfinished,
    hand_back,
    is_first_rank,
    unfinished_dependencies,
)
from cpd.comm import connect
from cpd.reading import DamagedFileError
from cpd.run.attempt import mark
from cpd.run.command import EXIT_DEPENDENCY, EXIT_FAILED, EXIT_USAGE
from cpd.run.directory import Element, Run, RunError
from cpd.run.interrupt import EXIT_INTERRUPTED, Interrupt, InterruptedBySignal
from cpd.run.lease import LeaseHeldError
from cpd.run.progress import read_status
from cpd.run.shortage import describe_error, error_number, shortage

#: The end of every command's help text.
EXIT_CODES = """exit codes:
  0 done; 1 failed; 2 a mistake in the command, settings or files; 3 something that it needs is not finished;
  75 saved and stopped as asked, or Slurm does not answer: try again"""

E = TypeVar("E", bound=Element)


def log(line: str) -> None:
    """Print one line with the time of day, at once; a log that has no room is no reason to stop."""
    try:
        print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)
    except OSError as error:
        if not error_number(error):
            raise


def parser_with_examples(prog: str, description: str, examples: Sequence[str]) -> argparse.ArgumentParser:
    """Return an argument parser whose help ends with examples and exit codes.

    It accepts no abbreviated options: `--set` would list the settings and `--c` would cancel a run's jobs.
    """
    return argparse.ArgumentParser(
        prog=f"cpd {prog.rpartition('.')[2].replace('_', '-')}" if sys.argv[0] == "cpd" else f"python -m {prog}",
        allow_abbrev=False,
        description=description,
        epilog="examples:\n" + "\n".join(f"  {example}" for example in examples) + f"\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def element_parser(prog: str, description: str, examples: Sequence[str]) -> argparse.ArgumentParser:
    """Return a parser of a command that works on one element; its arguments are `RUN_DIR [ELEMENT]`."""
    parser = parser_with_examples(prog, description, examples)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the run's directory")
    parser.add_argument(
        "element",
        nargs="?",
        metavar="ELEMENT",
        help="its name, as `cpd status` shows it, or its number in its role (default: the Slurm array "
        "task, else 0)",
    )
    return parser


def choose_element(elements: Sequence[E], name_or_index: str | None) -> E:
    """Return the element with this name or number; without either, that of the Slurm array task, or the first.

    Raises:
        ValueError: if there is no such element; the message lists `elements`.
    """
    name_or_index = name_or_index or os.environ.get("SLURM_ARRAY_TASK_ID", "0")
    for element in elements:
        # The name of a student also stands for its evaluation.
        if name_or_index.rstrip("/") in (
            str(element.index),
            element.name,
            element.name.removesuffix("/evaluation"),
        ):
            return element
    listing = "\n".join(f"  {element.index}: {element.name}" for element in elements)
    raise ValueError(f"{name_or_index}: the run has no such {elements[0].role}; choose one of\n{listing}")


class ElementCommand(Generic[E]):
    """One call of a command that works on an element; as a context manager, turns errors into exit codes.

    Attributes:
        has_work: whether to enter the `with` block; False after a mistake of the user, and if the element is
            finished or cannot start yet.
        exit_code: 0 done (or rejected); 75 saved and stopped as asked, try again; 3 a dependency is not finished;
            2 a mistake of the user; 1 failed.
    """

    def __init__(
        self,
        parser: argparse.ArgumentParser,
        arguments: argparse.Namespace,
        elements: Callable[[Run], Sequence[E]],
        *,
        partial: bool = False,
    ) -> None:
        """Find the element.

        Args:
            parser: from `element_parser`.
            arguments: what it parsed.
            elements: returns the run's elements of the command's role.
            partial: whether the element may start before all its dependencies are finished.
        """
        self._prog = parser.prog
        self.has_work = False
        self.exit_code = 0
        self.interrupt = Interrupt()
        try:
            self.run = Run(arguments.run_dir)
            self.element = choose_element(elements(self.run), arguments.element)
            is_finished = self.element.finished
            missing = [] if partial or is_finished else unfinished_dependencies(self.run, self.element)
        except ValueError as error:
            print(f"{self._prog}: {error}", file=sys.stderr)
            self.exit_code = EXIT_USAGE
            return
        if is_finished:
            log(f"{self.element.name} is finished already")
            return
        if missing:
            reason = describe_unfinished(missing)
            if is_first_rank():
                mark(self.element, "waiting", reason)
            print(f"{self._prog}: {self.element.name}: {reason}", file=sys.stderr)
            self.exit_code = EXIT_DEPENDENCY
            return
        if reason := check_code(self.run, self.element, self.log):
            if is_first_rank():
                mark(self.element, "failed", reason)
            print(f"{self._prog}: {self.element.name}: {reason}", file=sys.stderr)
            self.exit_code = EXIT_USAGE
            return
        self.has_work = True

    def log(self, line: str) -> None:
        """Print one line with the time of day and the element's name."""
        log(f"{self.element.name}: {line}")

    def __enter__(self) -> Self:
        self.interrupt.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, InterruptedBySignal):
            message = str(error)
            if self.interrupt.signal_number == signal.SIGXCPU:
                message += " (its limit of CPU time is reached: `ulimit -t`)"
            log(message)
            if self.interrupt.signal_number != signal.SIGINT:
                hand_back(self.run, self.element, connect(), log)
            self.exit_code = EXIT_INTERRUPTED
        elif isinstance(error, LeaseHeldError):
            print(f"{self._prog}: {error}", file=sys.stderr)
            self.exit_code = EXIT_FAILED
        elif isinstance(error, Exception):
            is_damage = isinstance(error, DamagedFileError | RunError)
            reason = str(error) if is_damage else shortage(error, self.element.path)
            print(f"{self._prog}: {reason}" if reason else traceback.format_exc(), file=sys.stderr)
            # An attempt records its own failure. If the element is still queued, no attempt has begun.
            with contextlib.suppress(OSError):
                if is_first_rank() and read_status(self.element.status).state == "queued":
                    mark(self.element, "failed", describe_error(error, self.element.path))
            self.exit_code = EXIT_USAGE if is_damage else EXIT_FAILED
        return isinstance(error, Exception)
