"""The warm start of `demo_rl`: demonstrations, cloning, the cap, and RL after it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cpd.config import Config, WarmStartConfig
from cpd.config.load import load, merge, read_toml, to_dict
from cpd.envs.goals import Goal
from cpd.envs.vector_env import VectorEnv, make_vector_env
from cpd.run.checkpoint import published
from cpd.run.directory import Run, TeacherElement
from cpd.run.files import sha256, write_json
from cpd.run.interrupt import Interrupt, InterruptedBySignal
from cpd.run.progress import read_metrics, read_status
from cpd.run.shards.schema import read_index
from cpd.teachers import demonstrations as demonstrations_module
from cpd.teachers import trainer
from cpd.teachers import warm_start as warm_start_module
from cpd.teachers.demonstrations import Demonstrator, Labelled, demonstration_noise
from cpd.teachers.policy import GaussianPolicy, load_policy
from cpd.teachers.run_teacher import env_pool, run_teacher
from cpd.teachers.warm_start import Cloner, WarmStart, warm_start
from tests.conftest import MINIATURE, goal_set

TASK = "drawer-close-v3"
HORIZON = 130
NUM_DAGGER_EPISODES = 4
CONFIG = WarmStartConfig(num_demonstrations=6, num_dagger_rounds=1)

DEMO_RL: dict[str, Any] = {
    "stream": {"horizon": HORIZON},
    "teacher": {
        "recipe": "demo_rl",
        "max_env_steps": 1_600,
        "horizon": HORIZON,
        "validate_every": 1,
        "stop_success": 1.0,
        "ppo": {"hidden_sizes": [32], "num_envs": 4, "steps_per_env": 130, "minibatch_size": 130, "num_epochs": 2},
        "warm_start": {"num_demonstrations": 8, "num_dagger_rounds": 1},
    },
}


@pytest.fixture(scope="module", autouse=True)
def short_training() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demonstrations_module, "NUM_DAGGER_EPISODES", NUM_DAGGER_EPISODES)
        patch.setattr(warm_start_module, "NUM_CLONING_STEPS", 400)
        patch.setattr(trainer, "CRITIC_ITERATIONS", 1)
        patch.setattr(trainer, "VALIDATE_FROM", 0.0)
        yield


@contextlib.contextmanager
def shorter_still() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demonstrations_module, "STEPS_AFTER_SUCCESS", 5)
        patch.setattr(warm_start_module, "NUM_CLONING_STEPS", 40)
        patch.setattr(warm_start_module, "STEPS_PER_CHECK", 20)
        yield


def demonstrator(envs: VectorEnv) -> Demonstrator:
    goals = goal_set(TASK, "training", 10)
    return Demonstrator(TASK, goals, envs, CONFIG.num_demonstrations, HORIZON, 1, Interrupt())


def gathered(num_workers: int, clone: GaussianPolicy | None = None) -> Labelled:
    with shorter_still(), make_vector_env([TASK] * 25, num_workers) as envs:
        return demonstrator(envs).gather(int(clone is not None), clone)


@pytest.fixture(scope="module")
def demonstrations() -> Labelled:
    return gathered(1)


def fresh_policy() -> GaussianPolicy:
    return GaussianPolicy((32,), -2.0, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_demonstrations_are_reproducible_by_any_number_of_workers(
    demonstrations: Labelled, num_workers: int
) -> None:
    again = gathered(num_workers)
    assert np.array_equal(again.obs_BO, demonstrations.obs_BO)
    assert np.array_equal(again.labels_BA, demonstrations.labels_BA)
    assert np.abs(again.labels_BA).max() <= 1.0
    assert len(again.obs_BO) < CONFIG.num_demonstrations * HORIZON, "episodes end some steps after success"


def test_in_dagger_rounds_the_clone_acts(demonstrations: Labelled) -> None:
    rounds = [gathered(1, fresh_policy()) for _ in range(2)]
    assert np.array_equal(rounds[0].obs_BO, rounds[1].obs_BO)
    # A fresh policy hardly moves and does not succeed, unlike the expert, whose labels say what to do.
    assert len(rounds[0].obs_BO) == NUM_DAGGER_EPISODES * HORIZON
    hands = rounds[0].obs_BO[:, :3].std(axis=0), demonstrations.obs_BO[:, :3].std(axis=0)
    assert hands[0].max() < hands[1].max()
    assert np.abs(rounds[0].labels_BA).mean() > 0.1


def test_noise_is_light_in_a_quarter_of_episodes_and_comes_in_bursts_in_the_others() -> None:
    share_quiet = [float((demonstration_noise(n, 200, 4, 1) == 0).all(axis=1).mean()) for n in range(40)]
    assert sum(share == 0.0 for share in share_quiet) == 10
    assert all(share > 0.5 for share in share_quiet if share)
    assert np.array_equal(demonstration_noise(3, 200, 4, 1), demonstration_noise(3, 200, 4, 1))
    assert not np.array_equal(demonstration_noise(3, 200, 4, 1), demonstration_noise(3, 200, 4, 2))


def test_cloning_lowers_the_loss_and_goes_back_exactly(demonstrations: Labelled) -> None:
    policy = fresh_policy()
    policy.normalizer.update(torch.from_numpy(demonstrations.obs_BO))
    cloner = Cloner(policy, seed=1)
    first = cloner.run(demonstrations, 20)
    state = cloner.state()
    second = cloner.run(demonstrations, 100)
    assert second < 0.7 * first
    cloner.restore(state)
    # The same steps in smaller increments are the same steps.
    halves = [cloner.run(demonstrations, 50), cloner.run(demonstrations, 50)]
    assert sum(halves) / 2 == pytest.approx(second)
    assert cloner.num_steps == 120
    assert float(policy.log_std_A.detach().mean()) == -2.0


def started(validate: Callable[[], float], config: WarmStartConfig = CONFIG) -> tuple[WarmStart, GaussianPolicy]:
    policy = fresh_policy()
    with shorter_still(), make_vector_env([TASK] * 25, 1) as envs:
        return warm_start(policy, demonstrator(envs), config, validate), policy


def test_an_increment_beyond_the_cap_is_taken_back_and_halved() -> None:
    rates = iter([0.0, 0.9, 0.2, 0.8, 0.4, 0.6])
    done, _ = started(lambda: next(rates))
    # 20 steps exceed the cap, 10 do not; 20 are validated once; 15 exceed it, 12 do not; 14 reach the target.
    assert (done.validation_success, done.highest_success, done.cloning_steps) == (0.6, 0.9, 14)
    assert done.dagger_rounds == 0
    assert not list(rates)


def test_where_every_increment_overshoots_the_last_policy_below_the_cap_stays() -> None:
    rates = iter([0.1] + [0.75] * 5)
    done, policy = started(lambda: next(rates))
    assert (done.validation_success, done.highest_success, done.cloning_steps) == (0.1, 0.75, 0)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), fresh_policy().parameters(), strict=True))


def test_success_at_the_cap_is_kept_and_at_the_target_ends_cloning() -> None:
    config = replace(CONFIG, success_target=0.7, success_cap=0.7)
    rates = iter([0.0, 0.7])
    done, policy = started(lambda: next(rates), config)
    assert (done.validation_success, done.highest_success, done.cloning_steps) == (0.7, 0.7, 20)
    assert done.cloning_loss > 0
    assert not torch.equal(policy.net[0].weight, fresh_policy().net[0].weight)


def test_a_policy_that_succeeds_untrained_is_not_cloned() -> None:
    done, policy = started(lambda: 0.5)
    assert (done.validation_success, done.cloning_steps, done.dagger_rounds, done.cloning_loss) == (0.5, 0, 0, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), fresh_policy().parameters(), strict=True))


def test_an_increment_stays_as_small_as_the_cap_has_made_it() -> None:
    # Increments of five from 10 steps on, since 20 exceeded the cap, and of two from 15 on, DAgger round included.
    ends = [20, 10, 15, *range(17, 40, 2), *range(40, 81, 2)]
    rates = iter([0.0, 0.8, *[0.45] * (len(ends) - 1)])
    done, _ = started(lambda: next(rates))
    assert (done.validation_success, done.cloning_steps, done.dagger_rounds) == (0.45, 80, 1)
    assert not list(rates)


def test_the_statistics_are_those_of_the_demonstrations_whatever_follows(demonstrations: Labelled) -> None:
    done, policy = started(lambda: 0.3)
    count, obs = len(demonstrations.obs_BO), demonstrations.obs_BO.astype(np.float64)
    assert done.demonstration_env_steps == count + NUM_DAGGER_EPISODES * HORIZON
    assert policy.normalizer.count == count
    np.testing.assert_allclose(policy.normalizer.mean.numpy(), obs.mean(axis=0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(policy.normalizer.std.numpy(), obs.std(axis=0).clip(1e-3), rtol=1e-6)


def test_dagger_rounds_follow_where_the_target_is_not_reached() -> None:
    done, _ = started(lambda: 0.3)
    assert (done.dagger_rounds, done.cloning_steps, done.validation_success) == (1, 80, 0.3)


def new_run(root: Path, **over: Any) -> Run:
    tables = merge(read_toml(MINIATURE), merge(DEMO_RL, over))
    write_json(root / "config.json", to_dict(load(Config, tables, "test")))
    return Run(root)


def finish(run: Run, interrupt: Interrupt | None = None) -> TeacherElement:
    teacher = run.teachers()[0]
    run_teacher(run, teacher, env_pool(run.config, 1), interrupt=interrupt or Interrupt(), log=lambda line: None)
    return teacher


def products(teacher: TeacherElement) -> list[str]:
    files = [teacher.policy, teacher.policy.with_suffix(".json"), *sorted(teacher.shards.iterdir())]
    return [sha256(file) for file in files]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> TeacherElement:
    return finish(new_run(tmp_path_factory.mktemp("undisturbed")))


def test_the_record_tells_success_before_and_after_rl(undisturbed: TeacherElement) -> None:
    description = json.loads(undisturbed.policy.with_suffix(".json").read_text())
    training = description["training"]
    start = training["warm_start"]
    assert description["labels"]["teacher_recipe"] == "demo_rl"
    assert 0.0 < start["validation_success"] <= 0.7
    assert start["demonstration_env_steps"] > 0
    records = read_metrics(undisturbed.metrics)
    # The iteration of the critic alone is not validated: only policies that RL has changed are selected.
    assert records[0]["validation_success"] is None
    assert records[0]["grad_norm"] == 0.0
    assert training["selected_iteration"] >= 2
    updates = sum(int(record["epochs"]) * 4 for record in records[1:])
    assert training["policy_updates"] == updates > 0
    assert training["env_steps"] == 520 * len(records)
    assert read_index(undisturbed.shards).attributes.teacher_recipe == "demo_rl"


def test_rl_leaves_the_statistics_with_which_the_policy_was_cloned(undisturbed: TeacherElement) -> None:
    config = Run(undisturbed.path.parents[2]).config.teacher
    goals = goal_set(undisturbed.task, "training", config.num_training_goals)
    with make_vector_env([undisturbed.task] * 25, 1) as envs:
        num_episodes = config.warm_start.num_demonstrations
        labelled = Demonstrator(
            undisturbed.task, goals, envs, num_episodes, HORIZON, undisturbed.seed, Interrupt()
        ).gather(0)
    normalizer = load_policy(undisturbed.policy).normalizer
    assert normalizer.count == len(labelled.obs_BO)
    np.testing.assert_allclose(normalizer.mean.numpy(), labelled.obs_BO.astype(np.float64).mean(axis=0), atol=1e-9)


def test_no_goal_serves_two_purposes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Teachers learn and write rollouts on training goals, and are chosen by validation goals alone."""
    run = new_run(tmp_path)
    teacher = run.teachers()[0]
    used: dict[str, set[str]] = {}

    def noted(envs: VectorEnv, slots: Any, goals: Sequence[Goal]) -> None:
        used.setdefault(read_status(teacher.status).phase, set()).update(goal.split for goal in goals)
        VectorEnv.reset(envs, slots, goals)

    monkeypatch.setattr(type(make_vector_env([TASK], 1)), "reset", noted)
    finish(run)
    assert used == {
        "warm start": {"training", "validation"},
        "train": {"training", "validation"},
        "evaluate": {"held_out", "training"},
        "rollouts": {"training"},
    }


