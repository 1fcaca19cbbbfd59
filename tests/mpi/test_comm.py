"""The communicator on real MPI ranks."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys

import numpy as np
import pytest

from cpd.comm import CommSizeError, SerialComm, asked_size, connect, float_sum, gathered_rows, share_of

COLLECTIVES = """
import numpy as np
from cpd.comm import connect, float_sum, gathered_rows, share_of
comm = connect()
assert comm.size == 3
big = np.full(700_001, comm.rank + 1.0, dtype=np.float32)  # several pieces
comm.all_reduce_sum(big)
assert (big == 6).all()
for size in (1, 2, 300_001):
    values = [np.random.default_rng(rank).normal(size=size).astype(np.float32) for rank in range(3)]
    total = values[comm.rank].copy()
    comm.all_reduce_sum(total)
    assert (total == (values[0] + values[1]) + values[2]).all()  # in the order of ranks
assert comm.any(comm.rank == 2) and not comm.any(False)
assert comm.broadcast({"rank": comm.rank}) == {"rank": 0}
assert comm.gather(comm.rank) == ([0, 1, 2] if comm.rank == 0 else [])
assert gathered_rows(comm, [comm.rank] * comm.rank) == [1, 2, 2]
assert sorted(gathered_rows(comm, share_of(comm, list(range(10))))) == list(range(10))
assert float_sum(comm, 0.5) == 1.5
comm.barrier()
print("fine")
"""


def test_collectives_on_three_ranks(mpi) -> None:
    # MPICH takes the ranks for those of two nodes, over which its own sums have another order.
    done = mpi(3, "-c", COLLECTIVES, MPIR_CVAR_NUM_CLIQUES="2", MPIR_CVAR_ODD_EVEN_CLIQUES="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fine") == 3


@pytest.mark.parametrize(("asked", "connected"), [(3, 2), (2, 3)])
def test_a_communicator_of_the_wrong_size_is_refused(asked: int, connected: int, mpi) -> None:
    done = mpi(connected, "-c", "from cpd.comm import connect; connect()", CPD_RANKS=str(asked))
    assert done.returncode != 0
    assert "CommSizeError" in done.stderr and re.search(rf"{asked} ranks.* {connected}\b", done.stderr)


def test_ranks_that_do_not_know_of_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # The effect of a wrong process-management interface: two ranks are announced, but this process is alone.
    code = "from cpd.comm import connect; connect()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"CPD_RANKS": "2", "PATH": ""}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert CommSizeError.__name__ in done.stderr and "srun_mpi" in done.stderr


def test_ranks_that_never_meet_are_ended() -> None:
    # A process manager that never answers.
    ours, theirs = socket.socketpair()
    code = "import cpd.comm; cpd.comm.CONNECT_SECONDS = 1.0; cpd.comm.connect()"
    environment = {"CPD_RANKS": "2", "PMI_SIZE": "2", "PMI_RANK": "0", "PMI_FD": str(theirs.fileno())}
    with ours, theirs:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | environment,
            pass_fds=[theirs.fileno()],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert b"cmd=" in ours.recv(100)  # MPI has asked
    assert done.returncode == 1
    assert "Timeout" in done.stderr and "in connect" in done.stderr


def test_the_innermost_launcher_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """In an interactive step of Slurm with four tasks, mpiexec may start two ranks, or a launcher a job of one."""
    monkeypatch.setenv("CPD_RANKS", "")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("PMI_SIZE", "2")
    assert asked_size() == 2
    monkeypatch.setenv("CPD_RANKS", "1")
    assert asked_size() == 1 == connect().size


def test_a_single_process_needs_no_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CPD_RANKS", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    comm = connect()
    assert isinstance(comm, SerialComm)
    array = np.arange(3.0)
    comm.all_reduce_sum(array)
    assert array.tolist() == [0, 1, 2]
    assert comm.gather(1) == [1] and gathered_rows(comm, [1, 2]) == [1, 2] and share_of(comm, [1, 2]) == [1, 2]
    assert float_sum(comm, 2.0) == 2.0
