"""Learning curves in tools that plot them: no point is lost or doubled, and no job fails of them."""

from __future__ import annotations

import sys

import pytest

from cpd.comm import SerialComm
from cpd.run.attempt import begin_attempt
from cpd.run.directory import Element, Run
from cpd.run.files import write_json
from cpd.run.progress import read_metrics
from cpd.run.shortage import OPTIONAL
from cpd.run.tracking import points


@pytest.fixture
def student(make_run) -> Element:
    return make_run().students()[0]


def append_steps(log, steps: range) -> None:
    for step in steps:
        log.append(stage=0, step=step, task="drawer-close-v3", loss=1 / step, replay=None, global_step=step)


def track(element: Element, tracker: str) -> None:
    write_json(element.root / "profile.json", {"cluster": "local", "track": tracker})


def test_a_requeued_job_goes_on_in_the_same_curve(student: Element) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    track(student, "tensorboard")
    folder = student.root / "tensorboard" / student.name
    with begin_attempt(student, SerialComm(), print) as attempt:
        log = attempt.open_metrics(0)
        append_steps(log, range(1, 4))
        checkpoint_size = log.size
        append_steps(log, range(4, 7))  # no `close`: the job is killed
    watching = accumulator(str(folder))
    watching.Reload()
    assert [event.step for event in watching.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    with begin_attempt(student, SerialComm(), print) as attempt:
        log = attempt.open_metrics(checkpoint_size)
        append_steps(log, range(4, 6))
        log.close()
    watching.Reload()
    opened_later = accumulator(str(folder))
    opened_later.Reload()
    for reader in (watching, opened_later):
        assert reader.Tags()["scalars"] == ["loss"]
        values = [(event.step, pytest.approx(event.value, rel=1e-5)) for event in reader.Scalars("loss")]
        assert values == [(step, 1 / step) for step in range(1, 6)]


@pytest.mark.parametrize("module", ["tensorboard.summary.writer.record_writer", "wandb"])
def test_a_missing_library_is_one_warning(student: Element, module: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    tracker = module.partition(".")[0]
    track(student, tracker)
    lines: list[str] = []
    with begin_attempt(student, SerialComm(), lines.append) as attempt:
        log = attempt.open_metrics(0)
        append_steps(log, range(1, 4))
        log.close()
    assert len(lines) == 1 and f"[{OPTIONAL[tracker]}]" in lines[0] and lines[0].startswith("warning: ")
    assert len(read_metrics(student.metrics)) == 3


def test_an_error_of_the_tracker_ends_the_curves_only(student: Element) -> None:
    pytest.importorskip("tensorboard")
    track(student, "tensorboard")
    (student.root / "tensorboard").touch()
    lines: list[str] = []
    with begin_attempt(student, SerialComm(), lines.append) as attempt:
        append_steps(attempt.open_metrics(0), range(1, 4))
    assert len(lines) == 1 and len(read_metrics(student.metrics)) == 3


def test_curves_are_off_by_default(student: Element) -> None:
    with begin_attempt(student, SerialComm(), print) as attempt:
        append_steps(attempt.open_metrics(0), range(1, 4))
    assert {path.name for path in student.root.iterdir()} == {"config.json", "logs", "students"}


def test_records_of_earlier_versions_have_steps_too(make_run) -> None:
    run: Run = make_run()
    records = [
        {"stage": 0, "step": 40, "loss": 1.0, "task": "drawer-close-v3", "expert_share.0.1": 0.5},
        {"event": "protection", "stage": 0, "masked_share": 0.2},
        {"event": "growth", "stage": 1, "num_new": 2},
        {"stage": 1, "step": 5, "loss": float("nan"), "task": "window-close-v3"},
    ]
    assert list(points(run.students()[0], records)) == [
        (40, {"loss": 1.0, "expert_share/0.1": 0.5}),
        (40, {"masked_share": 0.2}),
        (45, {}),
    ]
    teacher = {"iteration": 1, "env_steps": 800, "train_success": 0.5}
    assert list(points(run.teachers()[0], [teacher])) == [(800, {"train_success": 0.5})]
