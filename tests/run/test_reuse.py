"""Reusing teachers of another run: completely, in part, or as published policies; and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpd.comm import SerialComm
from cpd.config import Config
from cpd.config.load import load, merge, read_toml, to_dict
from cpd.distill.stage_data import read_stage
from cpd.reading import read_json
from cpd.run.directory import Run, TeacherElement, published_policy
from cpd.run.files import sha256, write_json
from cpd.run.interrupt import Interrupt
from cpd.run.progress import read_status
from cpd.run.reuse import Reuse, ReuseError, find_reusable, reuse
from cpd.teachers.run_teacher import env_pool, run_teacher
from jobs.launch import main
from tests.conftest import MINIATURE, ROOT

#: Real experts, acting for a moment.
SCRIPTED: dict[str, Any] = {
    "teacher": {"recipe": "scripted", "ppo": {"num_envs": 2, "minibatch_size": 100}},
    "rollouts": {"num_steps": 120, "shard_steps": 60},
    "evaluation": {"num_episodes": 2},
}


#: All that can be reused of a teacher.
COMPLETE = ("policy", "evaluation", "rollouts", "marker")


def what_is_reused(item: Reuse) -> tuple[str, ...]:
    return tuple(name for name in COMPLETE if getattr(item, name))


def tables(**over: Any) -> dict[str, Any]:
    return merge(merge(read_toml(MINIATURE), SCRIPTED), over)


def make(root: Path, **over: Any) -> Run:
    write_json(root / "config.json", to_dict(load(Config, tables(**over), "test")))
    (root / "logs").mkdir()
    return Run(root)


def finish(run: Run, teacher: TeacherElement) -> None:
    run_teacher(run, teacher, env_pool(run.config, 1), interrupt=Interrupt(), log=lambda line: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two finished teachers; not to be changed."""
    run = make(tmp_path_factory.mktemp("runs") / "other")
    write_json(run.root / "provenance.json", {"code": "abc"})
    for teacher in run.teachers():
        finish(run, teacher)
    return run.root


@pytest.fixture
def other(finished: Path, tmp_path: Path) -> Path:
    """A copy of it that may be changed."""
    shutil.copytree(finished, tmp_path / "other")
    return tmp_path / "other"


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "attempts" not in path.parts and path.name != "status.json"
    }


def test_finished_teachers_are_reused_completely(finished: Path, tmp_path: Path) -> None:
    run = make(tmp_path / "new", method="another", distill={"lr": 0.5}, seeds=[1, 2])
    planned = find_reusable(run, finished)
    assert [item.marker for item in planned] == ["COMPLETE"] * 2
    assert not (run.root / "teachers").exists(), "planning writes nothing"
    assert reuse(run, finished) == planned
    for theirs, ours in zip(Run(finished).teachers(), run.teachers(), strict=True):
        assert ours.finished
        assert contents(ours.path) == contents(theirs.path)
        shard = next(ours.shards.glob("*.h5"))
        assert shard.samefile(theirs.shards / shard.name), "large files are linked"
        assert not ours.evaluation.samefile(theirs.evaluation), "small files are copied"
        assert (read_status(ours.status).state, read_status(ours.status).message) == (
            "done",
            "reused from other",
        )
        assert read_stage(run, ours, SerialComm()).observations.shape == (120, 39)
    record = read_json(run.root / "provenance.json", dict)["teachers"]
    first = run.teachers()[0]
    assert record[first.name] == {
        "from": "other",
        "policy_sha256": sha256(first.policy),
        "rollouts_sha256": sha256(first.shards / "index.json"),
        "evaluation_sha256": sha256(first.evaluation),
    }
    assert str(tmp_path) not in (run.root / "provenance.json").read_text()
    assert find_reusable(run, tmp_path / "gone") == [], "later launches do not need the other run any more"


def test_reused_files_outlive_their_source(other: Path, tmp_path: Path) -> None:
    run = make(tmp_path / "new")
    reuse(run, other)
    files = contents(run.root)
    shutil.rmtree(other)
    assert contents(run.root) == files
    assert len(read_stage(run, run.teachers()[0], SerialComm()).observations) == 120


def test_an_interrupted_reuse_is_completed(finished: Path, tmp_path: Path) -> None:
    run = make(tmp_path / "new")
    reuse(run, finished)
    files = contents(run.root / "teachers")
    first = run.teachers()[0]
    first.complete.unlink()
    (first.shards / "index.json").unlink()
    assert [item.teacher for item in reuse(run, finished)] == [first]
    assert contents(run.root / "teachers") == files


