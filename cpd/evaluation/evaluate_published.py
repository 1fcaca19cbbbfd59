"""Evaluates a published student again, from its files alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from typing_extensions import TypedDict

from cpd.comm import TORCH_THREADS, Comm
from cpd.envs.cells import Cell, EnvPool, evaluate_cells
from cpd.envs.episodes import mean_of_scores
from cpd.envs.suite import DEFAULT_SUITE, load_suite
from cpd.evaluation.publish_students import final_rows
from cpd.evaluation.results_folder import read_tables
from cpd.reading import DamagedFileError, read_json
from cpd.run.directory import published_student
from cpd.run.folders import kind_of
from cpd.student.actor import load_actor


class _Description(TypedDict):
    method: str
    seed: int


def evaluate_published(folder: Path, comm: Comm, log: Callable[[str], None]) -> bool:
    """Run the episodes of a student's last row again, and log its success beside the published one; a collective.

    Args:
        folder: of the student, in its folder of published results.
        comm: the ranks that share the work.
        log: takes a line for each task.

    Returns:
        Whether all numbers of successes are the published ones.

    Raises:
        DamagedFileError: if a file is missing or damaged, or if the results have no row of the student.
    """
    torch.set_num_threads(TORCH_THREADS)
    results = folder.resolve().parent.parent
    if kind_of(results) != "results":
        raise DamagedFileError(
            f"{folder} is not in a folder of published results, so nothing says what its success was; name "
            "RESULTS/students/NAME"
        )
    tables = read_tables(results)
    described = read_json(folder / "policy.json", _Description)
    rows = final_rows(described["method"], described["seed"], tables)
    if not rows or folder.resolve() != published_student(results, described["method"], described["seed"]).parent:
        raise DamagedFileError(f"{results} has no results of {folder}; restore the folder as it was published")
    # One task per pass, as when the row was measured: rounding depends on the composition of a batch.
    cells = [Cell(task, row.goal_set, row.episodes, True, tasks_per_pass=1) for task, row in rows.items()]
    pool = EnvPool(suite=load_suite(next(iter(rows.values())).suite or DEFAULT_SUITE))
    horizon = next(iter(rows.values())).horizon
    measured = evaluate_cells(load_actor(folder), cells, horizon, pool, comm)
    pool.close()
    assert measured is not None
    equal = []
    for row, outcomes in zip(rows.values(), measured, strict=True):
        successes = sum(outcome.success for outcome in outcomes)
        score = mean_of_scores(outcomes)
        equal.append(successes == row.successes and math.isclose(score, row.total / row.episodes, rel_tol=1e-9))
        if row.normalised_return is None:
            log(f"{row.task}: {successes} of {row.episodes} episodes succeed, published {row.successes}")
        else:
            log(f"{row.task}: mean normalised return {score:.4f}, published {row.normalised_return:.4f}")
    return all(equal)
