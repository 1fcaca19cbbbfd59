"""The Gaussian policy with its running moments, the scripted stand-in, and their files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from metaworld.policies import ENV_POLICY_MAP

from cpd.envs.episodes import run_episodes
from cpd.envs.metaworld.task_env import TaskEnv
from cpd.envs.metaworld.tasks import ALL_TASKS
from cpd.envs.vector_env import make_vector_env
from cpd.run.claim import REPOSITORY_RESULTS
from cpd.teachers.demonstrations import ScriptedPolicy, load_scripted, save_scripted
from cpd.teachers.policy import (
    GaussianPolicy,
    RunningMoments,
    TeacherActor,
    gaussian_log_prob,
    load_policy,
    mlp,
    save_policy,
)
from tests.conftest import goal_set


def make_policy(seed: int = 1) -> GaussianPolicy:
    generator = torch.Generator().manual_seed(seed)
    policy = GaussianPolicy((16, 8), -0.3, generator)
    policy.normalizer.update(torch.randn(200, 39, generator=generator) * 0.1 + 0.5)
    with torch.no_grad():
        policy.log_std_A += torch.randn(4, generator=generator)
        policy.net[-1].weight *= 100
    return policy


def observations(num: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.5, 0.2, size=(num, 39)).astype(np.float32)


@given(seed=st.integers(0, 1000), log_std=st.lists(st.floats(-3, 0.5), min_size=4, max_size=4))
@settings(max_examples=50, deadline=None)
def test_log_prob_is_that_of_torch(seed: int, log_std: list[float]) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, mean = torch.randn(2, 7, 4, generator=generator, dtype=torch.float64)
    log_std_A = torch.tensor(log_std, dtype=torch.float64)
    reference = torch.distributions.Normal(mean, log_std_A.exp()).log_prob(x).sum(dim=-1)
    torch.testing.assert_close(gaussian_log_prob(x, mean, log_std_A), reference)


def test_layers_are_orthogonal_and_the_head_is_small() -> None:
    net = mlp((39, 32, 32, 4), 0.01, torch.Generator().manual_seed(1))
    hidden, head = net[2].weight, net[4].weight
    torch.testing.assert_close(hidden @ hidden.T, 2 * torch.eye(32), atol=1e-5, rtol=0)
    torch.testing.assert_close(head @ head.T, 1e-4 * torch.eye(4), atol=1e-9, rtol=1e-4)
    assert all((layer.bias == 0).all() for layer in (net[0], net[2], net[4]))
    again = mlp((39, 32, 32, 4), 0.01, torch.Generator().manual_seed(1))
    assert torch.equal(again[0].weight, net[0].weight)


def test_observations_are_normalised_and_clipped() -> None:
    policy = make_policy()
    mean, std = policy.normalizer.mean.float(), policy.normalizer.std.float()
    torch.testing.assert_close(policy.normalize(mean[None] + 3 * std), torch.full((1, 39), 3.0), rtol=1e-4, atol=0)
    assert (policy.normalize(mean[None] + 100 * std) == 8.0).all()
    assert (policy.normalize(mean[None] - 100 * std) == -8.0).all()


def test_the_actor_clips_and_the_distribution_does_not() -> None:
    policy = make_policy()
    obs = observations(50)
    distribution = policy.distribution(obs)
    assert np.abs(distribution.raw_mean).max() > 1.0
    assert distribution.log_std.shape == distribution.raw_mean.shape == (50, 4)
    assert (distribution.log_std == policy.log_std_A.detach().numpy()).all()
    actor = TeacherActor(policy)
    actor.reset(["push-v3"] * 50)
    actions = actor.act(obs)
    assert actions.dtype == np.float32
    assert np.array_equal(actions, distribution.raw_mean.clip(-1, 1))


def test_a_saved_policy_acts_the_same(tmp_path: Path) -> None:
    policy, path = make_policy(), tmp_path / "policy.safetensors"
    save_policy(policy, path, {"task": "push-v3", "labels": {"teacher_recipe": "rl"}})
    loaded = load_policy(path)
    obs = observations(20)
    for saved, after in zip(policy.distribution(obs), loaded.distribution(obs), strict=True):
        assert np.array_equal(saved, after)
    description = json.loads((tmp_path / "policy.json").read_text())
    assert description["architecture"]["hidden_sizes"] == [16, 8]
    assert description["labels"] == {"teacher_recipe": "rl"}
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    first = path.read_bytes()
    save_policy(make_policy(), path, {"task": "push-v3"})
    assert path.read_bytes() == first
    # Members of a group on a shared file system can read it like any other file.
    assert path.stat().st_mode == (tmp_path / "policy.json").stat().st_mode


def act_in_numpy(path: Path, obs_BO: np.ndarray) -> np.ndarray:
    """Act as the description's `acting` says, from the two files alone."""
    tensors = safetensors.numpy.load_file(path)
    entries = json.loads(path.with_suffix(".json").read_text())["architecture"]
    dtype, count = entries["dtype"], tensors["normalizer.count"]
    std_O = np.maximum(np.sqrt(tensors["normalizer.sum_of_squares"] / count), entries["observation_min_std"])
    x_BD = (obs_BO.astype(dtype) - tensors["normalizer.mean"].astype(dtype)) / std_O.astype(dtype)
    x_BD = x_BD.clip(-entries["observation_clip"], entries["observation_clip"])
    activation = {"tanh": np.tanh}[entries["activation"]]
    for layer in range(len(entries["hidden_sizes"]) + 1):
        x_BD = x_BD if layer == 0 else activation(x_BD)
        x_BD = x_BD @ tensors[f"net.{2 * layer}.weight"].T + tensors[f"net.{2 * layer}.bias"]
    return x_BD.clip(-entries["action_clip"], entries["action_clip"])


