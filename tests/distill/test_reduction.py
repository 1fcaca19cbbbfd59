"""When buckets of gradients are summed, and by what; tests/mpi sums on real ranks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from cpd.comm import SerialComm
from cpd.distill import reduction
from cpd.distill.flat import FlatParameters
from cpd.distill.reduction import BucketedReduction, Reduction, choose_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
NUM_LAYERS = 4


class Starts:
    """Stands for torch.distributed: notes whose sums started, and whether the first gradients were final then."""

    def __init__(self, flat: FlatParameters) -> None:
        self.flat = flat
        self.slices: list[tuple[int, int]] = []
        self.first_was_final: list[bool] = []
        self.num_waits = 0

    def all_reduce(self, part: Tensor, async_op: bool = False) -> Starts:
        start = part.storage_offset()
        assert part.data_ptr() == self.flat.grads[start:].data_ptr()
        self.slices.append((start, start + len(part)))
        self.first_was_final.append(bool(self.flat.leaves[0].grad.any()))
        part.mul_(2.0)  # as on two ranks with the same gradient
        return self

    def wait(self) -> None:
        self.num_waits += 1


@pytest.fixture
def bucketed(monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, FlatParameters, BucketedReduction, Starts]:
    """Layers of 30 parameters each, two in a bucket."""
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(5, 5) for _ in range(NUM_LAYERS)))
    flat = FlatParameters(module)
    starts = Starts(flat)
    monkeypatch.setattr(reduction, "connect_group", lambda comm, device, backend: None)
    monkeypatch.setattr(reduction.dist, "all_reduce", starts.all_reduce)
    monkeypatch.setattr(reduction, "BUCKET_BYTES", 2 * 30 * 4)
    return module, flat, BucketedReduction(SerialComm(), CPU, "gloo"), starts


def gradient(module: nn.Module, flat: FlatParameters) -> Tensor:
    """The gradient without any reduction."""
    flat.grads.zero_()
    loss(module).backward()
    return flat.grads.clone()


def loss(module: nn.Module) -> Tensor:
    return module(torch.ones(3, 5)).square().sum()


def test_buckets_start_during_the_backward_pass_from_the_end(bucketed) -> None:
    module, flat, buckets, starts = bucketed
    wanted = 2.0 * gradient(module, flat)
    assert not starts.slices  # a backward pass that is not a step's
    for _ in range(2):
        starts.slices.clear()
        starts.first_was_final.clear()
        buckets.backward(loss(module), flat)
        assert starts.slices == [(60, 120), (0, 60)]
        assert starts.first_was_final == [False, True]
        assert torch.equal(flat.grads, wanted)
    assert starts.num_waits == 4


def test_parameters_without_a_gradient_are_summed_last(bucketed) -> None:
    module, flat, buckets, starts = bucketed
    buckets.backward(loss(module[:3]), flat)  # the last layer, in the first bucket, is not used
    assert starts.slices == [(60, 120), (0, 60)]
    assert starts.first_was_final == [True, True]
    summed = flat.grads.clone()
    assert torch.equal(summed, 2.0 * gradient(module[:3], flat))


def test_buckets_follow_frozen_parameters(bucketed) -> None:
    module, flat, buckets, starts = bucketed
    buckets.backward(loss(module), flat)
    mask = torch.ones_like(flat.values)
    mask[30:60] = 0.0
    flat.freeze(mask)
    starts.slices.clear()
    buckets.backward(loss(module), flat)
    assert starts.slices == [(30, 90), (0, 30)]


def test_one_rank_sums_nothing() -> None:
    values = torch.randn(3)
    summed = values.clone()
    Reduction(SerialComm()).sum(summed)
    assert torch.equal(values, summed)


class Ranks(SerialComm):
    """The first of some ranks, with what the others send."""

    def __init__(self, *others: str) -> None:
        self.size, self._others = 1 + len(others), others

    def gather(self, value):
        return [value, *([other] for other in self._others)]


@pytest.mark.parametrize(
    ("others", "device", "has_nccl", "backend"),
    [
        (("b", "c"), CUDA, True, "nccl"),
        ((), CUDA, True, "mpi"),  # one rank
        (("a",), CUDA, True, "mpi"),  # a shared device
        (("",), CUDA, True, "mpi"),  # a rank without a device
        (("b",), CPU, True, "mpi"),
        (("b",), CUDA, False, "mpi"),
    ],
)
def test_nccl_is_chosen_where_every_rank_has_its_own_device(
    others, device, has_nccl, backend, monkeypatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="a"))
    monkeypatch.setattr(reduction.dist, "is_nccl_available", lambda: has_nccl)
    assert choose_backend(Ranks(*others), device) == backend
