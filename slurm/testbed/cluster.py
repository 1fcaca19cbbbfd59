"""Start and stop the daemons of the test cluster."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cpd.cluster.ledger import user_name
from cpd.cluster.queue import foreign_variables
from cpd.reading import read_json
from cpd.run.lease import is_alive, start_ticks
from slurm.testbed.conf import (
    CLUSTER,
    SYSTEM_FOLDERS,
    Settings,
    gres_conf,
    program,
    slurm_conf,
    slurmdbd_conf,
)

#: Names the state folder in the environment of everything that the cluster starts.
STATE_VARIABLE = "CPD_TESTBED"
#: Tells MariaDB's client library, and so slurmdbd, where the private database listens.
SOCKET_VARIABLE = "MYSQL_UNIX_PORT"
#: The Debian package of each program.
PACKAGES = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
    "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server",
    "mariadb-install-db": "mariadb-server",
}
START_SECONDS = 60.0
#: Marks the state folder of a test cluster: only folders with this file are ever removed.
MARKER = "test-cluster"


class TestbedError(RuntimeError):
    """The test cluster cannot be started or stopped; the message says what to do."""

    __test__ = False  # not a test, whatever its name


def default_state() -> Path:
    """Return the default state folder: a short path that belongs to this user."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "cpd-slurm" if runtime else Path(f"/tmp/cpd-slurm-{os.getuid()}")


def needed_programs(munge: bool, accounting: bool) -> list[str]:
    """Return the programs that a cluster with these features runs."""
    names = ["slurmctld", "slurmd", "sbatch"]
    # Debian's Slurm is linked against munge's library in any case; the daemon is needed with `munge` only.
    return names + ["munged"] * munge + ["slurmdbd", "mariadbd", "mariadb-install-db"] * accounting


def missing_packages(munge: bool = False, accounting: bool = False) -> str:
    """Return a message about missing programs, with the command that installs them; empty if none is missing."""
    absent = [name for name in needed_programs(munge, accounting) if program(name) is None]
    if not absent:
        return ""
    packages = " ".join(dict.fromkeys(PACKAGES[name] for name in absent))
    return (
        f"{', '.join(absent)} not found; on Debian or Ubuntu:\n"
        f"  sudo apt-get update && sudo apt-get install -y --no-install-recommends {packages}"
    )


def free_ports(count: int) -> int:
    """Return the first of `count` consecutive free TCP ports of the loopback device.

    Raises:
        TestbedError: if there are none.
    """
    for _ in range(100):
        first = 20_000 + secrets.randbelow(10_000)
        with contextlib.suppress(OSError), contextlib.ExitStack() as held:
            for port in range(first, first + count):
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise TestbedError(f"no {count} consecutive free ports between 20000 and 30000")


