"""The test cluster of one machine: it comes up, keeps to itself, and goes away."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from workbench import ROOT, Workbench

from cpd.run.lease import start_ticks
from slurm.testbed.__main__ import argument_parser, main
from slurm.testbed.cluster import MARKER, Testbed, TestbedError, default_state, free_ports, missing_packages
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
    assert set(here.daemons()) - {"munged"} == {"slurmctld", "slurmd-n1", "slurmd-n2", "slurmd-n3"}
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


def test_jobs_are_authenticated_where_munge_is_installed(bench: Workbench) -> None:
    if missing_packages(munge=True):
        pytest.skip(missing_packages(munge=True))
    assert "munged" in bench.testbed.daemons()


@pytest.mark.parametrize("kind", ["link", "open", "file"])
def test_a_folder_that_others_can_write_is_refused(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "s"
    real = tmp_path / "real"
    real.mkdir(mode=0o700)
    (real / MARKER).touch()
    (real / "daemons.json").write_text(json.dumps({"slurmctld": [os.getpid(), start_ticks(os.getpid())]}))
    if kind == "link":
        state.symlink_to(real)
    elif kind == "file":
        state.touch(mode=0o600)
    else:
        real.rename(state)
        state.chmod(0o770)
    for verb in ("up", "status", "down"):
        assert main([verb, "--state", str(state)]) == 1
        assert str(state) in capsys.readouterr().err
    assert kind == "file" or (state / "daemons.json").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a folder away")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir(mode=0o700)
    os.chown(tmp_path / "s", 65534, 65534)
    with pytest.raises(TestbedError, match="another user"):
        Testbed(tmp_path / "s")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slurm.testbed.conf.SYSTEM_FOLDERS", ())
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
