"""Command line of the test cluster."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from slurm.testbed.cluster import Testbed, TestbedError, default_state
from slurm.testbed.conf import PARTITION, URGENT_PARTITION, Settings, program


def at_least_one(text: str) -> int:
    """Parse a positive whole number."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a positive whole number")
    return int(text)


def argument_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m slurm.testbed",
        description="A real Slurm on this machine: one controller and several virtual nodes, on the loopback "
        "device only, as root or an ordinary user, with all its files in one folder.",
        epilog="examples:\n"
        "  python -m slurm.testbed up                  # then: export SLURM_CONF=...\n"
        "  python -m slurm.testbed up --nodes 4 --cpus 8 --accounting\n"
        "  python -m slurm.testbed status\n"
        "  python -m slurm.testbed down",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=("up", "down", "status"))
    parser.add_argument(
        "--state", type=Path, default=default_state(), help="folder of all its files (default: %(default)s)"
    )
    up = parser.add_argument_group("for up")
    up.add_argument("--nodes", type=at_least_one, default=2, help="virtual nodes (default: %(default)s)")
    up.add_argument(
        "--cpus", type=at_least_one, default=4, help="CPUs that each node reports (default: %(default)s)"
    )
    up.add_argument(
        "--munge",
        action=argparse.BooleanOptionalAction,
        default=program("munged") is not None,
        help="authenticate with a private munged (default: where it is installed); without it every local user "
        "can run jobs as you",
    )
    up.add_argument("--accounting", action="store_true", help="slurmdbd on a private MariaDB, for sacct")
    up.add_argument(
        "--min-job-age", type=int, default=86_400, help="seconds for which squeue remembers ended jobs"
    )
    up.add_argument("--kill-wait", type=int, default=30, help="seconds between SIGTERM and SIGKILL")
    up.add_argument("--grace", type=int, default=30, help="seconds that a preempted job has to save")
    up.add_argument("--preempt-user-signal", action="store_true", help="preempt with a job's own --signal")
    up.add_argument("--enforce-memory", action="store_true", help="kill jobs that exceed their --mem")
    up.add_argument("--gpus", type=int, default=0, help="simulated GPUs of each node")
    up.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a further line of slurm.conf; repeatable",
    )
    return parser


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Return the settings that the command line asks for."""
    return Settings(
        state=arguments.state.absolute(),
        num_nodes=arguments.nodes,
        cpus=arguments.cpus,
        munge=arguments.munge,
        accounting=arguments.accounting,
        min_job_age=arguments.min_job_age,
        kill_wait=arguments.kill_wait,
        grace_seconds=arguments.grace,
        preempt_user_signal=arguments.preempt_user_signal,
        enforce_memory=arguments.enforce_memory,
        gpus=arguments.gpus,
        options=tuple(arguments.option),
    )


def status_lines(testbed: Testbed) -> list[str]:
    """Return lines with the state of the cluster and the commands that use it."""
    daemons, states = testbed.daemons(), testbed.node_states()
    option = f" --state {testbed.state}" if testbed.state != default_state().absolute() else ""
    lines = [f"state     {testbed.state}"]
    lines += [f"daemons   {', '.join(f'{name} ({pid})' for name, pid in daemons.items()) or 'none'}"]
    if not daemons:
        return [*lines, f"the test cluster is down; `python -m slurm.testbed up{option}` starts it"]
    lines += [f"nodes     {', '.join(f'{node} {state}' for node, state in states.items()) or 'no answer'}"]
    return [
        *lines,
        f"queues    {PARTITION} (default), {URGENT_PARTITION} (preempts {PARTITION})",
        "",
        "in every shell that uses it:",
        f"  export SLURM_CONF={testbed.conf}",
        "then, for instance:",
        "  sinfo && srun -N2 hostname",
        "  cpd launch demo --profile testbed --run-dir runs/demo-slurm",
        "  cpd status runs/demo-slurm --watch",
        "to stop it:",
        f"  python -m slurm.testbed down{option}",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Start, stop or show the test cluster; return the exit code."""
    arguments = argument_parser().parse_args(argv)
    try:
        testbed = Testbed(arguments.state)
        if arguments.verb == "up":
            started = testbed.up(settings_of(arguments))
            print("the test cluster is up" if started else "the test cluster was up already")
        elif arguments.verb == "down":
            was_up = bool(testbed.daemons())
            killed = testbed.down()
            note = f"; {len(killed)} leftover processes killed" if killed else ""
            print(f"the test cluster is down{note}" if was_up or killed else "the test cluster was not up")
            return 0
        print("\n".join(status_lines(testbed)))
        return 0 if testbed.daemons() else 1
    except TestbedError as error:
        print(f"slurm.testbed: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
