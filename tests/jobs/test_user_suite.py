"""A suite of a user outside of the repository: the documentation's example in the whole chain, and mistakes."""

from __future__ import annotations

import ast
import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cpd.envs.goals import Goal
from cpd.envs.suite import Returns, Sizes, Suite, SuiteError, load_suite
from cpd.envs.suite_check import suite_mistakes, task_mistakes
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
SUITE = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[0]
RECIPE = re.findall(r"^```toml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[0]
TINY = {
    **{"seeds": "[1]", "teacher.max_env_steps": "800", "teacher.gate": "0.0", "teacher.num_training_goals": "5"},
    **{"teacher.num_validation_goals": "2", "teacher.ppo.num_envs": "8", "teacher.ppo.steps_per_env": "100"},
    **{"teacher.ppo.minibatch_size": "200", "rollouts.num_steps": "200", "student.width": "16"},
    **{"student.expert_width": "16", "memory.share": "0.1", "distill.steps_per_stage": "3"},
    **{"distill.batch_size": "16", "evaluation.num_episodes": "2", "evaluation.num_episodes_brief": "1"},
    **{"evaluation.curve_points": "1", "student.opening_steps": "1"},
}


def cpd(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a verb in `folder`, whose modules Python finds."""
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "cpd", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_suite_of_the_documentation_goes_through_the_whole_chain_beside_another_suite(tmp_path: Path) -> None:
    """The recipe alone runs on the test cluster; here its stream has a task of each of two suites.

    They have other sizes of observations and actions, and one task has no success measure.
    """
    assert len(SUITE.splitlines()) <= 60 and "horizon = 40" in SUITE
    (tmp_path / "reaching.py").write_text(SUITE.replace("horizon = 40", "horizon = 200"))  # as long as the other's
    (tmp_path / "reaching.toml").write_text(RECIPE)
    mixed = {
        **TINY,
        "teacher.ppo.steps_per_env": "200",
        "stream.suite": '["reaching:Reaching", "gym-mujoco"]',
        "stream.tasks": '["wind", "crane"]',
    }
    overrides = [f"--{key}={value}" for key, value in mixed.items()]
    done = cpd(tmp_path, "launch", "reaching.toml", "--run-dir", "run", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "run"
    assert json.loads((run / "config.json").read_text())["stream"]["suite"] == "reaching:Reaching+gym-mujoco"
    with (run / "results" / "evaluations.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert {(row["task"], bool(row["normalised_return"])) for row in rows} == {("wind", False), ("crane", True)}
    assert {(row["suite"], row["metaworld"]) for row in rows} == {("reaching:Reaching+gym-mujoco", "")}
    assert {row["suite_versions"].split(", ")[0] for row in rows} == {"reaching 1.0"}
    policy = json.loads((run / "teachers" / "wind" / "seed-1" / "policy.json").read_text())
    bodies = load_suite("gym-mujoco").spaces
    sizes = policy["architecture"]["observation_size"], policy["architecture"]["action_size"]
    assert sizes == (9 + bodies.observation_size, bodies.action_size)
    assert (run / "figures" / "success_matrix.png").exists()


def test_one_student_serves_tasks_of_two_suites_from_published_teachers_of_each(tmp_path: Path) -> None:
    teachers = ROOT / "analysis" / "results" / "teachers"
    overrides = [f"--{key}={value}" for key, value in TINY.items()]
    overrides += [
        '--stream.tasks=["window-close-v3", "hopper"]',
        "--teacher.gate=0.6",
        "--teacher.ppo.steps_per_env=200",
    ]
    done = cpd(tmp_path, "launch", "mixed", "--run-dir", "run", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "run"
    for task, source in (("window-close-v3", "cw10-rl"), ("hopper", "bodies-rl")):
        policy = run / "teachers" / task / "seed-1" / "policy.safetensors"
        assert policy.read_bytes() == (teachers / source / "policies" / f"{task}-seed-1.safetensors").read_bytes()
        record = json.loads((run / "provenance.json").read_text())["teachers"][f"teachers/{task}/seed-1"]
        assert record["from"] == source and any(
            line.startswith("teacher.ppo.") for line in record["other_settings"]
        )
    status = json.loads((run / "teachers" / "hopper" / "seed-1" / "status.json").read_text())
    assert status["measure"] == "normalised return" and "no success measure" in status["message"]
    with (run / "results" / "evaluations.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert {(row["task"], row["suite"]) for row in rows} == {
        (task, "metaworld+gym-mujoco") for task in ("window-close-v3", "hopper")
    }
    teacher = {row["task"]: row for row in rows if row["method"] == "teacher" and row["goal_set"] == "held_out"}
    assert teacher["window-close-v3"]["successes"] == "2" and float(teacher["hopper"]["normalised_return"]) > 0.5
    assert cpd(tmp_path, "build", "run", "--publish", "published").returncode == 0
    (student,) = (tmp_path / "published" / "students").iterdir()
    done = cpd(tmp_path, "evaluate", str(student))
    assert done.returncode == 0, done.stdout + done.stderr
    done = cpd(tmp_path, "export", "run", "onnx", "--output", "onnx")
    assert done.returncode == 0, done.stdout + done.stderr


def test_check_suite_accepts_the_example_and_names_what_it_cannot_find(tmp_path: Path) -> None:
    (tmp_path / "reaching.py").write_text(SUITE)
    assert cpd(tmp_path, "check-suite", "reaching:Reaching", "--only", "space").returncode == 0
    assert (done := cpd(tmp_path, "check-suite", "reachign")).returncode == 2
    assert "reachign" in done.stderr and "metaworld" in done.stderr


class Counter:
    """An environment whose observation is its goal's seed and the number of steps."""

    def reset(self, goal: Goal) -> np.ndarray:
        self.state = np.array([goal.seed, 0.0])
        return self.state.copy()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        self.state[1] += float(action[0])
        return self.state.copy(), 0.0, bool(self.state[1] > 0.5)

    def close(self) -> None:
        pass


class Sound(Suite):
    tasks = ("count",)
    horizon = 5
    env: type = Counter

    def sizes(self, task: str) -> Sizes:
        return Sizes(2, 1)

    def make(self, task: str) -> Counter:
        return self.env()


class IgnoresGoal(Counter):
    def reset(self, goal: Goal) -> np.ndarray:
        return super().reset(goal._replace(vector=np.zeros(1)))


class Remembers(Counter):
    total = 0.0

    def reset(self, goal: Goal) -> np.ndarray:
        Remembers.total += 1.0
        return super().reset(goal) + np.array([0.0, Remembers.total])


class WrongShape(Counter):
    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        return (np.zeros(3), *super().step(action)[1:])


class NotANumber(Counter):
    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        return (np.array([0.0, np.nan]), *super().step(action)[1:])


class ResetsLikeGymnasium(Counter):
    def reset(self, goal: Goal) -> tuple[np.ndarray, dict[str, int]]:  # type: ignore[override]
        return super().reset(goal), {}


class StepsLikeGymnasium(Counter):
    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, int]]:  # type: ignore[override]
        return (*super().step(action), False, {})


