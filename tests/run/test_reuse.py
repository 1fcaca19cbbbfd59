"""Reusing teachers of another run: completely, in part, or as published policies; and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpd.comm import SerialComm
from cpd.config import Config
from cpd.config.load import load, merge, read_toml, to_dict
from cpd.distill.stage_data import read_stage
from cpd.evaluation import publish as publish_module
from cpd.evaluation.gather import gather
from cpd.reading import DamagedFileError, read_json
from cpd.run.directory import Run, RunError, TeacherElement, published_policy
from cpd.run.files import sha256, write_json
from cpd.run.interrupt import Interrupt
from cpd.run.progress import read_status
from cpd.run.reuse import Reuse, ReuseError, find_reusable, reuse
from cpd.teachers.run_teacher import env_pool, run_teacher
from jobs.distill import main as distill_main
from jobs.launch import main
from jobs.status import main as status_main
from jobs.teacher import main as teacher_main
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


def test_of_several_sources_the_first_that_has_a_teacher_counts(other: Path, tmp_path: Path) -> None:
    shutil.copytree(other, tmp_path / "elsewhere")
    Run(other).teachers()[1].complete.unlink()
    run = make(tmp_path / "new")
    planned = find_reusable(run, other, tmp_path / "elsewhere")
    assert [item.folder for item in planned] == [other, tmp_path / "elsewhere"]
    assert reuse(run, other, tmp_path / "elsewhere") == planned
    sources = read_json(run.root / "provenance.json", dict)["teachers"]
    assert [record["from"] for record in sources.values()] == ["other", "elsewhere"]
    assert all(teacher.finished for teacher in run.teachers())


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


def swap_policy(run: Run) -> TeacherElement:
    """Put the first teacher's policy in the place of the second's; return the second."""
    first, second = run.teachers()
    for name in ("policy.safetensors", "policy.json"):
        shutil.copyfile(first.path / name, second.path / name)
    return second


def test_damaged_weights_are_refused_before_distillation(other: Path) -> None:
    teacher = Run(other).teachers()[0]
    teacher.policy.write_bytes(b"noise")
    with pytest.raises(DamagedFileError, match=r"policy\.safetensors"):
        read_stage(Run(other), teacher, SerialComm())


def test_a_policy_in_the_place_of_another_is_refused_by_every_reader(other: Path, tmp_path: Path) -> None:
    place = "policy\\.json .*task 'drawer-close-v3', not 'window-close-v3'"
    teacher = swap_policy(Run(other))
    with pytest.raises(ReuseError, match=place):
        reuse(make(tmp_path / "new"), other)
    with pytest.raises(DamagedFileError, match=place):
        read_stage(Run(other), teacher, SerialComm())
    with pytest.raises(DamagedFileError, match=place):
        publish_module._check_whole(Run(other), teacher)
    teacher.complete.unlink()
    assert teacher_main([str(other), teacher.name]) == 2
    assert not teacher.complete.exists()


def test_a_policy_of_another_experiment_is_refused_but_not_one_of_an_earlier_version(other: Path) -> None:
    teacher = Run(other).teachers()[1]
    teacher.complete.unlink()
    path = teacher.policy.with_suffix(".json")
    description = read_json(path, dict[str, Any])
    write_json(path, {**description, "experiment": "elsewhere"})
    with pytest.raises(DamagedFileError, match=r"policy\.json .*experiment 'elsewhere', not 'miniature'"):
        finish(Run(other), teacher)
    del description["experiment"]
    write_json(path, description)
    finish(Run(other), teacher)
    assert teacher.marker == teacher.complete


def test_an_element_that_is_both_complete_and_rejected_is_refused(
    other: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    teacher = Run(other).teachers()[1]
    teacher.rejected.touch()
    for command in (teacher_main, distill_main, status_main):
        assert command([str(other), *([teacher.name] if command is teacher_main else [])]) == 2
        error = capsys.readouterr().err
        assert str(teacher.path) in error and "COMPLETE" in error and "REJECTED" in error
    with pytest.raises(ReuseError, match=str(teacher.path)):
        reuse(make(tmp_path / "new"), other)
    with pytest.raises(RunError, match=str(teacher.path)):
        gather(Run(other))


@pytest.mark.parametrize("name", ["../../../../new/victim.h5", "shard-../x.h5", "/etc/passwd", "index.json", 3])
def test_an_index_names_no_files_of_other_folders(other: Path, tmp_path: Path, name: str | int) -> None:
    shards = Run(other).teachers()[1].shards
    run = make(tmp_path / "new")
    (run.root / "victim.h5").write_text("mine")
    index = read_json(shards / "index.json", dict[str, Any])
    index["shards"][0]["file"] = name
    write_json(shards / "index.json", index)
    with pytest.raises(ReuseError, match=r"index\.json"):
        reuse(run, other)
    assert (run.root / "victim.h5").read_text() == "mine"
    assert not (run.root / "teachers").exists()


@pytest.mark.parametrize(
    "name", ["policy.safetensors", "metrics.jsonl", "episodes.csv", "shards", "shards/shard-00000.h5"]
)
def test_links_that_leave_the_source_are_not_followed(other: Path, tmp_path: Path, name: str) -> None:
    path = Run(other).teachers()[1].path / name
    if path.exists():
        path.rename(tmp_path / "outside")
    else:
        (tmp_path / "outside").write_text("secret")
    path.symlink_to(tmp_path / "outside")
    with pytest.raises(ReuseError, match=re.escape(str(path))):
        reuse(make(tmp_path / "new"), other)
    assert not (tmp_path / "new" / "teachers").exists()


@pytest.mark.parametrize("is_own", [True, False])
def test_files_of_another_user_are_copied_and_own_ones_linked(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_own: bool
) -> None:
    run = make(tmp_path / "new")
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner if is_own else owner + 1)
    reuse(run, finished)
    theirs, ours = (Run(root).teachers()[0] for root in (finished, run.root))
    for name in ("policy.safetensors", "shards/shard-00000.h5"):
        assert (ours.path / name).samefile(theirs.path / name) == is_own
        assert sha256(ours.path / name) == sha256(theirs.path / name)


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
    assert "'nowhere' holds nothing" in capsys.readouterr().err
    assert not (tmp_path / "newer").exists()


@pytest.mark.parametrize(
    ("recipe", "folder", "count"),
    [
        ("ablation", "cw10-demo_rl", 10),
        ("cw10", "cw10-demo_rl", 10),
        ("mt10", "mt10-demo_rl", 10),
        ("mt50", "mt50-demo_rl", 40),
        ("cw10_rl", "cw10-rl", 10),
        ("bodies", "bodies-rl", 4),
    ],
)
def test_the_published_teachers_match_todays_recipes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: str, folder: str, count: int
) -> None:
    source = ROOT / "analysis" / "results" / "teachers" / folder
    assert main([recipe, "--run-dir", str(tmp_path / "run"), "--teachers-from", str(source), "--dry-run"]) == 0
    assert capsys.readouterr().out.count("policy reused") == count
