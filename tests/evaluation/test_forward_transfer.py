"""Forward transfer of gathered results, relative to students of single tasks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cpd.evaluation.gather import gather
from cpd.reading import read_json
from cpd.run.files import write_json
from cpd.run.tables import CurveRow, read_rows, write_rows
from tests.evaluation.test_gather import RATES, STREAM, TEACHERS
from tests.synthetic_run import write_run


def test_forward_transfer_is_measured_from_the_students_of_single_tasks_in_the_same_run(tmp_path: Path) -> None:
    alone = RATES.copy()
    alone[0, 0] = 1.0
    alone[1, 0] = 1.0  # the first task needs no learning at all
    run = write_run(
        tmp_path / "run",
        stream=STREAM,
        students={1: RATES, 2: RATES},
        teachers=TEACHERS,
        variants={"alone": {1: alone * 0.5, 2: alone * [1, 0.5, 0.5]}},
        protocols={"alone": "single_task"},
    )
    report = gather(run)
    ours, single = report["methods"]
    assert single["forward_transfer"] is None
    areas = {(s["method"], s["seed"]): s["areas"] for s in report["students"]}
    baseline = [(areas["alone", 1][k] + areas["alone", 2][k]) / 2 for k in range(3)]
    expected = [(areas["moe", 1][k] - baseline[k]) / (1 - baseline[k]) for k in range(3)]
    transfer = ours["forward_transfer"]
    assert transfer["by_stage"] == pytest.approx(expected)
    assert transfer["mean"]["estimate"] == pytest.approx(sum(expected) / 3)
    assert transfer["left_out"] == ()
    assert (ours["memory_steps"], ours["parameters"]) == (240, 70_000)

    # A task in which the single-task students succeed at every evaluation is left out: no gain is possible.
    for student in run.students():
        if student.method == "alone":
            rows = read_rows(student.curves, CurveRow)
            write_rows(student.curves, [replace(r, successes=10) if r.stage == 1 else r for r in rows])
    (ours, _) = gather(run)["methods"]
    assert ours["forward_transfer"]["left_out"] == (STREAM[1],)
    assert ours["forward_transfer"]["mean"]["estimate"] == pytest.approx((expected[0] + expected[2]) / 2)

    # Single-task students with other batch sizes or numbers of steps are not comparable.
    config = read_json(run.config_path, dict)
    config["variants"]["alone"]["distill"]["batch_size"] = 2 * config["distill"]["batch_size"]
    write_json(run.config_path, config)
    assert all(method["forward_transfer"] is None for method in gather(run)["methods"])
    config["variants"]["alone"]["distill"]["batch_size"] = config["distill"]["batch_size"]
    config["variants"]["alone"]["distill"]["steps_per_stage"] = 2 * config["distill"]["steps_per_stage"]
    write_json(run.config_path, config)
    assert all(method["forward_transfer"] is None for method in gather(run)["methods"])


def test_the_area_of_a_single_task_student_begins_at_the_success_of_an_untrained_one(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        stream=STREAM,
        students={1: RATES},
        teachers=TEACHERS,
        variants={"alone": {1: RATES}},
        protocols={"alone": "single_task"},
    )
    continual, alone = (student["areas"] for student in gather(run)["students"])
    # Curves have a point every tenth of a stage, of which the first one counts half.
    earlier = [RATES[stage, stage] - RATES[0, stage] for stage in range(3)]
    assert earlier == [0.0, 0.1, 0.2]
    assert np.subtract(continual, alone) == pytest.approx(np.array(earlier) / 20)
