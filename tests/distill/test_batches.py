"""Batches: pure functions of seed, stage and step; windows and shares of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpd.comm import SerialComm
from cpd.config import DistillConfig, MemoryConfig
from cpd.config.types import EpisodeChoice
from cpd.distill.batches import BatchSource
from cpd.distill.contrast import ContrastSource
from cpd.distill.memory.memory import ReplayMemory
from cpd.distill.memory.segments import Segments
from cpd.distill.memory.selection import make_selection
from cpd.distill.stage_data import StageData
from cpd.run.shards.mapped import MappedRows
from cpd.run.shards.reader import Rollouts, read_rollouts
from cpd.run.shards.writer import write_shards
from tests.distill.synthetic import stage_data
from tests.run.test_shards import ATTRIBUTES, LABELS, make_episode


@dataclass
class OneOf(SerialComm):
    """Looks like rank `rank` of `size`; nothing here communicates."""

    rank: int = 0
    size: int = 1


def source(memory: Segments | None = None, comm: SerialComm | None = None, **over) -> BatchSource:
    config = DistillConfig(**{"batch_size": 32, "precision": "float64", **over})
    memory = Segments.empty() if memory is None else memory
    return BatchSource(stage_data(0), memory, config, 4, 1, 2, comm or SerialComm(), torch.device("cpu"))


def test_depends_on_nothing_but_seed_stage_and_step():
    one, other = source(), source()
    for step in (5, 0, 5):
        one.batch(step + 1)
        for left, right in zip(one.batch(step)[:6], other.batch(step)[:6], strict=True):
            assert torch.equal(left, right)
    assert not torch.equal(one.batch(0).obs_RLO, one.batch(1).obs_RLO)


@settings(max_examples=20, deadline=None)
@given(size=st.integers(1, 7), step=st.integers(0, 50))
def test_ranks_share_the_rows_of_the_global_batch(size, step):
    memory = stage_data(1).segments(4)
    whole = source(memory).batch(step)
    rank_batches = [source(memory, OneOf(rank, size)).batch(step) for rank in range(size)]
    assert all(rank_batch.num_tokens == whole.num_tokens for rank_batch in rank_batches)
    assert sum(int(rank_batch.valid_RL.sum()) for rank_batch in rank_batches) == whole.num_tokens
    for rank, rank_batch in enumerate(rank_batches):
        assert rank_batch.num_replayed == int(rank_batch.replayed_R.sum())
        assert rank_batch.replayed_R[: rank_batch.num_replayed].all()
        for mine, every in zip(rank_batch[:6], whole[:6], strict=True):
            assert torch.equal(mine, every[rank::size])


@pytest.mark.parametrize("context", [1, 4, 9])
def test_every_step_ends_one_window_that_stays_in_its_episode(context):
    data, stored = stage_data(0), stage_data(1).segments(4)
    batches = BatchSource(data, stored, DistillConfig(), context, 1, 2, SerialComm(), torch.device("cpu"))
    episode = np.repeat(np.arange(len(data.offsets) - 1), np.diff(data.offsets))
    last = np.arange(data.num_steps)
    starts, length = batches.windows_of(last)
    np.testing.assert_array_equal(episode[starts - stored.num_steps], episode)
    np.testing.assert_array_equal(length, np.minimum(last - data.offsets[episode] + 1, context))


def test_windows_hold_consecutive_steps_with_their_labels():
    data = stage_data(0)
    places = {row.astype(np.float64).tobytes(): step for step, row in enumerate(data.observations)}
    batch = source().batch(3)
    assert batch.num_tokens == batch.valid_RL.sum()
    for row in range(32):
        length = int(batch.valid_RL[row].sum())
        assert batch.valid_RL[row, :length].all()
        steps = [places[obs.numpy().tobytes()] for obs in batch.obs_RLO[row, :length]]
        assert steps == list(range(steps[0], steps[0] + length))
        assert length == 4 or steps[0] in data.offsets
        np.testing.assert_array_equal(batch.teacher_mean_RLA[row, :length], data.teacher_mean[steps])
    floor = source(std_floor=0.5).batch(3).teacher_log_std_RLA
    torch.testing.assert_close(floor, torch.full_like(floor, float(np.log(0.5))))


@pytest.mark.parametrize("share, wanted", [(0.0, 0), (0.25, 8), (0.5, 16), (0.999, 31)])
def test_the_first_rows_are_replayed_segments_of_their_own_task(share, wanted):
    memory = stage_data(1).segments(4).take(np.arange(5))
    batch = source(memory, replay_share=share).batch(0)
    assert batch.replayed_R.tolist() == [1.0] * wanted + [0.0] * (32 - wanted)
    assert batch.task_R.tolist() == [1] * wanted + [0] * (32 - wanted)
    held = {row.astype(np.float64).tobytes() for row in memory.observations}
    current = {row.astype(np.float64).tobytes() for row in stage_data(0).observations}
    assert all(obs.numpy().tobytes() in held for obs in batch.obs_RLO[:wanted].reshape(-1, 39))
    assert all(obs.numpy().tobytes() in current for obs in batch.obs_RLO[wanted:].reshape(-1, 39))


def test_an_empty_memory_leaves_the_whole_batch_to_the_current_task():
    assert not source().batch(0).replayed_R.any()


def test_the_probe_holds_the_current_task_alone():
    probe = source(stage_data(1).segments(4)).probe()
    assert len(probe.obs_RLO) == 32
    assert not probe.task_R.any() and not probe.replayed_R.any()


def test_the_probe_and_the_reference_are_drawn_apart_from_the_batches():
    one = source(stage_data(1).segments(4), replay_share=0.5)
    assert not torch.equal(one.probe().obs_RLO[:16], one.batch(0).obs_RLO[16:])
    assert not torch.equal(source().probe().obs_RLO, source().batch(0).obs_RLO)
    assert not torch.equal(one.reference(0, 16).obs_RLO, one.batch(0).obs_RLO[:16])


class TestRehearsalMixtures:
    """A memory with interleaved segments of two tasks, one of which has three times as many."""

    MEMORY = Segments.concatenate([stage_data(1).segments(4), stage_data(2, num_episodes=4).segments(4)])
    MEMORY = MEMORY.take(np.random.default_rng(0).permutation(len(MEMORY)))

    def mixed(self) -> BatchSource:
        return source(self.MEMORY, batch_size=800, replay_share=0.5, rehearsal=True)

    def segments(self) -> tuple[np.ndarray, np.ndarray]:
        """For every replayed row, the numbers of its segment and of the one that is mixed in."""
        windows = self.mixed().windows(3)
        numbers = {start: number for number, start in enumerate(self.MEMORY.start.tolist())}
        first, other = windows.start[:400], windows.mixture[0][:400]
        return np.array([numbers[start] for start in first]), np.array([numbers[start] for start in other])

    def test_two_segments_of_one_task_are_mixed_and_all_of_them_are(self):
        first, other = self.segments()
        np.testing.assert_array_equal(self.MEMORY.task[first], self.MEMORY.task[other])
        # 400 draws among about 80 and 26 segments of the two tasks.
        for task in (1, 2):
            candidates = np.flatnonzero(self.MEMORY.task == task)
            drawn = other[self.MEMORY.task[first] == task]
            assert len(np.unique(drawn)) > 0.9 * len(candidates)
        assert (first != other).mean() > 0.9

    def test_observations_are_their_weighted_mean_over_the_steps_that_both_have(self):
        batch, weight = self.mixed().batch(3), self.mixed().windows(3).mixture[1]
        memory, lengths = self.MEMORY, set()
        assert np.histogram(weight[:400], 4, (0, 1))[0].min() > 60
        for row, (first, other) in enumerate(zip(*self.segments(), strict=True)):
            length = min(memory.length[first], memory.length[other])
            lengths.add((int(memory.length[first]), int(memory.length[other])))
            assert batch.valid_RL[row].tolist() == [1.0] * length + [0.0] * (4 - length)
            left, right = (
                memory.observations[memory.start[one] : memory.start[one] + length].astype(np.float64)
                for one in (first, other)
            )
            wanted = weight[row] * left + (1.0 - weight[row]) * right
            np.testing.assert_allclose(batch.obs_RLO[row, :length], wanted, rtol=0, atol=1e-12)
            assert batch.task_R[row] == memory.task[first]
        assert {(4, 4), (4, 1), (1, 4)} <= lengths
        assert batch.num_tokens == batch.valid_RL.sum()

    def test_rows_of_the_current_task_are_left_as_they_are(self):
        batch = self.mixed().batch(3)
        rows = {row.astype(np.float64).tobytes() for row in stage_data(0).observations}
        assert all(obs.numpy().tobytes() in rows for obs in batch.obs_RLO[400:].reshape(-1, 39))

    def test_without_rehearsal_nothing_is_mixed(self):
        assert source(self.MEMORY, replay_share=0.5).windows(3).mixture is None
        assert source(rehearsal=True).windows(3).mixture is None


def taught(folder: Path, outcomes: Sequence[bool]) -> Rollouts:
    """Rollouts of episodes of 3, 4, 5 ... steps that succeeded or not."""
    episodes = [make_episode(3 + number, number) for number in range(len(outcomes))]
    for episode, success in zip(episodes, outcomes, strict=True):
        episode.successes[:] = False
        episode.successes[-1] = success
    write_shards(folder, ATTRIBUTES, episodes, 6)
    return read_rollouts(folder, task=ATTRIBUTES.task, labels=LABELS)


def test_failed_episodes_are_left_out_whole(tmp_path: Path) -> None:
    rollouts = taught(tmp_path, [True, False, True])
    data = StageData.from_rollouts(rollouts, [ATTRIBUTES.task], "successful")
    assert data.offsets.tolist() == [0, 3, 8]
    rows = [0, 1, 2, 7, 8, 9, 10, 11]
    np.testing.assert_array_equal(data.observations, rollouts.observations[rows])
    np.testing.assert_array_equal(data.teacher_mean, rollouts.teacher_mean[rows])
    np.testing.assert_array_equal(data.teacher_log_std, rollouts.teacher_log_std[rows])


@pytest.mark.parametrize(("outcomes", "episodes"), [([False, False], "successful"), ([True, False], "all")])
def test_all_episodes_are_distilled_where_none_succeeded_or_if_so_chosen(
    tmp_path: Path, outcomes: list[bool], episodes: EpisodeChoice
) -> None:
    data = StageData.from_rollouts(taught(tmp_path, outcomes), [ATTRIBUTES.task], episodes)
    assert data.offsets.tolist() == [0, 3, 7]


def test_mapped_rollouts_are_distilled_like_copied_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = taught(tmp_path, [True, False] * 20)
    monkeypatch.setattr("cpd.run.shards.reader.MAX_COPIED_BYTES", 0)
    mapped = read_rollouts(tmp_path, task=ATTRIBUTES.task, labels=LABELS)
    assert isinstance(mapped.observations, MappedRows) and isinstance(copied.observations, np.ndarray)
    np.testing.assert_array_equal(mapped.observations, copied.observations)
    memory = stage_data(1).segments(4)
    sources, memories = [], []
    for rollouts in (copied, mapped):
        data = StageData.from_rollouts(rollouts, [ATTRIBUTES.task], "successful")
        config = DistillConfig(replay_share=0.5, rehearsal=True)
        batches = BatchSource(data, memory, config, 4, 1, 2, SerialComm(), torch.device("cpu"))
        sources.append((batches, ContrastSource(batches, data, memory, 1, 2)))
        chosen = ReplayMemory(make_selection(MemoryConfig(), 1), 40)
        chosen.offer(data.segments(4))
        memories.append(chosen.state())
    (one, one_contrast), (other, other_contrast) = sources
    for left, right in zip(one.batch(3)[:6], other.batch(3)[:6], strict=True):
        assert torch.equal(left, right)
    assert torch.equal(one_contrast.batch(3), other_contrast.batch(3))
    assert all(torch.equal(tensor, memories[1][name]) for name, tensor in memories[0].items())
