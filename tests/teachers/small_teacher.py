"""A teacher that trains in a second: settings, run, and results."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

from cpd.config import Config
from cpd.config.load import load, merge, read_toml, to_dict
from cpd.run.directory import Run, TeacherElement
from cpd.run.files import sha256, write_json
from cpd.run.interrupt import Interrupt
from cpd.run.progress import read_metrics
from cpd.teachers.run_teacher import env_pool, run_teacher
from tests.conftest import MINIATURE

#: Six iterations of four environments and fifty steps, validated after every second one.
SMALL: dict[str, Any] = {
    "teacher": {
        "max_env_steps": 1_200,
        "validate_every": 2,
        "ppo": {"hidden_sizes": [16], "num_envs": 4, "steps_per_env": 50, "minibatch_size": 50, "num_epochs": 2},
    },
    "logging": {"teacher_checkpoint_every": 3},
}


def with_teacher(**changes: Any) -> dict[str, Any]:
    return {**SMALL, "teacher": {**SMALL["teacher"], **changes}}


def finish(run: Run, interrupt: Interrupt | None = None, num_workers: int = 1) -> TeacherElement:
    teacher = run.teachers()[0]
    with closing(env_pool(run.config, num_workers)) as pool:
        run_teacher(run, teacher, pool, interrupt=interrupt or Interrupt(), log=lambda line: None)
    return teacher


def products(teacher: TeacherElement) -> dict[str, str]:
    """Hashes of all results, and the learning curve without wall times."""
    files = [teacher.policy, teacher.policy.with_suffix(".json"), teacher.evaluation]
    files += [teacher.path / "episodes.csv", *sorted(teacher.shards.iterdir())]
    return {file.name: sha256(file) for file in files} | {"curve": json.dumps(curve(teacher))}


def curve(teacher: TeacherElement) -> list[dict[str, Any]]:
    records = read_metrics(teacher.metrics)
    return [{k: v for k, v in record.items() if not k.endswith("seconds")} for record in records]


def new_run(root: Path, **over: Any) -> Run:
    write_json(root / "config.json", to_dict(load(Config, merge(read_toml(MINIATURE), over or SMALL), "test")))
    return Run(root)
