"""Students are published with the results that measure them, and act from what was published alone."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.build import main
from cpd.evaluation.publish import publish_results
from cpd.reading import DamagedFileError, read_json
from cpd.run.descriptions import StudentPolicy
from cpd.run.directory import Run, RunError, identity, published_student
from cpd.run.files import sha256
from cpd.student.actor import StudentActor, load_actor
from cpd.student.network import save_student
from jobs.evaluate import main as evaluate
from tests.conftest import ROOT
from tests.student.grown import TASKS, grown_student, observations
from tests.synthetic_run import LABELS as USUAL
from tests.synthetic_run import write_run
from tests.test_docs import blocks

LABELS = replace(USUAL, horizon=120, task_identity="inferred")
RATES = np.array([[0.1, 0.0, 0.0], [0.9, 0.1, 0.0], [0.7, 0.8, 0.2], [0.5, 0.9, 0.96]])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two methods with two seeds, evaluated to the end, with students that nobody trained."""
    rates = {1: RATES, 2: RATES}
    options: dict[str, Any] = {"method": "cpd", "labels": LABELS, "teachers": dict.fromkeys(TASKS, 0.9)}
    root = tmp_path_factory.mktemp("students") / "r"
    run = write_run(root, stream=TASKS, students=rates, variants={"other": rates}, **options)
    size = {"memory_steps": 800, "memory_bytes": 1, "labels": asdict(LABELS)}
    for student in run.students():
        before, described = (
            {**identity(student.config, student, stage), "distinct_tasks": TASKS, **size} for stage in (1, 2)
        )
        save_student(student.stage_policy(1), grown_student(), before)
        # Only what changed since; what is published must not need the other file.
        save_student(student.stage_policy(2), grown_student(), described, student.stage_policy(1))
    return run


@pytest.fixture
def published(run: Run, tmp_path: Path) -> Path:
    return publish_results(run.root, tmp_path / "analysis" / "results" / "cw10-rl")


def test_the_first_student_of_the_first_method_is_published(run: Run, published: Path) -> None:
    (folder,) = (published / "students").iterdir()
    weights = published_student(published, "cpd", 1)
    assert weights.parent == folder and sha256(weights) == sha256(run.students()[0].stage_policy(1))
    card = (folder / "README.md").read_text()
    assert "| window-close-v3 | 96 % (48 of 50) | 87 to 99 | 90 % |" in card
    assert sha256(weights) in card and "3.1.1" in card and str(published) not in card
    obs = observations(3, seed=1).numpy()
    own = load_actor(run.students()[0].stage_policy(2))
    np.testing.assert_array_equal(load_actor(folder).act(obs), own.act(obs))


def test_the_example_of_the_readme_and_of_the_card_act(
    published: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = [block for block in blocks(ROOT / "README.md", "python") if "load_actor" in block]
    card = published / "students" / "cpd-seed-1" / "README.md"
    (of_card,) = blocks(card, "python")
    for folder, code in ((published.parents[2], example), (published / "students", of_card)):
        monkeypatch.chdir(folder)
        exec(compile(code, "example", "exec"), {})
        assert "success" in capsys.readouterr().out


def test_a_published_student_is_evaluated_again(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = published_student(published, "cpd", 1).parent
    assert evaluate([str(student)]) == 1, "its results are made up"
    assert "window-close-v3: 0 of 50 episodes succeed, published 48" in capsys.readouterr().out
    assert evaluate([str(student), "--told"]) == 0
    told = capsys.readouterr().out
    assert "window-close-v3: told the task: 0 of 50 episodes succeed, published 48" in told
    assert "average performance: told the task: 0.0 %, published 78.7 %" in told
    assert evaluate([str(student.rename(student.with_name("cpd-seed-3")))]) == 2


def test_a_student_that_is_told_the_task_acts_as_if_it_had_inferred_it(published: Path) -> None:
    folder = published_student(published, "cpd", 1).parent
    obs = observations(6, seed=2).numpy()
    inferring, told = load_actor(folder), load_actor(folder, told=True)
    actions = inferring.act(obs)
    assert isinstance(inferring, StudentActor)
    believed = [belief.plan_first for belief in inferring.beliefs]
    told.reset(believed)
    np.testing.assert_allclose(told.act(obs), actions, atol=1e-6)
    told.reset([next(task for task in TASKS if task != own) for own in believed])
    assert np.abs(told.act(obs) - actions).max() > 1e-3


def test_damage_is_named_and_nothing_is_lost(
    run: Run, published: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = (published / "evaluations.csv").read_bytes()
    with pytest.raises(RunError, match="students/cpd-seed-1"):
        publish_results(run.results, published)
    assert main([str(run.root), "--publish", str(published), "--students", "students/missing"]) == 2
    assert "students/missing" in capsys.readouterr().err
    publish_results(run.root, published, ["students/cpd", "students/other/seed-2"])
    names = {"cpd-seed-1", "cpd-seed-2", "other-seed-2"}
    assert {path.name for path in (published / "students").iterdir()} == names
    assert (published / "evaluations.csv").read_bytes() == table
    weights = published_student(published, "cpd", 1)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(DamagedFileError, match=re.escape(str(weights))):
        load_actor(weights.parent)


COMMITTED = sorted(ROOT.glob("analysis/results/**/students/*/policy.safetensors"))


@pytest.mark.parametrize("weights", COMMITTED, ids=lambda path: "-".join(path.parts[-4:-1]))
def test_committed_students_act(weights: Path) -> None:
    """On observations of their own suite's size."""
    centre = read_json(weights.with_suffix(".json"), StudentPolicy)["obs_centre"]
    noise = np.random.default_rng(1).normal(0.0, 0.05, (1, len(centre)))
    load_actor(weights.parent).act((centre + noise).astype(np.float32))
