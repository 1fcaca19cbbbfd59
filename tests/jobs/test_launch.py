"""The launcher's command line: what it refuses, and that refusing leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import jobs.distill
import jobs.evaluate
import jobs.report
import jobs.teacher
from cpd.cluster.element_job import ElementJob
from cpd.config import Config
from cpd.config.profile import Resources, load_profile
from cpd.run.command import exit_quietly
from cpd.run.directory import Run, RunError
from cpd.run.lease import Lease
from cpd.run.progress import read_status
from jobs.common import choose_element
from jobs.launch import main, prepare
from jobs.launch_options import load_recipe
from tests.conftest import MINIATURE


def test_mistakes_of_recipe_overrides_and_profile_are_reported_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "run"
    arguments = [
        str(MINIATURE),
        "--run-dir",
        str(root),
        "--profile",
        "lokal",
        "--distil.lr",
        "1",
        "--teacher.gate=x",
    ]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "distil: " in error and "'distill'" in error
    assert "teacher.gate: " in error
    assert "'lokal'" in error
    assert not root.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demoo"], "'demo'"),
        (["nowhere.toml"], "nowhere.toml"),
        (["demo", "--stream.tasks", "['hamer-v3']"], "'hammer-v3'"),
        (["demo", "stray"], "'stray'"),
        (["demo", "--distill.lr", "x"], "the command line: --distill.lr: "),
        (["demo", "--stream.tasks", '["push", "pull"]'], "the command line: --stream.tasks.1: "),
        (["demo", "--dryrun"], "'--dry-run'"),
        (["demo", "--can"], "--can"),
        (["demo", "--onyl", "teachers"], "'--only'"),
        (["--distill.lr", "5e-4", "demo"], "5e-4: "),
    ],
)
def test_a_mistake_is_named_and_nothing_is_created(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_dry_run_shows_what_would_run_and_creates_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "drawer-close-v3, handle-press-side-v3, window-close-v3" in output
    assert "240 stored steps (dpp)" in output
    assert not list(tmp_path.iterdir())


def prepared(root: Path, *overrides: str) -> Run:
    return prepare(root, load_recipe(str(MINIATURE), overrides), load_profile("local"))


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("students/ews", "--only students/ews: "),
        ("students/ewc", "teachers/drawer-close-v3/seed-1, teachers/window-close-v3/seed-1"),
        ("results", "students/moe/seed-1/evaluation, students/ewc/seed-1/evaluation"),
    ],
)
def test_only_existing_elements_with_finished_dependencies_are_executed(
    name: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(MINIATURE.read_text() + "\n[variants.ewc]\nmemory.selection = 'none'\n")
    command = [str(recipe), "--run-dir", str(tmp_path / "run"), "--only", name]
    assert main([*command, "--dry-run"]) == 2
    assert main(command) == 2
    assert not (tmp_path / "run").exists()
    error = capsys.readouterr().err
    assert named in error
    assert ("\n  students/ewc\n" in error) == (name == "students/ews"), "the list of elements"


def test_cancelling_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(MINIATURE), "--profile", "testbed", "--run-dir", str(tmp_path / "typo"), "--cancel"]
    assert main(command) == 2
    assert "typo" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize(
    ("words", "code"),
    [("Socket timed out on send/recv operation", 75), ("invalid partition specified: x", 2)],
)
def test_a_refusal_of_sbatch_and_a_silent_controller_have_different_exit_codes(
    words: str,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    profile = tmp_path / "profile.toml"
    profile.write_text('cluster = "slurm"\nsingle_machine = true\n')
    (tmp_path / "bin").mkdir()
    for name, script in {"sbatch": f"echo 'sbatch: error: {words}' >&2; exit 1", "squeue": "", "srun": ""}.items():
        command = tmp_path / "bin" / name
        command.write_text(f"#!/bin/sh\n{script}\n")
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    run = tmp_path / "run"
    assert main([str(MINIATURE), "--run-dir", str(run), "--profile", str(profile), "--only", "teachers"]) == code
    assert words in capsys.readouterr().err
    assert {read_status(teacher.status).state for teacher in Run(run).teachers()} == {"waiting"}


def test_a_recipe_file_of_that_name_is_suggested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text('extends = "demo"')
    assert main(["mine", "--dry-run"]) == 2
    assert "mine.toml" in capsys.readouterr().err


def test_a_damaged_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = prepared(tmp_path)
    run.config_path.write_text("{")
    assert main([str(MINIATURE), "--run-dir", str(run.root)]) == 2
    assert str(run.config_path) in capsys.readouterr().err


def test_added_variants_follow_the_existing_ones_and_need_a_new_report(tmp_path: Path) -> None:
    first = prepared(tmp_path, "--variants.b.student.width", "64")
    first.results.mkdir()
    first.report().complete.touch()
    again = prepared(tmp_path, "--variants.b.student.width", "64")
    assert again.report().complete.exists()
    more = prepared(tmp_path, "--variants.a.student.width", "48", "--variants.b.student.width", "64")
    assert [student.method for student in more.students()] == ["moe", "b", "a"]
    assert not more.report().complete.exists()
    with pytest.raises(RunError, match=r"variants\.a\b"):
        prepared(tmp_path, "--variants.b.student.width", "64")


def test_added_seeds_join_the_existing_students(tmp_path: Path) -> None:
    first = prepared(tmp_path, "--variants.b.student.width", "64", "--seeds", "[3]")
    job = ElementJob(str(tmp_path), "student", "students/b/seed-3", Resources())
    number = first.students()[1].index
    more = prepared(tmp_path, "--variants.b.student.width", "64", "--seeds", "[3, 1]")
    assert [student.name for student in more.students() if student.method == "b"] == [
        "students/b/seed-3",
        "students/b/seed-1",
    ]
    task = more.config.stream.tasks[0]
    assert more.teacher_of(task, 3) == first.teacher_of(task, 3)
    # Jobs in the queue name their element, since its number changes.
    assert choose_element(more.students(), job.arguments[1]).name == "students/b/seed-3"
    assert choose_element(more.students(), str(number)).name != "students/b/seed-3"
    for others in ("[3]", "[1, 3]"):
        with pytest.raises(RunError, match="seeds: "):
            prepared(tmp_path, "--variants.b.student.width", "64", "--seeds", others)


def test_an_element_is_chosen_by_name_or_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepared(tmp_path, "--seeds", "[1, 2]")
    second = run.evaluations()[1]
    for name in ("students/moe/seed-2", "students/moe/seed-2/", "students/moe/seed-2/evaluation", "1"):
        assert choose_element(run.evaluations(), name) == second
    assert choose_element(run.students(), None) == run.students()[0]
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert choose_element(run.evaluations(), None) == second
    for name in ("students/moe/seed-3", "2", "-1"):
        with pytest.raises(ValueError, match=rf"(?s){name}: .*\n  0: students/moe/seed-1\n  1: "):
            choose_element(run.students(), name)


def test_other_settings_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared(tmp_path)
    with pytest.raises(RunError) as caught:
        prepared(tmp_path, "--distill.lr", "0.5", "--seeds", "[2]")
    assert "distill.lr: 0.003 -> 0.5" in str(caught.value)
    assert "seeds: [1] -> [2]" in str(caught.value)
    # A dry run refuses them, too.
    assert main([str(MINIATURE), "--run-dir", str(tmp_path), "--distill.lr", "0.5", "--dry-run"]) == 2
    assert "distill.lr: 0.003 -> 0.5" in capsys.readouterr().err
    config: Config = Run(tmp_path).config
    assert config.distill.lr == 0.003


def test_settings_that_an_older_run_lacks_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = prepared(tmp_path / "run")
    config = json.loads(run.config_path.read_text())
    del config["distill"]["episodes"]
    run.config_path.write_text(json.dumps(config))
    capsys.readouterr()
    prepared(run.root)
    assert "  distill.episodes: 'successful'\n" in capsys.readouterr().out
    prepared(run.root)
    assert "distill.episodes" not in capsys.readouterr().out


def test_logging_settings_may_change(tmp_path: Path) -> None:
    prepared(tmp_path)
    assert prepared(tmp_path, "--logging.metrics_every", "99").config.logging.metrics_every == 99


def test_an_unsuitable_run_directory_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published = Path(__file__).resolve().parents[2] / "analysis" / "results" / "demo"
    published_files = sorted(published.rglob("*"))
    file = tmp_path / "file"
    file.touch()
    for path in (published, file):
        for option in ("--dry-run", "--prepare"):
            assert main(["demo", "--run-dir", str(path), option]) == 2
            assert str(path) in capsys.readouterr().err
    assert sorted(published.rglob("*")) == published_files


def test_a_run_on_slurm_is_not_resumed_locally_without_a_profile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(MINIATURE), "--run-dir", str(tmp_path / "run")]
    assert main([*command, "--profile", "testbed", "--prepare"]) == 0
    assert main([*command, "--prepare"]) == 2
    assert "--profile local" in capsys.readouterr().err
    assert main([*command, "--profile", "local", "--prepare"]) == 0
    assert main([*command, "--prepare"]) == 0


def test_a_directory_with_other_files_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").touch()
    assert main([str(MINIATURE), "--run-dir", str(tmp_path)]) == 2
    assert "thesis.tex" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_second_launcher_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared(tmp_path)
    with Lease(tmp_path / "launcher").acquire():
        assert main([str(MINIATURE), "--run-dir", str(tmp_path)]) == 2
        assert f"process {os.getpid()}" in capsys.readouterr().err
        contents = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
        # It changes nothing, even if its settings are allowed.
        assert main([str(MINIATURE), "--run-dir", str(tmp_path), "--variants.wide.student.width", "64"]) == 2
        assert contents == {path: path.read_bytes() for path in tmp_path.rglob("*.json")}


def test_a_launch_that_was_killed_at_its_start_can_be_repeated(tmp_path: Path) -> None:
    (tmp_path / "launcher" / "attempts").mkdir(parents=True)
    (tmp_path / "launcher" / "attempts" / "0001.json").touch()  # its contents were lost with the machine's power
    (tmp_path / "provenance.json").write_text("{}")
    (tmp_path / ".config.json.7.tmp").touch()
    assert main([str(MINIATURE), "--run-dir", str(tmp_path), "--prepare"]) == 0
    assert Run(tmp_path).config.name == "miniature"


def test_a_dry_run_shows_the_chosen_elements_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launch = [str(MINIATURE), "--run-dir", str(tmp_path / "run"), "--dry-run", "--only"]
    assert main([*launch, "teachers"]) == 0
    output = capsys.readouterr().out
    assert "teacher         2 x 1 rank(s)" in output and "student" not in output.partition("method")[2]
    assert main([*launch, "teachers/typo"]) == 2
    assert main([*launch[:-2], "--only", "teachers/typo"]) == 2
    assert "teachers/typo" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_denied_permission_names_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise PermissionError(13, "Permission denied", "/theirs/config.json")

    with pytest.raises(SystemExit) as stop:
        exit_quietly(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("/theirs/config.json: ")


def test_a_run_without_its_provenance_is_not_taken_for_published_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = prepared(tmp_path / "run")
    run.teachers()[0].path.mkdir(parents=True)
    (run.root / "provenance.json").unlink()
    assert main([str(MINIATURE), "--run-dir", str(run.root), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert str(run.root) in error and "provenance.json" in error


def test_a_closed_pipe_is_no_error() -> None:
    launch = subprocess.Popen(
        [sys.executable, "-m", "jobs.launch", "--settings"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert launch.stdout and launch.stderr
    launch.stdout.close()
    assert launch.stderr.read() == ""
    assert launch.wait() == 128 + signal.SIGPIPE


@pytest.mark.parametrize("verb", [jobs.teacher, jobs.distill, jobs.evaluate, jobs.report])
def test_help_shows_all_arguments(verb: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        verb.main(["--help"])
    output = capsys.readouterr().out
    assert "RUN_DIR [ELEMENT]" in output
    assert ("--partial" in output) == (verb in (jobs.distill, jobs.evaluate))


def test_a_run_directory_holds_no_absolute_path(tmp_path: Path) -> None:
    prepared(tmp_path)
    for name in ("config.json", "profile.json"):
        assert str(tmp_path) not in (tmp_path / name).read_text()


@pytest.mark.parametrize(("options", "tracker"), [(["--track", "tensorboard"], "tensorboard"), ([], "")])
def test_jobs_learn_from_the_run_directory_whether_to_follow_curves(
    tmp_path: Path, options: list[str], tracker: str
) -> None:
    assert main([str(MINIATURE), "--run-dir", str(tmp_path / "run"), "--prepare", *options]) == 0
    assert Run(tmp_path / "run").launched_with(str, None, "track") == tracker
