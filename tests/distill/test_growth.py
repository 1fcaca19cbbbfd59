"""Growth: which earlier task serves a new one best, what is copied, and how copies differ."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cpd.comm import SerialComm
from cpd.distill import growth
from cpd.distill.batches import Batch
from cpd.distill.growth import ROW_NOISE, GrowthDecision, Probe, grow, probe, probed_tasks
from cpd.distill.losses import LOSSES
from cpd.student.network import Student, StudentOutput
from tests.student.test_network import make_student, observations

LENGTHS = (5, 3, 1, 4)


def token_loss(out: StudentOutput, batch: Batch) -> torch.Tensor:
    return LOSSES["mse"](out.mean_BLA, out.log_std_BLA, batch.teacher_mean_RLA, batch.teacher_log_std_RLA)


def student_of(*sizes: int, **over) -> Student:
    """A student with a task for every argument, whose group has that many experts in every layer."""
    student = make_student(**{"num_experts": sum(sizes), "task_identity": "onehot", **over})
    group = torch.arange(len(sizes))
    for task in range(len(sizes)):
        student.assign_group(task, task)
    for moe in student.moes:
        moe.group_E[:] = group.repeat_interleave(torch.tensor(sizes))
        moe.read_layout()
    return student


def batch_of(student: Student, task: int) -> Batch:
    """Windows of different lengths, labelled by the student as `task` except for the padding."""
    obs = observations(len(LENGTHS), 5)
    task_B = torch.full((len(LENGTHS),), task)
    with torch.no_grad():
        out = student(obs, task_B=task_B)
    valid = (torch.arange(5) < torch.tensor(LENGTHS)[:, None]).double()
    mean = torch.where(valid.bool()[..., None], out.mean_BLA, 1e3 * (1 + torch.arange(4.0)))
    return Batch(obs, mean, out.log_std_BLA, valid, task_B, torch.zeros(len(LENGTHS)), sum(LENGTHS))


class TestProbe:
    @pytest.mark.parametrize("best", [0, 1, 2])
    def test_tells_the_task_with_the_least_loss_and_what_it_uses(self, best):
        student = student_of(3, 3, 3)
        batch = batch_of(student, best)
        for seen in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
            result = probe(student, batch, token_loss, seen, SerialComm())
            assert (result.task, result.loss) == (best, pytest.approx(0.0, abs=1e-20))
            others = result.counts_LE.copy()
            others[:, 3 * best : 3 * best + 3] = 0
            assert not others.any()
            np.testing.assert_array_equal(result.counts_LE, counts_as(student, batch, best))

    def test_looks_at_known_tasks_alone(self):
        student = student_of(3, 3, 3)
        batch = batch_of(student, 1)
        assert probe(student, batch, token_loss, [0, 2], SerialComm()).task in (0, 2)
        assert probe(student, batch, token_loss, [2], SerialComm()).task == 2

    def test_of_many_tasks_those_that_begin_most_alike_are_probed(self, monkeypatch):
        student = student_of(3, 3, 3)
        for task in range(3):
            student.density.fit(task, observations(20, seed=task))
        seen, opening_NO = [2, 0, 1], observations(4, seed=1)
        assert probed_tasks(student, seen, opening_NO) == seen
        monkeypatch.setattr(growth, "MAX_PROBED", 1)
        assert probed_tasks(student, seen, opening_NO) == [1]

    def test_padding_counts_neither_as_loss_nor_as_use(self):
        student = student_of(3, 3)
        batch = batch_of(student, 0)
        result = probe(student, batch, token_loss, [1], SerialComm())
        losses = []
        for row, length in enumerate(LENGTHS):
            with torch.no_grad():
                out = student(batch.obs_RLO[row : row + 1, :length], task_B=torch.tensor([1]))
            losses += (out.mean_BLA[0] - batch.teacher_mean_RLA[row, :length]).square().sum(-1).tolist()
        assert len(losses) == batch.num_tokens
        assert result.loss == pytest.approx(np.mean(losses))
        assert result.counts_LE.sum(1).tolist() == [2 * batch.num_tokens] * 2

    def test_a_student_without_tasks_is_looked_at_once(self):
        student = make_student()
        batch = batch_of(make_student(seed=2), 0)
        result = probe(student, batch, token_loss, [2, 1], SerialComm())
        assert result.task == 0 and result.loss > 0
        assert result.counts_LE.sum(1).tolist() == [2 * batch.num_tokens] * 2


def counts_as(student: Student, batch: Batch, task: int) -> np.ndarray:
    """Assignments [layers, experts] of the batch's steps, one window after another, as `task`."""
    total = np.zeros((len(student.moes), student.num_experts))
    for row, length in enumerate(LENGTHS):
        with torch.no_grad():
            out = student(
                batch.obs_RLO[row : row + 1, :length],
                task_B=torch.tensor([task]),
                valid_BL=torch.ones(1, length, dtype=torch.float64),
            )
        total += np.stack([stats.counts_E.numpy() for stats in out.stats])
    return total


def grown(student: Student, counts: list[list[int]], nearest: int, **over) -> GrowthDecision:
    result = Probe(nearest, 0.25, np.array(counts, np.float64))
    return grow(student, result, **{"seed": 1, "stage": 2, "task": 2, "num_new": 4, "reason": "why", **over})


