"""What the ranks of a data-parallel teacher do together.

Decentralised and synchronous, as in DD-PPO (Wijmans et al. 2020): every rank steps its part of the environments,
and all learn the same from the samples of all. With one rank everything here is what torch does by itself, bit for
bit.
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
    """Ranks that should hold the same parameters do not."""


def own_slots(comm: Comm, num_envs: int) -> range:
    """This rank's part of an iteration's environments: consecutive ones, as even as can be; one at least."""
    assert num_envs >= comm.size, "see TeacherConfig.check_ranks"
    bounds = np.linspace(0, num_envs, comm.size + 1).astype(int)
    return range(int(bounds[comm.rank]), int(bounds[comm.rank + 1]))


class Moments(NamedTuple):
    """Moments of a variable over the samples of all ranks, in its own precision."""

    mean: Tensor
    std: Tensor
    """Of a sample, unbiased."""
    variance: Tensor


def moments_over_ranks(x: Tensor, comm: Comm) -> Moments:
    """The moments of all elements of `x`, over ranks; a collective."""
    if comm.size == 1:
        return Moments(x.mean(), x.std(), x.var())
    count, mean_1, squares_1 = moments(x.double().reshape(-1, 1), comm)
    variance = squares_1[0] / (count - 1)
    return Moments(mean_1[0].to(x.dtype), variance.sqrt().to(x.dtype), variance.to(x.dtype))


def moments(x_BD: Tensor, comm: Comm) -> tuple[int, Tensor, Tensor]:
    """Number of rows of all ranks, their mean [D], and the sum of squared deviations from it [D]; a collective."""
    count = len(x_BD) if comm.size == 1 else int(reduced(torch.tensor([float(len(x_BD))]).double(), comm))
    mean_D = reduced(x_BD.sum(dim=0), comm) / count
    return count, mean_D, reduced(((x_BD - mean_D) ** 2).sum(dim=0), comm)


def reduced(x: Tensor, comm: Comm) -> Tensor:
    """The sum of `x` over ranks; a collective."""
    if comm.size == 1:
        return x
    total = x.detach().contiguous().clone()
    comm.all_reduce_sum(total.numpy())
    return total


def reduce_gradients(parameters: Iterable[Tensor], told: Tensor, comm: Comm) -> Tensor:
    """Sum the gradients of `parameters` over ranks, in place; a collective.

    A rank without a gradient, having no rows in a minibatch, takes part with zeros.

    Args:
        parameters: in the same order on every rank.
        told: further numbers to be summed in the same message.

    Returns:
        The sum of `told`.
    """
    if comm.size == 1:
        return told
    trained = list(parameters)
    parts = [p.grad.flatten() if p.grad is not None else torch.zeros(p.numel(), dtype=p.dtype) for p in trained]
    flat = reduced(torch.cat([*parts, told]), comm)
    start = 0
    for parameter in trained:
        end = start + parameter.numel()
        parameter.grad = flat[start:end].view(parameter.shape)
        start = end
    return flat[start:]


def largest(value: float, comm: Comm) -> float:
    """The greatest `value` of all ranks; a collective."""
    return comm.broadcast(max(comm.gather(value), default=value))


def float_mean(value: float, weight: float, comm: Comm) -> float:
    """The mean of the ranks' values with their weights; a collective."""
    if comm.size == 1:
        return value
    return float_sum(comm, value * weight) / float_sum(comm, weight)


def check_ranks_agree(tensors: Sequence[Tensor], comm: Comm) -> None:
    """Raise unless all ranks hold the same `tensors`, bit for bit; a collective.

    Raises:
        RanksDifferError: on every rank.
    """
    if comm.size == 1:
        return
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    found = comm.broadcast(comm.gather(digest.hexdigest()))
    odd = [rank for rank, other in enumerate(found) if other != found[0]]
    if odd:
        raise RanksDifferError(
            f"the parameters of rank(s) {', '.join(map(str, odd))} differ from rank 0's: the ranks must run the "
            "same versions on processors of the same type"
        )


def on_first_rank(comm: Comm, work: Callable[[], T]) -> T:
    """Let rank 0 do `work` while the others wait, and give its result to all; a collective.

    Raises:
        InterruptedBySignal: on every rank, if rank 0 was asked to stop.
    """
    if comm.size == 1:
        return work()
    result: T | None = None
    stopped = ""
    if comm.rank == 0:
        try:
            result = work()
        except InterruptedBySignal as stop:
            stopped = str(stop)
    stopped, shared = comm.broadcast((stopped, result))
    if stopped:
        raise InterruptedBySignal(stopped)
    return shared  # type: ignore[return-value]  # rank 0's, which is a T