def test_an_interrupted_reuse_is_recorded_by_the_next_launch(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(tmp_path / "new")

    def killed(path: Path, data: Any, sync: bool = True) -> None:
        if path.name == "provenance.json":
            raise KeyboardInterrupt
        write_json(path, data, sync)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("cpd.run.reuse.write_json", killed)
        reuse(run, finished)
    reuse(run, finished)
    assert all(teacher.finished for teacher in run.teachers())
    assert set(read_json(run.root / "provenance.json", dict)["teachers"]) == {t.name for t in run.teachers()}


def test_settings_that_do_not_affect_training_may_differ(finished: Path, tmp_path: Path) -> None:
    run = make(tmp_path / "new", rollouts={"num_steps": 90}, evaluation={"num_episodes": 3})
    assert {what_is_reused(item) for item in reuse(run, finished)} == {("policy",)}
    teacher, theirs = run.teachers()[0], Run(finished).teachers()[0]
    assert not teacher.finished
    assert not teacher.shards.exists()
    assert sha256(teacher.policy) == sha256(theirs.policy)
    trained = teacher.policy.stat().st_mtime_ns
    finish(run, teacher)
    assert teacher.policy.stat().st_mtime_ns == trained, "no training"
    assert len(read_stage(run, teacher, SerialComm()).observations) == 90
    stricter = make(tmp_path / "stricter", teacher={"gate": 1.0})
    assert {what_is_reused(item) for item in reuse(stricter, finished)} == {("policy", "evaluation", "rollouts")}
    assert contents(stricter.teachers()[0].shards) == contents(theirs.shards)
    finish(stricter, stricter.teachers()[0])
    assert stricter.teachers()[0].rejected.exists()


def test_a_teacher_that_the_source_lacks_is_trained(other: Path, tmp_path: Path) -> None:
    first, second = Run(other).teachers()
    second.complete.unlink()
    run = make(tmp_path / "new")
    assert [what_is_reused(item) for item in reuse(run, other)] == [COMPLETE, ()]
    assert [t.finished for t in run.teachers()] == [True, False]
    assert not run.teachers()[1].path.exists()
    first.complete.unlink()
    with pytest.raises(ReuseError, match="drawer-close-v3 seed 1"):
        reuse(make(tmp_path / "newer"), other)
    rejected = Run(other).teachers()[0]
    rejected.rejected.touch()
    assert reuse(make(tmp_path / "newest"), other)[0].marker == "REJECTED"


def test_teachers_may_come_from_several_sources(other: Path, tmp_path: Path) -> None:
    shutil.copytree(other, tmp_path / "elsewhere")
    Run(other).teachers()[1].complete.unlink()
    Run(tmp_path / "elsewhere").teachers()[0].complete.unlink()
    # With another number of rollouts both have something left to do, and are not finished in between.
    run = make(tmp_path / "new", rollouts={**SCRIPTED["rollouts"], "num_steps": 60})
    without_rollouts = ("policy", "evaluation")
    assert [what_is_reused(item) for item in reuse(run, other)] == [without_rollouts, ()]
    assert [what_is_reused(item) for item in reuse(run, tmp_path / "elsewhere")] == [(), without_rollouts]
    sources = read_json(run.root / "provenance.json", dict)["teachers"]
    assert [record["from"] for record in sources.values()] == ["other", "elsewhere"]
    for teacher in run.teachers():
        finish(run, teacher)
        assert teacher.finished and read_json(teacher.policy.with_suffix(".json"), dict)["seed"] == 1


def test_another_budget_affects_only_teachers_that_depended_on_it(other: Path, tmp_path: Path) -> None:
    endings = ({"stopped_by": "validation", "env_steps": 3_000}, {"stopped_by": "budget", "env_steps": 5_000})
    for teacher, ending in zip(Run(other).teachers(), endings, strict=True):
        path = teacher.policy.with_suffix(".json")
        description = read_json(path, dict)
        write_json(path, {**description, "training": {**description["training"], **ending}})

    def lacking_budget(budget: int) -> list[bool]:
        run = make(tmp_path / str(budget), teacher={"max_env_steps": budget})
        reuses = find_reusable(run, other)
        assert [what_is_reused(item) for item in reuses] == [() if r.lacks_budget else COMPLETE for r in reuses]
        return [item.lacks_budget for item in reuses]

    assert lacking_budget(load(Config, tables(), "test").teacher.max_env_steps) == [False, False]
    assert lacking_budget(20_000) == [False, True]
    with pytest.raises(ReuseError, match="drawer-close-v3 seed 1"):
        lacking_budget(2_000)


def test_published_policies_are_reused_without_training(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "published"
    folder.mkdir()
    shutil.copyfile(finished / "config.json", folder / "config.json")
    for teacher in Run(finished).teachers()[:1]:
        target = published_policy(folder, teacher.task, teacher.seed)
        target.parent.mkdir()
        shutil.copyfile(teacher.policy, target)
        shutil.copyfile(teacher.policy.with_suffix(".json"), target.with_suffix(".json"))
    run = make(tmp_path / "new")
    assert [what_is_reused(item) for item in reuse(run, folder)] == [("policy",), ()]
    teacher, theirs = run.teachers()[0], Run(finished).teachers()[0]
    finish(run, teacher)
    for name in ("policy.safetensors", "evaluation.csv", "shards/index.json"):
        assert sha256(teacher.path / name) == sha256(theirs.path / name), name


@pytest.mark.parametrize(
    ("over", "difference"),
    [
        ({"stream": {"horizon": 50}}, "stream.horizon: 60 -> 50"),
        ({"teacher": {"horizon": 50}}, "teacher.horizon: 40 -> 50"),
        ({"teacher": {"recipe": "rl"}}, "teacher.recipe: 'scripted' -> 'rl'"),
    ],
)
def test_other_settings_of_training_are_refused_by_name(
    over: dict[str, Any], difference: str, finished: Path, tmp_path: Path
) -> None:
    run = make(tmp_path / "new", **over)
    with pytest.raises(ReuseError) as caught:
        reuse(run, finished)
    assert difference in str(caught.value)
    assert not (run.root / "teachers").exists()


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda t: damage(t.policy), r"policy\.safetensors .*policy\.json"),
        (lambda t: damage(t.shards / "shard-00001.h5"), r"shard-00001\.h5"),
        (lambda t: (t.shards / "shard-00000.h5").unlink(), r"shard-00000\.h5"),
        (lambda t: relabel(t, "mujoco", "2.0"), r"mujoco .*'2\.0'"),
        (lambda t: t.policy.with_suffix(".json").unlink(), r"policy\.json"),
        (lambda t: (t.shards / "index.json").write_text("{"), r"index\.json"),
    ],
)
def test_files_that_do_not_match_their_records_are_refused(
    spoil: Callable[[TeacherElement], None], named: str, other: Path, tmp_path: Path
) -> None:
    spoil(Run(other).teachers()[1])
    run = make(tmp_path / "new")
    with pytest.raises(ReuseError, match=named):
        reuse(run, other)
    assert not (run.root / "teachers").exists(), "all files are checked before any is copied"


