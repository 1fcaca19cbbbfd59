"""Published teachers: copied from a run, drawn from the files alone, checked by Meta-World's own evaluation."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.build import main as build_main
from analysis.build_teachers import build_teachers
from analysis.published_teachers import find_published, load_published
from cpd.config import Config
from cpd.config.load import load, merge, read_toml, to_dict
from cpd.envs.cells import EnvPool
from cpd.envs.episodes import run_episodes
from cpd.envs.goals import FIRST_SEEDS
from cpd.envs.metaworld.own_evaluation import MetaWorldAgent, evaluate_with_metaworld
from cpd.evaluation.publish import publish_teachers
from cpd.run.directory import Run, published_policy
from cpd.run.files import sha256, write_json
from cpd.run.interrupt import Interrupt
from cpd.run.progress import read_status, write_status
from cpd.run.tables import EpisodeRow, EvaluationRow, read_rows, write_rows
from cpd.teachers.demonstrations import ScriptedPolicy
from cpd.teachers.policy import TeacherActor, load_policy
from cpd.teachers.run_teacher import env_pool, run_teacher
from jobs.check import HELD_OUT_SEED
from jobs.check import main as check_main
from jobs.publish import main as publish_main
from tests.conftest import MINIATURE, goal_set

COMMITTED = Path(__file__).resolve().parents[2] / "analysis" / "results" / "teachers"
POLICIES = sorted(COMMITTED.glob("*/policies/*.safetensors"))
EASIEST = COMMITTED / "cw10-demo_rl" / "policies" / "handle-press-side-v3-seed-1.safetensors"

FIVE_LINES = """
import sys, gymnasium, metaworld; from pathlib import Path
from cpd.teachers.policy import load_policy, TeacherActor
teacher = TeacherActor(load_policy(Path(sys.argv[1])))
env = gymnasium.make("Meta-World/MT1", env_name=sys.argv[2], seed=7)
obs, info = env.reset()
action = teacher.act(obs[None].astype("float32"))[0]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("teachers") / "mini"
    tables = merge(read_toml(MINIATURE), {"name": "mini", "stream": {"tasks": ["drawer-close-v3"]}})
    write_json(root / "config.json", to_dict(load(Config, tables, "test")))
    trained = Run(root)
    pool = env_pool(trained.config, 1)
    run_teacher(trained, trained.teachers()[0], pool, interrupt=Interrupt(), log=lambda line: None)
    return trained


def test_a_published_policy_is_the_run_s_and_acts_alike(run: Run, tmp_path: Path) -> None:
    teacher = run.teachers()[0]
    assert publish_main([str(run.root), str(tmp_path / "kept")]) == 0
    file = published_policy(tmp_path / "kept", teacher.task, teacher.seed)
    assert sha256(file) == sha256(teacher.policy)
    obs_BO = np.random.default_rng(1).standard_normal((5, 39)).astype(np.float32)
    original = load_policy(teacher.policy).distribution(obs_BO)
    assert np.array_equal(load_policy(file).distribution(obs_BO).raw_mean, original.raw_mean)
    published = {path: path.read_bytes() for path in (tmp_path / "kept").rglob("*") if path.is_file()}
    assert publish_teachers(run, tmp_path / "kept") == [file]
    assert published == {path: path.read_bytes() for path in (tmp_path / "kept").rglob("*") if path.is_file()}


def test_publishing_again_removes_policies_that_the_run_does_not_have(run: Run, tmp_path: Path) -> None:
    (file,) = publish_teachers(run, tmp_path / "kept")
    stale = published_policy(tmp_path / "kept", "push-v3", 7)
    for suffix in (".safetensors", ".json"):
        stale.with_suffix(suffix).write_bytes(file.with_suffix(suffix).read_bytes())
    publish_teachers(run, tmp_path / "kept")
    assert sorted((tmp_path / "kept" / "policies").iterdir()) == [file.with_suffix(".json"), file]


def renewed(run: Run, root: Path, **tables: Any) -> Run:
    """Return a copy of the run with `tables` merged into its frozen configuration."""
    shutil.copytree(run.root, root)
    write_json(root / "config.json", merge(to_dict(run.config), tables))
    return Run(root)


