"""Videos show the evaluation's own episodes, upright, with the success flag, and need no display."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cpd.comm import SerialComm
from cpd.distill.run_student import run_student
from cpd.envs.cells import EnvPool
from cpd.evaluation.run_evaluation import load_stage, run_evaluation
from cpd.export.graphics import BACKENDS, GraphicsError, choose_graphics
from cpd.export.video import run_evaluated
from cpd.run.directory import Run
from cpd.run.interrupt import Interrupt
from cpd.run.tables import EpisodeRow, read_rows
from cpd.student.actor import make_actor
from cpd.teachers.policy import TeacherActor
from cpd.teachers.run_teacher import load_teacher, run_teacher
from jobs.__main__ import main
from tests.conftest import ROOT
from tests.teachers.small_teacher import new_run

TASK = "coffee-button-v3"
#: In the second batch of the evaluation, which has two episodes.
GOAL = 26


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A scripted expert that succeeds, its student, and their evaluations of 27 goals."""
    run = new_run(
        tmp_path_factory.mktemp("video") / "run",
        stream={"tasks": [TASK], "horizon": 40},
        teacher={"recipe": "scripted"},
        distill={"steps_per_stage": 4},
        evaluation={"num_episodes": GOAL + 1, "num_episodes_brief": 1, "curve_points": 0},
    )
    quiet = {"interrupt": Interrupt(), "log": lambda line: None}
    pool = EnvPool()
    run_teacher(run, run.teachers()[0], pool, **quiet)
    pool.close()
    run_student(run, run.students()[0], SerialComm(), **quiet)
    run_evaluation(run, run.evaluations()[0], SerialComm(), **quiet)
    return run


def row_of(file: Path) -> EpisodeRow:
    rows = read_rows(file, EpisodeRow)
    (row,) = [row for row in rows if row.goal == GOAL and row.goal_set == "held_out"]
    return row


def test_a_filmed_episode_is_that_of_the_table_to_the_bit(run: Run) -> None:
    teacher, student, evaluation = run.teachers()[0], run.students()[0], run.evaluations()[0]
    actors = (
        (TeacherActor(load_teacher(run.config, teacher)), teacher.episodes),
        (make_actor(load_stage(student, 0), [TASK]), evaluation.row_episodes_file(0)),
    )
    for actor, table in actors:
        outcome, actions = run_evaluated(actor, run.config, TASK, GOAL, EnvPool())
        row = row_of(table)
        assert outcome._asdict().items() <= asdict(row).items()
        assert len(actions) == outcome.length == row.length
    with pytest.raises(ValueError, match=f"goals 0 to {GOAL}"):
        run_evaluated(actor, run.config, TASK, GOAL + 1, EnvPool())


def test_the_command_films_upright_and_writes_the_flag(run: Run, tmp_path: Path) -> None:
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    options = ["--goal", str(GOAL), "--size", "96", "--every", "20", "--out", str(tmp_path)]
    # MuJoCo chooses how to render when it is imported, hence a process of its own.
    done = subprocess.run(
        [sys.executable, "-m", "jobs.video", str(run.root), *options], cwd=ROOT, capture_output=True, text=True
    )
    if "cannot render" in done.stderr:
        pytest.skip(f"nothing can be rendered here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    films = re.search(r"teacher (.*), student (.*)", done.stdout)
    assert films
    for result, table in zip(
        films.groups(), (run.teachers()[0].episodes, run.evaluations()[0].row_episodes_file(0)), strict=True
    ):
        assert ("succeeds at step" in result) == row_of(table).success
    movie = Image.open(tmp_path / f"moe-seed-1-goal-{GOAL}.gif")
    assert movie.n_frames >= 3
    first = np.asarray(movie.convert("RGB")).astype(int)
    movie.seek(movie.n_frames - 1)
    last = np.asarray(movie.convert("RGB")).astype(int)
    teacher = (slice(34, 34 + 96), slice(4, 4 + 96))  # below two lines of text
    tile = first[teacher]
    # The table, which is brown, lies below the wall, which is grey.
    red_over_blue = (tile[..., 0] - tile[..., 2])[:, 40:90]
    assert red_over_blue[-10:].mean() > 20 > 10 > abs(red_over_blue[:6].mean())
    # The corner of the flag, of the teacher, who succeeds: green once it has.
    corners = [frame[teacher][:4, :4].mean((0, 1)) for frame in (first, last)]
    near = [np.abs(corner - (26, 127, 55)).max() < 40 for corner in corners]
    assert near == [False, True]
    num_frames, seconds = ffmpeg.count_frames_and_secs(str(tmp_path / f"moe-seed-1-goal-{GOAL}.mp4"))
    assert num_frames > 10 and seconds == pytest.approx(num_frames / 20, abs=0.1)


def test_a_machine_that_cannot_render_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(GraphicsError, match=r"(?s)libegl1.*libosmesa6.*module load.*glfw: "):
        choose_graphics(["glfw"])  # which needs a display
    assert "glfw" not in os.environ.get("MUJOCO_GL", "") and "glfw" not in BACKENDS


def test_mistakes_are_named_before_anything_is_rendered(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for words, named in (
        (["--task", "push-v3"], "push-v3"),
        (["students/moe/seed-9"], "students/moe/seed-1"),
        (["--every", "0"], "--every"),
    ):
        assert main(["video", str(run.root), *words]) == 2
        assert named in capsys.readouterr().err
