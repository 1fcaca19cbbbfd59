"""Records which experts process a student's steps while it acts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cpd.comm import Comm
from cpd.envs.episodes import Actor, Belief
from cpd.run.tables import UsageRow
from cpd.student.network import Student, StudentOutput

FloatArray = npt.NDArray[np.float32]
#: Arrays of counts, 0 where nothing was counted.
Counts = defaultdict[tuple[str, int], Any]


class ExpertUsage:
    """A `cpd.envs.episodes.Actor` that records a student's actor and returns the same actions.

    It counts every step of every row of a batch, so all episodes must run to the horizon.
    """

    def __init__(self, student: Student, actor: Actor, tasks: Sequence[str]) -> None:
        """Record an actor.

        Args:
            student: the network that `actor` calls.
            actor: the actor to record.
            tasks: the stream's distinct tasks, in order.
        """
        self._student, self._actor, self._tasks = student, actor, list(tasks)
        self._task = ""
        self._chosen: Counts = defaultdict(int)
        """By task and layer: the number of assignments to each expert, (E,)."""

    def reset(self, tasks: Sequence[str]) -> None:
        """Begin new episodes; all entries of `tasks` must be equal."""
        (self._task,) = set(tasks)
        self._actor.reset(tasks)

    @property
    def beliefs(self) -> Sequence[Belief]:
        """The actor's beliefs; empty if it does not infer the task."""
        beliefs: Sequence[Belief] = getattr(self._actor, "beliefs", ())
        return beliefs

    def act(self, obs_BO: FloatArray) -> FloatArray:
        """Record a step and return the actor's actions."""
        # Registered for this step only: the same student also acts in episodes that are not recorded.
        pre_hook = self._student.register_forward_pre_hook(_ask_for_statistics, with_kwargs=True)
        hook = self._student.register_forward_hook(self._count)
        try:
            return self._actor.act(obs_BO)
        finally:
            pre_hook.remove()
            hook.remove()

    def _count(self, student: torch.nn.Module, inputs: Any, out: StudentOutput) -> None:
        for layer, stats in enumerate(out.stats):
            self._chosen[self._task, layer] += stats.counts_E.round().to(torch.int64).cpu().numpy()

    def rows(self, comm: Comm, **common: Any) -> list[UsageRow]:
        """Return the records of all ranks, task by task; a collective.

        Args:
            comm: the ranks.
            common: the columns that all rows share.
        """
        chosen: Counts = defaultdict(int)
        for counts_of_rank in comm.gather(self._chosen):
            for key, count in counts_of_rank.items():
                chosen[key] = chosen[key] + count
        order = self._tasks.index
        return [
            UsageRow(**common, task=task, layer=layer, expert=expert, chosen=int(count))
            for task, layer in sorted(chosen, key=lambda key: (order(key[0]), key[1]))
            for expert, count in enumerate(chosen[task, layer])
        ]


def _ask_for_statistics(
    student: torch.nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Restrict the router's statistics to the last step of every window, since only its action is executed."""
    (obs_BLO,) = inputs
    valid_BL = torch.zeros(obs_BLO.shape[:2], dtype=obs_BLO.dtype, device=obs_BLO.device)
    valid_BL[:, -1] = 1.0
    return inputs, {**options, "valid_BL": valid_BL}
