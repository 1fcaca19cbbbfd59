"""The configuration files of the test cluster.

https://slurm.schedmd.com/slurm.conf.html describes the settings.
"""

from __future__ import annotations

import os
import shutil
import socket
from dataclasses import dataclass, field
from pathlib import Path

from cpd.cluster.ledger import user_name

CLUSTER = "testbed"
SYSTEM_FOLDERS = ("/usr/sbin", "/usr/bin", "/sbin", "/bin")
#: The partition that jobs go to by default, and one whose jobs preempt them.
PARTITION, URGENT_PARTITION = "main", "urgent"


@dataclass(frozen=True)
class Settings:
    """Settings of a test cluster."""

    state: Path
    """Folder of all files of the cluster; a short path, since the length of unix sockets' paths is limited."""
    num_nodes: int = 2
    cpus: int = 4
    """CPUs that every virtual node reports; may exceed the machine's cores, to test scheduling."""
    munge: bool = field(default_factory=lambda: program("munged") is not None)
    """Authenticate with a private munged; without it, every user of this machine can run jobs as you."""
    accounting: bool = False
    min_job_age: int = 86_400
    """Seconds for which squeue lists an ended job; many sites have Slurm's default of 300."""
    kill_wait: int = 30
    """Seconds between SIGTERM and SIGKILL at the end of a job."""
    grace_seconds: int = 30
    """Seconds that a preempted job has to save."""
    preempt_user_signal: bool = False
    """Preempt with the signal that a job asked for by --signal, rather than SIGTERM."""
    enforce_memory: bool = False
    """Kill jobs that use more memory than they requested, as sites do."""
    gpus: int = 0
    """Simulated GPUs of every virtual node, for submissions that request GPUs."""
    options: tuple[str, ...] = ()
    """Further lines of slurm.conf, `Key=Value`; they take precedence over the others."""
    ports: dict[str, int] = field(default_factory=dict)
    """Port of each daemon, by name."""

    @property
    def nodes(self) -> list[str]:
        """Names of the virtual nodes."""
        return [f"n{number}" for number in range(1, self.num_nodes + 1)]

    @property
    def devices(self) -> list[Path]:
        """Empty files that represent each node's GPUs."""
        return [self.state / f"gpu{number}" for number in range(self.gpus)]

    @property
    def slurm_conf(self) -> Path:
        """The file that SLURM_CONF must name."""
        return self.state / "slurm.conf"

    @property
    def munge_socket(self) -> Path:
        """Where the private munged listens."""
        return self.state / "munge.socket"

    @property
    def database_socket(self) -> Path:
        """Where the private MariaDB listens."""
        return self.state / "mysql.socket"


def program(name: str) -> str | None:
    """Return the path of a program, searching /usr/sbin too, which is not on an ordinary user's PATH."""
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *SYSTEM_FOLDERS]))


