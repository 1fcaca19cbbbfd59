"""How commands begin and end, whatever the environment, the terminal and the user do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cpd.envs.metaworld.tasks import STREAMS
from cpd.run.directory import Run
from tests.conftest import ROOT
from tests.synthetic_run import write_run

#: ASCII only: Python uses UTF-8 in these locales unless it is told not to.
PLAIN_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    tasks = STREAMS["demo"]
    rates = {1: np.full((4, 3), 0.5)}
    return write_run(
        tmp_path_factory.mktemp("é") / "run", stream=tasks, students=rates, teachers=dict.fromkeys(tasks, 1.0)
    )


def accept_ctrl_c() -> None:
    """Undo what a shell does to the commands that it starts in the background: they ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def command(*arguments: object, **env: str) -> subprocess.CompletedProcess[bytes]:
    words = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(words, cwd=ROOT, env=os.environ | env, capture_output=True)


def test_a_notebook_s_backend_and_an_ascii_locale_change_no_figure(run: Run, tmp_path: Path) -> None:
    usual = command("analysis.build", run.root, "--out", tmp_path / "usual")
    other = command(
        "analysis.build",
        run.root,
        "--out",
        tmp_path / "other",
        MPLBACKEND="module://no.such.backend",
        SOURCE_DATE_EPOCH="abc",
        **PLAIN_LOCALE,
    )
    assert usual.returncode == other.returncode == 0, other.stderr
    names = sorted(path.name for path in (tmp_path / "usual").iterdir())
    assert names
    for name in names:
        assert (tmp_path / "usual" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_a_status_is_printed_in_an_ascii_locale(run: Run) -> None:
    done = command("jobs.status", run.root, COLUMNS="150", **PLAIN_LOCALE)
    assert done.returncode == 0 and b"students/moe/seed-1" in done.stdout, done.stderr


def test_jobs_need_no_library_for_rendering() -> None:
    code = "import jobs, mujoco"
    env = os.environ | {"MUJOCO_GL": "osmesa", "SUBMITIT_EXECUTOR": "local"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True)


def test_jobs_import_the_simulator_without_starting_programs() -> None:
    """A signal to the group of processes would end them, and with them the import."""
    code = (
        "import sys\n"
        "started = []\n"
        "sys.addaudithook(lambda event, of: started.append(of) if event == 'subprocess.Popen' else None)\n"
        "import jobs, gymnasium.envs.mujoco\n"
        "assert not started, started"
    )
    env = os.environ | {"SUBMITIT_EXECUTOR": "local"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True)


def test_importing_the_packages_leaves_other_programs_alone() -> None:
    code = (
        "import os, signal, jobs, analysis\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
        "assert os.environ['MUJOCO_GL'] == 'egl'"
    )
    env = os.environ | {"MUJOCO_GL": "egl"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True, preexec_fn=accept_ctrl_c)


@pytest.mark.parametrize("arguments", [("jobs.status",), ("jobs.status", "--watch"), ("analysis.build",)])
def test_a_closed_pipe_ends_a_command_without_a_traceback(arguments: tuple[str, ...], run: Run) -> None:
    words = [sys.executable, "-m", arguments[0], str(run.root), *arguments[1:]]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    process.stdout.close()  # as `| head -0` does
    assert b"Traceback" not in process.stderr.read()
    process.wait()


def test_a_closed_output_ends_no_command(run: Run) -> None:
    words = [sys.executable, "-m", "jobs.status", str(run.root)]
    done = subprocess.run(words, cwd=ROOT, stderr=subprocess.PIPE, preexec_fn=lambda: os.close(1))
    assert (done.returncode, done.stderr) == (0, b"")


def interrupted(run: Run, **env: str) -> tuple[int, bytes]:
    """Exit code and errors of a `--watch` that gets Ctrl-C at its first output."""
    words = [sys.executable, "-u", "-m", "jobs.status", str(run.root), "--watch"]
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=accept_ctrl_c,
    )
    assert process.stdout
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def test_ctrl_c_ends_a_command_at_work_without_a_traceback(run: Run) -> None:
    run.report().complete.unlink(missing_ok=True)  # with it, the command would end by itself
    code, errors = interrupted(run, TTY_COMPATIBLE="1")  # without a terminal, it prints as it ends
    assert code == 130 and errors == b""


def test_ctrl_c_ends_a_command_that_still_imports_without_a_traceback(run: Run, tmp_path: Path) -> None:
    (tmp_path / "rich").mkdir()
    (tmp_path / "rich" / "__init__.py").write_text("import time\nprint('importing')\ntime.sleep(60)\n")
    code, errors = interrupted(run, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert code == -signal.SIGINT and errors == b""
