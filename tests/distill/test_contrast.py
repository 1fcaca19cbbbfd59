"""Training data of the task embedding, and prototypes that follow it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cpd.comm import SerialComm
from cpd.config import DistillConfig
from cpd.distill import contrast
from cpd.distill.batches import BatchSource
from cpd.distill.contrast import ContrastSource, prototypes_from_memory
from cpd.distill.memory.segments import Segments
from cpd.distill.run_student import run_student
from cpd.distill.stage_data import StageData, read_stage
from cpd.distill.trainer import StudentTrainer
from cpd.envs.metaworld.scaling import observation_scaling
from cpd.run.checkpoint import latest
from cpd.run.interrupt import Interrupt, InterruptedBySignal
from cpd.student.network import Student
from tests.distill.synthetic import stage_data, write_teachers
from tests.distill.test_trainer import make_trainer, train
from tests.student.test_network import make_student


def memory_of(steps_by_task: dict[int, int]) -> Segments:
    """The first steps of tasks, each a segment of its own."""
    parts = [stage_data(task).segments(1).take(np.arange(steps)) for task, steps in steps_by_task.items()]
    return Segments.concatenate([Segments.empty(), *parts])


@pytest.fixture
def source_of(monkeypatch):
    """Makes a source, by default without noise."""

    def make(data: StageData, memory: Segments, batch_size: int = 256, noise: float = 0.0) -> ContrastSource:
        monkeypatch.setattr(contrast, "BATCH_SIZE", batch_size)
        monkeypatch.setattr(contrast, "NOISE", noise)
        config = DistillConfig(precision="float64")
        batches = BatchSource(data, memory, config, 1, 1, 2, SerialComm(), torch.device("cpu"))
        return ContrastSource(batches, data, memory, 1, 2)

    return make


def places(obs_NO: np.ndarray, data: StageData) -> np.ndarray:
    """The step of `data` at which each observation occurs; KeyError if one does not occur."""
    steps = {row.astype(np.float64).tobytes(): step for step, row in enumerate(data.observations)}
    return np.array([steps[row.tobytes()] for row in np.ascontiguousarray(obs_NO)])


class TestBatch:
    def test_is_none_while_there_is_but_one_task(self, source_of):
        assert source_of(stage_data(0), Segments.empty()).batch(0) is None
        assert source_of(stage_data(0), memory_of({0: 5})).batch(0) is None

    def test_half_of_a_present_tasks_observations_open_an_episode(self, source_of):
        data = stage_data(2)
        source = source_of(data, memory_of({0: 5}), batch_size=40)
        steps = np.array([places(source.batch(step)[0].numpy(), data) for step in range(40)])
        assert steps.shape == (40, 20)
        assert set(steps[:, :10].ravel()) == set(data.offsets[:-1])
        others = steps[:, 10:].ravel()
        assert np.isin(others, data.offsets[:-1]).mean() == pytest.approx(1 / 24, abs=0.04)
        assert (np.bincount(others * 10 // data.num_steps, minlength=10) > 0).all()

    def test_an_earlier_tasks_are_mixtures_of_two_that_are_stored_of_it(self, source_of):
        stored = memory_of({0: 3}).observations.astype(np.float64)
        batch = source_of(stage_data(2), memory_of({0: 3}), batch_size=400).batch(0)
        rows = batch[1].numpy()
        mixed = []
        for first, second in ((0, 1), (0, 2), (1, 2)):
            edge = stored[second] - stored[first]
            share = (rows - stored[first]) @ edge / (edge @ edge)
            gap = np.abs(rows - stored[first] - share[:, None] * edge).max(1)
            between = (gap < 1e-9) & (share > 1e-6) & (share < 1 - 1e-6)
            mixed.append(between)
            # Two of three stored ones are drawn in two of nine cases.
            assert between.sum() == pytest.approx(200 * 2 / 9, abs=20)
            assert np.histogram(share[between], 4, (0, 1))[0].min() > 0
        alike = np.abs(rows[:, None] - stored).max(2).min(1) < 1e-9
        assert (np.sum(mixed, 0) + alike == 1).all()

    def test_a_task_that_comes_again_is_drawn_from_its_data_alone(self, source_of):
        data = stage_data(0)
        batch = source_of(data, memory_of({0: 5, 1: 5}), batch_size=100).batch(0)
        assert batch.shape == (2, 50, 39)
        places(batch[0].numpy(), data)

    def test_every_task_has_a_positive_in_the_smallest_batch(self, source_of):
        batch = source_of(stage_data(2), memory_of({0: 5, 1: 5}), batch_size=1).batch(0)
        assert batch.shape == (3, 2, 39)

    def test_a_long_stream_s_batches_hold_the_present_task_and_others_in_turn(self, source_of):
        """Tasks with one observation each, so that a row shows its task; the number of tasks in a batch stays."""
        earlier = range(1, 20)
        data = stage_data(0, num_episodes=1, length=1)
        source = source_of(data, memory_of(dict.fromkeys(earlier, 1)))
        only = {stage_data(task).observations[0].astype(np.float64).tobytes(): task for task in earlier}
        drawn = []
        for step in range(100):
            batch = source.batch(step)
            assert batch.shape == (contrast.MAX_TASKS, 256 // contrast.MAX_TASKS, 39)
            np.testing.assert_array_equal(batch[0], np.tile(data.observations, (len(batch[0]), 1)))
            drawn.append([only[row.tobytes()] for row in batch[1:, 0].numpy()])
            assert len(set(drawn[-1])) == contrast.MAX_TASKS - 1
        # Each earlier task is in 7 of 19 batches.
        assert np.bincount(np.ravel(drawn), minlength=20)[1:] == pytest.approx(700 / 19, abs=20)

    def test_does_not_depend_on_the_batches_drawn_before(self, source_of):
        data, memory = stage_data(2), memory_of({0: 5, 1: 5})
        source = source_of(data, memory, noise=0.1)
        batches = [source.batch(step) for step in range(contrast.BLOCK + 2)]
        again = source_of(data, memory, noise=0.1)
        for step in (contrast.BLOCK + 1, contrast.BLOCK, 3):
            assert torch.equal(again.batch(step), batches[step])
        assert len({batch.numpy().tobytes() for batch in batches}) == len(batches)

    @pytest.mark.parametrize("noise", [0.05, 0.4])
    def test_noise_is_in_the_students_scaling_and_each_numbers_own(self, noise, source_of):
        """Tasks with one observation each, so that only the noise varies."""
        data = stage_data(2, num_episodes=1, length=1)
        batch = source_of(data, memory_of({0: 1}), batch_size=2_000, noise=noise).batch(0).numpy()
        for rows, only in zip(batch, (data.observations[0], stage_data(0).observations[0]), strict=True):
            scaled = (rows - only) / observation_scaling()[1]
            np.testing.assert_allclose(scaled.std(0), noise, rtol=0.15)
            assert np.abs(scaled.mean(0)).max() < 0.15 * noise
            assert np.abs(np.corrcoef(scaled.T) - np.eye(39)).max() < 0.2


def prototype(student: Student, obs_NO: np.ndarray) -> torch.Tensor:
    """The direction of the mean embedding."""
    with torch.no_grad():
        embedded = [student.embedding(torch.from_numpy(row[None]).to(student.dtype))[0] for row in obs_NO]
    return F.normalize(torch.stack(embedded).mean(0), dim=0)


def assert_remembered(student: Student, memory: Segments, tasks: set[int]) -> None:
    """Of all tasks in memory, exactly those of `tasks` have the prototypes of the stored observations."""
    held = memory.observations_by_task()
    assert tasks == set(held)
    for task, obs_NO in held.items():
        torch.testing.assert_close(student.prototypes_KZ[task], prototype(student, obs_NO))


class TestPrototypes:
    def test_from_memory_each_is_of_its_own_tasks_observations(self):
        student, memory = make_student(task_identity="inferred"), memory_of({0: 7, 2: 4})
        student.prototypes_KZ[:] = 5.0
        prototypes_from_memory(student, memory)
        assert_remembered(student, memory, {0, 2})
        assert (student.prototypes_KZ[1] == 5.0).all()

    def test_within_a_stage_the_present_tasks_is_of_its_data_and_the_others_are_of_memory(self, source_of):
        student, memory = make_student(task_identity="inferred"), memory_of({0: 7, 1: 4})
        data = stage_data(0, num_episodes=30)
        source_of(data, memory).refresh_prototypes(student)
        openings = prototype(student, data.observations[data.offsets[:-1]])
        wanted = student.prototypes_KZ[0]
        torch.testing.assert_close(student.prototypes_KZ[1], prototype(student, memory.observations_by_task()[1]))
        torch.testing.assert_close(wanted.norm(), torch.tensor(1.0, dtype=student.dtype))
        assert wanted @ prototype(student, data.observations) > 0.98 > wanted @ student.prototypes_KZ[1]
        assert wanted @ openings > 0.98
        assert not student.prototypes_KZ[2].any()

    def test_at_a_stages_end_all_are_of_what_memory_holds_then_as_the_encoder_is_then(self):
        trainer = make_trainer(distill={"steps_per_stage": 15})
        for stage in range(3):
            train(trainer, until=15 * (stage + 1))
            assert_remembered(trainer.learner.student, trainer.memory.segments, set(range(stage + 1)))

    def test_refreshed_within_a_stage_they_follow_the_encoder(self):
        trainer = make_trainer(distill={"steps_per_stage": 30})
        train(trainer, until=45)
        stale = trainer.learner.student.prototypes_KZ.clone()
        assert stale[0].any() and not stale[1].any()
        trainer.learner.refresh_prototypes()
        fresh = trainer.learner.student.prototypes_KZ
        kept = trainer.memory.segments.observations_by_task()[0]
        torch.testing.assert_close(fresh[0], prototype(trainer.learner.student, kept))
        assert not torch.allclose(fresh[0], stale[0])
        assert fresh[1] @ prototype(trainer.learner.student, stage_data(1).observations) > 0.98

    def test_without_a_memory_the_present_tasks_is_left_as_its_data_make_it(self):
        trainer = make_trainer(memory={"selection": "none"}, distill={"steps_per_stage": 10})
        train(trainer, until=10)
        prototypes_KZ = trainer.learner.student.prototypes_KZ
        assert prototypes_KZ[0] @ prototype(trainer.learner.student, stage_data(0).observations) > 0.98
        assert not prototypes_KZ[1:].any()


def test_curves_are_measured_with_prototypes_of_the_encoder_as_it_is(make_run):
    """Stopped during the first episode of a curve: the saved prototypes are those it acts with."""

    class AskedInTheEpisode(Interrupt):
        looks = 0

        @property
        def requested(self) -> bool:
            self.looks += 1
            return self.looks > 40  # one check per step of the stage, and then those of the episode

    run = make_run(
        distill={"batch_size": 16},
        evaluation={"curve_points": 1, "num_episodes_brief": 1},
        logging={"checkpoint_every": 1_000},
    )
    element = run.students()[0]
    write_teachers(run, element)
    with pytest.raises(InterruptedBySignal, match="stage 0, step 40"):
        run_student(run, element, SerialComm(), interrupt=AskedInTheEpisode(), log=lambda line: None)
    state = latest(element.checkpoints).load()
    assert not state["curves"]
    trainer = StudentTrainer(element.config, element.seed, SerialComm(), torch.device("cpu"))
    trainer.restore(state["trainer"])
    saved = trainer.learner.student.prototypes_KZ.clone()
    teacher = run.teacher_of("drawer-close-v3", element.seed)
    trainer.begin_stage(read_stage(run, teacher, SerialComm(), element.config.distill.episodes))
    trainer.learner.refresh_prototypes()
    assert saved[0].any() and torch.equal(saved, trainer.learner.student.prototypes_KZ)
