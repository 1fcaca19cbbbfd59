"""A teacher from its first iteration to its shards: undisturbed, interrupted, killed, rejected."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpd.run import attempt as attempt_module
from cpd.run.checkpoint import published
from cpd.run.directory import Run, TeacherElement
from cpd.run.files import sha256
from cpd.run.interrupt import Interrupt, InterruptedBySignal
from cpd.run.lease import Lease, LeaseHeldError, LeaseLostError
from cpd.run.progress import read_metrics, read_status
from cpd.run.provenance import labels
from cpd.run.shards.reader import read_rollouts
from cpd.run.shards.schema import read_index
from cpd.run.tables import EpisodeRow, EvaluationRow, read_rows
from cpd.teachers import run_teacher as element_module
from tests.teachers.small_teacher import SMALL, finish, new_run, products, with_teacher

pytestmark = pytest.mark.usefixtures("validate_failing_policies")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, validate_failing_policies: None) -> TeacherElement:
    return finish(new_run(tmp_path_factory.mktemp("undisturbed")))


def test_the_products_of_a_teacher(undisturbed: TeacherElement) -> None:
    run = Run(undisturbed.path.parents[2])
    config = run.config
    assert undisturbed.complete.exists()
    assert not undisturbed.rejected.exists()
    status = read_status(undisturbed.status)
    assert status.state == "done"
    assert set(status.seconds) == {"train", "evaluate", "rollouts"}

    records = read_metrics(undisturbed.metrics)
    assert [record["iteration"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["env_steps"] for record in records] == [200, 400, 600, 800, 1000, 1200]
    assert [record["validation_success"] is not None for record in records] == [False, True] * 3

    description = json.loads(undisturbed.policy.with_suffix(".json").read_text())
    assert description["training"]["stopped_by"] == "budget"
    assert description["training"]["env_steps"] == 1200
    assert description["training"]["validation_success"] == max(r["validation_success"] or 0 for r in records)
    assert published(undisturbed.checkpoints) == []

    rollouts = read_rollouts(
        undisturbed.shards,
        task=undisturbed.task,
        labels=labels(config),
        policy_sha256=sha256(undisturbed.policy),
    )
    assert rollouts.num_steps == config.rollouts.num_steps
    attributes = read_index(undisturbed.shards).attributes
    assert (attributes.teacher_recipe, attributes.std_source) == ("rl", "policy")
    assert len(list(undisturbed.shards.glob("*.h5"))) == 2

    rows = read_rows(undisturbed.evaluation, EvaluationRow)
    assert [(row.goal_set, row.episodes) for row in rows] == [("held_out", 4), ("training", 4)]
    assert {(row.method, row.stage, row.horizon) for row in rows} == {("teacher", None, 60)}
    episodes = read_rows(undisturbed.path / "episodes.csv", EpisodeRow)
    assert [(row.goal_set, row.goal) for row in episodes] == [
        (goal_set, goal) for goal_set in ("held_out", "training") for goal in range(4)
    ]
    assert all(row.length == 60 and row.success_last is not None for row in episodes if row.goal_set == "held_out")


def test_finished_is_finished(undisturbed: TeacherElement) -> None:
    old_products = products(undisturbed)
    attempts = sorted((undisturbed.path / "attempts").iterdir())
    finish(Run(undisturbed.path.parents[2]))
    assert products(undisturbed) == old_products
    assert sorted((undisturbed.path / "attempts").iterdir()) == attempts


def test_the_number_of_workers_does_not_matter(undisturbed: TeacherElement, tmp_path: Path) -> None:
    assert products(finish(new_run(tmp_path), num_workers=2)) == products(undisturbed)


@pytest.mark.parametrize("looks", [130, 190])
def test_interrupted_again_and_again_it_ends_the_same(
    undisturbed: TeacherElement, tmp_path: Path, looks: int, counting_interrupt: Callable[[int], Interrupt]
) -> None:
    run = new_run(tmp_path)
    teacher, stops = run.teachers()[0], 0
    while not teacher.finished:
        assert stops < 12, "every attempt begins anew"
        try:
            finish(run, counting_interrupt(looks))
        except InterruptedBySignal:
            stops += 1
            assert read_status(teacher.status).state == "stopped"
    assert stops >= 3
    assert products(teacher) == products(undisturbed)


def in_a_fork(run: Run, interrupt: Interrupt | None = None) -> multiprocessing.process.BaseProcess:
    """Start the teacher in a process that need not import anything."""

    def work() -> None:
        finish(run, interrupt.install() if interrupt else None)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def test_killed_it_ends_the_same(undisturbed: TeacherElement, tmp_path: Path) -> None:
    run = new_run(tmp_path)
    teacher = run.teachers()[0]
    for num_records in (2, 5):
        process = in_a_fork(run)
        while len(read_metrics(teacher.metrics)) < num_records and process.is_alive():
            time.sleep(0.005)
        process.kill()
        process.join()
    assert not teacher.complete.exists()
    # At the second kill the newest checkpoint held three iterations; later records are cut off.
    assert published(teacher.checkpoints)
    finish(run)
    assert products(teacher) == products(undisturbed)


def test_a_signal_is_honoured_within_an_iteration(tmp_path: Path) -> None:
    ppo = {**SMALL["teacher"]["ppo"], "steps_per_env": 100_000}
    run = new_run(tmp_path, **with_teacher(ppo=ppo, max_env_steps=400_000))
    teacher = run.teachers()[0]
    process = in_a_fork(run, Interrupt())
    while read_status(teacher.status).phase != "train":
        time.sleep(0.02)
    time.sleep(0.5)
    process.terminate()
    process.join(20)
    assert process.exitcode == 1
    assert read_status(teacher.status).state == "stopped"


def test_a_teacher_below_the_gate_is_rejected_by_name(tmp_path: Path) -> None:
    teacher = finish(new_run(tmp_path, **with_teacher(gate=0.9)))
    assert teacher.rejected.read_text() == "validation success 0.00 is below the gate of 0.90\n"
    assert teacher.finished
    assert not teacher.complete.exists()
    assert not teacher.shards.exists()
    assert read_status(teacher.status).state == "rejected"
    assert teacher.evaluation.exists(), "its failure is measured like any success"


def test_the_scripted_stand_in_is_labelled(tmp_path: Path) -> None:
    run = new_run(tmp_path, teacher={"recipe": "scripted", "gate": 0.5}, stream={"horizon": 150})
    teacher = finish(run)
    read_rollouts(teacher.shards, task=teacher.task, labels=labels(run.config))
    attributes = read_index(teacher.shards).attributes
    assert (attributes.teacher_recipe, attributes.std_source) == ("scripted", "assumed")
    rows = read_rows(teacher.evaluation, EvaluationRow)
    assert {row.teacher_recipe for row in rows} == {"scripted"}
    assert rows[0].successes == rows[0].episodes


def test_a_new_policy_withdraws_what_the_old_one_left(undisturbed: TeacherElement, tmp_path: Path) -> None:
    run = Run(shutil.copytree(undisturbed.path.parents[2], tmp_path / "run"))
    teacher = run.teachers()[0]
    old_products = products(teacher)
    (teacher.path / ".policy.safetensors.123.tmp").write_text("half")
    teacher.complete.unlink()
    teacher.policy.with_suffix(".json").unlink()
    teacher.metrics.unlink()
    finish(run)
    assert products(teacher) == old_products
    assert not list(teacher.path.rglob("*.tmp")), "stale temporaries are swept"

    # Shards of another policy are collected again, although their index exists.
    teacher.complete.unlink()
    index = json.loads((teacher.shards / "index.json").read_text())
    index["attributes"]["policy_sha256"] = "0" * 64
    (teacher.shards / "index.json").write_text(json.dumps(index))
    finish(run)
    assert products(teacher) == old_products


def test_a_failure_is_told_and_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run(tmp_path)

    def broken(*arguments: Any, **named: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(element_module, "save_policy", broken)
        with pytest.raises(OSError, match="disk full"):
            finish(run)
    status = read_status(run.teachers()[0].status)
    assert (status.state, status.message) == ("failed", "OSError: disk full")
    assert finish(run).complete.exists()


def test_one_writer_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run(tmp_path)
    teacher = run.teachers()[0]
    monkeypatch.setattr(attempt_module, "HANDOVER_SECONDS", 0.0)
    with Lease(teacher.path).acquire(), pytest.raises(LeaseHeldError, match=str(os.getpid())):
        finish(run)
    assert not teacher.policy.exists()


def test_a_lost_lease_publishes_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run(tmp_path)
    teacher = run.teachers()[0]
    real_run = element_module.TeacherTrainer.run

    def taken_over(self: Any) -> Any:
        result = real_run(self)
        (teacher.path / "attempts" / "0002.json").write_text("{}")
        return result

    monkeypatch.setattr(element_module.TeacherTrainer, "run", taken_over)
    with pytest.raises(LeaseLostError):
        finish(run)
    assert not teacher.policy.exists()
