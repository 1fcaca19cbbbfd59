"""Policies in onnxruntime act as those of the run; the page on exporting shows how."""

from __future__ import annotations

import json
import re
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

import cpd.envs.gym  # noqa: F401
from cpd.config import Config
from cpd.config.load import load, merge, read_toml, to_dict
from cpd.export.inference import InferenceStudent
from cpd.export.onnx import trace
from cpd.run.directory import Run, published_policy
from cpd.run.files import write_json
from cpd.student.actor import StudentActor
from cpd.student.network import load_student, save_student
from cpd.student.plans import FIRST_STEPS
from cpd.teachers.policy import TeacherActor, load_policy
from jobs.export import main
from tests.conftest import MINIATURE, ROOT
from tests.student.grown import TASKS, first_observations, grown_student, observations
from tests.test_docs import blocks

onnxruntime = pytest.importorskip("onnxruntime")
PUBLISHED = ROOT / "analysis" / "results" / "teachers" / "cw10-rl"


def test_episodes_begin_at_any_step_and_the_traced_program_acts_alike() -> None:
    policy = InferenceStudent(grown_student(context=4))
    program = trace(policy)[0].module()
    state, later = torch.zeros(3, policy.state_size), torch.zeros(1, policy.state_size)
    for step in range(8):
        obs = observations(3, seed=step) if step != 2 else first_observations()
        if step == 2:
            state[1] = 0
        action, state = program(obs, state)
        if step >= 2:
            alone, later = policy(obs[1:2], later)
            torch.testing.assert_close(action[1:2], alone, rtol=0, atol=1e-6)
            assert torch.equal(state[1:2], later)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished student, which nobody trained."""
    root = tmp_path_factory.mktemp("onnx") / "run"
    tables = merge(read_toml(MINIATURE), {"stream": {"tasks": list(TASKS)}})
    write_json(root / "config.json", to_dict(load(Config, tables, "test")))
    run = Run(root)
    student = run.students()[0]
    save_student(student.stage_policy(2), grown_student(), {"distinct_tasks": TASKS})
    student.complete.touch()
    assert main([str(root), "onnx", "--output", str(root.parent / "onnx")]) == 0
    return run


def test_a_student_acts_a_whole_episode_told_nothing(run: Run) -> None:
    path = run.root.parent / "onnx" / f"{run.students()[0].name}.onnx"
    session = onnxruntime.InferenceSession(path)
    assert json.loads(session.get_modelmeta().custom_metadata_map["tasks"]) == list(TASKS)
    assert b"site-packages" not in path.read_bytes()
    actor = StudentActor(load_student(run.students()[0].stage_policy(2)), TASKS)
    env = gymnasium.make("cpd/window-close-v3", max_episode_steps=FIRST_STEPS + 5)
    obs, _ = env.reset(seed=1)
    state, is_over = np.zeros((1, 3), np.float32), False
    while not is_over:
        observation = obs[None].astype(np.float32)
        action, state = session.run(None, {"observation": observation, "state": state})
        np.testing.assert_allclose(action, actor.act(observation), rtol=0, atol=2e-6)
        obs, _, _, is_over, _ = env.step(action[0])
    assert state[0].tolist() == [FIRST_STEPS + 5, *(TASKS.index(task) for task in actor.beliefs[0][2:4])]


def test_the_page_s_example_acts_in_stock_meta_world(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.root.parent)
    (example,) = [block for block in blocks(ROOT / "docs" / "export.md", "python") if "onnxruntime" in block]
    exec(compile(example, "docs/export.md", "exec"), {})
    assert re.search(r"acted for \S+-v3", capsys.readouterr().out)


def test_a_published_teacher_acts_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(PUBLISHED), "onnx", "--output", str(tmp_path), "--only", "teachers/push-v3"]) == 0
    (path,) = tmp_path.rglob("*.onnx")
    obs = observations(5, seed=1).numpy()
    (action,) = onnxruntime.InferenceSession(path).run(None, {"observation": obs})
    expected = TeacherActor(load_policy(published_policy(PUBLISHED, "push-v3", 1))).act(obs)
    np.testing.assert_allclose(action, expected, rtol=0, atol=1e-6)
    assert main([str(PUBLISHED), "onnx", "--output", str(tmp_path), "--only", "teachers/reach-v3"]) == 2
    assert "teachers/push-v3/seed-1" in capsys.readouterr().err
