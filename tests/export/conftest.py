"""A run with one finished teacher of two and an untrained student: what there is to export, made in seconds."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from dataclasses import asdict

import pytest
import torch

from cpd.config import Config
from cpd.config.load import load, merge, read_toml, to_dict
from cpd.run.directory import Run, identity, published_policy
from cpd.run.files import write_json
from cpd.run.interrupt import Interrupt
from cpd.run.progress import MetricsLog, StatusRecord, write_status
from cpd.run.provenance import labels
from cpd.student.network import Student, save_student
from cpd.teachers.run_teacher import env_pool, run_teacher
from tests.conftest import MINIATURE, ROOT

TEACHERS = ROOT / "analysis" / "results" / "teachers" / "mt10-demo_rl"
TASK = "window-close-v3"
CHANGES = {
    "name": "demo",
    "stream": {"tasks": [TASK, "drawer-close-v3"], "horizon": 100},
    "rollouts": {"num_steps": 700, "shard_steps": 300},
    "teacher": {"gate": 0.0, "num_training_goals": 5},
}


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("export") / "runs" / "demo"
    config = load(Config, merge(read_toml(MINIATURE), CHANGES), "test")
    write_json(root / "config.json", to_dict(config))
    run = Run(root)
    teacher, student = run.teachers()[0], run.students()[0]
    source = published_policy(TEACHERS, TASK, 1)
    teacher.path.mkdir(parents=True)
    shutil.copy(source, teacher.policy)
    description = json.loads(source.with_suffix(".json").read_text())
    write_json(teacher.policy.with_suffix(".json"), description | identity(config, teacher))
    with closing(env_pool(config, 1)) as pool:
        run_teacher(run, teacher, pool, interrupt=Interrupt(), log=print)
    untrained = Student(config.student, 2)
    untrained.initialise(torch.Generator().manual_seed(1))
    tasks = {"distinct_tasks": list(config.stream.distinct_tasks), "labels": asdict(labels(config))}
    save_student(student.stage_policy(1), untrained, identity(config, student, 1) | tasks)
    student.complete.touch()
    log = MetricsLog(teacher.metrics)
    for iteration in range(1, 9):
        log.append(iteration=iteration, env_steps=100 * iteration, train_success=0.1 * iteration)
    log = MetricsLog(student.metrics)
    for step in range(5, 81, 5):
        log.append(stage=(step - 1) // 40, step=(step - 1) % 40 + 1, task=TASK, loss=1 / step, global_step=step)
    write_status(student.status, StatusRecord(state="done", updated=1e9))
    return run
