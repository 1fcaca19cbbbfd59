"""Rehearsal: the student from the start of the stage labels replayed rows; others are unchanged."""

from __future__ import annotations

import math

import torch

from cpd.distill.batches import Batch
from cpd.distill.flat import FlatParameters
from cpd.distill.rehearsal import Rehearsal
from cpd.student.network import Student
from tests.student.test_network import make_student, observations

REPLAYED = [True, True, True, False, False]
FLOOR = 0.25


def wide_student(**over) -> Student:
    """A student whose means are often out of range and whose deviations are often below the floor."""
    student = make_student(**{"task_identity": "onehot", **over})
    with torch.no_grad():
        student.head.weight.mul_(3.0)
        if student.task is not None:
            student.task.mul_(50.0)
    return student


def batch() -> Batch:
    """Three replayed rows of two tasks, then two rows of another."""
    ones = torch.ones(5, 5, 4, dtype=torch.float64)
    valid = torch.ones(5, 5, dtype=torch.float64)
    replayed = torch.tensor(REPLAYED).double()
    return Batch(
        observations(5, 5), 0.125 * ones, -0.5 * ones, valid, torch.tensor([0, 1, 0, 2, 2]), replayed, 25, 3
    )


def rehearsal_of(student: Student, num_opening: int = 0) -> Rehearsal:
    flat = FlatParameters(student)
    return Rehearsal(student, flat.values.clone(), flat, FLOOR, num_opening)


def assert_labels(relabelled: Batch, mean: torch.Tensor, log_std: torch.Tensor) -> None:
    """Check the labels of replayed rows against the Gaussian of the whole batch; others are unchanged."""
    rows, original = torch.tensor(REPLAYED), batch()
    torch.testing.assert_close(relabelled.teacher_mean_RLA[rows], mean[rows].clamp(-1.0, 1.0))
    torch.testing.assert_close(relabelled.teacher_log_std_RLA[rows], log_std[rows].clamp(min=math.log(FLOOR)))
    for name, value in original._asdict().items():
        left = getattr(relabelled, name)
        if name.startswith("teacher"):
            left, value = left[~rows], value[~rows]
        assert left == value if not isinstance(value, torch.Tensor) else torch.equal(left, value), name


def test_labels_are_clipped_and_floored_as_teachers_are():
    student = wide_student()
    with torch.no_grad():
        out = student(batch().obs_RLO, task_B=batch().task_R)
    rows = torch.tensor(REPLAYED)
    assert 0.1 < (out.mean_BLA[rows].abs() > 1.0).double().mean() < 0.9
    assert 0.1 < (out.log_std_BLA[rows] < math.log(FLOOR)).double().mean() < 0.9
    assert_labels(rehearsal_of(student).relabel(batch()), out.mean_BLA, out.log_std_BLA)


def test_labels_stay_while_the_student_learns():
    student = wide_student()
    rehearsal = rehearsal_of(student)
    relabelled = rehearsal.relabel(batch())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    after = rehearsal.relabel(batch())
    assert torch.equal(after.teacher_mean_RLA, relabelled.teacher_mean_RLA)
    assert torch.equal(after.teacher_log_std_RLA, relabelled.teacher_log_std_RLA)
    assert not after.teacher_mean_RLA.requires_grad


def test_a_student_resumed_within_a_stage_is_rehearsed_as_the_stage_found_it():
    """By then its parameters have changed, and the experts that were added are half open."""
    student = wide_student(task_identity="none")
    with torch.no_grad():
        out = student(batch().obs_RLO)
    for moe in student.moes:
        moe.grow(1, torch.ones(16), group=0, closed=True)
    flat = FlatParameters(student)
    values = flat.values.clone()
    flat.values += 0.5
    student.set_logit_offset(1, -0.1)
    rehearsal = Rehearsal(student, values, flat, FLOOR, 1)
    assert_labels(rehearsal.relabel(batch()), out.mean_BLA, out.log_std_BLA)
    assert student.moes[0].logit_offset[-1] == -0.1


def test_a_batch_without_replayed_rows_is_left_alone():
    without_replay = batch()._replace(replayed_R=torch.zeros(5), num_replayed=0)
    assert rehearsal_of(wide_student()).relabel(without_replay) is without_replay
