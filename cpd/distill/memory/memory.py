"""The replay memory: a fixed budget of distinct time steps for the whole stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import torch

from cpd.comm import Comm, SerialComm
from cpd.config import MemoryConfig
from cpd.distill.memory.segments import Segments
from cpd.distill.memory.selection import Diverse, Reservoir, Uniform


class Selection(Protocol):
    """Which segments stay when a stage has ended."""

    def choose(self, held: Segments, offered: Segments, budget: int) -> npt.NDArray[np.int64]:
        """Positions in `held` followed by `offered`, of segments with at most `budget` steps in all.

        The memory holds segments in the order returned, and `held` comes in that order: it is the one thing that
        a selection may remember. Must be a pure function of its arguments, the seed and the settings it was made
        with: a resumed run calls it again.
        """


#: By their names in `MemoryConfig.selection`; made with the student's seed.
SELECTIONS: Final[Mapping[str, Callable[[int, MemoryConfig], Selection]]] = {
    "reservoir": Reservoir,
    "uniform": Uniform,
    "dpp": Diverse,
}


def make_selection(config: MemoryConfig, seed: int) -> Selection | None:
    """The selection that `config.selection` names; None for `none`."""
    return None if config.selection == "none" else SELECTIONS[config.selection](seed, config)


class ReplayMemory:
    """What is kept of the stages behind us.

    No step is ever held twice: the segments of a task that comes again are known by task and first step.
    """

    def __init__(self, selection: Selection | None, budget: int) -> None:
        """An empty memory of at most `budget` steps."""
        self._selection = selection
        self.budget = budget
        self.segments = Segments.empty()

    @property
    def num_steps(self) -> int:
        """Distinct time steps held."""
        return self.segments.num_steps

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return self.segments.num_bytes

    def offer(self, segments: Segments, comm: Comm | None = None) -> None:
        """Make the choice that a stage's end asks for; `segments` are all of that stage's data, of one task.

        A collective of `comm`: rank 0 chooses for all, since rounding may differ between kinds of processors.
        """
        if self._selection is None or self.budget == 0:
            return
        held = self.segments
        known = held.first_step[held.task == segments.task[0]]
        new = segments.take(np.flatnonzero(~np.isin(segments.first_step, known)))
        if not len(new):
            return
        comm = comm or SerialComm()
        chosen = comm.broadcast(self._selection.choose(held, new, self.budget) if comm.rank == 0 else None)
        assert chosen is not None
        self.segments = Segments.concatenate([held, new]).take(chosen)
        assert self.num_steps <= self.budget

    def state(self) -> dict[str, torch.Tensor]:
        """The contents, for a checkpoint."""
        return {name: torch.from_numpy(array.copy()) for name, array in self.segments.arrays().items()}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over the contents that `state()` returned."""
        self.segments = Segments(**{name: tensor.numpy() for name, tensor in state.items()})
