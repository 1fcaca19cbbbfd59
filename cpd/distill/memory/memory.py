"""The replay memory: a fixed budget of distinct time steps for the whole stream."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from cpd.comm import Comm, SerialComm
from cpd.distill.memory.segments import Segments
from cpd.distill.memory.selection import Selection
from cpd.envs.suite import Sizes


class ReplayMemory:
    """The steps that are kept of past stages.

    No step is held twice: task and first step identify the segments of a task that comes again.
    """

    def __init__(self, selection: Selection | None, budget: int, sizes: Sizes | None = None) -> None:
        """An empty memory of at most `budget` steps; `sizes` as in `Segments.empty`."""
        self._selection = selection
        self.budget = budget
        self.segments = Segments.empty(sizes)

    @property
    def num_steps(self) -> int:
        """Distinct time steps held."""
        return self.segments.num_steps

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return self.segments.num_bytes

    def offer(self, segments: Segments, comm: Comm | None = None) -> None:
        """Choose again when a stage ends; `segments` are all data of that stage, of one task.

        A collective of `comm`: rank 0 chooses for all, since rounding may differ between kinds of processors.
        """
        if self._selection is None or self.budget == 0:
            return
        held = self.segments
        held_steps = held.first_step[held.task == segments.task[0]]
        new = segments
        if len(held_steps):
            new = segments.take(np.flatnonzero(~np.isin(segments.first_step, held_steps)))
        if not len(new):
            return
        comm = comm or SerialComm()
        chosen = comm.broadcast(self._selection.choose(held, new, self.budget) if comm.rank == 0 else None)
        assert chosen is not None
        # What stays of each, then in the order chosen: the data of the stage may be too large to copy.
        is_new = chosen >= len(held)
        order = np.argsort(is_new, kind="stable")
        stays = [held.take(chosen[~is_new]), new.take(chosen[is_new] - len(held))]
        self.segments = Segments.concatenate(stays).take(np.argsort(order))
        assert self.num_steps <= self.budget

    def state(self) -> dict[str, torch.Tensor]:
        """The contents, for a checkpoint."""
        return {name: torch.from_numpy(array.copy()) for name, array in self.segments.arrays().items()}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue with the contents that `state()` returned."""
        self.segments = Segments(**{name: tensor.numpy() for name, tensor in state.items()})
