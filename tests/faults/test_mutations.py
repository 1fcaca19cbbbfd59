"""Damaged files are harmless or refused by name: no traceback, no number that changes unnoticed."""

from __future__ import annotations

import collections
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import analysis.build
import analysis.build_teachers
import jobs.distill
import jobs.evaluate
import jobs.launch
import jobs.publish
import jobs.report
import jobs.status
import jobs.teacher
from cpd.run.checkpoint import latest
from cpd.run.directory import Run
from tests.conftest import MINIATURE
from tests.faults.mutations import ACCEPTED, Scene, Workspace, cases

SETTINGS = """
extends = "{miniature}"
name = "damaged"

[teacher]
max_env_steps = 400
num_training_goals = 4
num_validation_goals = 2

[teacher.ppo]
num_envs = 4
steps_per_env = 40
minibatch_size = 80
num_epochs = 1

[rollouts]
num_steps = 120
shard_steps = 60

[distill]
steps_per_stage = 4
batch_size = 16

[evaluation]
num_episodes = 2
num_episodes_brief = 1
curve_points = 1

[stream]
horizon = 20

[logging]
checkpoint_every = 2
"""
STATUS = ("run/*.json", "run/jobs.jsonl", "run/**/status.json", "run/**/attempts/*.json")


def launch(recipe: Path, root: Path, *options: str) -> int:
    return jobs.launch.main([str(recipe), "--run-dir", str(root), *options])


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What makes no difference to what is tested takes long: syncing to the disk, and drawing."""
    handlers = {
        number: signal.getsignal(number)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(analysis.build, "_figures", lambda data: iter(()))
        patch.setattr(analysis.build_teachers, "save_figure", lambda figure, stem, caption: [])
        yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def finished(fast: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, the recipe beside it, its published teachers and results."""
    folder = tmp_path_factory.mktemp("finished")
    recipe, root = folder / "recipe.toml", folder / "run"
    recipe.write_text(SETTINGS.format(miniature=MINIATURE))
    assert launch(recipe, root, "--prepare") == 0
    for verb, element in ((jobs.teacher, "0"), (jobs.teacher, "1"), (jobs.distill, "0"), (jobs.evaluate, "0")):
        assert verb.main([str(root), element]) == 0
    assert jobs.report.main([str(root)]) == 0
    assert jobs.publish.main([str(root), str(folder / "teachers")]) == 0
    assert analysis.build.main([str(root), "--publish", str(folder / "published")]) == 0
    return folder


