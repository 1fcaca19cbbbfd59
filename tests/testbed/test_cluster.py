"""The test cluster of one machine: it comes up, keeps to itself, and goes away."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from workbench import ROOT, Workbench

from slurm.testbed.__main__ import argument_parser
from slurm.testbed.cluster import Testbed, TestbedError, default_state, free_ports, missing_packages
from slurm.testbed.conf import Settings, slurm_conf

pytestmark = pytest.mark.slurm


def testbed(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "slurm.testbed", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


testbed.__test__ = False  # type: ignore[attr-defined]


def listening() -> set[str]:
    """Addresses, in the kernel's hexadecimal form, on which processes of Slurm's daemons listen."""
    addresses = set()
    for daemon in Path("/proc").glob("[0-9]*"):
        try:
            name = (daemon / "comm").read_text().strip()
            if name.startswith(("slurm", "maria", "munge")):
                sockets = {str(link.readlink()) for link in (daemon / "fd").iterdir()}
                lines = (daemon / "net" / "tcp").read_text().splitlines()[1:]
                fields = [line.split() for line in lines]
                addresses |= {
                    f[1].partition(":")[0] for f in fields if f[3] == "0A" and f"socket:[{f[9]}]" in sockets
                }
        except OSError:
            continue
    return addresses


def test_up_twice_then_down(tmp_path: Path) -> None:
    if missing_packages():
        pytest.skip(missing_packages())
    state = tmp_path / "s"
    up = ("up", "--state", str(state), "--nodes", "3", "--cpus", "2")
    first = testbed(*up)
    assert first.returncode == 0, first.stderr
    assert "n1 idle, n2 idle, n3 idle" in first.stdout
    assert f"export SLURM_CONF={state}/slurm.conf" in first.stdout
    second = testbed(*up)
    assert second.returncode == 0 and "already" in second.stdout
    here = Testbed(state)
    assert len(here.daemons()) == 4
    # A job that does not want to go, and a child that left its session.
    script = tmp_path / "stubborn.sh"
    script.write_text(
        "#!/bin/bash\ntrap '' TERM\nsetsid sleep 4711 &\nsrun bash -c \"trap '' TERM; sleep 4711\"\n"
    )
    here.command("sbatch", "-o", "/dev/null", str(script))
    deadline = time.monotonic() + 30
    while here.command("squeue", "-h", "-o", "%T").strip() != "RUNNING":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(1.0)
    assert listening() <= {"0100007F"}  # 127.0.0.1
    down = testbed("down", "--state", str(state))
    assert down.returncode == 0
    assert here.daemons() == {}
    assert list(here._processes()) == []
    assert subprocess.run(["pgrep", "-f", "sleep 4711"], capture_output=True, check=False).returncode == 1
    assert testbed("down", "--state", str(state)).returncode == 0
    assert testbed("status", "--state", str(state)).returncode == 1


def test_nodes_are_virtual(bench: Workbench) -> None:
    assert bench.testbed.node_states() == {"n1": "idle", "n2": "idle"}
    names = bench.slurm("srun", "-N2", "bash", "-c", "echo $SLURMD_NODENAME").split()
    assert sorted(names) == ["n1", "n2"]


def test_with_munge(tmp_path: Path) -> None:
    if missing_packages(munge=True):
        pytest.skip(missing_packages(munge=True))
    here = Testbed(tmp_path / "s")
    here.up(Settings(state=here.state, munge=True))
    try:
        assert "munged" in here.daemons()
        assert here.command("srun", "echo", "hello").strip() == "hello"
    finally:
        here.down()


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slurm.testbed.cluster.SYSTEM_FOLDERS", ())
    monkeypatch.setenv("PATH", "/nonexistent")
    assert re.search(
        r"apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge slurmdbd mariadb-server$",
        missing_packages(munge=True, accounting=True),
    )


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    if missing_packages():
        pytest.skip(missing_packages())
    (tmp_path / "thesis.tex").write_text("precious")
    (tmp_path / "log").mkdir()
    with pytest.raises(TestbedError, match=re.escape(str(tmp_path))):
        Testbed(tmp_path).up(Settings(state=tmp_path))
    assert (tmp_path / "thesis.tex").exists()


def test_a_daemon_that_dies_is_reported_at_once(tmp_path: Path) -> None:
    if missing_packages():
        pytest.skip(missing_packages())
    here = Testbed(tmp_path / "s")
    with pytest.raises(TestbedError, match="Nonsense"):
        here.up(Settings(state=here.state, options=("Nonsense=1",)))
    assert here.daemons() == {}


@pytest.mark.parametrize("option", ["--nodes", "--cpus"])
def test_sizes_below_one_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("-1", "0", "two"):
        with pytest.raises(SystemExit):
            argument_parser().parse_args(["up", option, text])
        assert f"argument {option}: {text}" in capsys.readouterr().err


def test_configuration(tmp_path: Path) -> None:
    ports = {"slurmctld": 1, "slurmdbd": 2, "n1": 3, "n2": 4}
    text = slurm_conf(Settings(state=tmp_path, ports=ports, options=("MaxArraySize=11",)))
    assert "\nMaxArraySize=11\n" in text
    assert " Port=[3-4] " in text
    assert "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny" in text
    assert 20_000 <= free_ports(5) < 30_000
    assert len(str(default_state())) < 80
