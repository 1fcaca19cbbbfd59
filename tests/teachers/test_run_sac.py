"""A SAC teacher from its first iteration to its shards: interrupted, killed, warm-started, with more workers."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpd.config import PPOConfig, SACConfig, TeacherConfig, WarmStartConfig
from cpd.envs.goals import goal_set
from cpd.envs.vector_env import make_vector_env
from cpd.run.directory import TeacherElement
from cpd.run.interrupt import Interrupt, InterruptedBySignal
from cpd.run.progress import read_metrics
from cpd.teachers.demonstrations import Demonstrator
from cpd.teachers.policy import SquashedPolicy, load_policy
from cpd.teachers.rollout import EpisodeRules
from tests.conftest import ROOT
from tests.teachers.test_run_teacher import KILLED, finish, new_run, products

#: Six iterations of four environments and fifty steps; the first one only fills the buffer.
SAC: dict[str, Any] = {
    "hidden_sizes": [16],
    "num_envs": 4,
    "steps_per_env": 50,
    "updates_per_step": 0.2,
    "batch_size": 16,
    "buffer_size": 900,
    "learning_starts": 300,
}
SMALL: dict[str, Any] = {
    "teacher": {
        "learner": "sac",
        "max_env_steps": 1_200,
        "validate_every": 2,
        "validate_from": 0.0,
        "sac": SAC,
    },
    "logging": {"teacher_checkpoint_every": 2},
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> TeacherElement:
    return finish(new_run(tmp_path_factory.mktemp("undisturbed"), **SMALL))


def test_the_products_of_a_sac_teacher(undisturbed: TeacherElement) -> None:
    assert undisturbed.complete.exists()
    records = read_metrics(undisturbed.metrics)
    assert [record["updates"] for record in records] == [0] + [40] * 5
    assert [record["env_steps"] for record in records] == [200, 400, 600, 800, 1000, 1200]
    description = json.loads(undisturbed.policy.with_suffix(".json").read_text())
    assert description["architecture"]["kind"] == "squashed_gaussian_mlp"
    training = description["training"]
    assert (training["learner"], training["ranks"], training["policy_updates"]) == ("sac", [1], 200)
    policy = load_policy(undisturbed.policy)
    assert isinstance(policy, SquashedPolicy)


def test_workers_and_interruptions_do_not_matter(
    undisturbed: TeacherElement, tmp_path: Path, counting_interrupt: Callable[[int], Interrupt]
) -> None:
    run = new_run(tmp_path, **SMALL)
    teacher, stops = run.teachers()[0], 0
    while not teacher.finished:
        try:
            finish(run, counting_interrupt(150), num_workers=2)
        except InterruptedBySignal:
            stops += 1
    assert stops >= 3
    assert products(teacher) == products(undisturbed)


def test_killed_it_ends_the_same(undisturbed: TeacherElement, tmp_path: Path) -> None:
    run = new_run(tmp_path, **SMALL)
    teacher = run.teachers()[0]
    command = [sys.executable, "-c", KILLED, str(run.root)]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while len(read_metrics(teacher.metrics)) < 3 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not teacher.complete.exists()
    finish(run)
    assert products(teacher) == products(undisturbed)


def test_a_warm_start_fills_the_buffer(tmp_path: Path) -> None:
    few = {"num_demonstrations": 3, "num_cloning_steps": 20, "steps_per_check": 10, "num_dagger_rounds": 0}
    tables = {**SMALL["teacher"], "recipe": "demo_rl", "warm_start": {**few, "critic_iterations": 1}}
    teacher = finish(new_run(tmp_path, teacher=tables))
    training = json.loads(teacher.policy.with_suffix(".json").read_text())["training"]
    assert training["warm_start"]["cloning_steps"] == 20
    records = read_metrics(teacher.metrics)
    # Demonstrations, forty steps each at this horizon, and the first iteration: enough to learn from at once.
    assert records[0]["updates"] == 40 and records[0]["policy_updates"] == 0
    assert training["policy_updates"] == 200
    # Neither replayed demonstrations nor what RL sees move the statistics with which the policy was cloned.
    assert load_policy(teacher.policy).normalizer.count == training["warm_start"]["demonstration_env_steps"]


def test_demonstrations_are_whole_transitions() -> None:
    task, horizon = "drawer-close-v3", 120
    goals = goal_set(task, "training", 10)
    config = TeacherConfig().warm_start
    with make_vector_env([task] * 25, 1) as envs:
        batches = Demonstrator(task, goals, envs, config, horizon, 1, Interrupt()).transitions(
            EpisodeRules(horizon)
        )
    assert sum(int(batch.terminated.sum()) for batch in batches) > 0.8 * config.num_demonstrations
    for before, after in itertools.pairwise(batches[:30]):  # one chunk
        going_on = before.next_obs[~before.terminated]
        assert (going_on[: len(after.obs[0])] == after.obs[0]).all()


def test_the_recipe_chooses_the_learner() -> None:
    config = TeacherConfig(learner="sac")
    assert config.learner_settings == config.sac
    warm = TeacherConfig(learner="sac", recipe="demo_rl").learner_settings
    assert isinstance(warm, SACConfig)
    assert (warm.hidden_sizes, warm.init_log_std) == ((256, 256), -2.0)
    with pytest.raises(ValueError, match=r"sac\.steps_per_env"):
        TeacherConfig(learner="sac", sac=SACConfig(steps_per_env=100))
    with pytest.raises(ValueError, match=r"ends before sac\.learning_starts"):
        TeacherConfig(learner="sac", max_env_steps=1_500, sac=SACConfig(learning_starts=1_200))


def test_settings_of_the_other_learner_are_pointed_out() -> None:
    other = PPOConfig(gamma=0.5)
    assert TeacherConfig(learner="sac", ppo=other).warnings() == ["ppo has no effect: teacher.learner is 'sac'"]
    assert TeacherConfig(sac=SACConfig(gamma=0.5)).warnings() == ["sac has no effect: teacher.learner is 'ppo'"]
    assert TeacherConfig(recipe="scripted", ppo=other).warnings() == [
        "ppo has no effect: teacher.recipe is 'scripted'"
    ]
    warm = TeacherConfig(learner="sac", recipe="demo_rl", sac=SACConfig(hidden_sizes=(7,))).warnings()
    assert warm == ["sac.hidden_sizes has no effect: demo_rl takes teacher.warm_start.rl_hidden_sizes"]
    unused = WarmStartConfig(rl_learning_rate=1e-5, rl_target_kl=0.5)
    assert TeacherConfig(learner="sac", recipe="demo_rl", warm_start=unused).warnings() == [
        "warm_start.rl_learning_rate has no effect: teacher.learner is 'sac', which takes sac.learning_rate",
        "warm_start.rl_target_kl has no effect: teacher.learner is 'sac'",
    ]
    assert TeacherConfig(learner="sac", sac=SACConfig(gamma=0.5)).warnings() == []


def test_settings_of_exploring_where_nothing_explores_are_pointed_out() -> None:
    idle = TeacherConfig(exploring_steps=7, exploring_until=0.5, ppo=PPOConfig(exploring_min_log_std=-4.0))
    assert idle.warnings() == [
        "exploring_steps has no effect: exploring_share and exploring_rate are 0",
        "exploring_until has no effect: nothing explores without exploring_share or exploring_rate",
        "ppo.exploring_min_log_std has no effect: ppo.min_log_std (-3) is no less",
    ]
    assert TeacherConfig(exploring_rate=0.1, exploring_steps=7, exploring_until=0.5).warnings() == []
    assert TeacherConfig(exploring_until=0.5, ppo=PPOConfig(exploring_min_log_std=-1.0)).warnings() == []


def test_ranks_that_cannot_share_a_teacher_are_refused() -> None:
    with pytest.raises(ValueError, match="'sac' runs on one rank, not on 2"):
        TeacherConfig(learner="sac").check_ranks(2)
    with pytest.raises(ValueError, match=r"26 ranks cannot share teacher\.ppo\.num_envs = 25 environments"):
        TeacherConfig().check_ranks(26)
    TeacherConfig(learner="sac").check_ranks(1)
    TeacherConfig().check_ranks(25)
    TeacherConfig(recipe="scripted").check_ranks(26)
