"""A teacher from its first iteration to its shards, undisturbed, interrupted, killed, and rejected."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpd.comm import DivergedError
from cpd.config import Config, ExplorationConfig, PPOConfig, TeacherConfig, WarmStartConfig
from cpd.config.load import load, merge, read_toml, to_dict
from cpd.run import attempt as attempt_module
from cpd.run.checkpoint import published
from cpd.run.directory import Run, TeacherElement
from cpd.run.files import sha256, write_json
from cpd.run.interrupt import Interrupt, InterruptedBySignal
from cpd.run.lease import Lease, LeaseHeldError, LeaseLostError
from cpd.run.progress import read_metrics, read_status
from cpd.run.provenance import labels
from cpd.run.shards.reader import read_rollouts
from cpd.run.shards.schema import read_index
from cpd.run.tables import EpisodeRow, EvaluationRow, read_rows
from cpd.teachers import ppo
from cpd.teachers import run_teacher as element_module
from cpd.teachers import trainer as training_module
from cpd.teachers.policy import load_policy
from cpd.teachers.rollout import sample
from cpd.teachers.run_teacher import env_pool, run_teacher
from tests.conftest import MINIATURE, ROOT

#: Six iterations of four environments and fifty steps, validated after every second one.
SMALL: dict[str, Any] = {
    "teacher": {
        "max_env_steps": 1_200,
        "validate_every": 2,
        "ppo": {"hidden_sizes": [16], "num_envs": 4, "steps_per_env": 50, "minibatch_size": 50, "num_epochs": 2},
    },
    "logging": {"teacher_checkpoint_every": 3},
}


def with_teacher(**changes: Any) -> dict[str, Any]:
    return {**SMALL, "teacher": {**SMALL["teacher"], **changes}}


def finish(run: Run, interrupt: Interrupt | None = None, num_workers: int = 1) -> TeacherElement:
    teacher = run.teachers()[0]
    with closing(env_pool(run.config, num_workers)) as pool:
        run_teacher(run, teacher, pool, interrupt=interrupt or Interrupt(), log=lambda line: None)
    return teacher


def products(teacher: TeacherElement) -> dict[str, str]:
    """Hashes of all that counts, and the learning curve without its wall times."""
    files = [teacher.policy, teacher.policy.with_suffix(".json"), teacher.evaluation]
    files += [teacher.path / "episodes.csv", *sorted(teacher.shards.iterdir())]
    return {file.name: sha256(file) for file in files} | {"curve": json.dumps(curve(teacher))}


def curve(teacher: TeacherElement) -> list[dict[str, Any]]:
    records = read_metrics(teacher.metrics)
    return [{k: v for k, v in record.items() if not k.endswith("seconds")} for record in records]


@pytest.fixture(scope="module", autouse=True)
def validates_failing_policies() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_module, "VALIDATE_FROM", 0.0)
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> TeacherElement:
    return finish(new_run(tmp_path_factory.mktemp("undisturbed")))


def new_run(root: Path, **over: Any) -> Run:
    write_json(root / "config.json", to_dict(load(Config, merge(read_toml(MINIATURE), over or SMALL), "test")))
    return Run(root)


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


def test_exploring_starts_count_as_environment_steps(tmp_path: Path) -> None:
    teacher = finish(new_run(tmp_path, **with_teacher(exploration={"start_share": 1.0, "max_steps": 20})))
    counts = [record["env_steps"] for record in read_metrics(teacher.metrics)]
    added = np.diff([0, *counts])
    # Two episodes for each of four environments, unless some succeed; what is added to the iteration's 200 varies.
    assert all(steps >= 200 + 4 for steps in added)
    assert len(set(added.tolist())) > 1
    assert 1_200 - 200 - 8 * 20 < counts[-1] <= 1_200 + 8 * 20
    with pytest.raises(ValueError, match=r"horizon \(490\) and exploration\.max_steps \(20\) .* 500 steps"):
        starts = ExplorationConfig(start_share=0.1, max_steps=20)
        TeacherConfig(horizon=490, exploration=starts, ppo=PPOConfig(steps_per_env=500))


EXPLORATION = {"start_share": 1.0, "max_steps": 20, "stop_at_success": 0.4}


@pytest.fixture
def succeeding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Iterations of which these shares of first episodes succeed, whatever they do."""
    rates = [0.2, 0.4, 0.5, 0.1, 0.9, 0.0]

    def sampled(*arguments: Any, **named: Any) -> Any:
        batch, iteration = sample(*arguments, **named), arguments[6]
        return batch and replace(batch, train_success=rates[iteration])

    monkeypatch.setattr(training_module, "sample", sampled)


