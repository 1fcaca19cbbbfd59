"""Evaluate cells of the success matrix: episodes of one task on one goal set, divided among ranks in chunks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
#: Environments that a process holds: some 0.3 GB, at 0.5 MB each and 2 MB per task. A pass needs at most 100.
MAX_ENVS = 400


class Cell(NamedTuple):
    """Episodes of one task on one goal set."""

    task: str
    goal_set: Split
    num_episodes: int
    to_the_end: bool = False
    """Whether episodes continue after success, so that success at the last step is known."""
    tasks_per_pass: int = TASKS_PER_PASS
    """Maximum number of tasks in a forward pass with episodes of this cell."""


class EnvPool:
    """The environments of this process: created when needed and reused, dropped beyond `MAX_ENVS`.

    The tasks with the most environments are dropped first, among equals the one used least recently.
    """

    def __init__(self, num_workers: int = 1, num_envs: int = 1, suite: Suite | None = None) -> None:
        """Create none yet; a task gets at least `num_envs` environments, in `num_workers` processes.

        `suite` is the suite of the tasks; None: Meta-World.
        """
        self.suite = suite or load_suite()
        self._num_workers = num_workers
        self._num_envs = num_envs
        self._envs: dict[str, VectorEnv] = {}
        """By task, in the order of their latest use."""

    def get(self, task: str) -> VectorEnv:
        """Return the environments of `task`, at least `CHUNK`, until the next call with another task."""
        return self.get_all({task: CHUNK})[0]

    def get_all(self, num_envs: Mapping[str, int]) -> list[VectorEnv]:
        """Return at least so many environments of each task, until the next call with other tasks."""
        needed = {task: max(number, self._num_envs) for task, number in num_envs.items()}
        kept = {task: self._envs.pop(task) for task in needed if task in self._envs}
        for task in [task for task, envs in kept.items() if envs.num_envs < needed[task]]:
            kept.pop(task).close()
        total = sum(kept[task].num_envs if task in kept else number for task, number in needed.items())
        while self._envs and total + sum(envs.num_envs for envs in self._envs.values()) > MAX_ENVS:
            self._envs.pop(max(self._envs, key=lambda task: self._envs[task].num_envs)).close()
        for task, number in needed.items():
            envs = kept.get(task) or make_vector_env([task] * number, self._num_workers, self.suite)
            self._envs[task] = envs
        return [self._envs[task] for task in needed]

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


def _passes(cells: Sequence[Cell], chunk: int, suite: Suite) -> list[list[_Chunk]]:
    """Divide all episodes into chunks of one task; a pass takes chunks of several tasks where possible."""
    passes: list[list[_Chunk]] = []
    for index, cell in enumerate(cells):
        goals = suite.goal_set(cell.task, cell.goal_set, cell.num_episodes)
        for start in range(0, len(goals), chunk):
            for members in passes:
                others = [cells[member.cell] for member in members]
                if (
                    len(others) < cell.tasks_per_pass == others[0].tasks_per_pass
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
        should_stop: called before every step.
        advance: called with the number of episodes that this rank has just finished.

    Returns:
        For each cell its outcomes in goal order, on every rank; None if any rank was asked to stop.
    """
    indexed: list[tuple[int, Outcome]] = []
    for chunks in share_of(comm, _passes(cells, chunk, pool.suite)):
        envs = pool.get_all({cells[index].task: len(goals) for index, goals in chunks})
        outcomes = run_episodes(
            actor,
            list(zip(envs, (goals for _, goals in chunks), strict=True)),
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
