"""A suite of a user's own on a real Slurm."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from workbench import ROOT, Workbench

from tests.jobs.test_user_suite import RECIPE, SUITE, TINY

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def test_the_suite_of_the_documentation_goes_through_the_cluster(
    bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "reaching.py").write_text(SUITE)
    (tmp_path / "reaching.toml").write_text(RECIPE)
    monkeypatch.setitem(bench.environment, "PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    overrides = [word for key, value in TINY.items() for word in (f"--{key}", value)]
    run = tmp_path / "run"
    options = ("--profile", bench.profile, "--run-dir", str(run), "--stream.tasks", '["plane", "space"]')
    bench.python("jobs.launch", str(tmp_path / "reaching.toml"), *options, *overrides)
    bench.drain()
    bench.assert_done(run)
    assert (run / "figures" / "success_matrix.png").exists()