class AlwaysSucceeds(Counter):
    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        return (*super().step(action)[:2], True)


class Fails(Counter):
    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("env", "words"),
    [
        (IgnoresGoal, ["reset ignores its goal"]),
        (Remembers, ["reset must set the whole state"]),
        (WrongShape, ["step 0", "(3,)", "(2,)"]),
        (NotANumber, ["step 0", "NaN", "position 1"]),
        (ResetsLikeGymnasium, ["reset", "tuple"]),
        (StepsLikeGymnasium, ["step 0", "(observation, reward, success)"]),
        (AlwaysSucceeds, ["success is True"]),
        (Fails, ["ZeroDivisionError"]),
    ],
)
def test_mistakes_in_an_environment_are_named(
    env: type, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A class of this file cannot be imported in a worker process.
    monkeypatch.setattr(
        "cpd.envs.suite_check._in_worker", lambda suite, task, goal, actions: run_here(env, goal, actions)
    )
    suite = Sound()
    suite.env = env
    (line,) = task_mistakes(suite, "count")
    assert line.startswith("count: ") and all(word in line for word in words)


class NeverSucceeds(Counter):
    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        return (*super().step(action)[:2], False)


def test_a_task_that_random_actions_never_solve_is_noted_and_a_return_that_never_varies_is_a_mistake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "cpd.envs.suite_check._in_worker", lambda suite, task, goal, actions: run_here(suite.env, goal, actions)
    )
    suite, notes = Sound(), list[str]()
    suite.env = NeverSucceeds
    assert task_mistakes(suite, "count", notes) == [] and len(notes) == 1
    suite.returns = lambda task: Returns(0.0, 1.0)  # type: ignore[method-assign]
    assert [line.split(":")[0] for line in task_mistakes(suite, "count", notes)] == ["count"] and len(notes) == 1
    suite.returns = lambda task: Returns(1.0, 1.0)  # type: ignore[method-assign]
    assert "(1.0, 1.0)" in task_mistakes(suite, "count")[0]


