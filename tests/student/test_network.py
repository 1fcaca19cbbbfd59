"""The Transformer student: causality, windows of every length, acting, and its files."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpd.config import StudentConfig
from cpd.envs.metaworld.scaling import observation_scaling
from cpd.reading import DamagedFileError
from cpd.student.actor import StudentActor
from cpd.student.moe import Route
from cpd.student.network import Student, load_student, save_student
from tests.student.grown import grown_student

TASKS = ("drawer-close-v3", "handle-press-side-v3", "window-close-v3")


def make_student(seed: int = 1, dtype: torch.dtype = torch.float64, **over) -> Student:
    sizes = {"context": 5, "width": 16, "expert_width": 24, "num_heads": 2, "num_experts": 4}
    config = StudentConfig(**{**sizes, "task_identity": "none", **over})
    student = Student(config, len(TASKS), dtype=dtype)
    student.initialise(torch.Generator().manual_seed(seed))
    return student


def observations(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    centre, scale = observation_scaling()
    drawn = torch.randn(*shape, 39, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return torch.tensor(centre, dtype=dtype) + torch.tensor(scale, dtype=dtype) * drawn


def test_what_is_unobserved_has_no_influence():
    student = make_student(task_identity="inferred", unobserved=((18, 36),))
    other = (obs := observations(6, 5)).clone()
    other[..., 18:36] += 1.0
    student.known_K[:2] = True
    for task in range(2):
        student.density.fit(task, observations(5 + task, seed=task))
    outputs = [student(seen, task_B=1).mean_BLA for seen in (obs, other)]
    assert torch.equal(*outputs)
    assert torch.equal(*(student.log_belief(seen[:, 0]) for seen in (obs, other)))
    with pytest.raises(ValueError, match="unobserved"):
        make_student(unobserved=((30, 40),))


def test_shapes_and_ranges():
    out = make_student()(observations(7, 5), valid_BL=torch.ones(7, 5, dtype=torch.float64))
    assert out.mean_BLA.shape == out.log_std_BLA.shape == (7, 5, 4)
    assert len(out.stats) == 2
    assert ((out.log_std_BLA > -3.0) & (out.log_std_BLA < 0.5)).all()
    for stats in out.stats:
        assert stats.counts_E.sum() == 7 * 5 * 2
        torch.testing.assert_close(stats.prob_sums_E.sum(), torch.tensor(35.0, dtype=torch.float64))


@settings(max_examples=25, deadline=None)
@given(step=st.integers(1, 4), seed=st.integers(0, 1000))
def test_later_observations_do_not_change_earlier_outputs(step, seed):
    student, obs = make_student(), observations(3, 5, seed=seed)
    changed = obs.clone()
    changed[:, step:] = observations(3, 5 - step, seed=seed + 1)
    with torch.no_grad():
        output, after = student(obs), student(changed)
    torch.testing.assert_close(output.mean_BLA[:, :step], after.mean_BLA[:, :step], rtol=0, atol=1e-12)
    torch.testing.assert_close(output.log_std_BLA[:, :step], after.log_std_BLA[:, :step], rtol=0, atol=1e-12)
    assert (output.mean_BLA[:, step:] - after.mean_BLA[:, step:]).abs().max() > 1e-6


@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 5), seed=st.integers(0, 1000))
def test_a_short_window_is_a_prefix_of_a_padded_one(length, seed):
    student, obs = make_student(), observations(4, 5, seed=seed)
    obs[:, length:] = obs[:, length - 1 : length]
    valid = (torch.arange(5) < length).double().expand(4, 5)
    with torch.no_grad():
        padded, short = student(obs, valid_BL=valid), student(obs[:, :length], valid_BL=valid[:, :length])
    torch.testing.assert_close(padded.mean_BLA[:, :length], short.mean_BLA, rtol=0, atol=1e-12)
    for with_padding, without in zip(padded.stats, short.stats, strict=True):
        for left, right in zip(with_padding, without, strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_rows_of_a_batch_do_not_see_each_other(data):
    student, obs = make_student(), observations(6, 5)
    rows = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=8))
    with torch.no_grad():
        whole, subset = student(obs), student(obs[rows])
    torch.testing.assert_close(whole.mean_BLA[rows], subset.mean_BLA, rtol=0, atol=1e-12)


def test_gradients_of_all_parameters_are_those_of_finite_differences():
    student = make_student(context=2, width=4, expert_width=4, num_layers=1, num_experts=2, top_k=1)
    obs, valid = observations(3, 2), torch.ones(3, 2, dtype=torch.float64)
    names, values = zip(*student.named_parameters(), strict=True)

    def loss(*parameters):
        out = torch.func.functional_call(
            student, dict(zip(names, parameters, strict=True)), (obs,), {"valid_BL": valid}
        )
        stats = out.stats[0]
        return out.mean_BLA.square().sum() + out.log_std_BLA.sum() + stats.prob_sums_E[0] + stats.z_square_sum

    assert torch.autograd.gradcheck(loss, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("length", "tasks"), [(1, [1] * 25), (3, [2, 0, 2, 1]), (1, [2])])
@pytest.mark.parametrize("top_k", [1, 2])
@torch.no_grad()
def test_prepared_passes_have_the_same_bits(dtype, length, tasks, top_k):
    student = grown_student(dtype, context=4, top_k=top_k)
    obs_BLO = observations(len(tasks), length, seed=9, dtype=dtype)
    task_B, valid_BL = torch.tensor(tasks), torch.ones(len(tasks), length, dtype=dtype)
    prepared = student.prepare(task_B, length)
    assert all(isinstance(route, Route) == (top_k == 2) for route in prepared.routes)
    for valid in (None, valid_BL):
        plain = student(obs_BLO, task_B=task_B, valid_BL=valid)
        fast = student(obs_BLO, task_B=prepared, valid_BL=valid)
        assert torch.equal(plain.mean_BLA, fast.mean_BLA)
        for layers in zip(plain.stats, fast.stats, strict=True):
            assert all(torch.equal(*sums) for sums in zip(*layers, strict=True))


class TestActor:
    def test_acts_as_the_last_position_of_the_window_so_far(self):
        student = make_student(dtype=torch.float32)
        obs = observations(3, 9, dtype=torch.float32)
        actor = StudentActor(student, TASKS)
        actor.reset([TASKS[0]] * 3)
        for step in range(9):
            action = actor.act(obs[:, step].numpy())
            with torch.no_grad():
                window = obs[:, max(0, step - 4) : step + 1]
                wanted = student(window).mean_BLA[:, -1].clamp(-1, 1)
            np.testing.assert_allclose(action, wanted.numpy(), atol=1e-6)
            assert action.dtype == np.float32

    def test_mixing_tasks_in_a_batch_gives_what_each_gets_alone(self):
        student = make_student()
        obs = observations(4, 7).float().numpy()
        together = StudentActor(student, TASKS)
        together.reset([TASKS[0]] * 4)
        alone = [StudentActor(student, TASKS) for _ in range(4)]
        for row, actor in enumerate(alone):
            actor.reset([TASKS[row % 3]] * 1)
        for step in range(7):
            mixed = together.act(obs[:, step])
            single = np.concatenate([actor.act(obs[row : row + 1, step]) for row, actor in enumerate(alone)])
            np.testing.assert_allclose(mixed, single, atol=1e-7)

    def test_reset_forgets(self):
        student, obs = make_student(), observations(2, 3).float().numpy()
        actor = StudentActor(student, TASKS)
        actor.reset([TASKS[0]] * 2)
        first = [actor.act(obs[:, step]) for step in range(3)]
        actor.reset([TASKS[1]] * 2)
        again = [actor.act(obs[:, step]) for step in range(3)]
        np.testing.assert_array_equal(first, again)

    def test_the_caller_may_reuse_its_observation_array(self):
        student, obs = make_student(), observations(2, 3).float().numpy()
        actors = [StudentActor(student, TASKS) for _ in range(2)]
        for actor in actors:
            actor.reset([TASKS[0]] * 2)
        buffer = np.empty_like(obs[:, 0])
        for step in range(3):
            buffer[:] = obs[:, step]
            np.testing.assert_array_equal(actors[0].act(buffer), actors[1].act(obs[:, step]))
            buffer[:] = np.nan

    def test_onehot_acts_by_the_name_of_the_task_and_none_does_not(self):
        obs = observations(2, 1)[:, 0].float().numpy()
        actions = {}
        for identity in ("none", "onehot"):
            student = make_student(task_identity=identity)
            if student.task is not None:
                with torch.no_grad():
                    student.task.mul_(100)
            actor = StudentActor(student, TASKS)
            for task in TASKS[:2]:
                actor.reset([task] * 2)
                actions[identity, task] = actor.act(obs)
        np.testing.assert_array_equal(actions["none", TASKS[0]], actions["none", TASKS[1]])
        assert np.abs(actions["onehot", TASKS[0]] - actions["onehot", TASKS[1]]).max() > 1e-3

    def test_onehot_refuses_a_task_outside_its_stream(self):
        with pytest.raises(ValueError, match="reach-v3"):
            StudentActor(make_student(task_identity="onehot"), TASKS).reset(["reach-v3"])


class TestFile:
    def test_comes_back_bit_for_bit_after_growth(self, tmp_path):
        student = make_student(dtype=torch.float32)
        for moe in student.moes:
            moe.grow(0, torch.zeros(16), group=0, closed=True)
        path = tmp_path / "stages" / "stage-01.safetensors"
        save_student(path, student, {"stage": 1})
        description = json.loads(path.with_suffix(".json").read_text())
        assert description["stage"] == 1 and description["num_experts"] == 5
        assert description["num_parameters"] == sum(p.numel() for p in student.parameters())
        loaded = load_student(path)
        for (name, value), (other, wanted) in zip(
            loaded.state_dict().items(), student.state_dict().items(), strict=True
        ):
            assert name == other
            assert torch.equal(value, wanted)
        obs = observations(2, 5, dtype=torch.float32)
        assert torch.equal(loaded(obs).mean_BLA, student(obs).mean_BLA)

    def test_of_an_earlier_version_has_tensors_of_single_experts(self, tmp_path):
        student = make_student(dtype=torch.float32)
        path = tmp_path / "a.safetensors"
        save_student(path, student, {})
        tensors = safetensors.torch.load_file(path)
        for layer in range(2):
            moe = f"blocks.{layer}.moe"
            for expert, row in enumerate(tensors.pop(f"{moe}.router.stack")):
                tensors[f"{moe}.router.{expert}"] = row.clone()
            for kind in ("up", "down"):
                for expert, matrix in enumerate(tensors.pop(f"{moe}.{kind}.stack")):
                    former = matrix if kind == "up" else matrix.t()
                    tensors[f"{moe}.experts.{expert}.{kind}.weight"] = former.contiguous().clone()
        safetensors.torch.save_file(tensors, path)
        description = json.loads(path.with_suffix(".json").read_text())
        description["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        path.with_suffix(".json").write_text(json.dumps(description))
        obs = observations(2, 5, dtype=torch.float32)
        assert torch.equal(load_student(path)(obs).mean_BLA, student(obs).mean_BLA)

    def test_refuses_weights_that_do_not_match_their_description(self, tmp_path):
        path = tmp_path / "a.safetensors"
        save_student(path, make_student(1), {})
        weights = path.read_bytes()
        save_student(path, make_student(2), {})
        path.write_bytes(weights)
        with pytest.raises(ValueError, match=r"a\.json"):
            load_student(path)

    def test_refuses_another_scaling_of_observations(self, tmp_path):
        path = tmp_path / "a.safetensors"
        save_student(path, make_student(1), {})
        description = json.loads(path.with_suffix(".json").read_text())
        description["obs_scale"][0] *= 2
        path.with_suffix(".json").write_text(json.dumps(description))
        with pytest.raises(ValueError, match="scaling"):
            load_student(path)

    def test_refuses_a_setting_that_it_does_not_know(self, tmp_path):
        path = tmp_path / "a.safetensors"
        save_student(path, make_student(1), {})
        description = json.loads(path.with_suffix(".json").read_text())
        description["student"]["act_"] = description["student"].pop("act")
        path.with_suffix(".json").write_text(json.dumps(description))
        with pytest.raises(DamagedFileError, match=r"a\.json.*\n.*act_.*did you mean 'act'"):
            load_student(path)
