"""Processor time of evaluating a stream of fifty tasks, beside plain passes with as many episodes in every cell.

    python -m tests.bench.bench_evaluation [--student FOLDER] [--tasks 10]

Measures the kinds of cells of the success matrix with a published student, interleaved, and adds them up for a
stream of fifty tasks with the numbers of episodes of the recipe mt50. A student that has met a single task stands
for one that has not met the tasks of its cells: its episodes last to the horizon. Equal cells must have equal
outcomes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from cpd.comm import TORCH_THREADS, SerialComm
from cpd.envs.cells import CHUNK, Cell, EnvPool, evaluate_cells
from cpd.envs.episodes import Actor
from cpd.evaluation.expert_usage import ExpertUsage
from cpd.reading import read_json
from cpd.run.descriptions import StudentStream
from cpd.student.actor import StudentActor
from cpd.student.network import Prepared, Student, load_student

STUDENT = Path("analysis/results/cw10-rl/students/cpd-seed-1")
NUM_TASKS, HORIZON, FULL, BRIEF = 50, 500, 50, 5


class PlainStudent(Student):
    """Prepares nothing: every pass sorts the tokens by expert."""

    def prepare(self, task_B: torch.Tensor, length: int) -> Prepared:
        return task_B  # type: ignore[return-value]


def cpu_seconds(actor: Actor, cells: Sequence[Cell], pool: EnvPool, results: list[bytes]) -> float:
    start = time.process_time()
    outcomes = evaluate_cells(actor, cells, HORIZON, pool, SerialComm())
    results.append(repr(outcomes).encode())
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", type=Path, default=STUDENT)
    parser.add_argument("--tasks", type=int, default=10, help="tasks of the stream that are measured")
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(TORCH_THREADS)
    weights = arguments.student / "policy.safetensors"
    stream = read_json(weights.with_suffix(".json"), StudentStream)["distinct_tasks"]
    tasks = stream[: arguments.tasks]

    def actor(plain: bool, num_known: int) -> StudentActor:
        student = load_student(weights)
        student.known_K[num_known:] = False
        if plain:
            student.__class__ = PlainStudent
        return StudentActor(student, stream)

    def final(plain: bool) -> Actor:
        made = actor(plain, len(stream))
        return ExpertUsage(made._student, made, stream)

    brief = [Cell(task, "held_out", BRIEF) for task in tasks]
    thin = [Cell(task, "held_out", 1, tasks_per_pass=CHUNK) for task in tasks[1:]]
    full = [Cell(task, "held_out", CHUNK) for task in tasks]
    to_the_end = [cell._replace(to_the_end=True, tasks_per_pass=1) for cell in full[:3]]
    # Name, how many such cells fifty tasks have, actor and cells as they were, actor and cells as they are.
    half, known, chunks = (NUM_TASKS - 1) * (NUM_TASKS - 2) // 2, len(stream), FULL // CHUNK
    near, diagonal = 2 * NUM_TASKS - 1, 2 * NUM_TASKS - 1  # the latter with the training goals of the final row
    kinds = [
        ("met", half, actor(True, known), brief, actor(False, known), brief),
        ("next or before training", near, actor(True, 1), brief[1:], actor(False, 1), brief[1:]),
        ("not met", half, actor(True, 1), brief[1:], actor(False, 1), thin),
        ("diagonal and training goals", diagonal * chunks, actor(True, known), full, actor(False, known), full),
        ("final row", NUM_TASKS * chunks, final(True), to_the_end, final(False), to_the_end),
    ]
    pool = EnvPool()
    for task in tasks:  # resets are simulated once
        evaluate_cells(actor(False, known), [Cell(task, "held_out", CHUNK)], 1, pool, SerialComm())
    print(f"{'processor seconds per cell':32s}{'cells':>8s}{'before':>9s}{'now':>9s}{'ratio':>8s}")
    totals = np.zeros(2)
    for name, number, old, old_cells, new, new_cells in kinds:
        best, results = np.full(2, np.inf), []
        for _ in range(arguments.repeats):
            seconds = cpu_seconds(old, old_cells, pool, results), cpu_seconds(new, new_cells, pool, results)
            best = np.minimum(best, np.array(seconds) / len(new_cells))
        assert old_cells is not new_cells or len(set(results)) == 1
        totals += number * best
        print(f"{name:32s}{number:8d}{best[0]:9.4f}{best[1]:9.4f}{best[1] / best[0]:8.2f}", flush=True)
    print(f"{'fifty tasks':40s}{totals[0]:9.0f}{totals[1]:9.0f}{totals[1] / totals[0]:8.2f}")


if __name__ == "__main__":
    main()