class Testbed:
    """The cluster in one state folder, running or not."""

    __test__ = False  # not a test, whatever its name

    def __init__(self, state: Path) -> None:
        """Look at the cluster in `state`, which need not exist.

        Raises:
            TestbedError: if `state` is not a folder that this user alone can read and write. Who writes into it
                decides which programs the cluster runs.
        """
        self.state = state.absolute()
        with contextlib.suppress(FileNotFoundError):
            entry = self.state.lstat()
            if not stat.S_ISDIR(entry.st_mode) or entry.st_uid != os.geteuid() or entry.st_mode & 0o077:
                raise TestbedError(
                    f"{self.state} is a link, belongs to another user, or is open to others (mode "
                    f"{stat.S_IMODE(entry.st_mode):o}); remove it, or choose another --state"
                )
        self.conf = self.state / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """Environment in which Slurm's commands talk to this cluster."""
        hidden = foreign_variables()
        inherited = {key: value for key, value in os.environ.items() if key not in hidden}
        path = os.pathsep.join([inherited.get("PATH", ""), *SYSTEM_FOLDERS])
        return inherited | {"SLURM_CONF": str(self.conf), "PATH": path}

    def command(self, *words: str, check: bool = True, timeout: float = 60) -> str:
        """Run one of Slurm's commands and return its output.

        Raises:
            TestbedError: if it fails and `check` is set.
        """
        done = subprocess.run(
            words,
            env=self.environment,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            timeout=timeout,
        )
        if check and done.returncode:
            raise TestbedError(f"{' '.join(words)} failed: {done.stderr.strip()}")
        return done.stdout

    # ------------------------------------------------------------------ daemons

    @property
    def _pid_file(self) -> Path:
        return self.state / "daemons.json"

    def _recorded(self) -> dict[str, tuple[int, int]]:
        return read_json(self._pid_file, dict[str, tuple[int, int]]) if self._pid_file.exists() else {}

    def daemons(self) -> dict[str, int]:
        """Process id of every living daemon, by name."""
        return {name: pid for name, (pid, ticks) in self._recorded().items() if is_alive(pid, ticks)}

    def start_daemon(self, name: str, *words: str) -> None:
        """Start a daemon in the foreground of a new session, and record its process."""
        binary = program(words[0])
        assert binary is not None
        marks = {STATE_VARIABLE: str(self.state), SOCKET_VARIABLE: str(self.state / "mysql.socket")}
        with (self.state / "log" / f"{name}.out").open("ab") as output:
            process = subprocess.Popen(
                [binary, *words[1:]],
                env=self.environment | marks,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                cwd=self.state,
            )
        daemons = self._recorded() | {name: (process.pid, start_ticks(process.pid))}
        self._pid_file.write_text(json.dumps(daemons), encoding="utf-8")

    def start_node(self, node: str) -> None:
        """Start the daemon of one virtual node."""
        self.start_daemon(f"slurmd-{node}", "slurmd", "-D", "-N", node)

    def wait_for(self, ready: Callable[[], bool], condition: str) -> None:
        """Poll until `ready` returns True; error messages call this `condition`.

        Raises:
            TestbedError: if it takes more than `START_SECONDS` or a daemon dies, with the last lines of the logs.
        """
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            dead = sorted(set(self._recorded()) - set(self.daemons()))
            if dead or time.monotonic() > deadline:
                reason = f"{', '.join(dead)} died" if dead else f"not within {START_SECONDS:.0f} s"
                logs = sorted((self.state / "log").glob("*"))
                texts = [log.read_text(encoding="utf-8", errors="replace") for log in logs]
                tails = [
                    f"--- {log}\n" + "\n".join(text.splitlines()[-8:])
                    for log, text in zip(logs, texts, strict=True)
                ]
                raise TestbedError(f"{condition}: {reason}\n" + "\n".join(tails))
            time.sleep(0.1)

    # ------------------------------------------------------------------ up

    def up(self, settings: Settings) -> bool:
        """Start the cluster and wait until its nodes are idle; False if it was up already.

        Raises:
            TestbedError: if a program is missing, the folder is unusable, or a daemon does not come up.
        """
        if self.daemons():
            states = self.node_states()  # none if the controller does not answer
            if states and all(state in ("idle", "mix", "alloc") for state in states.values()):
                return False
            self.down()
        message = missing_packages(settings.munge, settings.accounting)
        if message:
            raise TestbedError(message)
        if len(str(settings.database_socket)) > 100:
            raise TestbedError(f"{self.state} is too long a path for unix sockets; choose a shorter --state")
        self._make_state(settings)
        try:
            self._start_all(self._with_ports(settings))
        except TestbedError:
            self.down()
            raise
        return True

    def _start_all(self, settings: Settings) -> None:
        if settings.munge:
            self._start_munge(settings)
        if settings.accounting:
            self._start_accounting(settings)
        self.conf.write_text(slurm_conf(settings), encoding="utf-8")
        if settings.gpus:
            for device in settings.devices:
                device.touch()
            self.conf.with_name("gres.conf").write_text(gres_conf(settings), encoding="utf-8")
        self.start_daemon("slurmctld", "slurmctld", "-D")
        for node in settings.nodes:
            self.start_node(node)
        self.wait_for(lambda: self.is_idle(settings.num_nodes), "all nodes idle")

    def _make_state(self, settings: Settings) -> None:
        if self.state.exists() and any(self.state.iterdir()) and not (self.state / MARKER).is_file():
            raise TestbedError(
                f"{self.state} exists and is not a test cluster; choose another --state, or remove it"
            )
        shutil.rmtree(self.state, ignore_errors=True)
        try:
            # Nobody else may read the credentials of the database or of munge.
            self.state.mkdir(mode=0o700, parents=True)
        except OSError as error:
            raise TestbedError(f"{self.state} cannot be made: {error.strerror}; choose another --state") from None
        (self.state / MARKER).touch()
        per_node = [f"{kind}-{node}" for node in settings.nodes for kind in ("spool", "tmp")]
        for folder in ("log", "controller", *per_node):
            (self.state / folder).mkdir()

    @staticmethod
    def _with_ports(settings: Settings) -> Settings:
        names = ["slurmctld", "slurmdbd", *settings.nodes]
        first = free_ports(len(names))
        return Settings(**(vars(settings) | {"ports": {name: first + i for i, name in enumerate(names)}}))

    def _start_munge(self, settings: Settings) -> None:
        key = self.state / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        paths = {"key-file": key, "socket": settings.munge_socket, "pid-file": self.state / "munged.pid"}
        paths |= {"log-file": self.state / "log" / "munged.log", "seed-file": self.state / "munged.seed"}
        options = [f"--{name}={path}" for name, path in paths.items()]
        # --force: munged refuses a socket in a folder that other users cannot read, as this one is on purpose.
        self.start_daemon("munged", "munged", "--foreground", "--force", *options)
        self.wait_for(settings.munge_socket.exists, "munged's socket")

    def _start_accounting(self, settings: Settings) -> None:
        data = self.state / "mysql"
        options = ["--no-defaults", "--skip-test-db", f"--datadir={data}", f"--user={user_name()}"]
        options += ["--auth-root-authentication-method=socket", f"--auth-root-socket-user={user_name()}"]
        install = program("mariadb-install-db") or ""
        done = subprocess.run(
            [install, *options], capture_output=True, encoding="utf-8", errors="replace", check=False
        )
        if done.returncode:
            raise TestbedError(f"mariadb-install-db failed: {done.stderr.strip()[-2000:]}")
        self.start_daemon(
            "mariadbd",
            *("mariadbd", "--no-defaults", f"--user={user_name()}", f"--datadir={data}", "--skip-networking"),
            *(f"--socket={settings.database_socket}", f"--pid-file={self.state}/mariadbd.pid"),
        )
        self.wait_for(settings.database_socket.exists, "MariaDB's socket")
        self.conf.write_text(slurm_conf(settings), encoding="utf-8")
        config = self.state / "slurmdbd.conf"
        config.touch(mode=0o600)
        config.write_text(slurmdbd_conf(settings), encoding="utf-8")
        self.start_daemon("slurmdbd", "slurmdbd", "-D")
        add = ("sacctmgr", "-i", "add", "cluster", CLUSTER)
        self.wait_for(lambda: self._knows_cluster(add), "slurmdbd")

    def _knows_cluster(self, add: tuple[str, ...]) -> bool:
        self.command(*add, check=False)
        return CLUSTER in self.command("sacctmgr", "-n", "-P", "list", "cluster", "format=cluster", check=False)

    # ------------------------------------------------------------------ state

    def node_states(self) -> dict[str, str]:
        """Return the state of every node, such as `idle`; empty if the controller does not answer."""
        lines = self.command("sinfo", "-N", "-h", "-p", "main", "-o", "%n %t %N", check=False).splitlines()
        return {line.split()[2]: line.split()[1] for line in lines}

    def is_idle(self, num_nodes: int) -> bool:
        """Whether all nodes have registered and are idle."""
        states = self.node_states()
        return len(states) == num_nodes and set(states.values()) == {"idle"}

    # ------------------------------------------------------------------ down

    def down(self) -> list[str]:
        """Stop all jobs and daemons; kill and return the processes that remain. Does nothing if it is not up."""
        if "slurmctld" in self.daemons():
            self.cancel_all()
        daemons = self.daemons()
        # Stop the database and munge last: the other daemons use them until they end.
        order = sorted(daemons, key=lambda name: ("slurm", "mariadb", "munge").index(_family(name)))
        for family in ("slurm", "mariadb", "munge"):
            self._end([daemons[name] for name in order if _family(name) == family])
        remaining = list(self._processes())
        for process in remaining:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._pid_file.unlink(missing_ok=True)
        return [str(process) for process in remaining]

    def cancel_all(self, seconds: float = 3.0) -> None:
        """Kill all jobs without time to save, and wait at most `seconds` until they have left the queue."""
        self.command("scancel", "--signal=KILL", f"--user={user_name()}", "--full", check=False)
        self.command("scancel", f"--user={user_name()}", check=False)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.command("squeue", "-h", check=False).strip():
            time.sleep(0.2)

    @staticmethod
    def _end(processes: list[int], seconds: float = 10.0) -> None:
        ticks = {process: start_ticks(process) for process in processes}
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(is_alive(*item) for item in ticks.items()):
            time.sleep(0.05)
        for process, started in ticks.items():
            if is_alive(process, started):
                os.kill(process, signal.SIGKILL)

    def _processes(self) -> Iterator[int]:
        """Yield the living processes of this cluster's daemons and jobs, recognised by their environment."""
        daemon_variable = f"{STATE_VARIABLE}={self.state}".encode()
        conf_variable = f"SLURM_CONF={self.conf}".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                variables = (entry / "environ").read_bytes().split(b"\0")
                inside_job = conf_variable in variables and any(v.startswith(b"SLURM_JOB_ID=") for v in variables)
                if (daemon_variable in variables or inside_job) and int(entry.name) != os.getpid():
                    yield int(entry.name)


def _family(name: str) -> str:
    return next(family for family in ("slurm", "mariadb", "munge") if name.startswith(family))
