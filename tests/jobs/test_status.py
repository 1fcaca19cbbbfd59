"""The status table says what markers, leases and records say."""

from __future__ import annotations

import io
import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from cpd.cluster.ledger import LedgerEntry, append
from cpd.cluster.queue import JobState, NoAnswerError, NoSchedulerError, QueueView, SchedulerError
from cpd.run.directory import Element, Run
from cpd.run.files import write_json
from cpd.run.lease import Lease
from cpd.run.progress import Status
from jobs.status import IDLE_POLLS, main, run_status
from jobs.status_table import queue_lines, screen_table, status_table


def test_states(make_run) -> None:
    run: Run = make_run(stream={"tasks": ["push-v3", "reach-v3", "hammer-v3", "door-open-v3", "soccer-v3"]})
    push, reach, hammer, door, soccer = run.teachers()
    for element in (push, reach, hammer, door):
        Status(element.status).begin("train", 100, 40)
    push.complete.touch()
    reach.rejected.touch()
    Status(hammer.status).finish("failed", "ValueError: bad luck")
    with Lease(soccer.path):
        Status(soccer.status).begin("train", 200, 50)
        append(run, [LedgerEntry(soccer.name, "teacher", "123", "logs/123_0_log.out", 0.0)])
        rows = {row.element: row for row in run_status(run)}
    assert rows[push.name].state == "done"
    assert rows[reach.name].state == "rejected"
    assert (rows[hammer.name].state, rows[hammer.name].message) == ("failed", "ValueError: bad luck")
    assert rows[door.name].state == "killed"
    assert (rows[soccer.name].state, rows[soccer.name].done, rows[soccer.name].attempts) == ("running", 50, 1)
    assert rows[soccer.name].log == "logs/123_0_log.out"
    assert rows["results"].state == "waiting"
    assert {row.element: row.state for row in run_status(run)}[soccer.name] == "killed"


