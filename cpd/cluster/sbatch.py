"""From a profile to submitit's executor for Slurm, and to the text that it hands to sbatch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import submitit
from submitit.core.utils import DelayedSubmission, JobPaths
from submitit.slurm.slurm import _make_sbatch_string

from cpd.cluster.element_job import ElementJob
from cpd.config.profile import Profile, Resources
from cpd.config.types import Role
from cpd.run.directory import Element, Run
from cpd.run.interrupt import EXIT_INTERRUPTED, Interrupt

#: Other ways to ask sbatch for memory, which excludes them.
MEMORY_OPTIONS = {"mem-per-cpu", "mem-per-gpu"}
#: Enough for every restart of a job: giving up is our own decision (`Profile.max_timeouts`).
MANY_TIMEOUTS = 10**6


class Executor(submitit.SlurmExecutor):
    """submitit's executor, which can also tell what it would submit on a machine without Slurm."""

    @classmethod
    def affinity(cls) -> int:
        """Usable, whether srun is there or not."""
        return 2

    def text(self, count: int) -> str:
        """What sbatch would be given for `count` jobs: an array if there are several."""
        parameters = self.parameters | ({"map_count": count} if count > 1 else {})
        return str(_make_sbatch_string(command=self._submitit_command_str, folder=self.folder, **parameters))

    def dump(self, function: Any, job_id: str) -> None:
        """Write the pickle from which job `job_id` learns what to do, unless it is there."""
        paths = JobPaths(self.folder, job_id)
        if not paths.submitted_pickle.exists():
            delayed = DelayedSubmission(function)
            delayed.set_timeout(self.parameters["time"], self.max_num_timeout)
            delayed.dump(paths.submitted_pickle)


@dataclass
class BundleJob(submitit.helpers.Checkpointable):
    """Several elements, one after another, in one job: for sites that limit how many jobs may be submitted."""

    jobs: tuple[ElementJob, ...]

    def __call__(self) -> None:
        """Do them all; an element that fails does not keep the others from being tried."""
        code: Any = 0
        Interrupt.inherits = True
        for job in self.jobs:
            try:
                job()
            except SystemExit as ended:
                if ended.code == EXIT_INTERRUPTED:
                    raise  # the whole job goes back into the queue, and finished elements end at once
                code = ended.code
        if code:
            raise SystemExit(code)


def element_work(run: Run, task: Sequence[Element], resources: Resources, partial: bool = False) -> Any:
    """What submitit pickles for one job: an element's work, or that of several."""
    root = str(run.root.resolve())
    jobs = tuple(ElementJob(root, element.role, element.name, resources, partial) for element in task)
    return jobs[0] if len(jobs) == 1 else BundleJob(jobs)


def executor(run: Run, profile: Profile, role: Role, name: str, dependency: str = "", parallelism: int = 0) -> Any:
    """The executor for elements of `role`.

    Args:
        run: where the logs go.
        profile: partition, limits, resources.
        role: whose resources.
        name: the job's unique name.
        dependency: as sbatch takes it, e.g. `afterany:12:13_4`.
        parallelism: elements of an array that run at a time; 0: the profile's.
    """
    given = profile.resources(role)
    made = Executor(run.logs.absolute(), max_num_timeout=MANY_TIMEOUTS)
    parameters: dict[str, Any] = {
        "job_name": name,
        "partition": profile.partition or None,
        "account": profile.account or None,
        "qos": profile.qos or None,
        "constraint": profile.constraint or None,
        "time": given.minutes,
        "nodes": given.nodes,
        "ntasks_per_node": given.ranks_per_node,
        "cpus_per_task": given.cpus,
        "gpus_per_node": given.gpus * given.ranks_per_node or None,
        "mem": memory(given.memory_gb * given.ranks_per_node),
        "setup": profile.setup_lines or None,
        "signal_delay_s": profile.signal_seconds,
        "dependency": dependency or None,
        "array_parallelism": parallelism or profile.array_parallelism,
        "stderr_to_stdout": True,
        "wckey": None,
        "srun_args": srun_arguments(profile, role),
    }
    made.update_parameters(**with_further_options(parameters, profile, role))
    return made


def memory(gigabytes: float) -> str | None:
    """An amount of memory as sbatch takes it, or None for the site's default."""
    return f"{round(gigabytes * 1024)}M" if gigabytes else None


def with_further_options(parameters: dict[str, Any], profile: Profile, role: Role) -> dict[str, Any]:
    """`parameters` with the profile's own options on top; an empty one takes an option away."""
    options: dict[str, Any] = {"requeue" if profile.requeue else "no-requeue": True}
    if parameters["dependency"]:
        # A dependency that can never be met would leave its dependents pending for ever.
        options["kill-on-invalid-dep"] = "yes"
    options |= {**profile.sbatch, **profile.resources(role).sbatch}
    unwanted = {key for key, value in options.items() if value is False or value == ""}
    # Given twice, the one that comes last would count, and not which is last.
    taken = {*options, *(["mem"] if options.keys() & MEMORY_OPTIONS else [])}
    kept = {key: None if key.replace("_", "-") in taken else value for key, value in parameters.items()}
    return kept | {"additional_parameters": {k: v for k, v in options.items() if k not in unwanted}}


def srun_arguments(profile: Profile, role: Role) -> list[str]:
    """Options of the srun that starts an element's ranks."""
    given = profile.resources(role)
    # Since Slurm 22.05 srun does not take the number of cores over from sbatch.
    arguments = [f"--cpus-per-task={given.cpus}"]
    if given.ranks > 1:
        # Without the second, ranks whose neighbour was killed wait for it in a collective for ever.
        arguments += [f"--mpi={profile.srun_mpi}", "--kill-on-bad-exit=1"]
    return arguments


@contextlib.contextmanager
def outside_of_jobs() -> Iterator[None]:
    """Hide from sbatch that we may ourselves be inside a job, whose settings would leak into the new one's."""
    hidden = {}
    if "SLURM_JOB_ID" in os.environ:
        leaking = ("SLURM_", "SLURMD_", "PMI_", "PMIX_")
        hidden = {key: value for key, value in os.environ.items() if key.startswith(leaking)}
        hidden.pop("SLURM_CONF", None)
    for key in hidden:
        del os.environ[key]
    try:
        yield
    finally:
        os.environ.update(hidden)
