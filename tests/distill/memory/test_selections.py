"""What every selection must do, and what equal shares and the greedy order add."""

from __future__ import annotations

from typing import get_args, get_type_hints

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpd.comm import SerialComm
from cpd.config import MemoryConfig
from cpd.distill.memory import selection
from cpd.distill.memory.dpp import select
from cpd.distill.memory.memory import ReplayMemory
from cpd.distill.memory.segments import Segments
from cpd.distill.memory.selection import SELECTIONS, make_selection, segment_features
from cpd.distill.stage_data import StageData
from cpd.run.checkpoint import latest, save
from cpd.seeding import generator

EVERY = pytest.mark.parametrize("name", sorted(SELECTIONS))
EQUAL = pytest.mark.parametrize("name", ["uniform", "dpp"])


def stage(task: int, lengths: list[int], segment: int = 4) -> Segments:
    """Random walks of 39 numbers; the first two columns of the teacher's mean hold (task, step)."""
    offsets = np.cumsum([0, *lengths]).astype(np.int64)
    num_steps = int(offsets[-1])
    walk = generator(9, "walk", task).normal(size=(num_steps, 39)).cumsum(axis=0).astype(np.float32)
    mean = np.zeros((num_steps, 4), np.float32)
    mean[:, 0], mean[:, 1] = task, np.arange(num_steps)
    return StageData(task, offsets, 0.01 * walk, mean, -mean).segments(segment)


def memory_of(name: str, budget: int, seed: int = 1, **over: float) -> ReplayMemory:
    return ReplayMemory(make_selection(MemoryConfig(selection=name, **over), seed), budget)


def stored_steps(memory: ReplayMemory) -> list[tuple[int, int]]:
    return [(int(task), int(step)) for task, step in memory.segments.teacher_mean[:, :2]]


def identities(memory: ReplayMemory, task: int) -> list[int]:
    """First steps of a task's segments, in the order of the memory."""
    return memory.segments.first_step[memory.segments.task == task].tolist()


def test_the_table_holds_exactly_what_recipes_may_name():
    assert {*SELECTIONS, "none"} == set(get_args(get_type_hints(MemoryConfig)["selection"]))


@EVERY
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 25), min_size=1, max_size=6), min_size=1, max_size=5),
    budget=st.integers(4, 80),
    seed=st.integers(1, 50),
)
def test_counts_of_distinct_steps_after_every_stage(name, lengths, budget, seed):
    memory = memory_of(name, budget, seed)
    for task, episodes in enumerate(lengths):
        held = set(stored_steps(memory))
        memory.offer(stage(task, episodes))
        steps = stored_steps(memory)
        offered = sum(map(sum, lengths[: task + 1]))
        assert len(steps) == len(set(steps)) == memory.num_steps
        assert min(offered, budget - 3) <= memory.num_steps <= min(offered, budget)
        assert {step for step in steps if step[0] < task} <= held


@EVERY
def test_a_stream_that_comes_twice_stores_nothing_twice(name):
    memory = memory_of(name, 200)
    stages = [stage(task, [25] * 8) for task in range(10)]
    counts = []
    for segments in stages:
        memory.offer(segments)
        counts.append(memory.num_steps)
    assert all(196 < count <= 200 for count in counts)
    steps_before = stored_steps(memory)
    for segments in stages:
        memory.offer(segments)
        steps = stored_steps(memory)
        # An episode's short last segment may still fit into what the reservoir's budget leaves.
        assert steps == steps_before if name != "reservoir" else set(steps_before) <= set(steps)
        assert len(set(steps)) == len(steps) == memory.num_steps <= 200


@EVERY
@pytest.mark.parametrize("until", [0, 1, 3])
def test_a_resumed_memory_goes_on_bit_for_bit(name, until, tmp_path):
    straight, first, resumed = (memory_of(name, 90) for _ in range(3))
    stages = [stage(task, [25, 13, 30]) for task in range(5)]
    for segments in stages[:until]:
        first.offer(segments)
    save(tmp_path, "step-000001", {"memory": first.state()})
    checkpoint = latest(tmp_path)
    assert checkpoint is not None
    resumed.restore(checkpoint.load()["memory"])
    for segments in stages[until:]:
        resumed.offer(segments)
    for segments in stages:
        straight.offer(segments)
    for key, array in straight.segments.arrays().items():
        np.testing.assert_array_equal(resumed.segments.arrays()[key], array)


@EVERY
def test_seeds_differ_and_repeat(name, monkeypatch):
    monkeypatch.setattr(selection, "MAX_CANDIDATES", 20)

    def held(seed: int) -> list[tuple[int, int]]:
        memory = memory_of(name, 80, seed)
        for task in range(3):
            memory.offer(stage(task, [25] * 8))
        return stored_steps(memory)

    assert held(1) == held(1) != held(2)


