"""Records which experts a student's router chooses, and which task the student infers, while it acts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cpd.comm import Comm
from cpd.envs.episodes import Actor
from cpd.run.tables import RetrievalRow, UsageRow
from cpd.student.network import Student, StudentOutput

FloatArray = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]


def retrieval_steps(horizon: int) -> list[int]:
    """Return the steps at which inferred tasks are recorded: all of the first ones, then fewer, and the last."""
    steps, step = [], 1.0
    while step < horizon:
        steps.append(round(step))
        step = max(step + 1, 1.25 * step)
    return [*dict.fromkeys(steps), horizon]


class ExpertUsage:
    """A `cpd.envs.episodes.Actor` that records a student's actor and returns the same actions.

    It counts every step of every row of a batch, so all episodes must run to the horizon.
    """

    def __init__(self, student: Student, actor: Actor, tasks: Sequence[str], horizon: int) -> None:
        """Record an actor.

        Args:
            student: the network that `actor` calls.
            actor: the actor to record.
            tasks: the stream's distinct tasks, in order.
            horizon: length of the episodes, in steps.
        """
        self._student, self._actor, self._tasks = student, actor, list(tasks)
        self._recorded = set(retrieval_steps(horizon))
        identity: str = student.config.task_identity
        self._believes = identity == "inferred"
        self._task, self._step = "", 0
        self._chosen: dict[tuple[str, int], Counts] = {}
        """By task and layer: the number of assignments to each expert, (E,)."""
        self._retrieved: dict[tuple[str, int], tuple[int, int]] = {}
        """By task and step: the number of episodes, and the number of those with the right inferred task."""

    def reset(self, tasks: Sequence[str]) -> None:
        """Begin new episodes; all entries of `tasks` must be equal."""
        (self._task,) = set(tasks)
        self._step = 0
        self._actor.reset(tasks)

    def act(self, obs_BO: FloatArray) -> FloatArray:
        """Record a step and return the actor's actions."""
        self._step += 1
        # Registered for this step only: the same student also acts in episodes that are not recorded.
        pre_hook = self._student.register_forward_pre_hook(_ask_for_statistics, with_kwargs=True)
        hook = self._student.register_forward_hook(self._count)
        try:
            actions = self._actor.act(obs_BO)
        finally:
            pre_hook.remove()
            hook.remove()
        believed: Any = getattr(self._actor, "believed", ())
        if self._believes and self._step in self._recorded and len(believed):
            episodes, correct = self._retrieved.get((self._task, self._step), (0, 0))
            newly_correct = int((believed[-1] == self._tasks.index(self._task)).sum())
            self._retrieved[self._task, self._step] = episodes + len(obs_BO), correct + newly_correct
        return actions

    def _count(self, student: torch.nn.Module, inputs: Any, out: StudentOutput) -> None:
        for layer, stats in enumerate(out.stats):
            counts: Counts = stats.counts_E.round().to(torch.int64).cpu().numpy()
            key = self._task, layer
            self._chosen[key] = counts + self._chosen.get(key, np.zeros_like(counts))

    def rows(self, comm: Comm, **common: Any) -> tuple[list[UsageRow], list[RetrievalRow]]:
        """Return the records of all ranks, task by task; a collective.

        Args:
            comm: the ranks.
            common: the columns that all rows share.
        """
        chosen: dict[tuple[str, int], Counts] = {}
        retrieved: dict[tuple[str, int], tuple[int, int]] = {}
        for chosen_on_rank, retrieved_on_rank in comm.gather((self._chosen, self._retrieved)):
            for key, counts in chosen_on_rank.items():
                chosen[key] = counts + chosen.get(key, np.zeros_like(counts))
            for key, (episodes, correct) in retrieved_on_rank.items():
                totals = retrieved.get(key, (0, 0))
                retrieved[key] = totals[0] + episodes, totals[1] + correct
        order = self._tasks.index
        usage = [
            UsageRow(**common, task=task, layer=layer, expert=expert, chosen=int(count))
            for task, layer in sorted(chosen, key=lambda key: (order(key[0]), key[1]))
            for expert, count in enumerate(chosen[task, layer])
        ]
        retrieval = [
            RetrievalRow(
                **common, task=task, step=step, episodes=retrieved[task, step][0], correct=retrieved[task, step][1]
            )
            for task, step in sorted(retrieved, key=lambda key: (order(key[0]), key[1]))
        ]
        return usage, retrieval


def _ask_for_statistics(
    student: torch.nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Restrict the router's statistics to the last step of every window, since only its action is executed."""
    (obs_BLO,) = inputs
    valid_BL = torch.zeros(obs_BLO.shape[:2], dtype=obs_BLO.dtype, device=obs_BLO.device)
    valid_BL[:, -1] = 1.0
    return inputs, {**options, "valid_BL": valid_BL}