def exploring_tables(min_log_std: float = -3.0, **ppo: float) -> dict[str, Any]:
    """Six iterations that explore until more than .4 of episodes succeed; the stopping rule ends them."""
    ends = {"max_env_steps": 3_000, "gate": 0.0, "stop_success": 0.0, "stop_passes": 3}
    exploration = {**EXPLORATION, "min_log_std": min_log_std}
    return with_teacher(**ends, exploration=exploration, ppo={**SMALL["teacher"]["ppo"], **ppo})


@pytest.mark.usefixtures("succeeding")
def test_exploration_stops_permanently_once_enough_episodes_succeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ppo, "MAX_LOG_STD", -0.3)
    run = new_run(tmp_path, **exploring_tables(learning_rate=0.1, min_log_std=-0.3))
    records = read_metrics(finish(run).metrics)
    assert [record["exploring_steps"] > 0 for record in records] == [True] * 3 + [False] * 3
    assert [record["log_std"] for record in records[:3]] == pytest.approx([-0.3] * 3)
    assert all(record["log_std"] < -0.301 for record in records[3:])


@pytest.mark.usefixtures("succeeding")
def test_that_exploring_is_over_survives_interruptions(
    tmp_path: Path, counting_interrupt: Callable[[int], Interrupt]
) -> None:
    undisturbed, interrupted = (new_run(tmp_path / name, **exploring_tables()) for name in ("whole", "parts"))
    teacher = interrupted.teachers()[0]
    while not teacher.finished:
        with contextlib.suppress(InterruptedBySignal):
            finish(interrupted, counting_interrupt(190))
    assert [record["exploring_steps"] > 0 for record in curve(teacher)] == [True] * 3 + [False] * 3
    assert products(teacher) == products(finish(undisturbed))


def test_finished_is_finished(undisturbed: TeacherElement) -> None:
    before = products(undisturbed)
    attempts = sorted((undisturbed.path / "attempts").iterdir())
    finish(Run(undisturbed.path.parents[2]))
    assert products(undisturbed) == before
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
        try:
            finish(run, counting_interrupt(looks))
        except InterruptedBySignal as stop:
            stops += 1
            assert "launch again" in str(stop)
            assert read_status(teacher.status).state == "stopped"
    assert stops >= 3
    assert products(teacher) == products(undisturbed)


KILLED = """
import sys
from pathlib import Path
from cpd.run.interrupt import Interrupt
from cpd.run.directory import Run
from cpd.teachers import trainer
from cpd.teachers.run_teacher import env_pool, run_teacher
trainer.VALIDATE_FROM = 0.0
run = Run(Path(sys.argv[1]))
run_teacher(run, run.teachers()[0], env_pool(run.config, 1), interrupt=Interrupt(), log=print)
"""


def test_killed_it_ends_the_same(undisturbed: TeacherElement, tmp_path: Path) -> None:
    run = new_run(tmp_path)
    teacher = run.teachers()[0]
    for num_records in (2, 5):
        command = [sys.executable, "-c", KILLED, str(run.root)]
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        while len(read_metrics(teacher.metrics)) < num_records and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not teacher.complete.exists()
    # After the second kill three iterations were behind the newest checkpoint; records beyond are cut back.
    assert published(teacher.checkpoints)
    finish(run)
    assert products(teacher) == products(undisturbed)


def test_a_signal_is_honoured_within_an_iteration(tmp_path: Path) -> None:
    ppo = {**SMALL["teacher"]["ppo"], "steps_per_env": 100_000}
    run = new_run(tmp_path, **with_teacher(ppo=ppo, max_env_steps=400_000))
    teacher = run.teachers()[0]
    code = KILLED.replace("Interrupt()", "Interrupt().install()")
    process = subprocess.Popen([sys.executable, "-c", code, str(run.root)], cwd=ROOT, stderr=subprocess.PIPE)
    while read_status(teacher.status).phase != "train":
        time.sleep(0.02)
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert b"InterruptedBySignal: asked to stop while training" in errors
    assert read_status(teacher.status).state == "stopped"


def test_training_stops_after_successive_passes(tmp_path: Path) -> None:
    run = new_run(tmp_path, **with_teacher(gate=0.0, stop_success=0.0, stop_passes=2))
    teacher = finish(run)
    training = json.loads(teacher.policy.with_suffix(".json").read_text())["training"]
    assert training["stopped_by"] == "validation"
    assert training["iterations"] == training["selected_iteration"] == 4


