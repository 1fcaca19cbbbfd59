"""A distillation step over the size of student, batch and stream: time, memory, and share of the peak.

    OMP_NUM_THREADS=1 python -m tests.bench.bench_scale [--large] [--precision bfloat16] [--json PATH]

One size of a small student varies at a time, each value in a process of its own. This prints the time of a step,
the memory, and how many times as long as its arithmetic a step takes: the operations of its matrix products and
attention, counted, over the rate of a large product, which is measured between the steps. The exponent of a size
is the slope of log time over log size. `--large` measures a single student instead: 208 million parameters, 64
experts per layer, 256 windows of 16 steps. This takes minutes and 5 GB.

On a CPU: processor time of one core, and the greatest resident memory. On CUDA: wall time, and allocated memory.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from cpd.comm import TORCH_THREADS, SerialComm, choose_device
from cpd.config import Config
from cpd.config.load import load
from cpd.distill.trainer import StudentTrainer
from cpd.envs.metaworld.tasks import ALL_TASKS
from tests.distill.synthetic import stage_data

BASE = {"width": 128, "num_layers": 2, "context": 4, "experts": 8, "batch_size": 256, "tasks": 1}
SWEEPS = {
    "width": (64, 128, 256, 512),
    "num_layers": (1, 2, 4, 8),
    "context": (1, 4, 16, 32),
    "experts": (2, 8, 32, 64),
    "batch_size": (64, 256, 1024),
    "tasks": (1, 4, 16, 50),
}
LARGE = {"width": 512, "num_layers": 6, "context": 16, "experts": 64, "expert_width": 512, "tasks": 1}
STEPS = 7


def make_trainer(sizes: dict[str, int], precision: str, device: torch.device) -> StudentTrainer:
    """A trainer in the last of `tasks` stages; with one task, tokens choose among all experts, and all learn."""
    one = sizes["tasks"] == 1
    student = {name: sizes[name] for name in ("width", "num_layers", "context")}
    student["expert_width"] = sizes.get("expert_width", 2 * sizes["width"])
    free = {"num_experts": sizes["experts"], "task_identity": "none", "expansion": "none"}
    tables = {
        "name": "scale",
        "stream": {"tasks": list(ALL_TASKS[: sizes["tasks"]])},
        "student": {**student, **(free if one else {})},
        "protection": {"kind": "none" if one else "mask"},
        "rollouts": {"num_steps": 2_000},
        "distill": {"batch_size": sizes.get("batch_size", 256), "precision": precision},
    }
    trainer = StudentTrainer(load(Config, tables, "scale"), 1, SerialComm(), device)
    for task in range(sizes["tasks"]):
        data = stage_data(task, 20, 100)
        trainer.begin_stage(data)
        trainer.train_step()
        if task < sizes["tasks"] - 1:
            trainer.end_stage(data)
    return trainer


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """The time of a call: the processor's, or with a GPU, until it has finished."""
    if device.type == "cpu":
        start = time.process_time()
        call()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def operations(step: Callable[[], Any]) -> int:
    """The floating-point operations of a step's matrix products and attention, by their shapes."""
    counted = {
        torch.ops.cpd.grouped_product: lambda a, b, ends, out_shape: 2 * a[0] * a[1] * b[2],
        torch.ops.cpd.grouped_outer: lambda a, b, ends, first, count, out_shape: 2 * a[0] * a[1] * b[1],
    }
    with FlopCounterMode(display=False, custom_mapping=counted) as counter:
        step()
    return counter.get_total_flops()


def measure(sizes: dict[str, int], precision: str) -> dict[str, float]:
    """One row of the table."""
    torch.set_num_threads(TORCH_THREADS)
    device = choose_device(SerialComm())
    trainer = make_trainer(sizes, precision, device)
    size = 1024 if device.type == "cpu" else 8192
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a, out = (
        torch.randn(size, size, device=device, dtype=dtype),
        torch.empty(size, size, device=device, dtype=dtype),
    )
    trainer.train_step()
    steps, products = [], []
    for _ in range(STEPS):
        products.append(seconds(lambda: torch.mm(a, a, out=out), device))
        steps.append(seconds(trainer.train_step, device))
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_memory()
    step, flops = statistics.median(steps), operations(trainer.train_step)
    peak = 2 * size**3 / min(products)
    parameters = trainer.learner.flat.size
    return {
        **sizes,
        "parameters": parameters,
        "milliseconds": step * 1e3,
        "gigabytes": memory / 1e9,
        "bytes_per_parameter": memory / parameters,
        "gigaflop": flops / 1e9,
        "peak_gigaflops": peak / 1e9,
        "share_of_peak": flops / step / peak,
    }


def peak_memory() -> int:
    """The greatest resident memory of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured_alone(sizes: dict[str, int], precision: str) -> dict[str, float]:
    """`measure` in a process of its own, whose peak memory is that of these sizes."""
    command = [sys.executable, "-m", "tests.bench.bench_scale", "--precision", precision]
    done = subprocess.run([*command, "--point", json.dumps(sizes)], capture_output=True, text=True, check=True)
    row: dict[str, float] = json.loads(done.stdout)
    return row


def show(name: str, row: dict[str, float]) -> None:
    """Print a row."""
    print(
        f"{name:18s} {row['parameters'] / 1e6:8.2f} M {row['milliseconds']:10.2f} ms {row['gigabytes']:7.2f} GB "
        f"{row['bytes_per_parameter']:8.1f} B/param {row['share_of_peak']:6.2f} of {row['peak_gigaflops']:.0f} "
        f"GFLOP/s: {1 / row['share_of_peak']:6.2f} x its arithmetic",
        flush=True,
    )


def exponent(rows: list[dict[str, float]], name: str) -> float:
    """The slope of log time over log size, by least squares."""
    x, y = ([math.log(row[key]) for row in rows] for key in (name, "milliseconds"))
    return statistics.linear_regression(x, y).slope


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--point", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.point:
        print(json.dumps(measure(json.loads(arguments.point), arguments.precision)))
        return
    record: dict[str, Any] = {"precision": arguments.precision}
    if arguments.large:
        record["large"] = row = measured_alone(LARGE, arguments.precision)
        show("large", row)
    for name, sizes in ({} if arguments.large else SWEEPS).items():
        rows = []
        for size in sizes:
            rows.append(measured_alone({**BASE, name: size}, arguments.precision))
            show(f"{name} {size}", rows[-1])
        record[name] = {"rows": rows, "exponent": exponent(rows, name)}
        print(f"{name}: time grows with the power {record[name]['exponent']:.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
