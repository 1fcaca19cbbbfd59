"""The stay phase of a teacher: resumed, from a reused policy, and which policy it selects."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cpd.envs.episodes import Outcome
from cpd.run.directory import TeacherElement
from cpd.run.files import sha256
from cpd.run.interrupt import Interrupt, InterruptedBySignal
from cpd.run.progress import read_metrics, read_status
from cpd.run.reuse import ReuseError, reuse
from cpd.teachers import stay as stay_module
from tests.teachers.small_teacher import curve, finish, new_run, products, with_teacher

pytestmark = pytest.mark.usefixtures("validate_failing_policies")

#: Seven iterations after the six of training; those after four change the policy.
STAY = with_teacher(stay={"max_env_steps": 1_400})


def training_of(teacher: TeacherElement) -> dict[str, Any]:
    training: dict[str, Any] = json.loads(teacher.policy.with_suffix(".json").read_text())["training"]
    return training


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, validate_failing_policies: None) -> TeacherElement:
    return finish(new_run(tmp_path_factory.mktemp("undisturbed"), **STAY))


def test_it_continues_the_training(undisturbed: TeacherElement) -> None:
    records = read_metrics(undisturbed.metrics)
    assert [record["iteration"] for record in records] == [*range(1, 14)]
    assert records[-1]["env_steps"] == 2_600
    assert ["validation_success_last" in record for record in records] == [False] * 11 + [True] * 2
    before = json.loads(undisturbed.trained_policy.with_suffix(".json").read_text())["training"]
    training = training_of(undisturbed)
    stay = training.pop("stay")
    assert training == {**before, "validation_success": stay["validation_success"]}
    assert (stay["iterations"], stay["env_steps"], stay["stopped_by"]) == (7, 1_400, "budget")
    assert stay["validation_success"] >= stay["success_before"] == before["validation_success"]
    assert {"train", "stay"} < read_status(undisturbed.status).seconds.keys()


def test_interrupted_again_and_again_it_ends_the_same(
    undisturbed: TeacherElement, tmp_path: Path, counting_interrupt: Callable[[int], Interrupt]
) -> None:
    run = new_run(tmp_path, **STAY)
    teacher, stops = run.teachers()[0], []
    while not teacher.finished:
        assert len(stops) < 20, "every attempt begins anew"
        try:
            finish(run, counting_interrupt(190))
        except InterruptedBySignal:
            stops.append(read_status(teacher.status).phase)
    assert stops.count("stay") >= 3
    assert products(teacher) == products(undisturbed)


def test_it_begins_with_a_reused_policy(undisturbed: TeacherElement, tmp_path: Path) -> None:
    source = new_run(tmp_path / "source")
    without = finish(source)
    assert sha256(without.policy) == sha256(undisturbed.trained_policy)
    run = new_run(tmp_path / "stay", **STAY)
    assert reuse(run, source.root)[0].begins_stay
    assert products(finish(run)) == products(undisturbed)
    other = new_run(tmp_path / "other", **with_teacher(stay={"max_env_steps": 2_000}))
    with pytest.raises(ReuseError, match=r"teacher\.stay\.max_env_steps"):
        reuse(other, run.root)


def rates(*pairs: tuple[float, float]) -> Iterator[list[Outcome]]:
    """Ten episodes each, with these rates of success at any step and at the last step."""
    for success, last in pairs:
        yield [Outcome(goal, goal < 10 * success, goal < 10 * last, 60, 0.0) for goal in range(10)]


@pytest.mark.parametrize(
    ("pairs", "selected", "stopped_by"),
    [
        ([(0.8, 0.1), (0.9, 0.5), (0.7, 0.9), (0.8, 0.5), (0.9, 0.4)], 7, "budget"),
        ([(0.8, 0.1), (0.7, 1.0), (0.7, 1.0), (0.7, 1.0), (0.7, 1.0)], 0, "budget"),
        ([(1.0, 0.1), (1.0, 1.0), (1.0, 1.0)], 6, "validation"),
        ([(1.0, 1.0)], 0, "validation"),
    ],
)
def test_success_at_the_last_step_selects_where_success_has_not_fallen(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pairs: list[tuple[float, float]],
    selected: int,
    stopped_by: str,
) -> None:
    validations = rates(*pairs)
    monkeypatch.setattr(stay_module, "validation_episodes", lambda *arguments, **named: next(validations))
    changes = {"validate_every": 1, "max_env_steps": 200, "stay": {"max_env_steps": 1_600}}
    teacher = finish(new_run(tmp_path, **with_teacher(**changes)))
    stay = training_of(teacher)["stay"]
    assert (stay["selected_iteration"], stay["stopped_by"]) == (selected, stopped_by)
    assert (stay["validation_success"], stay["validation_success_last"]) == pairs[max(0, selected - 4)]
    assert not list(validations)
    assert (sha256(teacher.policy) == sha256(teacher.trained_policy)) == (selected == 0)


def test_a_rejected_teacher_has_none(tmp_path: Path) -> None:
    teacher = finish(new_run(tmp_path, **with_teacher(gate=1.0, max_env_steps=200, stay={"max_env_steps": 800})))
    assert teacher.is_rejected
    assert len(curve(teacher)) == 1
    assert "stay" not in training_of(teacher)