class AfterWarmStart(Interrupt):
    """Asks to stop as soon as the teacher has a checkpoint: at the end of the warm start."""

    def __init__(self, teacher: TeacherElement) -> None:
        super().__init__()
        self.teacher = teacher

    @property
    def requested(self) -> bool:
        return bool(published(self.teacher.checkpoints))


def test_interrupted_in_after_and_behind_the_warm_start_it_ends_the_same(
    undisturbed: TeacherElement, tmp_path: Path, counting_interrupt: Callable[[int], Interrupt]
) -> None:
    run = new_run(tmp_path)
    teacher = run.teachers()[0]
    with pytest.raises(InterruptedBySignal):
        finish(run, counting_interrupt(20))
    assert read_status(teacher.status).phase == "warm start"
    assert not published(teacher.checkpoints), "half a warm start is not kept"
    with pytest.raises(InterruptedBySignal):
        finish(run, AfterWarmStart(teacher))
    assert read_status(teacher.status).phase == "train"
    assert len(published(teacher.checkpoints)) == 1
    assert read_metrics(teacher.metrics) == []
    with pytest.raises(InterruptedBySignal):
        finish(run, counting_interrupt(200))  # in the second iteration
    assert len(read_metrics(teacher.metrics)) == 1
    finish(run)
    assert products(teacher) == products(undisturbed)
