"""What the verbs share: their command line, their exit codes, and how they tell progress."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from cpd.cluster.requeue import decline, describe_unfinished, hand_back, is_first_rank, unfinished_dependencies
from cpd.comm import Comm, connect
from cpd.config.types import Role
from cpd.run.attempt import force_status, mark
from cpd.run.directory import Element, Run
from cpd.run.interrupt import EXIT_INTERRUPTED, Interrupt, InterruptedBySignal
from cpd.run.lease import LeaseHeldError
from cpd.run.progress import read_status

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_DEPENDENCY = 3
EXIT_CTRL_C = 130
#: What all verbs have in common.
EXIT_CODES = """exit codes:
  0 done; 1 failed; 2 a mistake in the command, settings or files; 3 something that it needs is not finished;
  75 saved and stopped as asked, or Slurm does not answer: try again"""
#: How long mpiexec is given to pass on what a failing rank has written.
FORWARDING_SECONDS = 0.5


def tell(line: str) -> None:
    """Print one line with the time of day, at once."""
    print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)


def exit_quietly(main: Callable[[], int]) -> NoReturn:
    """Exit with `main`'s code; no traceback after Ctrl-C, for files of another user, or for a `head`."""
    try:
        code = main()
        sys.stdout.flush()
    except PermissionError as error:
        print(f"{error.filename}: permission denied; ask its owner, or take another directory", file=sys.stderr)
        code = EXIT_USAGE
    except KeyboardInterrupt:
        code = EXIT_CTRL_C
    except BrokenPipeError:
        # As by SIGPIPE. The interpreter flushes once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    sys.exit(code)


def parser_with_examples(prog: str, description: str, examples: Sequence[str]) -> argparse.ArgumentParser:
    """An argument parser whose help ends with examples and exit codes; options are not to be abbreviated.

    Else `--set` would list the settings, and `--c` cancel a run's jobs.
    """
    return argparse.ArgumentParser(
        prog=f"python -m {prog}",
        allow_abbrev=False,
        description=description,
        epilog="examples:\n" + "\n".join(f"  {example}" for example in examples) + f"\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def element_parser(prog: str, description: str, examples: Sequence[str]) -> argparse.ArgumentParser:
    """The same for a verb that does the work of one element: `RUN_DIR [ELEMENT]`."""
    parser = parser_with_examples(prog, description, examples)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the run's directory")
    parser.add_argument(
        "element",
        nargs="?",
        metavar="ELEMENT",
        help="its name, as `jobs.status` shows it, or its number in the role's array (default: the Slurm array "
        "task, else 0)",
    )
    return parser


def chosen_element(run: Run, role: Role, asked: str | None) -> Element:
    """The element of `role` that the command line asks for, by name or number, or else the Slurm array task.

    Raises:
        ValueError: if there is no such element, naming those that there are.
    """
    elements = [element for element in run.elements() if element.role == role]
    asked = asked or os.environ.get("SLURM_ARRAY_TASK_ID", "0")
    for element in elements:
        # An evaluation may go by the name of its student.
        if asked.rstrip("/") in (str(element.index), element.name, element.name.removesuffix("/evaluation")):
            return element
    listing = "\n".join(f"  {element.index}: {element.name}" for element in elements)
    raise ValueError(f"{asked}: {run.root} has no such {role}; it has\n{listing}")


def element_main(
    role: Role,
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    work: Callable[[Run, Element, Interrupt], None],
    needs_all: bool = True,
) -> int:
    """Do `work` on the element that the command line names, unless it is finished; turn errors into exit codes.

    `parser` is one of `element_parser`'s. With `needs_all`, an element of which something that it depends on is
    not finished is not started.

    Returns:
        0: done (or rejected); 75: saved and stopped as asked, try again; 3: something that it needs is not
        finished; 2: a user's mistake; 1: failed.
    """
    arguments = parser.parse_args(argv)
    try:
        run = Run(arguments.run_dir)
        element = chosen_element(run, role, arguments.element)
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return EXIT_USAGE
    if element.finished:
        tell(f"{element.name} is finished already")
        return 0
    missing = unfinished_dependencies(run, element) if needs_all else []
    if missing:
        reason = describe_unfinished(missing)
        decline(element, reason)
        print(f"{parser.prog}: {element.name}: {reason}", file=sys.stderr)
        return EXIT_DEPENDENCY
    interrupt = Interrupt().install()
    try:
        work(run, element, interrupt)
    except InterruptedBySignal as stop:
        tell(str(stop))
        if interrupt.signal_number != signal.SIGINT:
            hand_back(run, element, connect(), tell)
        return EXIT_INTERRUPTED
    except LeaseHeldError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return EXIT_FAILED
    except Exception as error:
        traceback.print_exc()
        if is_first_rank() and read_status(element.status).state == "queued":
            mark(element, "failed", f"{type(error).__name__}: {error}")  # it failed before its session began
        return EXIT_FAILED
    return 0


def element_tell(element: Element) -> Callable[[str], None]:
    """`tell` with the element's name in front."""
    return lambda line: tell(f"{element.name}: {line}")


@contextlib.contextmanager
def mpi_guard(element: Element, comm: Comm) -> Iterator[None]:
    """End all ranks if this one fails: the others would wait for it in a collective for ever."""
    try:
        yield
    except (InterruptedBySignal, LeaseHeldError):
        raise  # agreed by all ranks
    except BaseException as error:
        if comm.size > 1:
            # Where all ranks meet the same error, rank 0, which keeps the record, is to tell it first.
            time.sleep(5.0 if comm.rank else 0.0)
            print(f"rank {comm.rank} of {comm.size} failed:", file=sys.stderr)
            traceback.print_exc()
            sys.stderr.flush()
            if comm.rank and not element.finished and read_status(element.status).state != "failed":
                force_status(element, "failed", f"rank {comm.rank}: {type(error).__name__}: {error}")
            # An abort takes mpiexec down with all that it has not passed on yet.
            time.sleep(FORWARDING_SECONDS)
            comm.abort(EXIT_FAILED)
        raise
