"""Launch an experiment: resolve its configuration, make its run directory, execute or submit what is missing."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.live import Live

from cpd.cluster.element_job import VERBS
from cpd.cluster.estimate import launch_problems
from cpd.cluster.local import LocalQueue
from cpd.cluster.plan import PlanError
from cpd.cluster.queue import NoSchedulerError, QueueView, SchedulerError, SubmissionRefusedError
from cpd.config import Config, changes, continued
from cpd.config.load import ConfigError, setting_lines, to_dict
from cpd.config.profile import Profile
from cpd.config.retired import upgrade
from cpd.run.claim import claim
from cpd.run.directory import Element, Run, RunError, StudentElement
from cpd.run.files import DamagedFileError, read_json, write_json
from cpd.run.interrupt import EXIT_INTERRUPTED, Interrupt
from cpd.run.lease import Lease, LeaseHeldError
from cpd.run.progress import progress_line, read_status
from cpd.run.provenance import code_version, provenance
from cpd.run.reuse import PlannedRun, ReuseError, find_reusable, reuse
from jobs.common import EXIT_FAILED, EXIT_USAGE, exit_quietly, log
from jobs.launch_options import build_parser, check_options, check_run_dir, load_both
from jobs.launch_slurm import cancel_chain, dry_run, submit_chain
from jobs.status import print_failures, run_status, screen_table

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
    """Make the run directory, or check that it is of the same experiment; call with the launcher's lease held.

    Raises:
        RunError: if settings that affect results differ from what `root` holds.
    """
    claim(root, "run", config)
    config_path = root / "config.json"
    if config_path.exists():
        old = Run(root)
        started_with = read_json(root / "provenance.json")["code"]
        if started_with != code_version():
            log(f"note: {root} was started with code {started_with}, this is {code_version()}")
        stored = upgrade(read_json(config_path))
        unsaid = [line for line in changes(stored, to_dict(old.config)) if ": None -> " in line]
        if unsaid:
            lines = "\n".join(f"  {line.replace('None -> ', '')}" for line in unsaid)
            log(f"note: {root} is older than these settings; finished elements may not agree with them:\n{lines}")
        config = continued(old.config, config)
        if old.is_extended_by(config):
            old.report().complete.unlink(missing_ok=True)  # it lacks the new students
    else:
        write_json(root / "provenance.json", provenance())
    write_json(root / "profile.json", to_dict(profile))
    # Teachers are reused before anything starts, so that only the name of their source is kept.
    write_json(config_path, to_dict(replace(config, teachers_from=Path(config.teachers_from).name)))
    run = Run(root)
    run.logs.mkdir(exist_ok=True)
    return run


def describe(run: Run, profile: Profile, chosen: Sequence[Element]) -> list[str]:
    """Return lines that say what of `chosen` would run on this machine."""
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
    return [*lines, f"executed on     {profile.usable_cores} cores of this machine"]


def execute(run: Run, profile: Profile, interrupt: Interrupt, elements: Sequence[Element]) -> bool:
    """Execute elements on this machine with a live display, or plain lines where there is no terminal."""
    console, view = Console(), QueueView()
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
        """Print what is new."""
        due = time.monotonic() - self._last >= LINE_SECONDS
        if due:
            self._last = time.monotonic()
        for row in run_status(self._run, self._view):
            if row.element not in self._states:
                continue
            if row.state != self._states[row.element]:
                self._states[row.element] = row.state
                log(f"{row.element}: {row.state}{f' ({row.message})' if row.message else ''}")
            elif due and row.state == "running":
                log(f"{row.element}: {progress_line(read_status(self._run.root / row.element / 'status.json'))}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line of `python -m jobs.launch`; return the exit code."""
    parser = build_parser()
    arguments, overrides = parser.parse_known_args(argv)
    if arguments.settings:
        print("\n".join(setting_lines(Config)))
        return 0
    if arguments.recipe is None:
        parser.error("which recipe? e.g. `python -m jobs.launch demo`")
    try:
        check_options(parser, overrides)
        config, profile = load_both(arguments.recipe, overrides, arguments.profile or "local")
        root = arguments.run_dir or Path("runs") / config.name
        for warning in (*config.warnings(), *profile.warnings()):
            log(f"warning: {warning}")
        if profile.cluster == "local" and (arguments.retry_failed or arguments.cancel):
            raise ConfigError(["--retry-failed and --cancel are for Slurm profiles"], "the command line")
        if arguments.cancel:
            cancel_chain(Run(root), profile, arguments.only)
            return 0
        # Also before anything is created, so that a mistake leaves nothing behind.
        check_run_dir(root, config, arguments.profile)
        source = Path(config.teachers_from) if config.teachers_from else None
        reuses = find_reusable(PlannedRun(root, config), source) if source else []
        run: Run = PlannedRun(root, config, reuses)
        chosen = run.select(arguments.only)
        if profile.cluster == "local" and not arguments.prepare:
            check_needs(run, chosen)
        problems = launch_problems(root, config, profile)
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
            for item in reuse(run, source) if source else []:
                log(f"{item.teacher.name}: {item.summary}")
            if arguments.prepare:
                log(f"{root} is ready")
            elif profile.cluster == "slurm":
                submit_chain(run, profile, arguments.only, arguments.retry_failed)
            else:
                return conclude(run, profile, arguments.only)
            return 0
    except MISTAKES as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return EXIT_USAGE
    except SchedulerError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return EXIT_INTERRUPTED


def check_needs(run: Run, elements: Sequence[Element]) -> None:
    """Raise RunError if one of `elements` needs what is neither finished nor among them."""
    unfinished = [element for element in elements if not element.finished]
    for element in unfinished:
        lacking = [e.name for e in run.dependencies(element) if not e.finished and e not in unfinished]
        if lacking:
            raise RunError(
                f"{element.name} needs {', '.join(lacking)}: finish that first, add it to --only, or reuse "
                "finished teachers with --teachers-from"
            )


def conclude(run: Run, profile: Profile, only: Sequence[str] = ()) -> int:
    """Execute what is missing, of everything or of what `only` names, then print the summary of a finished run."""
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
