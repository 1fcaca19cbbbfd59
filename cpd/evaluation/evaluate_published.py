"""Evaluates a published student again, from its files alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Final

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

LOG_EVERY: Final = 15.0
"""Seconds between two lines of progress."""


class _Description(TypedDict):
    method: str
    seed: int


def evaluate_published(folder: Path, comm: Comm, log: Callable[[str], None], *, told: bool = False) -> bool:
    """Run the episodes of a student's last row again, and log its success beside the published one; a collective.

    Args:
        folder: of the student, in its folder of published results.
        comm: the ranks that share the work.
        log: takes a line for each task, and one for their mean.
        told: whether the student is told the task that it has inferred in the published row.

    Returns:
        Whether all numbers of successes are the published ones; True if the student is told the task.

    Raises:
        DamagedFileError: if a file is missing or damaged, or if the results have no row of the student.
        ValueError: if the student is to be told the task, but does not infer it.
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
    advance = _progress(sum(row.episodes for row in rows.values()), comm, log)
    measured = evaluate_cells(load_actor(folder, told=told), cells, horizon, pool, comm, advance=advance)
    pool.close()
    assert measured is not None
    ours = "told the task: " if told else ""
    scores, published = [mean_of_scores(outcomes) for outcomes in measured], []
    equal = []
    for row, outcomes, score in zip(rows.values(), measured, scores, strict=True):
        successes = sum(outcome.success for outcome in outcomes)
        published.append(row.total / row.episodes)
        equal.append(successes == row.successes and math.isclose(score, published[-1], rel_tol=1e-9))
        if row.normalised_return is None:
            log(f"{row.task}: {ours}{successes} of {row.episodes} episodes succeed, published {row.successes}")
        else:
            log(f"{row.task}: {ours}mean normalised return {score:.4f}, published {row.normalised_return:.4f}")
    log(f"average performance: {ours}{100 * fmean(scores):.1f} %, published {100 * fmean(published):.1f} %")
    return told or all(equal)


def _progress(total: int, comm: Comm, log: Callable[[str], None]) -> Callable[[int], None]:
    """Return what logs the episodes done of `total`, estimated from this rank's, every `LOG_EVERY` seconds."""
    done, logged = 0, time.monotonic()

    def advance(episodes: int) -> None:
        nonlocal done, logged
        done += episodes * comm.size
        if time.monotonic() - logged >= LOG_EVERY:
            logged = time.monotonic()
            log(f"{min(done, total)} of {total} episodes done")

    return advance
