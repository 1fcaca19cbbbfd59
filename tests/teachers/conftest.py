"""Teachers are computed with one thread, as by default in a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from cpd.run.interrupt import Interrupt


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class CountingInterrupt(Interrupt):
    """Asks to stop once it has been looked at `limit` times."""

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
