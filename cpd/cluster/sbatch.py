"""Makes submitit's executor for Slurm, and the text that it passes to sbatch, from a profile."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import submitit
from submitit.core.utils import DelayedSubmission, JobPaths
from submitit.slurm.slurm import _make_sbatch_string

from cpd.cluster.element_job import ElementJob
from cpd.cluster.pickles import PROGRAM, protect
from cpd.config.profile import Profile, Resources
from cpd.config.types import Role
from cpd.run.directory import Element, Run
from cpd.run.interrupt import EXIT_INTERRUPTED, Interrupt

#: Other ways to ask sbatch for memory, which excludes them.
MEMORY_OPTIONS = {"mem-per-cpu", "mem-per-gpu"}
#: submitit's limit, never reached: `Profile.max_timeouts` decides when a job is given up.
MANY_TIMEOUTS = 10**6


class Executor(submitit.SlurmExecutor):
    """submitit's executor, usable without Slurm too, for `--dry-run`."""

    @classmethod
    def affinity(cls) -> int:
        """Report the executor as usable, with or without srun."""
        return 2

    @property
    def _submitit_command_str(self) -> str:
        return f"{self.python} -u -m {PROGRAM} {shlex.quote(str(self.folder))}"

    def text(self, count: int) -> str:
        """Return sbatch's input for `count` jobs: an array if there are several."""
        parameters = self.parameters | ({"map_count": count} if count > 1 else {})
        return str(_make_sbatch_string(command=self._submitit_command_str, folder=self.folder, **parameters))

    def dump(self, function: Any, job_id: str) -> None:
        """Write the pickle that job `job_id` loads, unless it exists."""
        paths = JobPaths(self.folder, job_id)
        if not paths.submitted_pickle.exists():
            delayed = DelayedSubmission(function)
            delayed.set_timeout(self.parameters["time"], self.max_num_timeout)
            delayed.dump(paths.submitted_pickle)
            protect(paths.submitted_pickle)


@dataclass
class BundleJob(submitit.helpers.Checkpointable):
    """Several elements, one after another, in one job, for sites that limit the number of submitted jobs."""

    jobs: tuple[ElementJob, ...]

    def __call__(self) -> None:
        """Run all of them; after a failure the others still run."""
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
    """Return the callable that submitit pickles for one job of one or several elements."""
    root = str(run.root.resolve())
    jobs = tuple(ElementJob(root, element.role, element.name, resources, partial) for element in task)
    return jobs[0] if len(jobs) == 1 else BundleJob(jobs)


def executor(run: Run, profile: Profile, role: Role, name: str, dependency: str = "", parallelism: int = 0) -> Any:
    """Return the executor for elements of `role`, which writes logs into the run.

    Args:
        run: the run.
        profile: partition, limits, resources.
        role: determines the resources.
        name: the job's unique name.
        dependency: as sbatch takes it, e.g. `afterany:12:13_4`.
        parallelism: elements of an array that run at a time; 0: the profile's.
    """
    resources = profile.resources(role)
    # Since Slurm 22.05 srun does not take the number of cores over from sbatch.
    srun_args = [f"--cpus-per-task={resources.cpus}"]
    if resources.ranks > 1:
        # Without the second, ranks whose neighbour was killed wait for it in a collective for ever.
        srun_args += [*([f"--mpi={profile.srun_mpi}"] if profile.srun_mpi else []), "--kill-on-bad-exit=1"]
    if "export" in {**profile.sbatch, **resources.sbatch}:
        srun_args.append("--export=ALL")  # the step gets what the job has, and what its setup exports
    srun_args += profile.of_role(role, "srun_args")
    gpus = resources.gpus * resources.ranks_per_node
    memory_gb = resources.memory_gb * resources.ranks_per_node
    parameters: dict[str, Any] = {
        "job_name": name,
        "partition": profile.partition or None,
        "account": profile.account or None,
        "qos": profile.qos or None,
        "constraint": profile.constraint or None,
        "time": resources.minutes,
        "nodes": resources.nodes,
        "ntasks_per_node": resources.ranks_per_node,
        "cpus_per_task": resources.cpus,
        "gpus_per_node": (f"{resources.gpu_type}:{gpus}" if resources.gpu_type else gpus) if gpus else None,
        "mem": f"{round(memory_gb * 1024)}M" if memory_gb else None,  # None: the site's default
        "setup": profile.setup_lines(role) or None,
        "signal_delay_s": profile.signal_seconds,
        "dependency": dependency or None,
        "array_parallelism": parallelism or profile.array_parallelism,
        "stderr_to_stdout": True,
        "wckey": None,
        "srun_args": srun_args,
    }
    python = shlex.split(profile.of_role(role, "python")) or [sys.executable]
    slurm_executor = Executor(run.logs.absolute(), max_num_timeout=MANY_TIMEOUTS, python=shlex.join(python))
    slurm_executor.update_parameters(**_with_options(parameters, profile, role))
    return slurm_executor


def _with_options(parameters: dict[str, Any], profile: Profile, role: Role) -> dict[str, Any]:
    """Add the profile's own options, which replace equal parameters; an empty one removes an option."""
    options: dict[str, Any] = {"requeue" if profile.requeue else "no-requeue": True}
    if parameters["dependency"]:
        # Otherwise a job stays pending for ever once its dependency can no longer be met.
        options["kill-on-invalid-dep"] = "yes"
    options["clusters"] = profile.clusters
    options |= {**profile.sbatch, **profile.resources(role).sbatch}
    # An option must not appear twice: sbatch takes the last one, and submitit decides their order.
    replaced = {*options, *(["mem"] if options.keys() & MEMORY_OPTIONS else [])}
    kept = {key: None if key.replace("_", "-") in replaced else value for key, value in parameters.items()}
    wanted = {key: value for key, value in options.items() if value is not False and value != ""}
    return kept | {"additional_parameters": wanted}