def test_results_of_another_experiment_are_never_overwritten(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "kept"
    publish_teachers(run, kept)
    published = {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    steps = run.config.teacher.max_env_steps
    changes: dict[str, tuple[dict[str, Any], str]] = {
        "named": ({"name": "other"}, "name: 'mini' -> 'other'"),
        "stream": ({"stream": {"tasks": ["push-v3", "drawer-close-v3"]}}, "stream.tasks: ['drawer-close-v3'] -> "),
        "noisy": ({"teacher": {"ppo": {"noise_correlation": 0.25}}}, "teacher.ppo.noise_correlation: "),
        "cheaper": ({"teacher": {"max_env_steps": steps - 1}}, f"teacher.max_env_steps: {steps} -> {steps - 1}"),
    }
    for label, (tables, difference) in changes.items():
        other = renewed(run, tmp_path / label, **tables)
        assert publish_main([str(other.root), str(kept)]) == 2
        error = capsys.readouterr().err
        assert str(kept) in error and difference in error
    assert published == {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}


def test_a_longer_version_of_the_same_experiment_is_published_over_it(run: Run, tmp_path: Path) -> None:
    publish_teachers(run, tmp_path / "kept")
    more = {"seeds": [*run.config.teacher.seeds, 7], "max_env_steps": 2 * run.config.teacher.max_env_steps}
    longer = renewed(run, tmp_path / "longer", teacher=more)
    config = json.loads((tmp_path / "kept" / "config.json").read_text())
    del config["teacher"]["exploration"]  # as if it had not been a setting yet
    write_json(tmp_path / "kept" / "config.json", config)
    assert publish_main([str(longer.root), str(tmp_path / "kept")]) == 0
    published = json.loads((tmp_path / "kept" / "config.json").read_text())["teacher"]
    assert published["max_env_steps"] == more["max_env_steps"]


def test_runs_and_unknown_files_are_not_published_over(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = renewed(run, tmp_path / "other", name="other")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "provenance.json").touch()
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "metrics.json").write_text("mine")
    (tmp_path / "file").touch()
    publish_teachers(run, tmp_path / "students")
    publish_teachers(run, tmp_path / "shelf" / "mini")
    (tmp_path / "students" / "losses.csv").write_text("mine")
    for folder, reason in (
        (other.root, ""),
        (run.root, ""),
        (run.results, str(run.root.resolve())),
        (tmp_path / "begun", ""),
        (tmp_path / "tables", "metrics.json"),
        (tmp_path / "file", ""),
        (tmp_path / "students", "losses.csv"),
        (tmp_path / "shelf", str(tmp_path / "shelf" / "mini")),
    ):
        assert publish_main([str(run.root), str(folder)]) == 2
        error = capsys.readouterr().err
        assert reason in error and str(folder) in error and "'mini'" in error
    assert (tmp_path / "tables" / "metrics.json").read_text() == "mine"


def test_a_damaged_policy_does_not_replace_a_good_one(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = renewed(run, tmp_path / "damaged")
    (file,) = publish_teachers(run, tmp_path / "kept")
    published = file.read_bytes()
    policy = damaged.teachers()[0].policy
    policy.write_bytes(policy.read_bytes()[:200])
    assert publish_main([str(damaged.root), str(tmp_path / "kept")]) == 2
    assert str(policy) in capsys.readouterr().err
    assert file.read_bytes() == published


def test_policies_of_teachers_that_are_not_finished_are_not_lost(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = {"stream": {"tasks": ["window-close-v3", "drawer-close-v3"]}}
    begun, whole = (renewed(run, tmp_path / name, **tables) for name in ("begun", "whole"))
    drawer = whole.root / "teachers" / "drawer-close-v3"
    for file in shutil.copytree(drawer, drawer.with_name("window-close-v3")).rglob("*.*"):
        if file.suffix in (".csv", ".json"):
            file.write_text(file.read_text().replace("drawer-close-v3", "window-close-v3"))
    kept = {path: path.read_bytes() for path in publish_teachers(whole, tmp_path / "kept")}
    assert len(kept) == 2
    assert publish_main([str(begun.root), str(tmp_path / "kept")]) == 2
    error = capsys.readouterr().err
    assert "teachers/window-close-v3/seed-1" in error and str(begun.root) in error
    assert kept == {path: path.read_bytes() for path in kept}


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_published_folder_that_lost_a_file_is_not_drawn_without_it(
    run: Run, tmp_path: Path, suffix: str
) -> None:
    (file,) = publish_teachers(run, tmp_path / "kept")
    file.with_suffix(suffix).unlink()
    with pytest.raises(ValueError, match=str(file.with_suffix(suffix))):
        load_published(tmp_path / "kept")


def test_a_published_folder_without_its_configuration_is_refused(run: Run, tmp_path: Path) -> None:
    publish_teachers(run, tmp_path / "kept" / "mini")
    (tmp_path / "kept" / "mini" / "config.json").unlink()
    assert build_main([str(tmp_path / "kept")]) == 2


def test_building_does_not_publish_teachers(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish_teachers(run, tmp_path / "kept" / "mini")
    for path in (tmp_path / "kept", tmp_path / "kept" / "mini"):
        assert build_main([str(path), "--publish", str(tmp_path / "again")]) == 2
        assert "cpd publish" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
    (tmp_path / "file").touch()
    assert build_main([str(tmp_path / "kept"), "--out", str(tmp_path / "file")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_figures_and_scores_are_made_from_the_files_alone(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "kept" / "mini"
    publish_teachers(run, folder)
    assert find_published(tmp_path / "kept") == [folder]
    (published,) = load_published(folder).teachers
    description = json.loads(run.teachers()[0].policy.with_suffix(".json").read_text())["training"]
    assert (published.env_steps, published.policy_updates) == (1_600, description["policy_updates"])
    (timing,) = (t for t in json.loads((folder / "timings.json").read_text()) if t["role"] == "teacher")
    assert published.before_rl is None and published.cpu_seconds == timing["cpu_seconds"] > 0.0
    assert build_main([str(tmp_path / "kept")]) == 0
    (row,) = csv.DictReader((tmp_path / "kept" / "figures" / "scores.csv").open(newline=""))
    assert (row["folder"], row["teacher_recipe"], row["held_out_episodes"]) == ("mini", "rl", "4")
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "kept" / "figures").iterdir()}
    assert {"mini_gain.pdf", "mini_gain.png", "mini_curves.pdf", "mini_scores.md"} <= set(drawn)
    assert build_main([str(tmp_path / "kept")]) == 0
    again = {path.name: path.read_bytes() for path in (tmp_path / "kept" / "figures").iterdir()}
    assert again == drawn, "the same bytes at every build"
    write_json(folder / "timings.json", [])
    with pytest.raises(ValueError, match=rf"timings\.json .*{run.teachers()[0].name}"):
        load_published(folder)


def test_teachers_without_learning_curves_are_published_without_students(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.root, tmp_path / "mini")
    copy = Run(tmp_path / "mini")
    (teacher,) = copy.teachers()
    # As with reused teachers, which are not trained in the run.
    teacher.metrics.unlink()
    record = read_status(teacher.status)
    del record.seconds["train"]
    write_status(teacher.status, record)
    (row, *_) = read_rows(teacher.evaluation, EvaluationRow)
    element = copy.evaluations()[0]
    kinds = {teacher.evaluation: EvaluationRow, teacher.episodes: EpisodeRow}
    for (table, kind), target in zip(
        kinds.items(), (element.row_file(-1), element.row_episodes_file(-1)), strict=True
    ):
        write_rows(target, [replace(row, method=element.method, stage=-1) for row in read_rows(table, kind)])
    folder = tmp_path / "kept" / "mini"
    publish_teachers(copy, folder)
    assert {r.method for r in read_rows(folder / "evaluations.csv", EvaluationRow)} == {"teacher"}
    assert {entry["role"] for entry in json.loads((folder / "timings.json").read_text())} == {"teacher"}
    (published,) = load_published(folder).teachers
    assert (published.curve.env_steps, published.held_out.successes) == ((), row.successes)
    assert build_main([str(tmp_path / "kept")]) == 0


def test_folders_with_the_same_tasks_are_compared(run: Run, tmp_path: Path) -> None:
    for name in ("push-mini", "push-again"):
        publish_teachers(run, tmp_path / name)
    written = build_teachers(tmp_path)
    assert tmp_path / "figures" / "push-comparison.png" in written
    text = (tmp_path / "figures" / "push-comparison.txt").read_text()
    assert "push-again, push-mini learn the same tasks (recipes: push-again: rl, push-mini: rl)" in text


def test_an_unfinished_run_or_a_folder_without_teachers_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh" / "config.json").write_text(run.config_path.read_text())
    with pytest.raises(ValueError, match=str(tmp_path / "fresh")):
        publish_teachers(Run(tmp_path / "fresh"), tmp_path / "kept")
    assert check_main([str(tmp_path)]) == 2


def test_a_check_with_wrong_arguments_is_refused_before_any_episode(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish_teachers(run, tmp_path / "kept")
    for arguments, named in (
        (["--only", "drawer-close-v3", "--only", "puhs-v3"], "puhs-v3 (it has drawer-close-v3)"),
        (["--episodes", "0"], "--episodes 0"),
        (["--csv", str(tmp_path / "nowhere" / "a.csv")], str(tmp_path / "nowhere")),
        (["--csv", str(tmp_path / "kept" / "config.json")], str(tmp_path / "kept" / "config.json")),
    ):
        assert check_main([str(tmp_path / "kept"), *arguments]) == 2
        assert named in capsys.readouterr().err


def test_meta_world_draws_our_held_out_goals_from_the_seed_that_is_the_default() -> None:
    assert FIRST_SEEDS["held_out"] == HELD_OUT_SEED
    with pytest.raises(ValueError, match="got 0"):
        evaluate_with_metaworld(TeacherActor(ScriptedPolicy("reach-v3", 0.1)), "reach-v3", seed=0, horizon=10)


def test_meta_world_s_evaluation_agrees_with_ours_episode_for_episode() -> None:
    # The scripted expert of reach needs 33 to 59 steps, so that a horizon of 48 separates its goals.
    expert, horizon = ScriptedPolicy("reach-v3", 0.1), 48
    theirs = evaluate_with_metaworld(TeacherActor(expert), "reach-v3", seed=HELD_OUT_SEED, horizon=horizon)
    pool = EnvPool()
    goals = goal_set("reach-v3", "held_out", 50)
    outcomes = [
        outcome
        for start in (0, 25)
        for outcome in run_episodes(
            TeacherActor(expert), [(pool.get("reach-v3"), goals[start : start + 25])], horizon
        )[0]
    ]
    pool.close()
    assert 0 < theirs.successes < theirs.episodes == 50
    assert theirs.successes == sum(outcome.success for outcome in outcomes)
    assert theirs.mean_return == pytest.approx(np.mean([outcome.episode_return for outcome in outcomes]), rel=1e-6)


def test_the_protocol_s_agent_takes_meta_world_s_own_types() -> None:
    agent = MetaWorldAgent(TeacherActor(ScriptedPolicy("reach-v3", 0.1)))
    action = agent.eval_action(np.zeros((2, 39)))
    assert action.shape == (2, 4)
    assert np.abs(action).max() <= 1.0


@pytest.mark.skipif(not POLICIES, reason="no policies are published yet")
@pytest.mark.parametrize("policy", POLICIES, ids=lambda path: f"{path.parents[1].name}-{path.stem}")
def test_committed_policies_are_small_sound_and_labelled(policy: Path) -> None:
    assert policy.stat().st_size <= 500_000
    description = json.loads(policy.with_suffix(".json").read_text())
    assert sha256(policy) == description["sha256"]
    assert policy.stem == f"{description['task']}-seed-{description['seed']}"
    assert description["labels"]["teacher_recipe"] == policy.parents[1].name.split("-")[1]
    start = description["training"]["warm_start"]
    assert start is None or start["validation_success"] <= 0.7
    assert description["training"]["policy_updates"] > 0
    load_policy(policy)


def test_a_committed_policy_loads_in_five_lines_in_a_fresh_python() -> None:
    task = EASIEST.stem.removesuffix("-seed-1")
    episode = """
while not info.get("success"):
    obs, reward, terminated, truncated, info = env.step(teacher.act(obs[None].astype("float32"))[0])
    assert not truncated
"""
    command = [sys.executable, "-W", "ignore", "-c", FIVE_LINES + episode, str(EASIEST), task]
    subprocess.run(command, check=True, timeout=120)


@pytest.mark.slow
def test_a_committed_policy_passes_meta_world_s_evaluation(tmp_path: Path) -> None:
    task = EASIEST.stem.removesuffix("-seed-1")
    table = tmp_path / "checked.csv"
    assert check_main([str(EASIEST.parents[1]), "--only", task, "--csv", str(table)]) == 0
    (row,) = csv.DictReader(table.open(newline=""))
    assert row["successes"] == row["published_successes"], "the same goals, so the same episodes"
