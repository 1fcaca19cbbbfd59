"""Evaluate cells of the success matrix: episodes of one task on one goal set, divided among ranks in chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from cpd.comm import Comm, gathered_rows, share_of
from cpd.envs.episodes import Actor, Outcome, run_episodes
from cpd.envs.goals import Goal, Split
from cpd.envs.suite import Suite, load_suite
from cpd.envs.vector_env import VectorEnv, make_vector_env

#: Episodes of a task per forward pass. Rounding depends on the composition of a batch, so it is fixed: results do
#: not depend on the number of ranks.
CHUNK = 25
#: Tasks per forward pass. The pass of a small network takes about as long for a hundred episodes as for ten. But
#: ranks share whole passes, so there must be enough of them.
TASKS_PER_PASS = 4


class Cell(NamedTuple):
    """Episodes of one task on one goal set."""

    task: str
    goal_set: Split
    num_episodes: int
    to_the_end: bool = False
    """Whether episodes continue after success, so that success at the last step is known."""


class EnvPool:
    """The environments of this process: created at a task's first use and reused by every evaluation."""

    def __init__(self, num_workers: int = 1, num_envs: int = CHUNK, suite: Suite | None = None) -> None:
        """Create none yet; a task gets `num_envs` environments, at least `CHUNK`, in `num_workers` processes.

        `suite` is the suite of the tasks; None: Meta-World.
        """
        self.suite = suite or load_suite()
        self._num_workers = num_workers
        self._num_envs = max(num_envs, CHUNK)
        self._envs: dict[str, VectorEnv] = {}

    def get(self, task: str) -> VectorEnv:
        """Return the environments of `task`, at least `CHUNK`; the first call creates them."""
        if task not in self._envs:
            self._envs[task] = make_vector_env([task] * self._num_envs, self._num_workers, self.suite)
        return self._envs[task]

    def close(self) -> None:
        """Close all environments."""
        for envs in self._envs.values():
            envs.close()
        self._envs.clear()


class _Chunk(NamedTuple):
    """Episodes of one cell that act together."""

    cell: int
    """Index of the cell."""
    goals: tuple[Goal, ...]


def _passes(cells: Sequence[Cell], chunk: int, tasks_per_pass: int, suite: Suite) -> list[list[_Chunk]]:
    """Divide all episodes into chunks of one task; a pass takes chunks of several tasks where possible."""
    passes: list[list[_Chunk]] = []
    for index, cell in enumerate(cells):
        goals = suite.goal_set(cell.task, cell.goal_set, cell.num_episodes)
        for start in range(0, len(goals), chunk):
            for members in passes:
                others = [cells[member.cell] for member in members]
                if (
                    len(others) < tasks_per_pass
                    and others[0].to_the_end == cell.to_the_end
                    and all(other.task != cell.task for other in others)
                ):
                    break
            else:
                passes.append(members := [])
            members.append(_Chunk(index, goals[start : start + chunk]))
    return passes


def evaluate_cells(
    actor: Actor,
    cells: Sequence[Cell],
    horizon: int,
    pool: EnvPool,
    comm: Comm,
    *,
    chunk: int = CHUNK,
    tasks_per_pass: int = TASKS_PER_PASS,
    should_stop: Callable[[], bool] = lambda: False,
    advance: Callable[[int], None] = lambda episodes: None,
) -> list[list[Outcome]] | None:
    """Run all episodes of `cells`; a collective.

    Args:
        actor: the policy, on every rank the same.
        cells: what to measure; goals are each set's first `num_episodes`.
        horizon: steps per episode.
        pool: this rank's environments.
        comm: the ranks that share the work.
        chunk: episodes of a task per forward pass, at most `CHUNK`.
        tasks_per_pass: maximum number of tasks per forward pass.
        should_stop: called before every step.
        advance: called with the number of episodes that this rank has just finished.

    Returns:
        For each cell its outcomes in goal order, on every rank; None if any rank was asked to stop.
    """
    indexed: list[tuple[int, Outcome]] = []
    for chunks in share_of(comm, _passes(cells, chunk, tasks_per_pass, pool.suite)):
        outcomes = run_episodes(
            actor,
            [(pool.get(cells[index].task), goals) for index, goals in chunks],
            horizon,
            stop_at_success=not cells[chunks[0].cell].to_the_end,
            should_stop=should_stop,
        )
        if not outcomes:
            break
        for (index, _), chunk_outcomes in zip(chunks, outcomes, strict=True):
            indexed += [(index, outcome) for outcome in chunk_outcomes]
        advance(sum(map(len, outcomes)))
    if comm.any(should_stop()):
        return None
    by_cell: list[list[Outcome]] = [[] for _ in cells]
    for index, outcome in gathered_rows(comm, indexed):
        by_cell[index].append(outcome)
    return [sorted(outcomes, key=lambda outcome: outcome.goal) for outcomes in by_cell]