class TestGrow:
    #: By layer, for groups of two and of three; the new task does not use the first group's experts.
    COUNTS = ([9, 0, 2, 5, 0], [0, 9, 4, 0, 7])

    def test_copies_the_nearest_tasks_experts_by_use_and_begins_again_when_all_are_copied(self):
        student = student_of(2, 3)
        decision = grown(student, self.COUNTS, nearest=1)
        assert decision.sources == [[3, 2, 4, 3], [4, 2, 3, 4]]
        for moe, sources in zip(student.moes, decision.sources, strict=True):
            assert moe.num_experts == 9
            for stack in (moe.up.stack, moe.down.stack):
                assert torch.equal(stack[5:], stack[sources])

    @pytest.mark.parametrize("nearest", [0, 1])
    def test_the_copies_are_a_new_group_and_open(self, nearest):
        student = student_of(2, 3)
        decision = grown(student, self.COUNTS, nearest)
        assert decision.group == 2 and student.group_K.tolist() == [0, 1, 2]
        for moe in student.moes:
            assert moe.group_E.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2]
            assert not moe.logit_offset.any()

    @pytest.mark.parametrize("nearest", [0, 1])
    @pytest.mark.parametrize("num_new", [0, 2])
    def test_the_task_begins_with_the_nearest_ones_vector(self, nearest, num_new):
        student = student_of(2, 3)
        vectors = student.task.detach().clone()
        grown(student, self.COUNTS, nearest, num_new=num_new)
        assert torch.equal(student.task[2], vectors[nearest])
        assert torch.equal(student.task[:2], vectors[:2])

    @pytest.mark.parametrize("nearest", [0, 1])
    def test_without_new_experts_the_nearest_tasks_group_is_shared(self, nearest):
        student = student_of(2, 3)
        decision = grown(student, self.COUNTS, nearest, num_new=0)
        assert decision == GrowthDecision(2, 2, nearest, 0.25, "why", 0, [[], []], nearest)
        assert student.group_K.tolist() == [0, 1, nearest]
        assert student.num_experts == 5

    def test_without_tasks_all_experts_are_copied_from_and_copies_are_closed(self):
        student = make_student(num_experts=3)
        decision = grown(student, [[1, 3, 2], [2, 0, 7]], nearest=0)
        assert decision.sources == [[1, 2, 0, 1], [2, 0, 1, 2]]
        assert decision.group == 0 and not student.group_K.any()
        for moe in student.moes:
            assert not moe.group_E.any()
            assert moe.logit_offset.tolist() == [0.0] * 3 + [-np.inf] * 4


def test_fresh_experts_start_like_those_of_a_new_student_and_leave_the_others_alone():
    student = student_of(2, 3, expert_width=256)
    earlier = [moe.up.stack.clone() for moe in student.moes]
    vectors = student.task.detach().clone()
    grown(student, TestGrow.COUNTS, nearest=1, num_new=2)
    student.initialise_newest(2, 2, torch.Generator().manual_seed(0))
    for moe, up in zip(student.moes, earlier, strict=True):
        assert torch.equal(moe.up.stack[:5], up)
        spreads = [stack.std().item() for stack in (moe.up.stack[5:], moe.up.stack[:5])]
        assert spreads[0] == pytest.approx(spreads[1], rel=0.1)
        assert not any(torch.equal(new, old) for new in moe.up.stack[5:] for old in up)
    assert torch.equal(student.task[:2], vectors[:2]) and not torch.equal(student.task[2], vectors[1])


class TestRowNoise:
    """Copies of one expert differ in their router rows alone."""

    @staticmethod
    def noises(**over) -> list[np.ndarray]:
        """For every layer and copy, the deviation of its router row from the source's, relative to its scale."""
        student = student_of(2, width=512, expert_width=4)
        rows = [row for moe in student.moes for row in moe.router.stack]
        with torch.no_grad():
            for scale, row in zip((1.0, 50.0, 0.1, 7.0), rows, strict=True):
                row.mul_(scale)
        decision = grown(student, [[1, 2], [2, 1]], nearest=0, **over)
        deviations = []
        for moe, sources in zip(student.moes, decision.sources, strict=True):
            for copy, source in zip(moe.router.stack[2:], sources, strict=True):
                row = moe.router.stack[source].detach()
                deviations.append(((copy - row) / row.square().mean().sqrt()).detach().numpy())
        return deviations

    def test_is_a_small_share_of_the_row_it_moves(self):
        noises = self.noises()
        assert len(noises) == 8
        assert 0.0 < ROW_NOISE < 0.5
        for noise in noises:
            assert noise.std() == pytest.approx(ROW_NOISE, rel=0.15)
            assert abs(noise.mean()) < 0.2 * ROW_NOISE

    def test_is_its_own_in_every_layer_and_copy_seed_and_stage(self):
        noises = [*self.noises(), *self.noises(seed=2), *self.noises(stage=1)]
        correlation = np.corrcoef(noises) - np.eye(len(noises))
        assert np.abs(correlation).max() < 0.3

    def test_is_the_same_whenever_it_is_drawn(self):
        for left, right in zip(self.noises(), self.noises(), strict=True):
            np.testing.assert_array_equal(left, right)
