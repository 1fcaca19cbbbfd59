"""The commit of the code is recorded whoever owns the clone."""

from __future__ import annotations

import subprocess

import pytest

from cpd.run.provenance import REPOSITORY_VARIABLES, code_version
from tests.conftest import ROOT


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the code is not in a clone")
def test_the_commit_of_a_clone_of_another_user_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    find_commit = code_version.__wrapped__
    commit = find_commit()
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    command = ["git", "-C", str(ROOT), "describe", "--always"]
    assert subprocess.run(command, capture_output=True, check=False).returncode, "git refuses such a clone"
    assert find_commit() == commit
    for name in REPOSITORY_VARIABLES:  # as in a hook of another repository
        monkeypatch.setenv(name, "/nowhere")
    assert find_commit() == commit