@pytest.fixture(scope="module")
def scenes(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Scene]:
    def workspace(name: str, prepare: Callable[[Path], None] = lambda root: None) -> Workspace:
        folder = tmp_path_factory.mktemp(name)
        shutil.copytree(finished, folder / "original")
        prepare(folder / "original" / "run")
        return Workspace(folder / "original", folder / "copy")

    def unmark_teacher(root: Path) -> None:
        Run(root).teachers()[0].complete.unlink()

    def unmark_student(root: Path) -> None:
        student = Run(root).students()[0]
        student.complete.unlink()
        last = latest(student.checkpoints)
        assert last is not None
        shutil.rmtree(last.path)

    def unmark_evaluation(root: Path) -> None:
        evaluation = Run(root).evaluations()[0]
        evaluation.complete.unlink()
        evaluation.row_file(-1).unlink()

    def unmark_report(root: Path) -> None:
        Run(root).report().complete.unlink()

    whole = workspace("whole")
    elements = ("run/teachers/**/*", "run/students/**/*", "run/config.json")
    results = ("run/results/*.csv", "run/results/metrics.json", "run/figures/*")
    return [
        Scene(
            "status",
            whole,
            lambda root: jobs.status.main([str(root / "run")]),
            (),
            STATUS,
        ),
        Scene(
            "dry run",
            whole,
            lambda root: launch(root / "recipe.toml", root / "run", "--dry-run"),
            (),
            ("recipe.toml", *STATUS),
        ),
        Scene(
            "launch",
            whole,
            lambda root: launch(root / "recipe.toml", root / "run"),
            ("run/teachers/**/*.safetensors", "run/students/**/*.csv", "run/config.json"),
            ("recipe.toml", "run/*.json", "run/jobs.jsonl", "run/results/*", "run/launcher/**/*.json"),
        ),
        Scene("build", whole, lambda root: analysis.build.main([str(root / "run")]), results, elements),
        Scene(
            "build published",
            whole,
            lambda root: analysis.build.main([str(root / "published")]),
            ("published/figures/*",),
            ("published/*",),
        ),
        Scene(
            "publish",
            whole,
            lambda root: jobs.publish.main([str(root / "run"), str(root / "again")]),
            # Entries of policy.json that nothing reads are copied as they are.
            ("again/*.csv", "again/metrics.json", "again/policies/*.safetensors"),
            ("run/teachers/**/*", "run/config.json"),
        ),
        Scene(
            "publish again",
            whole,
            lambda root: jobs.publish.main([str(root / "run"), str(root / "teachers")]),
            ("teachers/*.csv", "teachers/metrics.json", "teachers/policies/*"),
            ("teachers/**/*",),
        ),
        Scene(
            "build teachers",
            whole,
            lambda root: analysis.build.main([str(root / "teachers")]),
            ("teachers/figures/*",),
            ("teachers/**/*",),
        ),
        Scene(
            "reuse",
            whole,
            lambda root: launch(
                root / "recipe.toml", root / "new", "--prepare", "--teachers-from", str(root / "run")
            ),
            ("new/teachers/**/*.h5", "new/teachers/**/*.safetensors", "new/teachers/**/*.csv", "new/config.json"),
            ("run/config.json", "run/teachers/**/*"),
        ),
        Scene(
            "reuse published",
            whole,
            lambda root: launch(
                root / "recipe.toml", root / "new", "--prepare", "--teachers-from", str(root / "teachers")
            ),
            ("new/teachers/**/*.safetensors", "new/config.json"),
            ("teachers/config.json", "teachers/policies/*"),
        ),
        Scene(
            "teacher",
            workspace("teacher", unmark_teacher),
            lambda root: jobs.teacher.main([str(root / "run"), "0"]),
            ("run/teachers/**/*.h5", "run/teachers/**/*.safetensors", "run/teachers/**/*.csv"),
            ("run/config.json", "run/teachers/drawer*/**/*"),
        ),
        Scene(
            "distill",
            workspace("distill", unmark_student),
            lambda root: jobs.distill.main([str(root / "run"), "0"]),
            ("run/students/*/*/stages/*.safetensors", "run/students/*/*/curves.csv"),
            (
                *("run/config.json", "run/teachers/**/*"),
                *("run/students/*/*/checkpoints/**/*", "run/students/*/*/*.*", "run/students/*/*/attempts/*"),
            ),
        ),
        Scene(
            "evaluate",
            workspace("evaluate", unmark_evaluation),
            lambda root: jobs.evaluate.main([str(root / "run"), "0"]),
            ("run/students/*/*/evaluation/*.csv",),
            ("run/config.json", "run/students/*/*/stages/*", "run/students/*/*/evaluation/**/*"),
        ),
        Scene(
            "report",
            workspace("report", unmark_report),
            lambda root: jobs.report.main([str(root / "run")]),
            results,
            ("run/results/**/*", *elements),
        ),
    ]


def play(scenes: list[Scene], count: int, seed: int) -> None:
    wanted = {}
    for scene in scenes:
        wanted[scene.name] = scene.play()
        scene.workspace.restore()
        assert wanted[scene.name].code == 0, (scene.name, wanted[scene.name])
    started, verdicts = time.process_time(), collections.Counter[str]()
    wrong = []
    for scene, file, kind, case in cases(scenes, count, seed):
        verdict, told = scene.judge(file, kind, case, wanted[scene.name])
        verdicts[verdict] += 1
        if verdict not in ACCEPTED:
            wrong.append(f"{verdict}: {scene.name}, {file}, {kind}, {case}: {told}")
    print(dict(verdicts), f"{time.process_time() - started:.0f} s of processor time")
    assert not wrong, f"{len(wrong)} of {count}: {dict(verdicts)}\n" + "\n".join(wrong)


def test_a_sample_of_damaged_files(scenes: list[Scene]) -> None:
    play(scenes, 120, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_damaged_files(scenes: list[Scene]) -> None:
    play(scenes, 2_000, seed=2)
