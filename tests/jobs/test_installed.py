"""The command `cpd` from an installed wheel, also without torch, the simulator and MPI; and its completion."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpd.envs.metaworld.tasks import STREAMS
from cpd.run.claim import REPOSITORY_RESULTS
from cpd.run.directory import Run
from cpd.run.shortage import TRAINING
from jobs.__main__ import main, verbs
from jobs.completion import script
from tests.conftest import MINIATURE, ROOT
from tests.synthetic_run import write_run

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the wheel installs."""
    pytest.importorskip("setuptools", "77")
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("cpd", "jobs", "analysis", "slurm"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("results", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet", "--wheel-dir", str(source)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", str(source), *options], check=True)
    (archive,) = source.glob("*.whl")
    with zipfile.ZipFile(archive) as file:
        file.extractall(site)
    return site


def requirements(words: list[str]) -> set[str]:
    """The distributions that these need without any extra, and these."""
    names: set[str] = set()
    while words:
        word = words.pop()
        name = re.split(r"[^\w.-]", word)[0]
        if name in names or "extra ==" in word:
            continue
        try:
            words += importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # for another platform or Python
            continue
        names.add(name)
    return names


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages that the base install brings, and no others."""
    folder = tmp_path_factory.mktemp("base")
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for name in requirements(list(wanted)):
        distribution = importlib.metadata.distribution(name)
        tops = {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            if not (folder / top).exists():
                (folder / top).symlink_to(distribution.locate_file(top))
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder whose own packages have the names of ours."""
    for name in ("jobs", "analysis", "slurm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('a package of somebody else')\n")
    return tmp_path


@pytest.fixture
def cpd(wheel: Path, elsewhere: Path) -> Command:
    def run(*words: object, paths: tuple[Path, ...] = (), python: tuple[str, ...] = ()) -> Any:
        env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (wheel, *paths)))}
        command = [sys.executable, *python, "-m", "cpd", *map(str, words)]
        return subprocess.run(command, cwd=elsewhere, env=env, capture_output=True, text=True)

    return run


@pytest.fixture
def cpd_base(cpd: Command, base: Path) -> Command:
    return lambda *words: cpd(*words, paths=(base,), python=("-S",))


def synthetic(root: Path) -> Run:
    tasks = STREAMS["demo"]
    return write_run(root, stream=tasks, students={1: np.full((4, 3), 0.5)}, teachers=dict.fromkeys(tasks, 1.0))


def test_the_wheel_installs_one_package_with_its_recipes_and_profiles(wheel: Path) -> None:
    (info,) = wheel.glob("*.dist-info")
    assert {path.name for path in wheel.iterdir()} == {"cpd", info.name}
    assert (info / "top_level.txt").read_text().split() == ["cpd"]
    assert "cpd = cpd.__main__:main" in (info / "entry_points.txt").read_text()
    bundle = wheel / "cpd" / "bundled"
    for folder, pattern in (("jobs", "recipes/*.toml"), ("slurm", "profiles/*.toml"), ("slurm", "*.sbatch")):
        names = {path.name for path in (ROOT / folder).glob(pattern)}
        assert names and {path.name for path in (bundle / folder).glob(pattern)} == names
    assert {
        str(path.relative_to(ROOT)) for top in ("cpd", "jobs", "analysis") for path in (ROOT / top).rglob("*.py")
    } == {
        str(path.relative_to(wheel)).removeprefix("cpd/bundled/")
        for path in (wheel / "cpd").rglob("*.py")
        if "slurm" not in path.relative_to(wheel).parts
    }


def test_the_base_install_tells_and_plans(cpd_base: Command, elsewhere: Path, wheel: Path) -> None:
    run = synthetic(elsewhere / "run")
    assert "build" in cpd_base("--help").stdout
    (info,) = wheel.glob("*.dist-info")
    version = info.name.removesuffix(".dist-info").rpartition("-")[2]
    assert cpd_base("--version").stdout.split() == ["cpd", version]
    status = cpd_base("status", run.root)
    assert "students/moe/seed-1" in status.stdout, status.stderr
    plan = cpd_base("launch", "cw10", "--profile", "generic", "--dry-run")
    assert plan.returncode == 0 and "#SBATCH --array=0-9" in plan.stdout, plan.stderr


def test_the_base_install_draws_published_results_again(cpd_base: Command, elsewhere: Path) -> None:
    drawn = cpd_base("build", REPOSITORY_RESULTS / "mt10", "--out", "figures")
    assert drawn.returncode == 0, drawn.stderr
    committed = list((REPOSITORY_RESULTS / "mt10" / "figures").glob("*.png"))
    assert committed
    for path in committed:
        assert (elsewhere / "figures" / path.name).read_bytes() == path.read_bytes(), path.name


def test_training_without_its_extra_names_it(cpd_base: Command, elsewhere: Path) -> None:
    launched = cpd_base("launch", MINIATURE)
    assert launched.returncode == 2 and "[train]" in launched.stderr and "torch" in launched.stderr
    assert not (elsewhere / "runs").exists()
    prepared = cpd_base("launch", MINIATURE, "--prepare")
    assert prepared.returncode == 0, prepared.stderr
    trained = cpd_base("teacher", "runs/miniature")
    assert trained.returncode == 1 and "[train]" in trained.stderr and "Traceback" not in trained.stderr


def test_a_launch_without_the_mpiexec_that_it_needs_makes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", "")
    assert main(["launch", str(MINIATURE)]) == 2
    assert "mpiexec" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_jobs_of_the_wheel_run_where_others_have_packages_of_their_names(
    cpd: Command, cpd_base: Command, elsewhere: Path
) -> None:
    launched = cpd("launch", MINIATURE, "--only", "teachers/window-close-v3", "--teacher.max-env-steps", 800)
    assert launched.returncode == 0, launched.stdout + launched.stderr
    assert Run(elsewhere / "runs" / "miniature").teachers()[1].finished
    published = cpd_base("publish", "runs/miniature", "teachers")
    assert published.returncode == 0, published.stderr
    assert (elsewhere / "teachers" / "policies" / "window-close-v3-seed-1.safetensors").exists()


def test_every_verb_has_a_line_and_mistakes_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^  {verb} +\w", text, re.MULTILINE) for verb in verbs())
    assert {"launch", "teacher", "distill", "evaluate", "report", "status", "publish", "build"} <= set(verbs())
    assert main(["lauch"]) == 2
    assert "'launch'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "offer"),
    [
        (["la"], "launch"),
        (["launch", "cw1"], "cw10_rl"),
        (["launch", "cw10", "--profile", "pre"], "preemptible"),
        (["launch", "cw10", "--distill.l"], "--distill.lr"),
        (["launch", "cw10", "--ret"], "--retry-failed"),
        (["status", "--wa"], "--watch"),
        (["launch", "my"], "my-recipe.toml"),
        (["status", "ru"], "runs"),
    ],
)
def test_words_are_completed(words: list[str], offer: str, tmp_path: Path) -> None:
    (tmp_path / "my-recipe.toml").touch()
    (tmp_path / "runs").mkdir()
    (tmp_path / "script").write_text(script())
    state = f"COMP_WORDS=(cpd {' '.join(words)}); COMP_CWORD={len(words)}"
    line = f"source ./script; {state}; _cpd; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=True)
    offers = done.stdout.split()
    assert offer in offers and all(word.startswith(words[-1]) for word in offers)


def test_the_extra_for_training_brings_what_training_imports() -> None:
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["train"]
    assert set(TRAINING) <= requirements(list(extra))