def test_json_is_for_programs(make_run, capsys: pytest.CaptureFixture[str]) -> None:
    run: Run = make_run()
    assert main([str(run.root), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["element"] for row in rows] == [element.name for element in run.elements()]
    assert rows == [asdict(row) for row in run_status(run)]


def queue_view(failure: SchedulerError | None = None, *jobs: JobState) -> QueueView:
    """What Slurm has just answered, or why it has not."""
    return QueueView({job.job: job for job in jobs}, time.monotonic() + 1e6, {}, 0.0, failure)


def submitted(run: Run, user: str = "") -> list[Element]:
    """A queued, a running and a stopped teacher; the jobs 1_0, 1_1 and 1_2."""
    teachers = run.teachers()
    entries = [LedgerEntry(t.name, "teacher", f"1_{t.index}", "", 0.0, "slurm", user=user) for t in teachers]
    append(run, entries)
    Status(teachers[1].status).begin("train", 100, 40)
    Status(teachers[2].status).finish("stopped", "saved")
    write_json(teachers[0].status, {"state": "queued"})
    return [*teachers]


def test_a_controller_that_does_not_answer_takes_no_job_out_of_the_queue(make_run) -> None:
    run: Run = make_run(stream={"tasks": ["push-v3", "reach-v3", "hammer-v3"]})
    _, reach, _ = submitted(run)
    with Lease(reach.path):
        rows = run_status(run, queue_view(NoAnswerError("squeue did not answer")))
    assert [row.state for row in rows[:3]] == ["queued", "running", "stopped"]
    assert {row.queue for row in rows[:3]} == {"UNKNOWN (Slurm does not answer)"}
    assert queue_lines(rows, is_wide=True) == ["1 queued: UNKNOWN (Slurm does not answer)"]
    # On a machine without Slurm nobody is asked.
    assert run_status(run, queue_view(NoSchedulerError("squeue not found")))[0].state == "waiting"


def test_a_second_look_reads_no_files_of_what_is_finished_or_pending(make_run) -> None:
    run: Run = make_run(stream={"tasks": ["push-v3", "reach-v3", "hammer-v3"]})
    push, reach, hammer = submitted(run)
    hammer.complete.touch()
    view = queue_view(None, *(JobState(f"1_{i}", "x", "PENDING", "", "Priority", "1") for i in range(2)))
    rows = run_status(run, view)
    assert [row.state for row in rows[:3]] == ["queued", "queued", "done"]
    for element in (push, reach, hammer):
        shutil.rmtree(element.path)
    assert run_status(run, view, rows) == rows
    # One of them has started; its log is there, and its status.
    view._jobs["1_1"] = JobState("1_1", "x", "RUNNING", "n1", "", "1")
    Status(reach.status).begin("train", 100, 40)
    with Lease(reach.path):
        assert [row.state for row in run_status(run, view, rows)[:3]] == ["queued", "running", "done"]


@pytest.mark.parametrize("width", [80, 160])
def test_what_holds_jobs_up_is_told_at_any_width(make_run, width: int) -> None:
    run: Run = make_run(stream={"tasks": ["push-v3", "reach-v3", "hammer-v3"]})
    submitted(run, user="alice")
    reasons = ("JobHeldUser", "QOSMaxCpuPerUserLimit", "JobHeldAdmin")
    jobs = [JobState(f"1_{i}", "x", "PENDING", "", reason, "1") for i, reason in enumerate(reasons)]
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(status_table(run, run_status(run, queue_view(None, *jobs)), width))
    text = console.export_text()
    assert "held: scontrol release 1_[0,2]" in [line.rstrip() for line in text.splitlines()]
    assert "PENDING (QOSMaxCpuPerUserLimit)" in text
    assert "alice" in text


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_the_terminal(make_run, width: int) -> None:
    run: Run = make_run(stream={"tasks": "mt50"})
    for element in run.teachers():
        Status(element.status).begin("rollouts", 8000, 4000)
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(status_table(run, run_status(run), width))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    assert any(
        "teachers/peg-unplug-side-v3/seed-1" in line and "killed" in line and "50 %" in line for line in lines
    )


@pytest.mark.parametrize("width", [60, 80, 120, 180])
def test_long_names_are_folded_and_nothing_is_cut_off(make_run, width: int) -> None:
    run: Run = make_run(stream={"tasks": "demo"}, variants={"a-variant-with-quite-a-long-name-of-its-own": {}})
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(status_table(run, run_status(run), width))
    text = console.export_text()
    assert "…" not in text
    assert "waiting" in text and "progress" in text and "success" in text


@pytest.mark.parametrize(("width", "height"), [(80, 24), (160, 24), (160, 8), (60, 3)])
def test_a_live_display_shows_what_matters_most_and_counts_the_rest(make_run, width: int, height: int) -> None:
    run: Run = make_run(stream={"tasks": "mt50"})
    teachers = run.teachers()
    for teacher in teachers[:20]:
        teacher.path.mkdir(parents=True)
        teacher.complete.touch()
    Status(teachers[20].status).finish("failed", "ValueError: bad luck, and a long story of how it came about")
    console = Console(width=width, height=height, force_terminal=True, record=True, file=io.StringIO())
    with Lease(teachers[40].path):
        Status(teachers[40].status).begin("train", 200, 50)
        table = screen_table(console, run, run_status(run))
        console.print(table)
    lines = console.export_text().splitlines()
    assert len(lines) < height or height < 5
    text = "".join(lines)
    assert teachers[40].task in text.replace(" ", "") and "not shown: " in text
    assert (teachers[20].task in text) == (height > 5)
    assert teachers[19].task not in text, "done"
    assert height < 24 or teachers[21].task in text, "the next one"


def test_a_live_display_with_room_shows_all(make_run) -> None:
    run: Run = make_run(stream={"tasks": "demo"})
    for height, is_terminal in ((40, True), (5, False)):
        console = Console(width=120, height=height, force_terminal=is_terminal, record=True, file=io.StringIO())
        console.print(screen_table(console, run, run_status(run)))
        text = console.export_text()
        assert "not shown" not in text
        assert all(element.name in text for element in run.elements())


def test_a_file_gets_a_line_for_every_element(
    make_run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    run: Run = make_run(variants={"a-variant-with-quite-a-long-name-of-its-own": {}})
    Status(run.teachers()[0].status).finish("stopped", "a long story " * 20)
    assert main([str(run.root)]) == 0
    title, _, *lines = capsys.readouterr().out.splitlines()
    assert str(run.root) in title
    assert [line.split()[0] for line in lines] == [element.name for element in run.elements()]


def test_watching_an_idle_run_ends(
    make_run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run()
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert main([str(run.root), "--watch"]) == 1

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupt)
    assert main([str(run.root), "--watch"]) == 130


def test_watching_goes_on_while_slurm_does_not_answer(
    make_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: Run = make_run(stream={"tasks": ["push-v3", "reach-v3", "hammer-v3"]})
    push, _, _ = submitted(run)
    push.complete.touch()  # what remains was running and is silent, or has stopped
    (tmp_path / "squeue").write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    looks: list[float] = []
    real_sleep = time.sleep

    def sleep(seconds: float) -> None:
        if seconds < 1.0:
            real_sleep(seconds)  # another thread's
        elif len(looks) > IDLE_POLLS:
            raise KeyboardInterrupt
        else:
            looks.append(seconds)

    monkeypatch.setattr("time.sleep", sleep)
    assert main([str(run.root), "--watch"]) == 130
    assert set(looks) == {10.0}


def test_published_results_are_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    demo = Path(__file__).resolve().parents[2] / "analysis" / "results" / "demo"
    assert main([str(demo)]) == 2
    assert str(demo) in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_a_damaged_status_counts_as_none(make_run) -> None:
    run: Run = make_run()
    for text in ("{", "", '{"no": "status"}'):
        write_json(run.teachers()[0].status, {})
        run.teachers()[0].status.write_text(text)
        assert run_status(run)[0].state == "waiting"


def test_an_element_that_was_started_by_hand_and_failed_has_no_log(
    make_run, capsys: pytest.CaptureFixture[str]
) -> None:
    run: Run = make_run()
    first, second = run.teachers()
    Status(first.status).finish("failed", "ValueError: no luck [/bold] :smile: [lr=5e-4]\x1b[2J")
    Status(second.status).begin("train", 100, 40)
    assert main([str(run.root)]) == 0
    output = capsys.readouterr().out
    assert f"FAILED {first.name}: ValueError: no luck [/bold] :smile: [lr=5e-4]" in output
    assert f"KILLED {second.name}: " in output
    assert "\x1b" not in output


def test_a_path_with_brackets_is_shown_whole(
    make_run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    run: Run = make_run("run[lr=5e-4] :smile: [/x]")
    assert main([str(run.root)]) == 0
    assert str(run.root) in capsys.readouterr().out
