"""The replay memory: contents after every stage, budget, and uniformity."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpd.config import MemoryConfig
from cpd.distill.memory.memory import ReplayMemory
from cpd.distill.memory.segments import PER_SEGMENT, Segments
from cpd.distill.memory.selection import make_selection
from cpd.distill.stage_data import StageData


def stage(task: int, lengths: list[int], segment: int = 4) -> Segments:
    """Segments whose observations hold (task, step) so that every step can be recognised."""
    offsets = np.cumsum([0, *lengths]).astype(np.int64)
    num_steps = int(offsets[-1])
    obs = np.zeros((num_steps, 39), np.float32)
    obs[:, 0], obs[:, 1] = task, np.arange(num_steps)
    mean = np.repeat(obs[:, 1:2], 4, axis=1)
    return StageData(task, offsets, obs, mean, -mean).segments(segment)


def reservoir(budget: int, seed: int = 1) -> ReplayMemory:
    return ReplayMemory(make_selection(MemoryConfig(selection="reservoir"), seed), budget)


def stored_steps(memory: ReplayMemory) -> list[tuple[int, int]]:
    return [(int(task), int(step)) for task, step in memory.segments.observations[:, :2]]


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8), segment=st.integers(1, 7))
def test_the_grid_holds_every_step_once_and_respects_episodes(lengths, segment):
    segments = stage(0, lengths, segment)
    assert segments.num_steps == sum(lengths)
    assert segments.length.max() <= segment
    np.testing.assert_array_equal(segments.start, segments.first_step)
    episode = np.repeat(np.arange(len(lengths)), lengths)
    for first, length in zip(segments.first_step, segments.length, strict=True):
        assert len(set(episode[first : first + length])) == 1


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_taken_segments_keep_their_own_steps(data):
    segments = stage(3, [9, 4, 14])
    chosen = np.array(data.draw(st.lists(st.integers(0, len(segments) - 1), unique=True)), dtype=np.int64)
    selected = segments.take(chosen)
    for row, start, length in zip(chosen, selected.start, selected.length, strict=True):
        first = segments.first_step[row]
        np.testing.assert_array_equal(
            selected.observations[start : start + length, 1], np.arange(first, first + length)
        )
        np.testing.assert_array_equal(
            selected.teacher_mean[start : start + length, 0], np.arange(first, first + length)
        )


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 25), min_size=1, max_size=6), min_size=1, max_size=5),
    budget=st.integers(4, 80),
    seed=st.integers(1, 50),
)
def test_counts_of_distinct_steps_after_every_stage(lengths, budget, seed):
    memory = reservoir(budget, seed)
    for task, episodes in enumerate(lengths):
        memory.offer(stage(task, episodes))
        steps = stored_steps(memory)
        offered = sum(map(sum, lengths[: task + 1]))
        assert len(steps) == len(set(steps)) == memory.num_steps
        # Whole segments are kept, so up to one segment of the budget may stay unused.
        assert min(offered, budget - 3) <= memory.num_steps <= min(offered, budget)
        assert memory.num_bytes == memory.num_steps * 4 * (39 + 4 + 4) + len(memory.segments) * 25


def test_bytes_are_those_of_the_arrays():
    memory = reservoir(40)
    memory.offer(stage(0, [40, 40]))
    arrays = memory.segments.arrays()
    assert memory.num_bytes == sum(array.nbytes for array in arrays.values())
    assert all(len(arrays[name]) == len(memory.segments) for name in PER_SEGMENT)


def test_a_task_that_comes_again_changes_nothing():
    memory = reservoir(60)
    stages = [stage(task, [25] * 6) for task in range(3)]
    for segments in stages:
        memory.offer(segments)
    steps_before = stored_steps(memory)
    for segments in stages:
        memory.offer(segments)
        assert stored_steps(memory) == steps_before


def test_is_the_sample_that_the_whole_stream_at_once_would_give():
    stages = [stage(task, [25, 17, 30]) for task in range(4)]
    memory = reservoir(50)
    for segments in stages:
        memory.offer(segments)
    keys = {}
    for segments in stages:
        alone = reservoir(10**6)
        alone.offer(segments)
        for task, first in zip(alone.segments.task, alone.segments.first_step, strict=True):
            keys[int(task), int(first)] = None
    one_by_one = reservoir(50)
    for segments in reversed(stages):
        one_by_one.offer(segments)
    assert sorted(stored_steps(memory)) == sorted(stored_steps(one_by_one))
    assert len(keys) == sum(len(segments) for segments in stages)


def test_every_segment_is_equally_likely_to_be_held():
    num_stages, per_stage, draws = 3, 20, 600
    counts = np.zeros((num_stages, per_stage))
    stages = [stage(task, [4] * per_stage) for task in range(num_stages)]
    for seed in range(1, draws + 1):
        memory = reservoir(48, seed)
        for segments in stages:
            memory.offer(segments)
        assert len(memory.segments) == 12
        np.add.at(counts, (memory.segments.task, memory.segments.first_step // 4), 1)
    expected = draws * 12 / (num_stages * per_stage)
    # Chi-square of 59 cells, each with the variance of drawing without replacement; 98.3 is its 99.9 % point.
    statistic = ((counts - expected) ** 2 / (expected * (1 - 12 / 60))).sum() * (59 / 60)
    assert statistic < 98.3
    np.testing.assert_allclose(counts.sum(1) / draws, 4, atol=0.25)


def test_none_keeps_nothing():
    memory = ReplayMemory(make_selection(MemoryConfig(selection="none"), 1), 100)
    memory.offer(stage(0, [20]))
    assert memory.num_steps == memory.num_bytes == 0


@pytest.mark.parametrize("offered", [[], [[12, 9]], [[12, 9], [30]]])
def test_state_comes_back(offered):
    memory, other = reservoir(20), reservoir(20)
    for task, lengths in enumerate(offered):
        memory.offer(stage(task, lengths))
    other.restore(memory.state())
    assert stored_steps(other) == stored_steps(memory)
    memory.offer(stage(5, [11, 8]))
    other.offer(stage(5, [11, 8]))
    assert stored_steps(other) == stored_steps(memory)
