"""What a machine lacks: the limit or the package behind an exception, the file and its file system, what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Final

#: By error number: what is wrong, and what to do.
CAUSES: Final[Mapping[int, tuple[str, str]]] = {
    errno.ENOSPC: ("no space left", "remove files"),
    errno.EDQUOT: ("disk quota exceeded", "remove files, or ask for a larger quota"),
    errno.EFBIG: ("file-size limit reached", "raise it (`ulimit -f`)"),
    errno.EMFILE: ("too many open files", "raise the limit of open files (`ulimit -n`)"),
    errno.ENFILE: ("too many open files on this machine", "end other programs"),
    errno.EAGAIN: ("too many processes or threads", "raise the limit of processes (`ulimit -u`)"),
    errno.ENOMEM: ("out of memory", "give it more memory (memory_gb of a profile, or `ulimit -v`), or use less"),
    errno.EROFS: ("read-only file system", "choose another directory, or have it mounted for writing"),
    errno.EIO: ("input/output error", "have the file system checked"),
    errno.ESTALE: ("the file server has lost the file", "check the mount"),
}
LIMITS: Final = {
    errno.EFBIG: (resource.RLIMIT_FSIZE, "bytes"),
    errno.EMFILE: (resource.RLIMIT_NOFILE, "open files"),
    errno.EAGAIN: (resource.RLIMIT_NPROC, "processes"),
    errno.ENOMEM: (resource.RLIMIT_AS, "bytes of address space"),
}
#: The packages that the base install lacks.
TRAINING: Final = ("torch", "mpi4py", "metaworld", "mujoco", "gymnasium")
#: The extra of this package that brings a package which exports or live curves need.
OPTIONAL: Final = {
    **dict.fromkeys(("onnx", "onnxscript", "minari", "tensorboard"), "export"),
    "wandb": "wandb",
}
#: What libraries that give no error number write. Most write the system's own words for it.
PHRASES: Final = {
    **{os.strerror(number): number for number in CAUSES if number != errno.EAGAIN},
    "out of memory": errno.ENOMEM,
    "allocate memory": errno.ENOMEM,
    "bad_alloc": errno.ENOMEM,
    "MemoryError": errno.ENOMEM,
    "failed to map segment": errno.ENOMEM,
    "can't start new thread": errno.EAGAIN,
}
#: Files that a process may open beyond its limit to write down what failed.
NUM_SPARE_FILES: Final = 8


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The exception and its causes, the latest first."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def error_number(error: BaseException) -> int:
    """The number in `CAUSES` that an exception or one of its causes has, or that its words mean; 0 if none."""
    for cause in _chain(error):
        if isinstance(cause, MemoryError):
            return errno.ENOMEM
        if isinstance(cause, OSError) and cause.errno:
            is_lock = cause.errno == errno.EAGAIN and "lock" in str(cause)  # HDF5's, which somebody else holds
            if cause.errno in CAUSES and not is_lock:
                return cause.errno
        elif number := next((number for phrase, number in PHRASES.items() if phrase in str(cause)), 0):
            return number
    return 0


def not_installed(packages: Iterable[str] = TRAINING) -> str:
    """Say which of `packages` are not installed, and what to install; empty if all are."""
    missing = ", ".join(name for name in packages if find_spec(name) is None)
    command = "pip install 'continual-policy-distillation[train]'"
    return f"not installed: {missing}, which training and evaluation need; {command}" if missing else ""


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Raise a shortage that any library meets in the block as an OSError that names `path`."""
    try:
        yield
    except Exception as error:
        if number := error_number(error):
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


def shortage(error: BaseException, folder: Path) -> str:
    """Say what ran out or is not installed, where, and what to do; empty if `error` means no shortage.

    Args:
        error: with its causes.
        folder: where its process writes, in case no cause names a file.
    """
    if isinstance(error, ModuleNotFoundError) and error.name in TRAINING:
        return not_installed()
    if isinstance(error, ImportError):  # a folder of the package's name may be what is found in its place
        package = (error.name or "").partition(".")[0]
        if package in OPTIONAL:
            return f"not installed: {package}; pip install 'continual-policy-distillation[{OPTIONAL[package]}]'"
    number = error_number(error)
    if not number:
        return ""
    what, remedy = CAUSES[number]
    names = [cause.filename for cause in _chain(error) if isinstance(cause, OSError) and cause.filename]
    path = Path(os.fsdecode(names[0])) if names and not isinstance(names[0], int) else folder
    if number == errno.ENOMEM and not names:
        text = str(error).strip().partition("\n")[0]
        where = f"{type(error).__name__}{f': {text}' if text else ''}"
    else:
        where = str(path)
    if number in LIMITS:
        kind, unit = LIMITS[number]
        soft = resource.getrlimit(kind)[0]
        where += f" (limit: {soft} {unit})" if soft != resource.RLIM_INFINITY else ""
    elif number != errno.ENFILE:
        place, is_inodes = _file_system(path)
        what = "no inodes left" if number == errno.ENOSPC and is_inodes else what
        where += f", on {place}"
    return f"{what}: {where}; {remedy}, then launch again: finished work is kept"


@contextlib.contextmanager
def spare_files() -> Iterator[None]:
    """Allow this process a few more open files in the block, as far as it may, to write down what failed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    raised = soft + NUM_SPARE_FILES
    if soft == resource.RLIM_INFINITY or (hard != resource.RLIM_INFINITY and raised > hard):
        raised = hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def describe_error(error: BaseException, folder: Path) -> str:
    """The shortage that an exception means, or else its type and message."""
    return shortage(error, folder) or f"{type(error).__name__}: {error}"


def _file_system(path: Path) -> tuple[str, bool]:
    """The file system of `path` and what is scarcer there, and whether that is inodes rather than space."""
    mount = next(place for place in (path.absolute(), *path.absolute().parents) if place.is_mount())
    with contextlib.suppress(OSError):
        # Some may be free again, since temporary files are removed.
        free = os.statvfs(mount)
        if free.f_files and free.f_favail * free.f_blocks < free.f_bavail * free.f_files:
            return f"the file system {mount} ({free.f_favail} of {free.f_files} inodes free)", True
        space = shutil.disk_usage(mount)
        return f"the file system {mount} ({space.free:,} of {space.total:,} bytes free)", False
    return f"the file system {mount}", False