@pytest.mark.parametrize("folder", ["cw10-demo_rl", "cw10-rl", "mt50-demo_rl"])
def test_a_published_teacher_acts_in_numpy_from_its_two_files(folder: str) -> None:
    path = min((REPOSITORY_RESULTS / "teachers" / folder / "policies").glob("*.safetensors"))
    task = json.loads(path.with_suffix(".json").read_text())["task"]
    env, actor = TaskEnv(task), TeacherActor(load_policy(path))
    observations_TO = [env.reset(goal_set(task, "held_out")[0])]
    for _ in range(100):
        action = act_in_numpy(path, np.array(observations_TO[-1:]))[0]
        observations_TO.append(env.step(action)[0])
    obs_TO = np.array(observations_TO, np.float32)
    np.testing.assert_allclose(act_in_numpy(path, obs_TO), actor.act(obs_TO), rtol=0, atol=1e-6)


def test_damaged_or_wrong_policy_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    with pytest.raises(ValueError, match=r"policy\.safetensors"):
        load_policy(path)
    save_policy(make_policy(), path, {})
    with pytest.raises(ValueError, match=r"policy\.json .*'gaussian_mlp'.*'scripted'"):
        load_scripted(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"policy\.safetensors .*cpd publish"):
        load_policy(path)
    (tmp_path / "COMPLETE").touch()  # in a run
    with pytest.raises(ValueError, match=r"policy\.safetensors .*policy\.json and COMPLETE"):
        load_policy(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match=r"policy\.json"):
        load_policy(path)


def test_the_scripted_stand_in(tmp_path: Path) -> None:
    expert, path = ScriptedPolicy("drawer-close-v3", assumed_std=0.2), tmp_path / "policy.safetensors"
    save_scripted(expert, path, {"labels": {"teacher_recipe": "scripted"}})
    loaded = load_scripted(path)
    assert loaded.std_source == "assumed"
    goals = goal_set("drawer-close-v3", "validation", 3)
    with make_vector_env(["drawer-close-v3"] * 3, 1) as envs:
        (outcomes,) = run_episodes(TeacherActor(loaded), [(envs, goals)], 200)
        obs = envs.observations.copy()
    assert all(outcome.success for outcome in outcomes)
    distribution = loaded.distribution(obs)
    np.testing.assert_allclose(np.exp(distribution.log_std), 0.2, rtol=1e-6)
    reference = ENV_POLICY_MAP["drawer-close-v3"]().get_action(obs[1].astype(np.float64))
    assert np.array_equal(distribution.raw_mean[1], reference.astype(np.float32))


def test_every_task_has_a_stand_in() -> None:
    obs = observations(2)
    for task in ALL_TASKS:
        assert ScriptedPolicy(task, 0.1).distribution(obs).raw_mean.shape == (2, 4)


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    offset=st.floats(-1e3, 1e3),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_moments_of_batches_merge_to_the_moments_of_the_whole(
    sizes: list[int], offset: float, scale: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    batches = [rng.normal(offset, scale, size=(size, 3)) for size in sizes]
    moments = RunningMoments(3, min_std=1e-9)
    for batch in batches:
        moments.update(torch.from_numpy(batch))
    whole = np.concatenate(batches)
    assert float(moments.count) == len(whole)
    np.testing.assert_allclose(moments.mean.numpy(), whole.mean(axis=0), rtol=1e-9, atol=1e-9 * scale)
    # Deviations are no more precise than the offset, which cancels.
    atol = 1e-9 * scale + 1e-12 * abs(offset)
    np.testing.assert_allclose(moments.std.numpy(), np.maximum(whole.std(axis=0), 1e-9), rtol=1e-7, atol=atol)


def test_constant_components_keep_the_floor_and_no_data_means_identity() -> None:
    moments = RunningMoments(2, min_std=0.5)
    assert moments.std.tolist() == [1.0, 1.0]
    assert moments.mean.tolist() == [0.0, 0.0]
    moments.update(torch.tensor([[3.0, 0.0], [3.0, 10.0]]))
    assert moments.std.tolist() == [0.5, 5.0]
    assert moments.mean.tolist() == [3.0, 5.0]


def test_moments_travel_with_a_state_dict() -> None:
    moments, other = RunningMoments(4, 1e-3), RunningMoments(4, 1e-3)
    moments.update(torch.randn(100, 4, generator=torch.Generator().manual_seed(1)))
    other.load_state_dict(moments.state_dict())
    assert torch.equal(moments.std, other.std)
    assert torch.equal(moments.mean, other.mean)
