"""Fixtures: one thread of arithmetic, as in a run; interrupts; validation of failing policies."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from cpd.run.interrupt import Interrupt
from cpd.teachers import trainer


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


class CountingInterrupt(Interrupt):
    """Asks to stop once it has been checked `limit` times."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.looks = 0

    @property
    def requested(self) -> bool:
        self.looks += 1
        return self.looks > self.limit


@pytest.fixture
def counting_interrupt() -> Callable[[int], CountingInterrupt]:
    return CountingInterrupt


@pytest.fixture(scope="module")
def validate_failing_policies() -> Iterator[None]:
    """Validate every policy: those of a few iterations never succeed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "VALIDATE_FROM", 0.0)
        yield
