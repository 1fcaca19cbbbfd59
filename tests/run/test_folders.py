"""What a folder holds is stated in it, and every command refuses the wrong kind without changing anything."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

import analysis.build
import jobs.check
import jobs.distill
import jobs.evaluate
import jobs.launch
import jobs.publish
import jobs.report
import jobs.status
import jobs.teacher
from cpd.config.load import ConfigError
from cpd.envs.metaworld.tasks import STREAMS
from cpd.evaluation.gather import gather
from cpd.evaluation.publish import publish_results
from cpd.reading import MAX_NAME_BYTES, read_json
from cpd.run.claim import claim
from cpd.run.directory import RunError
from cpd.run.files import write_json
from cpd.run.folders import CONTENTS, KIND_KEY, kind_of
from jobs.launch_options import load_recipe
from tests.conftest import MINIATURE
from tests.synthetic_run import write_run

RATES = np.array([[0.1, 0.0, 0.0], [0.9, 0.1, 0.0], [0.7, 0.8, 0.2], [0.5, 0.9, 0.96]])
#: By kind of folder, the commands that read one of this kind; each is called with the folder and `arguments`.
COMMANDS: dict[str, dict[Callable[[Sequence[str]], int], list[str]]] = {
    "run": {
        jobs.teacher.main: [],
        jobs.distill.main: [],
        jobs.evaluate.main: [],
        jobs.report.main: [],
        jobs.status.main: [],
        jobs.publish.main: ["published"],
    },
    "teachers": {jobs.check.main: []},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of every kind, by its name."""
    root = tmp_path_factory.mktemp("folders")
    run = write_run(
        root / "run", stream=STREAMS["demo"], students={1: RATES}, teachers=dict.fromkeys(STREAMS["demo"], 0.9)
    )
    gather(run)
    publish_results(run.root, root / "results")
    shutil.copytree(root / "results", root / "teachers")
    metrics = read_json(root / "teachers" / "metrics.json", dict)
    write_json(root / "teachers" / "metrics.json", {**metrics, KIND_KEY: "teachers"})
    (root / "policy").mkdir()
    for name in ("policy.safetensors", "policy.json"):
        (root / "policy" / name).write_text("{}")
    (root / "other").mkdir()
    (root / "other" / "notes.txt").write_text("mine")
    (root / "file").write_text("mine")
    (root / "link").symlink_to(root / "nowhere")
    return root


def contents(root: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in sorted(root.rglob("*"))}


def test_every_folder_states_its_kind(folders: Path) -> None:
    for name in ("run", "results", "teachers", "policy", "other", "file", "link"):
        assert kind_of(folders / name) == name
    assert kind_of(folders / "run" / "results") == "results"
    assert kind_of(folders) == "collection" and kind_of(folders / "nothing") == "empty"
    assert kind_of(folders / os.fsdecode(b"caf\xe9")) == "name"


def test_folders_of_earlier_versions_are_recognised_by_their_files(folders: Path, tmp_path: Path) -> None:
    for name in ("results", "teachers"):
        copy = shutil.copytree(folders / name, tmp_path / name)
        metrics = read_json(copy / "metrics.json", dict)
        del metrics[KIND_KEY]
        write_json(copy / "metrics.json", metrics)
        # What a student of this folder, taken for a run, left behind.
        (copy / "students").mkdir()
    (tmp_path / "teachers" / "policies").mkdir()
    assert kind_of(tmp_path / "results") == "results" and kind_of(tmp_path / "teachers") == "teachers"


@pytest.mark.parametrize(("held", "kind"), [("results", "teachers"), ("teachers", "results"), ("run", "results")])
def test_results_and_teachers_of_one_experiment_do_not_replace_each_other(
    folders: Path, tmp_path: Path, held: str, kind: Literal["teachers", "results"]
) -> None:
    copy = tmp_path / held
    copy.mkdir()
    for name in ("config.json", "metrics.json", "provenance.json", "evaluations.csv"):
        if (folders / held / name).exists():
            shutil.copyfile(folders / held / name, copy / name)
    with pytest.raises(RunError, match=CONTENTS[held]):
        claim(copy, kind, read_json(copy / "config.json", dict))


@pytest.mark.parametrize("held", ["run", "results", "teachers", "policy", "other", "file", "link", "nothing"])
def test_every_command_refuses_the_wrong_kind_and_changes_nothing(
    folders: Path, held: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    before = contents(folders)
    for wanted, commands in COMMANDS.items():
        for main, arguments in commands.items() if wanted != held else ():
            assert main([str(folders / held), *arguments]) == 2, main.__module__
            assert str(folders / held) in capsys.readouterr().err
    if held not in ("nothing", "run", "results", "teachers"):
        assert analysis.build.main([str(folders / held)]) == 2
    if held not in ("nothing", "run"):
        assert jobs.launch.main([str(MINIATURE), "--run-dir", str(folders / held), "--prepare"]) == 2
        assert str(folders / held) in capsys.readouterr().err
    if held not in ("run", "teachers"):
        source = f"--teachers-from={folders / held}"
        assert jobs.launch.main([str(MINIATURE), "--run-dir", "new", source, "--prepare"]) == 2
        assert str(folders / held) in capsys.readouterr().err
    assert contents(folders) == before and not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x" * (MAX_NAME_BYTES + 1), "é" * 128, "link", "link/run"])
def test_names_that_no_folder_can_have_are_refused_before_anything_is_written(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = contents(tmp_path)
    path = str(tmp_path / name)
    assert jobs.launch.main([str(MINIATURE), "--run-dir", path, "--prepare"]) == 2
    for main in COMMANDS["run"]:
        assert main([path, *COMMANDS["run"][main]]) == 2
    assert jobs.launch.main([str(MINIATURE), "--run-dir", path, "--dry-run"]) == 2
    assert contents(tmp_path) == before


def test_a_run_may_have_a_name_of_any_language(tmp_path: Path) -> None:
    root = tmp_path / "Läufe" / "試行 1"
    assert jobs.launch.main([str(MINIATURE), "--run-dir", str(root), "--prepare"]) == 0
    assert jobs.status.main([str(root), "--json"]) == 0
    assert kind_of(root) == "run"


@pytest.mark.parametrize("label", [".", "..", "", "a/b", "é", "x" * 201])
@pytest.mark.parametrize("setting", ["name", "method", "variants"])
def test_labels_name_folders_inside_the_run(setting: str, label: str) -> None:
    given = {"variants": f"--variants={{'{label}' = {{distill = {{lr = 0.5}}}}}}"}
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(MINIATURE), [given.get(setting, f"--{setting}={label}")])
    assert setting in str(caught.value)
