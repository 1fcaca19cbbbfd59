"""The contrastive task embedding, and the task that an actor infers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cpd.student.actor import StudentActor
from cpd.student.task_embedding import TaskEncoder, info_nce
from tests.student.test_network import TASKS, make_student, observations


def by_hand(z: torch.Tensor, task: torch.Tensor, temperature: float) -> float:
    """Compute the loss term by term."""
    total = 0.0
    for i in range(len(z)):
        positives = [p for p in range(len(z)) if p != i and task[p] == task[i]]
        others = [float(z[i] @ z[a]) / temperature for a in range(len(z)) if a != i]
        total -= np.mean([float(z[i] @ z[p]) / temperature - np.log(np.sum(np.exp(others))) for p in positives])
    return total / len(z)


def test_info_nce_is_what_its_formula_says():
    z_JNZ = torch.nn.functional.normalize(torch.randn(3, 4, 5, dtype=torch.float64), dim=-1)
    task = torch.arange(3).repeat_interleave(4)
    assert float(info_nce(z_JNZ, 0.2)) == pytest.approx(by_hand(z_JNZ.flatten(0, 1), task, 0.2))


def test_info_nce_is_lowest_if_embeddings_are_equal_within_a_task_and_orthogonal_between_tasks():
    apart, mixed = torch.eye(4, dtype=torch.float64)[torch.tensor([[[0, 0], [1, 1]], [[0, 1], [0, 1]]])]
    assert info_nce(apart, 0.1) < info_nce(mixed, 0.1)


def test_embeddings_of_an_untrained_encoder_are_unit_vectors_that_keep_distances():
    encoder = TaskEncoder(39, torch.float64)
    near, far = torch.randn(2, 39, dtype=torch.float64)
    z = encoder(torch.stack([near, near + 0.01, far]))
    torch.testing.assert_close(z.norm(dim=1), torch.ones(3, dtype=torch.float64))
    assert z[0] @ z[1] > z[0] @ z[2]


def student_with_prototypes(*tasks: int, **over):
    """Create a student whose prototypes of `tasks` are of observations drawn with the task as seed."""
    student = make_student(task_identity="inferred", belief="embedding", **over)
    for task in tasks:
        student.known_K[task] = True
        student.set_prototype(task, observations(1, seed=task).to(student.dtype))
    return student


def believed(actor):
    """The positions of the tasks that `actor` infers."""
    return [TASKS.index(belief.believed) for belief in actor.beliefs]


class TestInferredTask:
    def test_is_the_task_of_the_nearest_prototype(self):
        actor = StudentActor(student_with_prototypes(0, 1, 2), TASKS)
        actor.reset([""] * 3)
        actor.act(torch.cat([observations(1, seed=seed) for seed in (2, 0, 1)]).float().numpy())
        assert believed(actor) == [2, 0, 1]

    def test_is_never_a_task_without_a_prototype(self):
        actor = StudentActor(student_with_prototypes(0, 2), TASKS)
        actor.reset([""] * 1)
        actor.act(observations(1, seed=1).float().numpy())
        assert believed(actor) in ([0], [2])
        blank = StudentActor(student_with_prototypes(), TASKS)
        blank.reset([""] * 2)
        assert np.isfinite(blank.act(observations(2).float().numpy())).all()

    def test_later_observations_do_not_change_it(self):
        """They follow from the student's own actions."""
        actor = StudentActor(student_with_prototypes(0, 1), TASKS)
        actor.reset([""] * 1)
        for seed in (0, 1, 1, 1):
            actor.act(observations(1, seed=seed).float().numpy())
        assert believed(actor) == [0]

    def test_is_reset_with_every_episode(self):
        actor = StudentActor(student_with_prototypes(0, 1), TASKS)
        for seed in (0, 1):
            actor.reset([""] * 1)
            actor.act(observations(1, seed=seed).float().numpy())
            assert believed(actor) == [seed]

    def test_inferred_ignores_the_name_of_the_task_and_given_uses_only_the_name(self):
        obs = observations(2, seed=0).float().numpy()
        student = student_with_prototypes(0, 1)
        actions = []
        for task in TASKS[:2]:
            actor = StudentActor(student, TASKS)
            actor.reset([task] * 2)
            actions.append(actor.act(obs))
        np.testing.assert_array_equal(*actions)
        given = make_student(task_identity="given")
        for position, task in enumerate(TASKS):
            actor = StudentActor(given, TASKS)
            actor.reset([task] * 2)
            with torch.no_grad():
                out = given(torch.from_numpy(obs).double().unsqueeze(1), task_B=torch.tensor([position] * 2))
            np.testing.assert_array_equal(actor.act(obs), out.mean_BLA[:, 0].clamp(-1.0, 1.0).float().numpy())
            assert actor.beliefs == []

    def test_mixing_tasks_in_a_batch_gives_what_each_gets_alone(self):
        student = student_with_prototypes(0, 1, 2)
        obs = torch.stack([observations(6, seed=seed) for seed in (0, 1, 2)]).float().numpy()
        together = StudentActor(student, TASKS)
        together.reset([""] * 3)
        alone = [StudentActor(student, TASKS) for _ in range(3)]
        for actor in alone:
            actor.reset([""] * 1)
        for step in range(6):
            mixed = together.act(obs[:, step])
            single = np.concatenate([actor.act(obs[row : row + 1, step]) for row, actor in enumerate(alone)])
            np.testing.assert_allclose(mixed, single, atol=1e-7)
