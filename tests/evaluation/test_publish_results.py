"""Publishing results: figures and tables can be drawn from the copies, and stand-ins are kept apart."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analysis.build import main
from cpd.envs.metaworld.tasks import STREAMS
from cpd.evaluation.publish import publish_results
from cpd.reading import read_json
from cpd.run import claim as module
from cpd.run.claim import check_repository_place
from cpd.run.directory import RunError
from tests.synthetic_run import LABELS, write_run

RATES = np.array([[0.1, 0.0, 0.0], [0.9, 0.1, 0.0], [0.7, 0.8, 0.2], [0.5, 0.9, 0.96]])
TEACHERS = dict.fromkeys(STREAMS["demo"], 0.9)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a temporary folder the root of the repository's published results."""
    monkeypatch.setattr(module, "REPOSITORY_RESULTS", tmp_path / "results")
    return tmp_path / "results"


def test_stand_ins_are_published_and_drawn_among_themselves_only(
    tmp_path: Path, places: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted = replace(LABELS, teacher_recipe="scripted")
    run = write_run(
        tmp_path / "lab", stream=STREAMS["demo"], students={1: RATES}, teachers=TEACHERS, labels=scripted
    )
    for arguments in (["--publish", str(places / "lab")], ["--out", str(places / "lab")]):
        assert main([str(run.root), *arguments]) == 2
        assert "scripted" in capsys.readouterr().err
        assert not places.exists()
    stale = places / "stand-ins" / "lab" / "starts.csv"
    assert main([str(run.root), "--publish", str(stale.parent)]) == 0
    stale.touch()
    assert main([str(run.root), "--publish", str(stale.parent)]) == 0
    assert not stale.exists()
    assert (stale.parent / "figures" / "stream.pdf").exists()
    tables = {path.name for path in run.results.iterdir() if path.is_file()}
    assert {path.name for path in stale.parent.iterdir() if path.is_file()} == tables | {"report.html"}
    shutil.copytree(stale.parent, places / "by-hand")
    assert main([str(places / "by-hand")]) == 2, "a copied folder is checked as well"


def test_files_that_are_no_results_are_never_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "r", stream=STREAMS["demo"], students={1: RATES}, teachers=TEACHERS)
    paper = tmp_path / "paper"
    paper.mkdir()
    (paper / "measurements.csv").write_text("mine")
    for folder, named in ((paper, "measurements.csv"), (run.root, str(run.root))):
        assert main([str(run.root), "--publish", str(folder)]) == 2
        assert named in capsys.readouterr().err
    assert (paper / "measurements.csv").read_text() == "mine" and run.config_path.exists()


def test_results_of_another_experiment_are_never_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"students": {1: RATES}, "teachers": TEACHERS}
    run = write_run(tmp_path / "r", stream=STREAMS["demo"], **options)
    kept = publish_results(run.root, tmp_path / "kept")
    published = {path.name: path.read_bytes() for path in kept.iterdir()}
    named = write_run(tmp_path / "named", stream=STREAMS["demo"], **options)
    turned = write_run(tmp_path / "turned" / "r", stream=STREAMS["demo"][::-1], **options)
    for other, difference in ((named, "name: 'r' -> 'named'"), (turned, "stream.tasks: ")):
        assert main([str(other.root), "--publish", str(kept)]) == 2
        error = capsys.readouterr().err
        assert str(kept) in error and difference in error
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "losses.csv").write_text("mine")
    assert main([str(run.root), "--publish", str(tmp_path / "unknown")]) == 2
    assert "losses.csv" in capsys.readouterr().err
    assert published == {path.name: path.read_bytes() for path in kept.iterdir()}


def test_students_that_are_published_are_not_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"stream": STREAMS["demo"], "teachers": TEACHERS}
    whole = write_run(tmp_path / "whole" / "r", **options, students={1: RATES})
    partial = RATES.copy()
    partial[3] = np.nan
    begun = write_run(tmp_path / "begun" / "r", **options, students={1: partial})
    other_seed = write_run(tmp_path / "other" / "r", **options, students={2: RATES})
    none = write_run(tmp_path / "none" / "r", **options, students={1: RATES})
    shutil.rmtree(none.root / "students")
    kept = tmp_path / "kept"
    publish_results(none.root, kept)
    publish_results(none.root, kept)
    publish_results(whole.root, kept)
    published = (kept / "evaluations.csv").read_bytes()
    assert main([str(none.root), "--publish", str(kept)]) == 2
    assert "moe (seed 1)" in capsys.readouterr().err
    assert main([str(other_seed.root), "--publish", str(kept)]) == 2
    assert "moe (seed 1)" in capsys.readouterr().err
    assert (kept / "evaluations.csv").read_bytes() == published
    publish_results(begun.root, kept)
    assert (kept / "evaluations.csv").read_bytes() != published, "the same students, with fewer stages"


def test_real_teachers_are_not_published_among_stand_ins(places: Path, tmp_path: Path) -> None:
    check_repository_place(places / "cw10", "rl")
    check_repository_place(tmp_path / "anywhere", "rl")
    check_repository_place(tmp_path / "anywhere", "scripted")
    check_repository_place(places / "stand-ins", "")
    with pytest.raises(RunError, match="demo_rl"):
        check_repository_place(places / "stand-ins" / "cw10", "demo_rl")
    with pytest.raises(RunError, match="demo_rl/scripted"):
        check_repository_place(places / "cw10", "demo_rl/scripted")


@pytest.mark.parametrize(
    "path", sorted(module.REPOSITORY_RESULTS.rglob("config.json")), ids=lambda path: path.parent.name
)
def test_committed_results_are_where_they_belong(path: Path) -> None:
    check_repository_place(path.parent, read_json(path, dict)["teacher"]["recipe"])
