"""submitit's pickles: a job loads those of its own user only, and none outlives the work that it is for."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import sys
from pathlib import Path
from typing import Any

from submitit.core import job_environment, submission, utils

from cpd.cluster.ledger import ledger
from cpd.reading import DamagedFileError
from cpd.run.directory import Run
from cpd.run.interrupt import EXIT_INTERRUPTED

#: The program that a job runs in place of submitit's own.
PROGRAM = "cpd.cluster.pickles"
#: The pickles of a job, whose number the first group holds, and those of submissions that were refused.
JOB_PICKLE = re.compile(r"(\d+(?:_\d+)?)_(?:submitted|\d+_result)\.pkl(?:\.save_tmp)?")
REFUSED_PICKLE = re.compile(r"[0-9a-f]{32}\.pkl")


def load_own(filename: Path | str) -> Any:
    """Load a pickle, which may run any code.

    Raises:
        PermissionError: if another user owns the file.
        OSError: if it is a link, or not readable.
    """
    with os.fdopen(os.open(filename, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        if os.fstat(file.fileno()).st_uid != os.getuid():
            raise PermissionError(f"{filename} belongs to another user and is not loaded; launch the run again")
        return pickle.load(file)


def protect(path: Path) -> None:
    """Let only its owner read the pickle of a job, which may have removed it already."""
    with contextlib.suppress(FileNotFoundError):
        path.chmod(0o600)


def sweep_pickles(run: Run) -> None:
    """Remove the pickles of local jobs, which have loaded theirs, and of Slurm jobs without unfinished elements.

    Call as the run's launcher or report.
    """
    unfinished = {element.name for element in run.elements() if not element.finished}
    try:
        entries = [entry for name, entries in ledger(run).items() if name in unfinished for entry in entries]
    except DamagedFileError:
        return  # whoever submits jobs says so
    needed = {entry.job for entry in entries if entry.cluster == "slurm"}
    for path in run.logs.iterdir() if run.logs.is_dir() else ():
        match = JOB_PICKLE.fullmatch(path.name)
        if match[1] not in needed if match else REFUSED_PICKLE.fullmatch(path.name):
            path.unlink(missing_ok=True)


def main(folder: str) -> None:
    """Run the job whose pickle is in `folder`, by submitit's variables, and remove the pickle once it is over."""
    utils.pickle_load = load_own
    os.environ["SUBMITIT_FOLDER"] = folder
    environment = job_environment.JobEnvironment()
    may_be_requeued = False
    try:
        submission.process_job(folder)
    except SystemExit as stop:
        may_be_requeued = stop.code == EXIT_INTERRUPTED
        raise
    finally:
        environment.paths.result_pickle.unlink(missing_ok=True)
        # Ranks that start late still load theirs.
        if not may_be_requeued and environment.num_tasks == 1:
            environment.paths.submitted_pickle.unlink(missing_ok=True)


if __name__ == "__main__":
    main(sys.argv[1])
