"""A long stream of synthetic tasks, without a simulator: time of a step, memory and disk by stage.

    OMP_NUM_THREADS=1 python -m tests.bench.bench_stream [--tasks 500] [--against 50] [--root DIR]

Each task has a teacher with rollouts in real shards, and `run_student` distils them with the default method. The
command resumes where it was stopped. It first distils the shorter stream, then the longer one, and then compares a
step of their last stages in turn. Tables of stages are in `stages.csv` in the run directories.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cpd.comm import TORCH_THREADS, SerialComm
from cpd.config import Config
from cpd.config.load import load, merge, to_dict
from cpd.distill.run_student import run_student
from cpd.distill.stage_data import read_stage
from cpd.distill.trainer import StudentTrainer
from cpd.envs.metaworld.scaling import observation_scaling
from cpd.envs.suite import Environment, Sizes, Suite
from cpd.run.checkpoint import published
from cpd.run.directory import Run
from cpd.run.files import write_json
from cpd.run.interrupt import Interrupt
from tests.bench.bench_moe import best_milliseconds
from tests.distill.synthetic import write_teachers

MOST_TASKS = 2_000


class Synthetic(Suite):
    """Tasks of Meta-World's sizes that exist as rollouts only."""

    tasks = tuple(f"task-{number:04d}" for number in range(MOST_TASKS))
    horizon = 100

    def sizes(self, task: str) -> Sizes:
        """Those of Meta-World."""
        return Sizes(39, 4)

    def make(self, task: str) -> Environment:
        """There is none."""
        raise NotImplementedError("synthetic tasks have no environment")

    def scaling(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Those of Meta-World."""
        return observation_scaling()


def make_run(root: Path, num_tasks: int, settings: dict[str, Any]) -> Run:
    """A run directory with finished teachers of `num_tasks` tasks."""
    tables = {
        "name": root.name,
        "stream": {"suite": "tests.bench.bench_stream:Synthetic", "tasks": list(Synthetic.tasks[:num_tasks])},
        "rollouts": {"num_steps": 1_000},
        # Plans are measured in environments.
        "student": {"act": "most_likely"},
        "distill": {"steps_per_stage": 40, "lr_warmup_steps": 5},
        "memory": {"share": 0.05},
        "evaluation": {"curve_points": 0},
        "logging": {"checkpoint_every": 100_000},
    }
    config = load(Config, merge(tables, settings), "benchmark")
    if not (root / "config.json").exists():
        write_json(root / "config.json", to_dict(config))
    run = Run(root)
    write_teachers(run, run.students()[0], num_episodes=20, length=50)
    return run


def resident_mb() -> dict[str, float]:
    """Anonymous and file-backed resident memory of this process, and its peak, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = {name: rest for name, _, rest in (line.partition(":") for line in lines)}
    return {name: int(values[name].split()[0]) / 1e3 for name in ("RssAnon", "RssFile", "VmHWM")}


def folder_mb(folder: Path) -> float:
    """What the files of a folder take, in MB."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def distil(run: Run) -> None:
    """Distil the stages that are left; write a row for each to stages.csv."""
    student, table = run.students()[0], run.root / "stages.csv"
    steps: list[float] = []
    begun = time.process_time()
    step = StudentTrainer.train_step
    end = StudentTrainer.end_stage

    def timed_step(trainer: StudentTrainer, report: bool = False) -> Any:
        start = time.process_time()
        result = step(trainer, report)
        steps.append((time.process_time() - start) * 1e3)
        return result

    def timed_end(trainer: StudentTrainer, data: Any) -> None:
        nonlocal begun
        row = {
            "stage": trainer.learner.progress.stage,
            "step_ms": statistics.median(steps),
            "steps_s": sum(steps) / 1e3,
        }
        start = time.process_time()
        end(trainer, data)
        row |= {"end_s": time.process_time() - start, "stage_s": time.process_time() - begun, **resident_mb()}
        steps.clear()
        begun = time.process_time()
        with table.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if not file.tell():
                writer.writeheader()
            writer.writerow({name: f"{value:.6g}" for name, value in row.items()})

    StudentTrainer.train_step, StudentTrainer.end_stage = timed_step, timed_end  # type: ignore[method-assign]
    try:
        run_student(run, student, SerialComm(), interrupt=Interrupt(), log=lambda line: None)
    finally:
        StudentTrainer.train_step, StudentTrainer.end_stage = step, end  # type: ignore[method-assign]


def last_stage(run: Run) -> StudentTrainer:
    """A trainer in the last stage of a finished run."""
    student, comm = run.students()[0], SerialComm()
    trainer = StudentTrainer(student.config, student.seed, comm, torch.device("cpu"))
    before = published(student.checkpoints)[-2]
    trainer.restore(before.load()["trainer"])
    task = run.config.stream.tasks[trainer.learner.progress.stage]
    trainer.begin_stage(read_stage(run, run.teacher_of(task, student.seed), comm))
    return trainer


def main() -> None:
    """Distil both streams and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=500)
    parser.add_argument("--against", type=int, default=50)
    parser.add_argument("--root", type=Path, default=Path("build/bench/stream"))
    parser.add_argument("--remove", action="store_true", help="remove the run directories afterwards")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--expert-width", type=int, default=128)
    arguments = parser.parse_args()
    torch.set_num_threads(TORCH_THREADS)
    runs = {}
    for num_tasks in (arguments.against, arguments.tasks):
        sizes = {"student": {"width": arguments.width, "expert_width": arguments.expert_width}}
        run = runs[num_tasks] = make_run(arguments.root / f"{num_tasks}-tasks", num_tasks, sizes)
        distil(run)
        with (run.root / "stages.csv").open() as file:
            rows = list(csv.DictReader(file))
        for row in rows[:: max(len(rows) // 5, 1)] + rows[-1:]:
            print(f"{num_tasks} tasks,", ", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        parts = {part.name: round(folder_mb(part)) for part in run.students()[0].path.iterdir() if part.is_dir()}
        metrics = run.students()[0].metrics.stat().st_size / 1e6
        print(f"{num_tasks} tasks: {folder_mb(run.root):.0f} MB on disk, of which {parts}, metrics {metrics:.1f}")
    trainers = {f"{num_tasks} tasks": last_stage(run) for num_tasks, run in runs.items()}
    times = best_milliseconds({name: trainer.train_step for name, trainer in trainers.items()})
    base = times[f"{arguments.against} tasks"]
    for name, milliseconds in times.items():
        print(f"last stage of {name}: {milliseconds:.2f} ms a step, {milliseconds / base:.2f} times")
    if arguments.remove:
        shutil.rmtree(arguments.root)


if __name__ == "__main__":
    main()
