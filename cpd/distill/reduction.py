"""Sums over ranks: of the gradient of a step, and of what a forward pass needs from all ranks.

MPI sums in the order of ranks, after the backward pass and in host memory. Where every rank has a GPU of its own,
NCCL sums in device memory, during the backward pass and in an order of its own.
"""

from __future__ import annotations

import atexit
import functools
import socket
from datetime import timedelta
from typing import Final, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from cpd.comm import CONNECT_SECONDS, Comm, gathered_rows
from cpd.distill.flat import FlatParameters

#: What sums: MPI, or a backend of torch.distributed. `gloo` is for tests: it needs no GPU.
Backend = Literal["mpi", "nccl", "gloo"]
#: Gradients whose sum starts together: a large student has several buckets, a small one a single one. Not measured
#: on GPUs.
BUCKET_BYTES: Final = 4 << 20
#: A rank may wait as long as another one writes a checkpoint; torch's default of ten minutes can be too short.
TIMEOUT: Final = timedelta(hours=1)


class Reduction:
    """Sums by MPI, after the backward pass; on one rank nothing is left to do."""

    def __init__(self, comm: Comm) -> None:
        self._comm = comm

    def sum(self, tensor: Tensor) -> None:
        """Replace a contiguous tensor by its sum over ranks, in place; a collective."""
        if self._comm.size == 1:
            return
        if tensor.device.type == "cpu":
            self._comm.all_reduce_sum(tensor.numpy())
            return
        # Pinned memory, since MPI cannot read device memory; torch keeps it for the next call.
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor)
        self._comm.all_reduce_sum(host.numpy())
        tensor.copy_(host)

    def backward(self, loss: Tensor, flat: FlatParameters) -> None:
        """Set `flat.grads` to the sum over ranks of the gradient of their losses; a collective."""
        flat.grads.zero_()
        loss.backward()  # type: ignore[no-untyped-call]
        self.sum(flat.grads)


class BucketedReduction(Reduction):
    """Sums by torch.distributed, in buckets that start during the backward pass.

    A bucket is a slice of the vector of gradients. The backward pass reaches the last parameters first, so buckets
    are filled and started from the end of the vector, in the same order on every rank.
    """

    def __init__(self, comm: Comm, device: torch.device, backend: Backend) -> None:
        """Connect the ranks, unless this process has done so; a collective."""
        super().__init__(comm)
        connect_group(comm, device, backend)
        self._prepared_for: list[slice] | None = None
        self._hooks: list[RemovableHandle] = []
        self._buckets: list[slice] = []
        self._num_leaves: list[int] = []
        self._grads: Tensor | None = None
        #: By bucket, the number of parameters whose gradients are not final.
        self._num_missing: list[int] = []
        self._works: list[dist.Work] = []

    def sum(self, tensor: Tensor) -> None:
        """Replace a contiguous tensor by its sum over ranks, in place; a collective."""
        dist.all_reduce(tensor)

    def backward(self, loss: Tensor, flat: FlatParameters) -> None:
        """Set `flat.grads` to the sum over ranks of the gradient of their losses; a collective."""
        if self._prepared_for is not flat.trainable:
            self._prepare(flat)
        flat.grads.zero_()
        self._grads, self._num_missing = flat.grads, list(self._num_leaves)
        loss.backward()  # type: ignore[no-untyped-call]
        self._num_missing = [0] * len(self._buckets)  # a parameter that the loss does not use gets no gradient
        self._start_complete()
        for work in self._works:
            work.wait()  # with NCCL the device waits, not the host
        self._grads, self._works = None, []

    def _prepare(self, flat: FlatParameters) -> None:
        """Divide the gradients into buckets; called after every `flat.freeze`, which replaces them."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._buckets, self._num_leaves = [], [], []
        stop = start = len(flat.grads)
        count = 0
        for leaf in reversed(flat.leaves):
            is_final = functools.partial(self._count, len(self._buckets))
            self._hooks.append(leaf.register_post_accumulate_grad_hook(is_final))  # type: ignore[no-untyped-call]
            start, count = start - leaf.numel(), count + 1
            if (stop - start) * flat.grads.itemsize >= BUCKET_BYTES or start == 0:
                self._buckets.append(slice(start, stop))
                self._num_leaves.append(count)
                stop, count = start, 0
        self._prepared_for = flat.trainable

    def _count(self, bucket: int, leaf: Tensor) -> None:
        """The gradient of a parameter is final."""
        if self._grads is not None:  # else it is not that of a step, but e.g. of the importance of parameters
            self._num_missing[bucket] -= 1
            self._start_complete()

    def _start_complete(self) -> None:
        """Start the buckets that are complete, up to the first that is not: the same order on every rank."""
        assert self._grads is not None
        while len(self._works) < len(self._buckets) and not self._num_missing[len(self._works)]:
            work = dist.all_reduce(self._grads[self._buckets[len(self._works)]], async_op=True)
            assert work is not None
            self._works.append(work)


def choose_backend(comm: Comm, device: torch.device) -> Backend:
    """`nccl` if there are several ranks and each has a CUDA device of its own, else `mpi`; a collective."""
    if comm.size == 1:
        return "mpi"
    device_id = ""
    if device.type == "cuda" and dist.is_available() and dist.is_nccl_available():
        device_id = str(torch.cuda.get_device_properties(device).uuid)
    device_ids = gathered_rows(comm, [device_id])
    # NCCL refuses two ranks on one device.
    return "nccl" if all(device_ids) and len(set(device_ids)) == comm.size else "mpi"


def make_reduction(comm: Comm, device: torch.device, backend: Backend) -> Reduction:
    """The reduction of a backend; a collective."""
    return Reduction(comm) if backend == "mpi" else BucketedReduction(comm, device, backend)


def connect_group(comm: Comm, device: torch.device, backend: Backend) -> None:
    """Connect torch.distributed's process group, once per process; a collective. MPI broadcasts its address."""
    if dist.is_initialized():
        return
    hosts = gathered_rows(comm, [socket.gethostname()])
    host = hosts[0] if len(set(hosts)) > 1 else "localhost"  # a machine may not resolve its own name
    timeout = timedelta(seconds=CONNECT_SECONDS)
    join = functools.partial(dist.TCPStore, host, world_size=comm.size, timeout=timeout)  # type: ignore[attr-defined]
    if comm.rank == 0:
        store = join(port=0, is_master=True, wait_for_workers=False)
        comm.broadcast(store.port)
    else:
        store = join(port=comm.broadcast(0), is_master=False)
    dist.init_process_group(
        backend,
        store=store,
        rank=comm.rank,
        world_size=comm.size,
        timeout=TIMEOUT,
        device_id=device if backend == "nccl" else None,
    )
    atexit.register(dist.destroy_process_group)
