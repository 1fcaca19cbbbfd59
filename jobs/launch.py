"""Launch an experiment: load its configuration, make its run directory, execute or submit unfinished elements."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.live import Live

from cpd.cluster.element_job import VERBS, JobFailedError, mpi_command
from cpd.cluster.estimate import launch_problems, rank_lines
from cpd.cluster.local import LocalQueue
from cpd.cluster.pickles import sweep_pickles
from cpd.cluster.plan import PlanError
from cpd.cluster.probe import probe_profile
from cpd.cluster.queue import (
    CLUSTERS_VARIABLE,
    NoSchedulerError,
    QueueView,
    SchedulerError,
    SubmissionRefusedError,
)
from cpd.config import Config, changes, continued
from cpd.config.load import ConfigError, setting_lines, to_dict
from cpd.config.profile import Profile
from cpd.config.retired import upgrade
from cpd.reading import DamagedFileError, read_for_display, read_json
from cpd.run.claim import claim
from cpd.run.command import EXIT_FAILED, EXIT_USAGE, exit_quietly
from cpd.run.directory import Element, Run, RunError, StudentElement
from cpd.run.files import remove, sweep_temporaries, write_json
from cpd.run.interrupt import EXIT_INTERRUPTED, Interrupt
from cpd.run.lease import Lease, LeaseHeldError
from cpd.run.progress import progress_line, read_status
from cpd.run.provenance import Provenance, code_version, provenance
from cpd.run.reuse import PlannedRun, ReuseError, find_reusable, reuse
from cpd.run.shortage import not_installed
from cpd.terminal import plain_console
from jobs.common import log
from jobs.launch_options import build_parser, check_options, check_run_dir, load_recipe_and_profile
from jobs.launch_slurm import cancel_chain, dry_run, submit_chain
from jobs.status import print_failures, run_status
from jobs.status_table import screen_table

#: Mistakes of the user, reported in one line without a traceback.
MISTAKES = (
    ReuseError,
    ConfigError,
    DamagedFileError,
    LeaseHeldError,
    NoSchedulerError,
    PlanError,
    RunError,
    SubmissionRefusedError,
)
#: Seconds between plain lines of progress where the output is no terminal.
LINE_SECONDS = 15.0


def prepare(root: Path, config: Config, profile: Profile) -> Run:
    """Make the run directory, or check that it holds the same experiment; call with the launcher's lease held.

    Raises:
        RunError: if settings that affect results differ from what `root` holds.
    """
    claim(root, "run", config)
    sweep_temporaries(root)
    config_path = root / "config.json"
    if config_path.exists():
        old = Run(root)
        unknown = Provenance(code="an unknown version")
        old_version = read_for_display(root / "provenance.json", Provenance, unknown)["code"]
        if old_version != code_version():
            log(f"note: {root} was started with code {old_version}, this is {code_version()}")
        stored = upgrade(read_json(config_path, dict[str, Any]))
        added = [line for line in changes(stored, to_dict(old.config)) if ": None -> " in line]
        if added:
            lines = "\n".join(f"  {line.replace('None -> ', '')}" for line in added)
            log(f"note: {root} is older than these settings; finished elements may not agree with them:\n{lines}")
        config = continued(old.config, config)
        if old.is_extended_by(config):
            remove(old.report().complete)  # the report must be made again with the new students
    else:
        write_json(root / "provenance.json", provenance())
    write_json(root / "profile.json", to_dict(profile))
    # The path of the source is not needed later: teachers are copied before any element starts.
    names = [folder.name for folder in config.teacher_folders]
    source = names[0] if len(names) == 1 else tuple(names) or ""
    write_json(config_path, to_dict(replace(config, teachers_from=source)))
    run = Run(root)
    run.logs.mkdir(exist_ok=True)
    sweep_pickles(run)
    return run


def describe(run: Run, profile: Profile, chosen: Sequence[Element]) -> list[str]:
    """Return lines that describe what would run on this machine to finish the elements `chosen`."""
    config, root = run.config, run.root
    labels = dict.fromkeys(element.method for element in chosen if isinstance(element, StudentElement))
    lines = [
        f"run directory   {root}{' (exists: finished elements are skipped)' if run.config_path.exists() else ''}",
        f"stream          {', '.join(config.stream.tasks)}",
        *(
            f"method          {label}: {method.memory_steps} stored steps ({method.memory.selection})"
            for label, method in ((label, config.of_method(label)) for label in labels)
        ),
    ]
    for role in VERBS:
        are_finished = [element.finished for element in chosen if element.role == role]
        job = profile.resources(role)
        note = f" ({sum(are_finished)} finished)" if any(are_finished) else ""
        if are_finished:
            lines.append(f"{role:<15} {len(are_finished)} x {job.ranks} rank(s) x {job.cpus} core(s){note}")
    lines += [f"ranks           {line}" for line in rank_lines(run, chosen)]
    return [*lines, f"executed on     {profile.usable_cores} cores of this machine"]


def execute(run: Run, profile: Profile, interrupt: Interrupt, elements: Sequence[Element]) -> bool:
    """Execute elements on this machine with a live display, or plain lines where there is no terminal."""
    console, view = plain_console(), QueueView()
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:

            def draw() -> None:
                live.update(screen_table(console, run, run_status(run, view)), refresh=True)

            queue = LocalQueue(run, profile, interrupt, elements, draw)
            finished = queue.execute()
            draw()
    else:
        queue = LocalQueue(run, profile, interrupt, elements, PlainProgress(run, elements, view))
        finished = queue.execute()
    names = [element.name for element in queue.failed]
    print_failures(console, run, [row for row in run_status(run) if row.element in names])
    for name, holder in queue.held.items():
        log(f"{name} is being written by {holder}; wait for it or end it, then launch again")
    return finished


class PlainProgress:
    """Prints a line whenever an element's state changes, and its progress every 15 seconds."""

    def __init__(self, run: Run, elements: Sequence[Element], view: QueueView) -> None:
        self._run, self._view = run, view
        names = {element.name for element in elements}
        self._states = {row.element: row.state for row in run_status(run, view) if row.element in names}
        self._last = time.monotonic()

    def __call__(self) -> None:
        """Print the changed states, and every 15 seconds the progress of running elements."""
        is_due = time.monotonic() - self._last >= LINE_SECONDS
        if is_due:
            self._last = time.monotonic()
        for row in run_status(self._run, self._view):
            if row.element not in self._states:
                continue
            if row.state != self._states[row.element]:
                self._states[row.element] = row.state
                log(f"{row.element}: {row.state}{f' ({row.message})' if row.message else ''}")
            elif is_due and row.state == "running":
                log(f"{row.element}: {progress_line(read_status(self._run.root / row.element / 'status.json'))}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line of `cpd launch`; return the exit code."""
    parser = build_parser()
    arguments, overrides = parser.parse_known_args(argv)
    if arguments.settings:
        print("\n".join(setting_lines(Config)))
        return 0
    if arguments.recipe is None:
        parser.error("a recipe is required, e.g. `cpd launch demo`")
    try:
        check_options(parser, overrides)
        config, profile = load_recipe_and_profile(arguments.recipe, overrides, arguments.profile or "local")
        profile = replace(profile, track=arguments.track or profile.track)
        root = arguments.run_dir or Path("runs") / config.name
        os.environ[CLUSTERS_VARIABLE] = profile.clusters
        for warning in (*config.warnings(), *profile.warnings()):
            log(f"warning: {warning}")
        if profile.cluster == "local" and (arguments.retry_failed or arguments.cancel or arguments.probe):
            raise ConfigError(["--probe, --retry-failed and --cancel are for Slurm profiles"], "the command line")
        if arguments.cancel:
            cancel_chain(Run(root), profile, arguments.only)
            return 0
        # `prepare` checks again under the lease. This check comes before anything is created.
        check_run_dir(root, config, arguments.profile)
        reuses = find_reusable(PlannedRun(root, config), *config.teacher_folders)
        run: Run = PlannedRun(root, config, reuses)
        chosen = run.select(arguments.only)
        problems = launch_problems(root, config, profile)
        if profile.cluster == "local" and not arguments.prepare:
            check_dependencies(run, chosen)
            problems += missing_software(chosen, profile)
        if arguments.dry_run:
            if profile.cluster == "slurm":
                lines = dry_run(run, profile, arguments.only, arguments.retry_failed)
            else:
                lines = describe(run, profile, chosen)
            lines += [f"{item.teacher.name}: {item.summary}" for item in reuses]
            print("\n".join([*lines, *(f"warning: {problem}" for problem in problems)]))
            return 0
        if problems:
            raise RunError("; ".join(problems))
        with Lease(root / "launcher").acquire():
            run = prepare(root, config, profile)
            for item in reuse(run, *config.teacher_folders):
                log(f"{item.teacher.name}: {item.summary}")
            if arguments.prepare:
                log(f"{root} is ready")
            elif arguments.probe:
                return 0 if probe_profile(run, profile, log) else EXIT_FAILED
            elif profile.cluster == "slurm":
                submit_chain(run, profile, arguments.only, arguments.retry_failed)
            else:
                return execute_unfinished(run, profile, arguments.only)
            return 0
    except MISTAKES as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return EXIT_USAGE
    except SchedulerError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return EXIT_INTERRUPTED


def missing_software(chosen: Sequence[Element], profile: Profile) -> list[str]:
    """Return what this machine lacks to execute the unfinished elements of `chosen`, one problem per entry."""
    roles = {element.role for element in chosen if not element.finished} - {"report"}
    problems = [reason] if roles and (reason := not_installed()) else []
    if any(profile.resources(role).ranks > 1 for role in roles):
        try:
            mpi_command(2, [])
        except JobFailedError as error:
            problems.append(str(error))
    return problems


def check_dependencies(run: Run, elements: Sequence[Element]) -> None:
    """Raise RunError if a dependency of one of `elements` is neither finished nor among them."""
    unfinished = [element for element in elements if not element.finished]
    for element in unfinished:
        missing = [e.name for e in run.dependencies(element) if not e.finished and e not in unfinished]
        if missing:
            raise RunError(
                f"{element.name} needs {', '.join(missing)}: finish that first, add it to --only, or reuse "
                "finished teachers with --teachers-from"
            )


def execute_unfinished(run: Run, profile: Profile, only: Sequence[str] = ()) -> int:
    """Execute the unfinished elements, all or those that `only` names; print the summary if the run is finished.

    Returns:
        The exit code.
    """
    interrupt = Interrupt().install()
    unfinished = [element for element in run.select(only) if not element.finished]
    if unfinished:
        log(f"{run.root}: {len(unfinished)} of {len(run.elements())} elements to do")
        finished = execute(run, profile, interrupt, unfinished)
        if interrupt.requested:
            log("stopped; nothing is lost: the same command resumes")
            return EXIT_INTERRUPTED
        if not finished:
            return EXIT_FAILED
    elif only:
        log(f"{run.root}: nothing to do, {', '.join(only)} finished before")
    if not run.report().finished:
        return 0
    from analysis.terminal import print_summary

    print_summary(run.results)
    return 0


if __name__ == "__main__":
    exit_quietly(main)