def memory_mib() -> int:
    """Return the size of this machine's memory in MiB."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20


def authentication_lines(settings: Settings) -> list[str]:
    """Return the lines of slurm.conf on authentication."""
    # A requeued job restarts only once its credential has expired, by default after 120 s.
    expire = "cred_expire=5"
    if settings.munge:
        return ["AuthType=auth/munge", "CredType=cred/munge", f"AuthInfo=socket={settings.munge_socket},{expire}"]
    return ["AuthType=auth/none", "CredType=cred/none", f"AuthInfo={expire}"]


def slurm_conf(settings: Settings) -> str:
    """Return the text of slurm.conf."""
    host, state, ports = socket.gethostname(), settings.state, settings.ports
    first, last = ports["n1"], ports[settings.nodes[-1]]
    names = f"n[1-{settings.num_nodes}]" if settings.num_nodes > 1 else "n1"
    numbers = f"[{first}-{last}]" if settings.num_nodes > 1 else str(first)
    lines = [
        "# Written by `python -m slurm.testbed up`.",
        f"ClusterName={CLUSTER}",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={ports['slurmctld']}",
        f"SlurmUser={user_name()}",
        f"SlurmdUser={user_name()}",
        *authentication_lines(settings),
        "# Otherwise the daemons listen on every address; without munge, whoever reaches them runs code as you.",
        "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny",
        f"StateSaveLocation={state}/controller",
        f"SlurmctldPidFile={state}/slurmctld.pid",
        f"SlurmctldLogFile={state}/log/slurmctld.log",
        "# %n keeps the daemons of several nodes on one host apart.",
        f"SlurmdSpoolDir={state}/spool-%n",
        f"SlurmdPidFile={state}/slurmd-%n.pid",
        f"SlurmdLogFile={state}/log/slurmd-%n.log",
        f"TmpFS={state}/tmp-%n",
        "# No cgroups and no binding: needs neither root nor systemd.",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "JobAcctGatherType=jobacct_gather/linux",
        "SelectType=select/cons_tres",
        *memory_lines(settings),
        "# Nodes may claim more CPUs than the machine has.",
        "SlurmdParameters=config_overrides",
        "SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2,bf_continue",
        "MpiDefault=pmi2",
        "ReturnToService=2",
        "SlurmdTimeout=60",
        "SlurmctldTimeout=30",
        "JobRequeue=1",
        f"KillWait={settings.kill_wait}",
        f"MinJobAge={settings.min_job_age}",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        *(["SlurmctldParameters=preempt_send_user_signal"] if settings.preempt_user_signal else []),
        *accounting_lines(settings),
        *(["GresTypes=gpu"] if settings.gpus else []),
        *settings.options,
        f"NodeName={names} NodeHostname={host} NodeAddr=127.0.0.1 Port={numbers} "
        f"CPUs={settings.cpus} RealMemory={memory_mib()} "
        f"{f'Gres=gpu:{settings.gpus} ' if settings.gpus else ''}State=UNKNOWN",
        f"PartitionName={PARTITION} Nodes=ALL Default=YES PriorityTier=1 GraceTime={settings.grace_seconds}",
        f"PartitionName={URGENT_PARTITION} Nodes=ALL PriorityTier=10 PreemptMode=OFF",
    ]
    return "\n".join(lines) + "\n"


def memory_lines(settings: Settings) -> list[str]:
    """Return the lines on memory. Every node reports all memory, so allocating it alone would limit nothing."""
    if not settings.enforce_memory:
        return ["SelectTypeParameters=CR_CPU"]
    # Without cgroups, Slurm polls the memory of jobs.
    return [
        "SelectTypeParameters=CR_CPU_Memory",
        "JobAcctGatherParams=OverMemoryKill",
        "JobAcctGatherFrequency=task=1",
    ]


def accounting_lines(settings: Settings) -> list[str]:
    """Return the lines on the accounting of ended jobs."""
    if not settings.accounting:
        return ["AccountingStorageType=accounting_storage/none"]
    return [
        "AccountingStorageType=accounting_storage/slurmdbd",
        "AccountingStorageHost=127.0.0.1",
        f"AccountingStoragePort={settings.ports['slurmdbd']}",
        # Connections to slurmdbd use this and not AuthInfo.
        *([f"AccountingStoragePass={settings.munge_socket}"] if settings.munge else []),
    ]


def slurmdbd_conf(settings: Settings) -> str:
    """Return the text of slurmdbd.conf."""
    lines = [
        *authentication_lines(settings),
        f"DbdHost={socket.gethostname()}",
        "DbdAddr=127.0.0.1",
        f"DbdPort={settings.ports['slurmdbd']}",
        "CommunicationParameters=NoInAddrAny",
        f"SlurmUser={user_name()}",
        f"LogFile={settings.state}/log/slurmdbd.log",
        f"PidFile={settings.state}/slurmdbd.pid",
        "StorageType=accounting_storage/mysql",
        "StorageHost=localhost",
        f"StorageUser={user_name()}",
        "StorageLoc=slurm_acct_db",
    ]
    return "\n".join(line for line in lines if not line.startswith("CredType")) + "\n"


def gres_conf(settings: Settings) -> str:
    """Return the text of gres.conf, with empty files as the devices of simulated GPUs."""
    devices = ",".join(str(path) for path in settings.devices)
    return f"NodeName={','.join(settings.nodes)} Name=gpu File={devices}\n"
