"""The communicator: a protocol with a serial and an MPI implementation.

`mpi4py.MPI` is imported in `connect` only, since importing it initialises MPI, after which no process may fork.
"""

from __future__ import annotations

import faulthandler
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from cpd.reading import number_in_environment

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

#: Environment variable with the number of ranks that the launcher started.
RANKS_VARIABLE = "CPD_RANKS"
#: Environment variables in which process managers state the number of ranks, the innermost first: mpiexec may
#: run inside a step of Slurm.
SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS", "SLURM_STEP_NUM_TASKS")
#: Seconds in which the ranks of a job must connect.
CONNECT_SECONDS = 300.0
#: Threads of a process's tensor arithmetic: fixed, since another number rounds differently.
TORCH_THREADS = 1
#: Large buffers are reduced in pieces that stay in cache: 1.7-2.7 times as fast as gloo at 50 MB, not 1.0-1.7.
PIECE_BYTES = 1 << 20


class CommSizeError(RuntimeError):
    """The number of ranks that MPI connects is not that of the job."""


class Comm(Protocol):
    """The operations that training and evaluation need of a communicator."""

    rank: int
    size: int

    def all_reduce_sum(self, array: npt.NDArray[Any]) -> None:
        """Replace a contiguous array by its sum over ranks, in place; a no-op on one rank."""

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank; the same answer on all."""

    def broadcast(self, value: T) -> T:
        """Rank 0's `value` on every rank."""

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, in rank order, on rank 0; an empty list elsewhere."""

    def barrier(self) -> None:
        """Wait for all ranks."""

    def abort(self, code: int) -> None:
        """End all ranks immediately; for an error that occurs on this rank only."""


class SerialComm:
    """The communicator of a single process."""

    rank = 0
    size = 1

    def all_reduce_sum(self, array: npt.NDArray[Any]) -> None:
        """Leave the array unchanged."""

    def any(self, flag: bool) -> bool:
        """Return the flag."""
        return flag

    def broadcast(self, value: T) -> T:
        """Return the value."""
        return value

    def gather(self, value: T) -> list[T]:
        """Return a list of the value."""
        return [value]

    def barrier(self) -> None:
        """Return immediately."""

    def abort(self, code: int) -> None:
        """End this process."""
        raise SystemExit(code)


class MPIComm:
    """MPI's COMM_WORLD."""

    def __init__(self, mpi: Any) -> None:
        self._mpi = mpi
        self._world = mpi.COMM_WORLD
        self.rank: int = self._world.Get_rank()
        self.size: int = self._world.Get_size()

    def all_reduce_sum(self, array: npt.NDArray[Any]) -> None:
        """Sum in place, in the order of ranks; MPI's own order also depends on how ranks lie on nodes."""
        assert array.flags.c_contiguous
        flat = array.reshape(-1)
        piece = PIECE_BYTES // flat.itemsize
        for start in range(0, flat.size, piece):
            part = flat[start : start + piece]
            if self.size == 2:  # there is one order only
                self._world.Allreduce(self._mpi.IN_PLACE, part)
            else:
                self._sum_in_order(part)

    def _sum_in_order(self, part: npt.NDArray[Any]) -> None:
        """Sum in place: every rank adds up its share of `part`, and all ranks gather the shares."""
        shares = np.zeros((self.size, -(-part.size // self.size)), part.dtype)
        shares.reshape(-1)[: part.size] = part
        received = np.empty_like(shares)
        self._world.Alltoall(shares, received)
        total = received[0]
        for of_rank in received[1:]:
            total += of_rank
        self._world.Allgather(total, shares)
        part[:] = shares.reshape(-1)[: part.size]

    def any(self, flag: bool) -> bool:
        """Logical or over ranks."""
        return bool(self._world.allreduce(int(flag), op=self._mpi.MAX))

    def broadcast(self, value: T) -> T:
        """MPI_Bcast from rank 0, pickled."""
        result: T = self._world.bcast(value, root=0)
        return result

    def gather(self, value: T) -> list[T]:
        """MPI_Gather to rank 0, pickled."""
        return self._world.gather(value, root=0) or []

    def barrier(self) -> None:
        """MPI_Barrier."""
        self._world.Barrier()

    def abort(self, code: int) -> None:
        """MPI_Abort."""
        self._world.Abort(code)


def asked_size() -> int:
    """Return the number of ranks that were started, according to the environment variables; 1 without any."""
    return int(number_in_environment(RANKS_VARIABLE, *SIZE_VARIABLES)) or 1


def connect() -> Comm:
    """Return the communicator of this process.

    Raises:
        CommSizeError: if MPI connects another number of ranks than were started. With the wrong process-management
            interface, N processes do not know of each other and would train N copies.
    """
    asked = asked_size()
    if asked == 1:
        return SerialComm()
    # Ends this process, with a traceback, if its ranks never find each other; MPI does not.
    faulthandler.dump_traceback_later(CONNECT_SECONDS, exit=True)
    from mpi4py import MPI

    faulthandler.cancel_dump_traceback_later()
    comm = MPIComm(MPI)
    if comm.size != asked:
        raise CommSizeError(
            f"this job was given {asked} ranks, but MPI ({MPI.get_vendor()[0]}) connects {comm.size}. Use the "
            "mpiexec that belongs to this MPI, or set srun_mpi in the profile to the interface that it supports "
            "(pmi2 for MPICH, pmix for Open MPI)"
        )
    return comm


def gathered_rows(comm: Comm, rows: list[T]) -> list[T]:
    """Return the rows of all ranks, in rank order, on every rank."""
    return comm.broadcast([row for rank_rows in comm.gather(rows) for row in rank_rows])


def share_of(comm: Comm, items: list[T]) -> list[T]:
    """Return this rank's share of `items`: every `size`-th, from `rank` on."""
    return items[comm.rank :: comm.size]


def float_sum(comm: Comm, value: float) -> float:
    """Return the sum of `value` over ranks."""
    array = np.array([value], dtype=np.float64)
    comm.all_reduce_sum(array)
    return float(array[0])


def choose_device(comm: Comm) -> torch.device:
    """Return this rank's accelerator if there is one, else the CPU."""
    import torch  # here, so that programs on a login node start without it

    if torch.cuda.is_available():
        return torch.device("cuda", comm.rank % torch.cuda.device_count())
    return torch.device("cpu")


class DivergedError(ArithmeticError):
    """Training has produced numbers that are not finite."""
