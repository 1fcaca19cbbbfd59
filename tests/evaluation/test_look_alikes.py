"""Tasks that look alike at the start of an episode: by hand, from real shards, and in the tables."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analysis.dataset import load_dataset
from analysis.paper_tables import start_table
from cpd.evaluation.gather import gather
from cpd.evaluation.look_alikes import FirstObservations, nearest_tasks, start_rows
from cpd.run.directory import Run
from cpd.run.shards.writer import write_shards
from cpd.run.tables import StartRow, read_rows
from tests.run.test_shards import ATTRIBUTES, make_episode
from tests.synthetic_run import write_run

STREAM = ("reach-v3", "push-v3", "window-close-v3")
RATES = np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.8, 0.4, 0.9]])
#: Height of the object at the start of each episode, in metres; the n-th episode is on goal n.
HEIGHTS = {"reach-v3": (0.0, 0.2), "push-v3": (0.01, 0.21, 0.23), "window-close-v3": (5.0, 5.1)}


def first(*values: float, goals: tuple[int, ...] | None = None) -> FirstObservations:
    return FirstObservations(np.array(values)[:, None], np.array(goals or range(len(values))))


def test_nearest_neighbours_by_hand() -> None:
    nearest = nearest_tasks(
        {
            "a": first(0.0, 1.0, 1.1),
            "b": first(0.4, 5.0),
            "c": first(7.0, 7.2),
        }
    )
    assert nearest == {("a", "a"): 2, ("a", "b"): 1, ("b", "b"): 0, ("b", "a"): 1, ("b", "c"): 1, ("c", "c"): 2}


def test_other_episodes_on_the_same_goal_are_not_compared() -> None:
    nearest = nearest_tasks({"a": first(0.0, 0.0, 3.0, goals=(7, 7, 8)), "b": first(0.5, 9.0)})
    assert nearest["a", "b"] == 3


def test_a_task_alone_on_its_only_goal_cannot_be_compared() -> None:
    assert nearest_tasks({"a": first(0.0, 0.0, goals=(1, 1))}) == {("a", "a"): 0}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = write_run(tmp_path / "run", stream=STREAM, students={1: RATES}, teachers=dict.fromkeys(STREAM, 1.0))
    for teacher in run.teachers():
        episodes = [replace(make_episode(4, n), goal_index=n) for n in range(len(HEIGHTS[teacher.task]))]
        for episode, height in zip(episodes, HEIGHTS[teacher.task], strict=True):
            episode.observations[0] = 0.0
            episode.observations[0, 6] = height
        write_shards(teacher.shards, replace(ATTRIBUTES, task=teacher.task), episodes, 5)
    return run


def test_rows_are_computed_from_shards_and_stay_when_these_are_removed(run: Run) -> None:
    rows = [
        StartRow("reach-v3", 1, "reach-v3", 2, 0),
        StartRow("reach-v3", 1, "push-v3", 2, 2),
        StartRow("push-v3", 1, "push-v3", 3, 1),
        StartRow("push-v3", 1, "reach-v3", 3, 2),
        StartRow("window-close-v3", 1, "window-close-v3", 2, 2),
    ]
    assert start_rows(run) == rows
    gather(run)
    shutil.rmtree(run.teachers()[0].shards)
    assert start_rows(run) == []
    gather(run)
    assert read_rows(run.results / "starts.csv", StartRow) == rows


def test_there_are_no_rows_before_all_teachers_are_finished(run: Run) -> None:
    run.teachers()[1].complete.unlink()
    assert start_rows(run) == []


def test_there_are_no_rows_without_an_admitted_teacher(run: Run) -> None:
    for teacher in run.teachers():
        teacher.complete.unlink()
        teacher.rejected.touch()
    assert start_rows(run) == []
    gather(run)


def test_tasks_that_look_alike_are_reported_apart(run: Run) -> None:
    gather(run)
    data = load_dataset([run.results])
    assert data.look_alikes == {"reach-v3": {"push-v3": 1.0}, "push-v3": {"reach-v3": pytest.approx(2 / 3)}}
    table = start_table(data)
    assert table is not None
    assert table.rows == (
        ("moe", 1, "apart", 1, pytest.approx(0.9), pytest.approx(0.9)),
        ("moe", 1, "alike", 2, pytest.approx(0.6), pytest.approx(0.6)),
    )
    assert "reach (100 % push), push (67 % reach)" in table.caption
    (run.results / "starts.csv").unlink()
    assert start_table(load_dataset([run.results])) is None