def relabel(teacher: TeacherElement, name: str, value: str) -> None:
    path = teacher.policy.with_suffix(".json")
    description = read_json(path, dict)
    description["labels"][name] = value
    write_json(path, description)


def test_a_policy_of_another_teacher_is_refused(other: Path, tmp_path: Path) -> None:
    first, second = Run(other).teachers()
    for name in ("policy.safetensors", "policy.json"):
        shutil.copyfile(first.path / name, second.path / name)
    with pytest.raises(ReuseError, match="window-close-v3 seed 1"):
        reuse(make(tmp_path / "new"), other)


def test_the_launcher_shows_and_copies_reused_teachers_and_stores_no_path(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = {name: value for name, value in tables().items() if name != "logging"}
    overrides = [
        f"--{section}.{key}={json.dumps(value)}"
        for section in ("teacher", "rollouts", "evaluation")
        for key, value in config[section].items()
        if key != "ppo"
    ]
    overrides += ["--teacher.ppo.num_envs=2", "--teacher.ppo.minibatch_size=100"]
    arguments = [str(MINIATURE), "--run-dir", "new", f"--teachers_from={finished}", *overrides]
    assert main([*arguments, "--dry-run"]) == 0
    assert "teachers/window-close-v3/seed-1: " in capsys.readouterr().out
    assert not (tmp_path / "new").exists()
    assert main([*arguments, "--dry-run", "--profile", "generic"]) == 0
    output = capsys.readouterr().out
    assert "jobs.teacher" not in output
    assert "(2 finished, 0 in the queue)" in output
    assert main([*arguments, "--prepare"]) == 0
    run = Run(tmp_path / "new")
    assert all(teacher.finished for teacher in run.teachers())
    assert run.config.teachers_from == "other"
    for path in run.root.rglob("*.json"):
        assert str(finished) not in path.read_text().replace(json.dumps(f"--teachers_from={finished}"), ""), path
    assert main([*arguments[:3], "--teachers_from=nowhere", *overrides, "--prepare"]) == 0, (
        "all are reused already"
    )
    assert main([str(MINIATURE), "--run-dir", "newer", "--teachers_from=nowhere"]) == 2
    assert "'nowhere'" in capsys.readouterr().err
    assert not (tmp_path / "newer").exists()


@pytest.mark.parametrize(
    ("recipe", "folder", "count"),
    [
        ("ablation", "cw10-demo_rl", 10),
        ("cw10", "cw10-demo_rl", 10),
        ("mt10", "mt10-demo_rl", 10),
        ("mt50", "mt50-demo_rl", 40),
        ("cw10_rl", "cw10-rl", 10),
    ],
)
def test_the_published_teachers_match_todays_recipes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: str, folder: str, count: int
) -> None:
    source = ROOT / "analysis" / "results" / "teachers" / folder
    assert main([recipe, "--run-dir", str(tmp_path / "run"), "--teachers-from", str(source), "--dry-run"]) == 0
    assert capsys.readouterr().out.count("policy reused") == count
