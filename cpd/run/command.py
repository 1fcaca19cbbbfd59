"""How a command ends: exit codes, and no traceback for what is no bug."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path
from typing import NoReturn

from cpd.run.shortage import shortage

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_DEPENDENCY = 3
EXIT_CTRL_C = 130


def prepare_command() -> None:
    """Make the process of a command ready before it imports the rest; other programs stay as they are."""
    # "-m" is what Python names it while it looks for the module, "cpd" what `cpd.__main__` does.
    is_command = sys.argv[:1] in (["-m"], ["cpd"])
    if is_command or "SUBMITIT_EXECUTOR" in os.environ:
        # Commands show no windows: a notebook's, or missing, libraries for them must not stop an import.
        os.environ |= {"MPLBACKEND": "Agg", "MUJOCO_GL": "disabled"}
        # Gymnasium imports glfw, which starts programs that ask libraries for their versions. A signal that ends
        # them, as of a requeue, would fail the import.
        glfw = find_spec("glfw")
        library = Path(glfw.origin or "").parent / "x11" / "libglfw.so" if glfw else None
        if library and library.exists():
            os.environ.setdefault("PYGLFW_LIBRARY", str(library))
        os.environ.pop("SOURCE_DATE_EPOCH", None)  # figures have no dates; matplotlib fails if it is no number
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is None:  # the shell has closed it
                setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
            elif isinstance(stream, TextIOWrapper):
                stream.reconfigure(errors="replace")  # the locale's encoding may lack a character
    if is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # imports take seconds; `exit_quietly` takes over


def exit_quietly(main: Callable[[], int]) -> NoReturn:
    """Exit with `main`'s code; no traceback after Ctrl-C, a denied permission, a shortage or a closed pipe."""
    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        code = main()
        sys.stdout.flush()
    except PermissionError as error:
        print(f"{error.filename}: permission denied; ask its owner, or choose another directory", file=sys.stderr)
        code = EXIT_USAGE
    except KeyboardInterrupt:
        code = EXIT_CTRL_C
    except BrokenPipeError:
        # Exit as if SIGPIPE had ended this process. The interpreter flushes stdout again at exit, hence devnull.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except Exception as error:
        output = Path("/proc/self/fd/1").resolve()  # an error of writing to it names no file
        if not (message := shortage(error, output if output.is_file() else Path.cwd())):
            raise
        print(message, file=sys.stderr)
        code = EXIT_FAILED
    sys.exit(code)
