"""Everything at once: a run that is killed, requeued, preempted, cut off from a node, and cancelled."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest
from workbench import DRAWER, LONG, STUDENT, WINDOW, Workbench, stages, variation

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1800)]


def crash_node(bench: Workbench, node: str, with_jobs: bool) -> None:
    """SIGKILL to a node's daemon and, as if its power had gone, to all that runs on it."""
    os.kill(bench.testbed.daemons()[f"slurmd-{node}"], signal.SIGKILL)
    if not with_jobs:
        return
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            variables = (entry / "environ").read_bytes().split(b"\0")
            name = (entry / "cmdline").read_bytes()
            of_job = f"SLURMD_NODENAME={node}".encode() in variables
            of_cluster = f"SLURM_CONF={bench.testbed.conf}".encode() in variables
            if of_cluster and (of_job or f"slurmstepd-{node}".encode() in name):
                os.kill(int(entry.name), signal.SIGKILL)


@pytest.mark.parametrize("order", ["after_all", "overlap"])
def test_many_failures_do_not_change_the_student(
    order: str, finished: Path, bench: Workbench, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    profile = variation(tmp_path, partition=f'partition = "main"\norder = "{order}"')

    def launch(*more: str) -> str:
        return bench.launch(root, *LONG, *more, profile=profile)

    launch()
    for teacher in (DRAWER, WINDOW):
        bench.wait(lambda name=teacher: (root / name / "attempts").exists(), "the teacher at work")
        bench.kill(root, teacher)
    bench.wait(lambda: bench.rows(root)[WINDOW]["state"] == "killed", "the killed teacher is seen")
    launch()
    for done in (30, 90, 150):
        bench.until(root, STUDENT, done)
        bench.slurm("scontrol", "requeue", bench.running_job(root, STUDENT))
    bench.until(root, STUDENT, 210)
    bench.urgent_job()
    bench.until(root, STUDENT, 260)
    bench.kill(root, STUDENT)
    bench.drain()
    launch()
    bench.until(root, STUDENT, 310)
    launch("--cancel")
    launch()
    bench.until(root, STUDENT, 370)
    crash_node(bench, "n2", with_jobs=order == "after_all")
    bench.wait(lambda: bench.testbed.node_states()["n2"].startswith("down"), "the node is missed")
    bench.testbed.start_node("n2")
    bench.drain()
    # A job whose rank died with its node may have failed before Slurm missed the node.
    launch()
    bench.drain()
    bench.assert_done(root)
    assert stages(root) == stages(finished)
    assert bench.slurm("squeue", "-h") == ""