@EVERY
def test_other_ranks_take_over_rank_zeros_choice(name):
    class Told(SerialComm):
        """The second of two ranks, told rank 0's value."""

        rank, size = 1, 2

        def broadcast(self, value):
            assert value is None, "only rank 0 chooses"
            return np.array([2, 0])

    memory = memory_of(name, 80)
    memory.offer(stage(0, [25] * 8), Told())
    assert memory.segments.first_step.tolist() == [8, 0]


@EQUAL
def test_shares_are_equal_up_to_a_segment_whatever_teachers_wrote(name):
    memory = memory_of(name, 120)
    for task in range(6):
        memory.offer(stage(task, [25] * (6 + 3 * task)))
        counts = [sum(one == seen for one, _ in stored_steps(memory)) for seen in range(task + 1)]
        assert max(counts) - min(counts) <= 4
        assert 116 < sum(counts) <= 120


@EQUAL
def test_a_small_tasks_rest_goes_to_the_others(name):
    memory = memory_of(name, 100)
    for task, lengths in enumerate([[40, 40], [8], [40, 40]]):
        memory.offer(stage(task, lengths))
    counts = [sum(one == seen for one, _ in stored_steps(memory)) for seen in range(3)]
    assert counts[1] == 8 and counts[0] + counts[2] == 92 and abs(counts[0] - counts[2]) <= 4


@EQUAL
def test_shrinking_shares_keep_a_prefix_in_order(name):
    memory = memory_of(name, 120)
    orders: dict[int, list[int]] = {}
    for task in range(6):
        memory.offer(stage(task, [25] * 6))
        for seen, order in orders.items():
            left = identities(memory, seen)
            assert left == order[: len(left)]
        orders = {seen: identities(memory, seen) for seen in range(task + 1)}


def test_dpp_holds_the_greedy_choice_for_whatever_share_is_left():
    memory = memory_of("dpp", 120, start_share=0.0)
    stages = [stage(task, [24] * 6) for task in range(4)]
    for segments in stages:
        memory.offer(segments)
    for task, segments in enumerate(stages):
        left = identities(memory, task)
        draws = generator(1, "dpp", task)
        best = select(segment_features(segments), len(left), draws, limit=2_000)
        assert left == segments.first_step[best].tolist()


def test_dpp_spreads_wider_than_uniform():
    def least_distance(name: str) -> float:
        memory = memory_of(name, 60, start_share=0.0)
        memory.offer(stage(0, [100] * 6))
        features = segment_features(memory.segments)
        distances = np.linalg.norm(features[:, None] - features[None], axis=-1)
        return float((distances + 1e9 * np.eye(len(features))).min(1).mean())

    assert least_distance("dpp") > 1.3 * least_distance("uniform")


def test_dpp_fills_what_its_candidates_leave(monkeypatch):
    monkeypatch.setattr(selection, "MAX_CANDIDATES", 5)
    memory = memory_of("dpp", 100)
    memory.offer(stage(0, [24] * 6))
    assert memory.num_steps == 100
    few = memory_of("dpp", 20)
    few.offer(stage(0, [24] * 6))
    assert identities(few, 0) == identities(memory, 0)[:5]


def test_features_are_means_over_segments():
    segments = stage(0, [7, 5])
    scaled = segment_features(segments.take(np.array([1])))
    actions = np.zeros((1, 4), np.float32)
    mean = segments.observations[4:7].mean(axis=0, keepdims=True)
    one_step = StageData(0, np.array([0, 1]), mean, actions, actions).segments(4)
    np.testing.assert_allclose(scaled, segment_features(one_step), rtol=1e-5, atol=1e-6)


@EQUAL
def test_uniform_and_dpp_with_less_than_a_segment_per_task_keep_the_oldest(name):
    memory = memory_of(name, 9)
    for task in range(4):
        memory.offer(stage(task, [12]))
    assert sorted(set(memory.segments.task.tolist())) == [0, 1]
    memory.offer(stage(3, [12]))
    assert memory.num_steps == 8


@pytest.mark.parametrize("start_share", [0.25, 0.5, 1.0])
@EQUAL
def test_every_share_holds_segments_that_open_an_episode(name, start_share):
    memory = memory_of(name, 160, start_share=start_share)
    for task in range(5):
        memory.offer(stage(task, [24] * 30))
        held = memory.segments
        for seen in range(task + 1):
            opens = held.opens_episode[held.task == seen]
            assert opens[0], "a share of one segment is one that opens an episode"
            assert abs(opens.sum() - min(start_share * len(opens), 30)) <= 1
        np.testing.assert_array_equal(held.opens_episode, held.first_step % 24 == 0)
