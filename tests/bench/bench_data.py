"""From shards to tensors, beside raw reading of the same files; and the memory of a stage with many shards.

    OMP_NUM_THREADS=1 python -m tests.bench.bench_data [--gigabytes 10] [--steps 50] [--root DIR]

The shards have the right layout; all but the first are copies. Files are in the page cache for the comparison,
which runs in turn and counts processor time. The memory is that of a process of its own that distils a stage of
`--gigabytes`: anonymous pages, and pages of files that are mapped at the time (the page cache keeps them anyway,
and drops them when memory is needed). The shards are removed at the end.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cpd.comm import TORCH_THREADS, SerialComm
from cpd.config import Config
from cpd.config.load import load
from cpd.distill.memory.segments import Segments
from cpd.distill.stage_data import StageData
from cpd.distill.step_table import StepTable
from cpd.distill.trainer import StudentTrainer
from cpd.run.files import write_json
from cpd.run.provenance import labels
from cpd.run.shards.reader import read_rollouts
from cpd.run.shards.schema import Episode, ShardIndex
from cpd.run.shards.writer import write_shard
from tests.bench.bench_stream import resident_mb
from tests.distill.synthetic import shard_attributes, synthetic_episode

TASK = "window-close-v3"
EPISODES, LENGTH = 4_000, 100


def make_config(context: int) -> Config:
    """One task whose memory holds few of its steps."""
    tables = {
        "name": "data",
        "stream": {"tasks": [TASK], "horizon": LENGTH},
        "student": {"context": context},
        "memory": {"share": 0.01},
    }
    return load(Config, tables, "benchmark")


def write(folder: Path, num_shards: int, config: Config, episodes: int = EPISODES) -> None:
    """Shards of the synthetic teacher, of about 90 MB each."""
    attributes = shard_attributes(config, TASK)
    folder.mkdir(parents=True)
    few: list[Episode] = [synthetic_episode(0, number, LENGTH) for number in range(20)]
    first = write_shard(folder / "shard-00000.h5", few * (episodes // 20), attributes)
    entries = [replace(first, file=f"shard-{number:05d}.h5") for number in range(num_shards)]
    for entry in entries[1:]:
        shutil.copyfile(folder / first.file, folder / entry.file)
    write_json(folder / "index.json", ShardIndex(attributes, tuple(entries)).as_dict())


def read(folder: Path, config: Config) -> StageData:
    """The data of a stage."""
    rollouts = read_rollouts(folder, task=TASK, labels=labels(config))
    return StageData.from_rollouts(rollouts, [TASK], "all")


def compare(folder: Path, config: Config) -> dict[str, float]:
    """Milliseconds to read the files into a buffer, and to make them the tensors of a stage."""
    files = sorted(folder.glob("*.h5"))
    buffer = bytearray(files[0].stat().st_size)

    def raw() -> None:
        for path in files:
            with path.open("rb", buffering=0) as file:
                file.readinto(buffer)

    def tensors() -> None:
        data = read(folder, config)
        StepTable(Segments.empty(), [data], config.distill.std_floor, torch.float32, torch.device("cpu"))

    best = {"raw": float("inf"), "tensors": float("inf")}
    for _ in range(5):
        for name, call in (("raw", raw), ("tensors", tensors)):
            start = time.process_time()
            call()
            best[name] = min(best[name], (time.process_time() - start) * 1e3)
    return best


def stage(folder: Path, steps: int, context: int) -> None:
    """Distil a stage and print the memory at its end, the most at a step, and the time of a step, as JSON."""
    torch.set_num_threads(TORCH_THREADS)
    config = make_config(context)
    start = resident_mb()
    trainer = StudentTrainer(config, 1, SerialComm(), torch.device("cpu"))
    data = read(folder, config)
    trainer.begin_stage(data)
    most: dict[str, float] = {}
    begun = time.process_time()
    for _ in range(steps):
        trainer.train_step()
        most = {name: max(value, most.get(name, 0.0)) for name, value in resident_mb().items()}
    step_ms = (time.process_time() - begun) / steps * 1e3
    trainer.end_stage(data)
    result: dict[str, Any] = {"start": start, "steps": most, "end": resident_mb(), "step_ms": step_ms}
    print(json.dumps({**result, "num_steps": data.num_steps}))


def main() -> None:
    """Compare, then measure memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--context", type=int, default=1)
    parser.add_argument("--root", type=Path, default=Path("build/bench/data"))
    parser.add_argument("--stage", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        stage(arguments.root / "stage", arguments.steps, arguments.context)
        return
    config = make_config(arguments.context)
    shutil.rmtree(arguments.root, ignore_errors=True)
    for name, num_shards, episodes in (("copied", 1, 600), ("mapped", 8, EPISODES)):
        folder = arguments.root / name
        write(folder, num_shards, config, episodes)
        megabytes = sum(path.stat().st_size for path in folder.glob("*.h5")) / 1e6
        time.sleep(2.5)  # hashes of files that have just been written are not remembered
        begun = time.process_time()
        read(folder, config)
        print(
            f"{name}, {megabytes:.0f} MB: first reading with hashes {(time.process_time() - begun) * 1e3:.0f} ms"
        )
        times = compare(folder, config)
        ratio = times["tensors"] / times["raw"]
        print(f"  raw {times['raw']:.1f} ms, tensors {times['tensors']:.1f} ms: {ratio:.2f} times raw reading")
    size = (arguments.root / "mapped" / "shard-00000.h5").stat().st_size
    write(arguments.root / "stage", max(round(arguments.gigabytes * 1e9 / size), 1), config)
    command = [sys.executable, "-m", "tests.bench.bench_data", "--stage", "--root", str(arguments.root)]
    command += ["--steps", str(arguments.steps), "--context", str(arguments.context)]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"a stage of {arguments.gigabytes:g} GB, {result['num_steps']:,} steps; resident MB:")
    for name in ("start", "steps", "end"):
        print(f"  {name}: {result[name]}")
    print(f"  {result['step_ms']:.1f} ms of processor time a step")
    shutil.rmtree(arguments.root)


if __name__ == "__main__":
    main()