def run_here(env: type, goal: Goal, actions: np.ndarray) -> bytes:
    made = env()
    return np.stack([made.reset(goal), *(made.step(action)[0] for action in actions)]).astype(np.float32).tobytes()


def test_mistakes_in_goals_sizes_and_names_are_named() -> None:
    class Overlapping(Sound):
        def goal_vectors(self, task: str, split: str, num_goals: int) -> list[np.ndarray]:
            return [np.array([float(index)]) for index in range(num_goals)]

    class Few(Sound):
        def goal_vectors(self, task: str, split: str, num_goals: int) -> list[np.ndarray]:
            return list(super().goal_vectors(task, split, 3))

    class Unscaled(Sound):
        tasks = ("a task", "count")
        streams = {"all": ("count", "cuont")}  # noqa: RUF012

        def scaling(self) -> tuple[np.ndarray, np.ndarray]:
            return np.zeros(3), np.zeros(2)

    assert "validation goal 0" in task_mistakes(Overlapping(), "count")[0]
    assert "3 goals" in task_mistakes(Few(), "count")[0]
    lines = suite_mistakes(Unscaled())
    assert [line.split(":")[0] for line in lines] == ["tasks", "streams", "scaling", "scaling"]
    assert "cuont" in lines[1]

    class Untyped(Sound):
        def sizes(self, task: str) -> Sizes:
            return (2, 1)  # type: ignore[return-value]

    assert [line.split(":")[0] for line in suite_mistakes(Untyped())] == ["sizes"]


@pytest.mark.parametrize(
    "name", ["nothing", "no.such.module:Suite", "cpd.envs.suite:Nothing", "cpd.envs.goals:Goal"]
)
def test_a_suite_that_cannot_be_loaded_is_named(name: str) -> None:
    with pytest.raises(SuiteError, match=name):
        load_suite(name)


#: Its name, its simulator, the size of its observations, their parts' first positions, and its horizon.
MARKS = ("metaworld", "mujoco", 39, 18, 36, 500)


def is_size(node: ast.AST, number: int) -> bool:
    """Whether a value, default, argument or comparison gives this number to something named after a size."""
    pairs: list[tuple[str, ast.AST | None]] = []
    if isinstance(node, ast.keyword):
        pairs = [(node.arg or "", node.value)]
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        pairs = [(ast.unparse(target), node.value) for target in targets]
    elif isinstance(node, ast.Compare):
        pairs = [(ast.unparse(node.left), value) for value in node.comparators]
    elif isinstance(node, ast.arguments):
        pairs = [(arg.arg, value) for arg, value in zip(node.args[::-1], node.defaults[::-1], strict=False)]
    return any(
        isinstance(value, ast.Constant)
        and value.value == number
        and re.search("action|obs|goal|size", name.lower())
        for name, value in pairs
    )


def test_meta_world_is_known_in_its_folder_only() -> None:
    """No other file imports a simulator, or holds Meta-World's name, sizes or horizon, but for these."""
    allowed = {
        "cpd/envs/suite.py": "the name of the default suite",
        "cpd/run/provenance.py": "columns of tables",
        "cpd/run/shortage.py": "packages of an extra",
        "cpd/config/teacher.py": "samples of a minibatch",
        "analysis/captions.py": "columns of tables",
        "analysis/published_teachers.py": "columns of tables",
        "cpd/export/video.py": "renders Meta-World",
        "cpd/export/video_grid.py": "points of a font",
        "jobs/check.py": "compares with Meta-World's own evaluation",
    }
    found = set()
    for path in (path for top in ("cpd", "jobs", "analysis") for path in (ROOT / top).rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        values = [node.value for node in nodes if isinstance(node, ast.Constant)]
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        imports = [name for name in names if re.match(r"(cpd\.envs\.)?(metaworld|mujoco)\b", name)]
        if imports or any(value in MARKS for value in values) or any(is_size(n, 4) for n in nodes):
            found.add(path.relative_to(ROOT).as_posix())
    simulated = ("cpd/envs/metaworld/", "cpd/envs/gym_mujoco/")
    assert {name for name in found if not name.startswith(simulated)} == set(allowed)
