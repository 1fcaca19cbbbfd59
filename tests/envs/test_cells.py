"""Evaluation in cells: every episode runs once, whatever other episodes run beside it."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpd.comm import SerialComm
from cpd.envs.cells import CHUNK, TASKS_PER_PASS, Cell, EnvPool, _passes, evaluate_cells
from cpd.envs.suite import load_suite
from cpd.student.actor import TaskwiseActor
from cpd.teachers.demonstrations import ScriptedPolicy
from cpd.teachers.policy import TeacherActor

TASKS = ("reach-v3", "drawer-close-v3", "window-close-v3", "push-v3", "button-press-v3")
CELLS = st.builds(
    Cell, st.sampled_from(TASKS), st.sampled_from(["validation", "held_out"]), st.integers(1, 60), st.booleans()
)


@settings(deadline=None)  # goals are drawn at the first use
@given(st.lists(CELLS, min_size=1, max_size=8, unique_by=lambda cell: cell[:2]))
def test_passes_hold_every_episode_once_and_no_task_twice(cells: list[Cell]) -> None:
    passes = _passes(cells, CHUNK, load_suite())
    for chunks in passes:
        members = [cells[chunk.cell] for chunk in chunks]
        assert len({cell.task for cell in members}) == len(members) <= TASKS_PER_PASS
        assert len({cell.to_the_end for cell in members}) == 1
        assert all(0 < len(chunk.goals) <= CHUNK for chunk in chunks)
    episodes = sorted((chunk.cell, goal.index) for chunks in passes for chunk in chunks for goal in chunk.goals)
    assert episodes == [(index, goal) for index, cell in enumerate(cells) for goal in range(cell.num_episodes)]


def test_tasks_of_a_row_share_passes() -> None:
    brief = [Cell(task, "held_out", 10) for task in TASKS]
    assert [len(chunks) for chunks in _passes(brief, CHUNK, load_suite())] == [4, 1]
    alone = [cell._replace(tasks_per_pass=1) for cell in brief]
    assert [len(chunks) for chunks in _passes(alone, CHUNK, load_suite())] == [1] * 5
    thin = [cell._replace(tasks_per_pass=25) for cell in brief]
    assert [len(chunks) for chunks in _passes([*brief[:2], *thin[2:]], CHUNK, load_suite())] == [2, 3]


@pytest.mark.parametrize("to_the_end", [False, True])
def test_episodes_end_as_they_do_with_their_task_alone(to_the_end: bool) -> None:
    cells = [
        Cell(task, "held_out", number, to_the_end) for task, number in zip(TASKS[:3], (3, 30, 2), strict=True)
    ]
    cells.append(Cell(TASKS[0], "validation", 2, to_the_end))
    pool = EnvPool()

    def evaluate(tasks_per_pass: int) -> list[list[tuple]]:
        experts = TaskwiseActor(lambda task: TeacherActor(ScriptedPolicy(task, 0.1)))
        shared = [cell._replace(tasks_per_pass=tasks_per_pass) for cell in cells]
        outcomes = evaluate_cells(experts, shared, 60, pool, SerialComm())
        assert outcomes is not None
        return [[tuple(outcome) for outcome in cell_outcomes] for cell_outcomes in outcomes]

    together = evaluate(4)
    assert together == evaluate(1)
    pool.close()
    assert [[outcome[0] for outcome in outcomes] for outcomes in together] == [
        list(range(cell.num_episodes)) for cell in cells
    ]
    lengths = {outcome[3] for outcomes in together for outcome in outcomes}
    assert lengths == {60} if to_the_end else len(lengths) > 3


def test_a_pool_drops_the_largest_groups_and_never_those_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpd.envs.cells.MAX_ENVS", 6)
    pool = EnvPool()

    def sizes() -> dict[str, int]:
        return {task: envs.num_envs for task, envs in pool._envs.items()}

    small = pool.get_all({TASKS[0]: 1, TASKS[1]: 1})
    pool.get_all({TASKS[2]: 4})
    assert sizes() == dict(zip(TASKS, (1, 1, 4), strict=False))
    pool.get_all({TASKS[3]: 1})
    assert sizes() == {TASKS[0]: 1, TASKS[1]: 1, TASKS[3]: 1}
    assert pool.get_all({TASKS[1]: 1, TASKS[0]: 1}) == small[::-1]
    pool.get_all({TASKS[0]: 2})  # more than it has
    assert sizes() == {TASKS[3]: 1, TASKS[1]: 1, TASKS[0]: 2}
    pool.get_all({TASKS[1]: 4, TASKS[0]: 4})
    assert sizes() == {TASKS[1]: 4, TASKS[0]: 4}
    pool.close()


class Recorder:
    """Acts with a constant action and records its calls."""

    def __init__(self, value: float) -> None:
        self.value, self.tasks, self.seen = value, [""], np.zeros(0)

    def reset(self, tasks: list[str]) -> None:
        self.tasks = list(tasks)

    def act(self, obs_BO: np.ndarray) -> np.ndarray:
        self.seen = obs_BO
        return np.full((len(obs_BO), 4), self.value, np.float32)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=9))
def test_each_task_s_own_actor_sees_its_own_rows(tasks: list[str]) -> None:
    made: dict[str, Recorder] = {}
    actor = TaskwiseActor(lambda task: made.setdefault(task, Recorder(float(ord(task)))))
    obs = np.arange(len(tasks), dtype=np.float32)[:, None].repeat(39, axis=1)
    for _ in range(2):
        actor.reset(tasks)
        actions = actor.act(obs)
        assert actions.shape == (len(tasks), 4)
        assert actions[:, 0].tolist() == [ord(task) for task in tasks]
    assert made.keys() == set(tasks)
    for task, rows in groupby(sorted(range(len(tasks)), key=lambda row: tasks[row]), key=lambda row: tasks[row]):
        assert made[task].seen[:, 0].tolist() == list(rows)
        assert set(made[task].tasks) == {task}
