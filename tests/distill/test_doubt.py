"""Which tasks are confused, and what is measured about them, in the real simulator."""

import numpy as np
import torch

from cpd.comm import SerialComm
from cpd.distill.doubt import confused_pairs, measure_plans, opening_observations
from cpd.distill.memory.segments import Segments
from cpd.distill.stage_data import StageData
from cpd.envs.cells import EnvPool
from cpd.student.plans import Plan
from tests.student.test_network import make_student

TASKS = ("reach-v3", "pick-place-v3", "drawer-close-v3")


def stored(task: int, observations: np.ndarray) -> Segments:
    """Store one-step segments, half of which open an episode."""
    actions = np.zeros((len(observations), 4), np.float32)
    offsets = np.arange(0, len(observations) + 1, 2)
    return StageData(task, offsets, observations.astype(np.float32), actions, actions).segments(1)


def doubting_student():
    """Tasks 0 and 1 open alike, task 2 does not."""
    student = make_student(task_identity="inferred", belief="density")
    rng = np.random.default_rng(1)
    memory = []
    for task, centre in enumerate((0.0, 0.0, 1.0)):
        obs = rng.normal(centre, 0.05, (40, 39))
        student.known_K[task] = True
        student.density.fit(task, torch.from_numpy(obs))
        memory.append(stored(task, obs))
    return student, Segments.concatenate(memory)


def test_only_tasks_that_the_belief_confuses_are_paired_and_only_once():
    student, memory = doubting_student()
    assert {task: len(obs) for task, obs in opening_observations(memory).items()} == {0: 20, 1: 20, 2: 20}
    assert confused_pairs(student, memory) == [(0, 1)]
    student.plans.record(Plan(0, 1), 0, 1.0)
    assert confused_pairs(student, memory) == []


def test_every_plan_is_measured_on_both_tasks_and_a_stop_ends_it(monkeypatch):
    monkeypatch.setattr("cpd.distill.doubt.NUM_EPISODES", 2)
    student, _ = doubting_student()
    pool = EnvPool()
    measured = measure_plans(student, TASKS, [(0, 2)], 6, pool, SerialComm(), should_stop=lambda: False)
    assert measured is not None
    assert set(measured) == {Plan(0, 0), Plan(0, 2), Plan(2, 0), Plan(2, 2)}
    assert all({task: len(outcomes) for task, outcomes in by.items()} == {0: 2, 2: 2} for by in measured.values())
    assert measure_plans(student, TASKS, [(0, 2)], 6, pool, SerialComm(), should_stop=lambda: True) is None
    pool.close()