def test_a_failed_validation_starts_the_count_of_passes_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = iter([1.0, 0.6, 0.8, 0.7, 0.9])
    monkeypatch.setattr(training_module, "validate", lambda *arguments: next(rates))
    changes = {"validate_every": 1, "stop_success": 0.7, "stop_passes": 3}
    teacher = finish(new_run(tmp_path, **with_teacher(**changes)))
    training = json.loads(teacher.policy.with_suffix(".json").read_text())["training"]
    assert not list(rates)
    assert (training["stopped_by"], training["iterations"]) == ("validation", 5)
    assert (training["selected_iteration"], training["validation_success"]) == (1, 1.0)


def test_the_last_of_the_best_policies_is_selected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter([0.2, 0.6, 0.4, 0.6, 0.5, 0.1])
    monkeypatch.setattr(training_module, "validate", lambda *arguments: next(rates))
    teacher = finish(new_run(tmp_path, **with_teacher(validate_every=1)))
    training = json.loads(teacher.policy.with_suffix(".json").read_text())["training"]
    assert (training["stopped_by"], training["iterations"]) == ("budget", 6)
    assert (training["selected_iteration"], training["validation_success"]) == (4, 0.6)
    # Trained from scratch, it normalises with what it has seen up to then: 200 steps in each iteration.
    assert load_policy(teacher.policy).normalizer.count == 4 * 200


def test_hopeless_policies_are_validated_at_the_end_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_module, "VALIDATE_FROM", 1.0)
    teacher = finish(new_run(tmp_path, **with_teacher(horizon=5)))
    assert [r["validation_success"] for r in read_metrics(teacher.metrics)] == [None] * 5 + [0.0]


def test_an_update_that_diverged_is_told_and_not_saved(tmp_path: Path) -> None:
    ppo = {**SMALL["teacher"]["ppo"], "learning_rate": 1e30}
    run = new_run(tmp_path, **with_teacher(ppo=ppo))
    with pytest.raises(
        DivergedError, match=r"teachers/drawer-close-v3/seed-1: not finite after the update of iter"
    ):
        finish(run)
    status = read_status(run.teachers()[0].status)
    assert status.state == "failed"
    assert "lower teacher.ppo.learning_rate" in status.message
    assert published(run.teachers()[0].checkpoints) == []


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


def test_a_new_policy_withdraws_what_the_old_one_left(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    teacher = finish(run)
    before = products(teacher)
    teacher.complete.unlink()
    teacher.policy.with_suffix(".json").unlink()
    teacher.metrics.unlink()
    finish(run)
    assert products(teacher) == before

    # Shards of another policy are collected anew, though their index is there.
    teacher.complete.unlink()
    index = json.loads((teacher.shards / "index.json").read_text())
    index["attributes"]["policy_sha256"] = "0" * 64
    (teacher.shards / "index.json").write_text(json.dumps(index))
    finish(run)
    assert products(teacher) == before


def test_stale_temporaries_are_swept(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    teacher = run.teachers()[0]
    teacher.path.mkdir(parents=True)
    (teacher.path / ".policy.safetensors.123.tmp").write_text("half")
    finish(run)
    assert not list(teacher.path.rglob("*.tmp"))


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


def test_settings_without_effect_are_pointed_out() -> None:
    def paths(**settings: Any) -> list[str]:
        return [line.split()[0] for line in TeacherConfig(**settings).warnings()]

    # A recipe with scripted teachers may extend one that sets `ppo`.
    assert paths(recipe="scripted", ppo=PPOConfig(gamma=0.5)) == []
    assert paths(warm_start=WarmStartConfig(num_demonstrations=3)) == ["warm_start"]
    idle = ExplorationConfig(max_steps=7, stop_at_success=0.5, min_log_std=-4.0)
    assert paths(exploration=idle) == [
        "exploration.max_steps",
        "exploration.stop_at_success",
        "exploration.min_log_std",
    ]
    assert paths(exploration=ExplorationConfig(step_rate=0.1, max_steps=7, stop_at_success=0.5)) == []
    assert paths(exploration=ExplorationConfig(stop_at_success=0.5, min_log_std=-1.0)) == []


def test_ranks_that_cannot_share_a_teacher_are_refused() -> None:
    with pytest.raises(ValueError, match=r"26 ranks cannot share teacher\.ppo\.num_envs = 25 environments"):
        TeacherConfig().check_ranks(26)
    TeacherConfig().check_ranks(25)
    TeacherConfig(recipe="scripted").check_ranks(26)
