"""Collective operations of the ranks that train one teacher.

Training is decentralised and synchronous, as in DD-PPO (Wijmans et al. 2020): every rank steps some of the
environments, and all ranks compute the same update from the samples of all ranks. With one rank, every function
returns what plain torch would, bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from cpd.comm import Comm, float_sum
from cpd.run.interrupt import InterruptedBySignal

T = TypeVar("T")


class RanksDifferError(RuntimeError):
    """Ranks that should hold the same parameters hold different ones."""


def slots_of_rank(comm: Comm, num_envs: int) -> range:
    """This rank's share of an iteration's environments: consecutive ones, as even as possible, at least one."""
    assert num_envs >= comm.size, "see TeacherConfig.check_ranks"
    # Consecutive, so that a rank's share of an array of all environments is a slice.
    bounds = np.linspace(0, num_envs, comm.size + 1).astype(int)
    return range(int(bounds[comm.rank]), int(bounds[comm.rank + 1]))


class Moments(NamedTuple):
    """Moments of a variable over the samples of all ranks, in the precision of its samples."""

    mean: Tensor
    std: Tensor
    """Unbiased."""
    variance: Tensor


def moments_over_ranks(x: Tensor, comm: Comm) -> Moments:
    """The moments of all elements of `x`, over ranks; a collective."""
    if comm.size == 1:
        return Moments(x.mean(), x.std(), x.var())
    # In float64, since sums over ranks add in another order than torch does on one rank.
    count, mean_1, squares_1 = column_moments(x.double().reshape(-1, 1), comm)
    variance = squares_1[0] / (count - 1)
    return Moments(mean_1[0].to(x.dtype), variance.sqrt().to(x.dtype), variance.to(x.dtype))


def column_moments(x_BD: Tensor, comm: Comm) -> tuple[int, Tensor, Tensor]:
    """Return the number of rows of all ranks, their mean [D], and the sum of squared deviations from it [D].

    A collective.
    """
    # Two passes, mean first: E[x^2] - E[x]^2 would cancel where a mean is large against its deviation.
    count = len(x_BD) if comm.size == 1 else int(reduce_sum(torch.tensor([float(len(x_BD))]).double(), comm))
    mean_D = reduce_sum(x_BD.sum(dim=0), comm) / count
    return count, mean_D, reduce_sum(((x_BD - mean_D) ** 2).sum(dim=0), comm)


def reduce_sum(x: Tensor, comm: Comm) -> Tensor:
    """Return the sum of `x` over ranks; a collective."""
    if comm.size == 1:
        return x
    # A copy, since the reduction is in place and NumPy shares the memory of the tensor.
    total = x.detach().contiguous().clone()
    comm.all_reduce_sum(total.numpy())
    return total


def reduce_gradients(parameters: Iterable[Tensor], statistics: Tensor, comm: Comm) -> Tensor:
    """Sum the gradients of `parameters` over ranks, in place; a collective.

    A rank that has no rows in a minibatch, and so no gradient, contributes zeros.

    Args:
        parameters: in the same order on every rank.
        statistics: further numbers to sum in the same message, shape [S].

    Returns:
        The sum of `statistics`.
    """
    if comm.size == 1:
        return statistics
    # One message for all gradients, so that a minibatch costs one collective.
    trained = list(parameters)
    grads = [p.grad.flatten() if p.grad is not None else torch.zeros(p.numel(), dtype=p.dtype) for p in trained]
    flat = reduce_sum(torch.cat([*grads, statistics]), comm)
    start = 0
    for parameter in trained:
        end = start + parameter.numel()
        parameter.grad = flat[start:end].view(parameter.shape)
        start = end
    return flat[start:]


def largest(value: float, comm: Comm) -> float:
    """The largest `value` of all ranks; a collective."""
    return comm.broadcast(max(comm.gather(value), default=value))


def float_mean(value: float, weight: float, comm: Comm) -> float:
    """The weighted mean of the ranks' values; a collective."""
    if comm.size == 1:
        return value
    return float_sum(comm, value * weight) / float_sum(comm, weight)


def check_ranks_agree(tensors: Sequence[Tensor], comm: Comm) -> None:
    """Check that all ranks hold the same `tensors`, bit for bit; a collective.

    Raises:
        RanksDifferError: on every rank, if they do not.
    """
    if comm.size == 1:
        return
    # Hashes are compared, not tensors: a difference in one bit counts, and the message stays small.
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    digests = comm.broadcast(comm.gather(digest.hexdigest()))
    differing = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if differing:
        raise RanksDifferError(
            f"the parameters of rank(s) {', '.join(map(str, differing))} differ from those of rank 0; use the "
            "same library versions and processors of the same type on all ranks"
        )


def on_first_rank(comm: Comm, work: Callable[[], T]) -> T:
    """Run `work` on rank 0 while the others wait, and return its result on all ranks; a collective.

    Raises:
        InterruptedBySignal: on every rank, if rank 0 was asked to stop.
    """
    if comm.size == 1:
        return work()
    result: T | None = None
    stopped = ""
    if comm.rank == 0:
        # A stop on request must reach all ranks, which wait in the broadcast. Any other error ends the job: the
        # program aborts MPI.
        try:
            result = work()
        except InterruptedBySignal as stop:
            stopped = str(stop)
    stopped, shared = comm.broadcast((stopped, result))
    if stopped:
        raise InterruptedBySignal(stopped)
    return shared  # type: ignore[return-value]  # rank 0's, which is a T
